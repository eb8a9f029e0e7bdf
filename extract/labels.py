"""Label tables: a csv with one row per image, under the column names of the published data sets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agiqa.errors import DataError
from agiqa.store.label_tables import ASPECT_COLUMNS, SPLITS, read_mos, read_table

_TEXT_COLUMNS = ("name", "prompt", "split", "generator", "description", "rating")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as it is written; `problems` says what keeps it from being an item."""

    number: int
    """The line of the file that the row ends on, counted from 1."""
    name: str
    prompt: str
    labels: Mapping[str, float]
    split: str | None
    generator: str | None
    description: str | None
    rating: str | None
    problems: tuple[str, ...]


def read_rows(path: Path, mos_range: tuple[float, float]) -> list[Row]:
    """Every row of the csv file `path`; MOS outside `mos_range` (lowest, highest) become problems of their row.

    Raises DataError when the file is no UTF-8 csv, lacks `name`, `prompt` or any MOS column, or has no rows.
    """
    header, rows = read_table(path)
    _check_header(path, header)
    return [_row(row.number, header, row.cells, mos_range) for row in rows]


def _check_header(path: Path, header: list[str]) -> None:
    found = f"found: {', '.join(header)}"
    for column in ("name", "prompt"):
        if column not in header:
            message = f"{path}: no column {column!r} ({found})."
            raise DataError(message)
    aspects = [ASPECT_COLUMNS[column] for column in header if column in ASPECT_COLUMNS]
    if not aspects:
        message = f"{path}: no MOS column ({found}); expected at least one of {', '.join(ASPECT_COLUMNS)}."
        raise DataError(message)
    known = [column for column in header if column in _TEXT_COLUMNS]
    if len(set(aspects)) < len(aspects) or len(set(known)) < len(known):
        message = f"{path}: two columns mean the same ({found}); keep one of them."
        raise DataError(message)


def _row(number: int, header: list[str], cells: list[str], mos_range: tuple[float, float]) -> Row:
    columns = dict(zip(header, cells, strict=False))
    text = {column: columns.get(column, "") for column in _TEXT_COLUMNS}
    optional = {column: text[column].strip() or None for column in ("split", "generator", "rating")}
    labels, problems = _labels(columns, mos_range)
    if len(cells) != len(header):
        problems.insert(0, f"has {len(cells)} fields where the header has {len(header)}")
    problems.extend(_name_problems(text["name"]))
    if not text["prompt"].strip():
        problems.append("the prompt is empty")
    if optional["split"] not in (None, *SPLITS):
        problems.append(f"split {optional['split']!r} is none of {', '.join(SPLITS)}")
    return Row(
        number=number,
        name=text["name"],
        prompt=text["prompt"],
        labels=labels,
        description=text["description"] if text["description"].strip() else None,
        problems=tuple(problems),
        **optional,
    )


def _labels(columns: Mapping[str, str], mos_range: tuple[float, float]) -> tuple[dict[str, float], list[str]]:
    labels: dict[str, float] = {}
    problems: list[str] = []
    marks = [(column, cell.strip()) for column, cell in columns.items() if column in ASPECT_COLUMNS]
    for column, cell in marks:
        try:
            if cell:
                labels[ASPECT_COLUMNS[column]] = read_mos(column, cell, mos_range)
        except DataError as error:
            problems.append(str(error))
    if not any(cell for _, cell in marks):
        problems.append("no MOS at all")
    return labels, problems


def _name_problems(name: str) -> Iterator[str]:
    if not name.strip():
        yield "the name is empty"
        return
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        yield f"the name {name!r} is not a plain relative path with forward slashes"
