"""Label tables: a csv with one row per image, under the column names of the published data sets."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from agiqa.errors import DataError
from agiqa.extract.data.templates import templates
from agiqa.store.format.items import TEXT_AUTHOR, TEXT_AUTHORS
from agiqa.store.format.labels import ASPECT_COLUMNS, SPLITS, read_mos, read_table

_TEXT_COLUMNS = ("name", "prompt", "split", "generator", "description", "rating", TEXT_AUTHOR)
_DESCRIPTION = "description"
"""Column of descriptions of the aspect asked for; `description_ASPECT` has those of any aspect."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row as written; one with `problems` cannot become an item."""

    number: int
    """The line of the file that the row ends on, counted from 1."""
    name: str
    prompt: str
    labels: Mapping[str, float]
    split: str | None
    generator: str | None
    descriptions: Mapping[str, str]
    """By aspect; an absent aspect has none."""
    rating: str | None
    """The rating word."""
    text_author: str | None
    """Who wrote the descriptions and the rating word."""
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """A label table."""

    rows: tuple[Row, ...]
    header: tuple[str, ...]
    labelled: bool
    """Whether it has a column of MOS that was read."""


def read_rows(path: Path, mos_range: tuple[float, float] | None, *, aspect: str | None = None) -> Rows:
    """Every row of the csv file `path`.

    MOS outside `mos_range` (lowest, highest) are problems of their row, as is a row without any MOS in a table that
    has columns for them; without `mos_range` no MOS is read. The column `description` belongs to `aspect`, and is
    ignored without one. Raises DataError when the file is not a UTF-8 csv, lacks `name` or `prompt`, has two columns
    of one meaning, or no rows.
    """
    header, rows = read_table(path)
    _check_header(path, header, aspect)
    labelled = mos_range is not None and not ASPECT_COLUMNS.keys().isdisjoint(header)
    range_read = mos_range if labelled else None
    read = tuple(_row(row.number, header, row.cells, range_read, aspect) for row in rows)
    return Rows(rows=read, header=tuple(header), labelled=labelled)


def _check_header(path: Path, header: list[str], aspect: str | None) -> None:
    found = f"found: {', '.join(header)}"
    for column in ("name", "prompt"):
        if column not in header:
            message = f"{path}: no column {column!r} ({found})."
            raise DataError(message)
    described = _description_columns(aspect)
    meanings = [ASPECT_COLUMNS[column] for column in header if column in ASPECT_COLUMNS]
    meanings += [f"{_DESCRIPTION}_{described[column]}" for column in header if column in described]
    meanings += [column for column in header if column in _TEXT_COLUMNS and column not in described]
    if len(set(meanings)) < len(meanings):
        message = f"{path}: two columns mean the same ({found}); keep one of them."
        raise DataError(message)


def _description_columns(aspect: str | None) -> dict[str, str]:
    """The aspect of each column of descriptions, by the column's name."""
    named = {f"{_DESCRIPTION}_{name}": name for name in templates()}
    return named if aspect is None else {_DESCRIPTION: aspect, **named}


def _row(
    number: int, header: list[str], cells: list[str], mos_range: tuple[float, float] | None, aspect: str | None
) -> Row:
    columns = dict(zip(header, cells, strict=False))
    text = {column: columns.get(column, "") for column in _TEXT_COLUMNS}
    optional = {column: text[column].strip() or None for column in ("split", "generator", "rating", TEXT_AUTHOR)}
    labels, problems = ({}, []) if mos_range is None else _labels(columns, mos_range)
    if len(cells) != len(header):
        problems.insert(0, f"has {len(cells)} fields where the header has {len(header)}")
    problems.extend(_name_problems(text["name"]))
    if not text["prompt"].strip():
        problems.append("the prompt is empty")
    if optional["split"] not in (None, *SPLITS):
        problems.append(f"split {optional['split']!r} is none of {', '.join(SPLITS)}")
    if optional[TEXT_AUTHOR] not in (None, *TEXT_AUTHORS):
        problems.append(f"{TEXT_AUTHOR} {optional[TEXT_AUTHOR]!r} is none of {', '.join(TEXT_AUTHORS)}")
    return Row(
        number=number,
        name=text["name"],
        prompt=text["prompt"],
        labels=labels,
        descriptions={
            of: columns[column]
            for column, of in _description_columns(aspect).items()
            if columns.get(column, "").strip()
        },
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
