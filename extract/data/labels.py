"""Label tables: one row per image, with the columns that `agiqa.store.format.columns` recognises."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.image_names import ImageFinder
from agiqa.extract.data.templates import templates
from agiqa.progress import say
from agiqa.store.format.columns import ColumnNames, LabelTable, open_labels, wrong_width
from agiqa.store.format.items import TEXT_AUTHOR, TEXT_AUTHORS
from agiqa.store.format.labels import (
    ASPECT_COLUMNS,
    DEVIATION_COLUMNS,
    SPLITS,
    MosRange,
    MosReader,
    read_deviation,
    split_of,
)
from agiqa.store.format.ratings import RatingReader, count_columns
from agiqa.store.format.tables import TableRow

_TEXT_COLUMNS = ("name", "prompt", "split", "generator", "description", "rating", TEXT_AUTHOR)
_HIDDEN = "no MOS at all (only rows of the split test may have none: if it is hidden, say so in a column `split`)"
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
    deviations: Mapping[str, float]
    """Standard deviation of the single ratings by aspect, on the scale of the MOS."""
    counts: Mapping[str, float]
    """Ratings of each level by aspect and level, `quality_1` to `quality_5`."""
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
    """Whether it has a column of MOS that was read, with at least one MOS."""
    notes: tuple[str, ...] = ()
    """Remarks for the user."""


def read_rows(
    path: Path,
    mos_range: MosRange | None,
    *,
    aspect: str | None = None,
    columns: ColumnNames | None = None,
    prompts: bool = True,
    prompt: str | None = None,
    finder: ImageFinder | None = None,
) -> Rows:
    """Every row of the table `path`; one that repeats an earlier row is left out, with a note.

    MOS outside `mos_range` (lowest, highest) are problems of their row, as is a row without any MOS in a table that
    has some; rows of the split test may have none. Without `mos_range` no MOS is read. The column `description`
    belongs to `aspect`, and is ignored without one. `columns` name the columns, see `open_labels`; `finder` gives the
    image that a name means. `prompt` is that of every row of a table without such a column; without `prompts` no row
    needs one. Raises DataError when the file is no table, lacks `name` or `prompt`, has two columns of one meaning,
    decimal commas, MOS on another scale, or no rows; and as `open_labels`.
    """
    table = open_labels(path, columns)
    if prompt is not None and "prompt" in table.header:
        message = f"{path} has a column with prompts, {table.written['prompt']!r}; leave --prompt out."
        raise ConfigError(message)
    _check_header(table, aspect, prompts=prompts and prompt is None)
    reader = _RowReader(
        table=table, mos_range=mos_range, aspect=aspect, prompts=prompts, finder=finder, prompt=prompt or ""
    )
    found = list(table.rows)
    if finder is not None and "name" in table.header:
        at = table.header.index("name")
        finder.expect(_slashed(row.cells[at]) for row in found if at < len(row.cells))
    rows = [reader.read(row) for row in found]
    reader.mos.check()
    reader.announce()
    rows, notes = _without_repeats(path, [reader.with_fitting_counts(row) for row in rows])
    notes += reader.ratings.notes()
    labelled = any(row.labels for row in rows) or any(reader.has_mark.values())
    if labelled:
        rows = [_complete(row, hidden=not reader.has_mark[row.number]) for row in rows]
        hidden = sum(not reader.has_mark[row.number] and row.split == "test" for row in rows)
        if hidden:
            notes.append(f"note: {hidden} test rows of {path} have no MOS")
    header = tuple(table.written[column] for column in table.header)
    return Rows(rows=tuple(rows), header=header, labelled=labelled, notes=tuple(notes))


def _complete(row: Row, *, hidden: bool) -> Row:
    """The row, with a problem if it should have a MOS and has none."""
    if not hidden or row.split == "test":
        return row
    return replace(row, problems=(*row.problems, _HIDDEN))


def _without_repeats(path: Path, rows: list[Row]) -> tuple[list[Row], list[str]]:
    """The rows but for those that repeat an earlier one in everything that is read, and a note about these."""
    first: dict[str, Row] = {}
    kept: list[Row] = []
    repeats: list[Row] = []
    for row in rows:
        before = first.setdefault(row.name, row)
        same = before is not row and row.name and replace(row, number=before.number) == before
        (repeats if same else kept).append(row)
    if not repeats:
        return kept, []
    one = repeats[0]
    line = f"line {one.number} ({one.name}) repeats line {first[one.name].number}"
    return kept, [f"note: {path}: rows that repeat an earlier row are left out: {len(repeats)}; {line}"]


def _check_header(table: LabelTable, aspect: str | None, *, prompts: bool) -> None:
    table.need("name")
    if prompts:
        table.need("prompt", why="which the questions name", instead="--prompt TEXT if all images have the same")
    described = _description_columns(aspect)
    found = Counter(described[column] for column in table.header if column in described)
    if any(count > 1 for count in found.values()):
        message = f"{table.path}: two columns mean the same ({table.shown()}); keep one of them."
        raise DataError(message)


def _description_columns(aspect: str | None) -> dict[str, str]:
    """The aspect of each column of descriptions, by the column's name."""
    named = {f"{_DESCRIPTION}_{name}": name for name in templates()}
    return named if aspect is None else {_DESCRIPTION: aspect, **named}


def rows_of_images(folder: Path, names: Sequence[str], prompt: str | None) -> Rows:
    """A row for each of the images `names` in `folder`, without labels. Raises ConfigError without a `prompt`."""
    if prompt is None:
        message = (
            f"{folder}: {len(names)} images and no table, so no prompts, which the questions name. Give --prompt TEXT "
            "if all have the same, or put a data.csv with the columns name and prompt into the folder."
        )
        raise ConfigError(message)
    about: dict[str, Any] = {
        **dict.fromkeys(("split", "generator", "rating", TEXT_AUTHOR)),
        **{column: {} for column in ("labels", "deviations", "counts", "descriptions")},
        "problems": (),
    }
    rows = tuple(Row(number=number, name=name, prompt=prompt, **about) for number, name in enumerate(names, start=1))
    return Rows(rows=rows, header=("name",), labelled=False)


def _slashed(name: str) -> str:
    return name.replace("\\", "/")


class _RowReader:
    """Reads the rows of one table."""

    def __init__(
        self,
        *,
        table: LabelTable,
        mos_range: MosRange | None,
        aspect: str | None,
        prompts: bool,
        finder: ImageFinder | None,
        prompt: str,
    ) -> None:
        """The arguments are those of `read_rows`; `prompt` is that of rows that have none."""
        self._table, self._range, self._prompts, self._finder = table, mos_range, prompts, finder
        self._prompt = prompt
        self._marks = [] if mos_range is None else [one for one in table.header if one in ASPECT_COLUMNS]
        self._spreads = [] if mos_range is None else [one for one in table.header if one in DEVIATION_COLUMNS]
        self._described = _description_columns(aspect)
        self.ratings = RatingReader(table)
        self.mos = MosReader(table.path)
        self.has_mark: dict[int, bool] = {}
        """By line, whether the row has a value in a column of MOS."""
        self._backslashes = 0
        self._splits = dict[str, str]()

    def announce(self) -> None:
        """Say once what was read otherwise than it is written."""
        path = self._table.path
        if self._backslashes:
            say(f"{path}: {self._backslashes} names are written with backslashes, read as forward slashes")
        if self._splits:
            say(f"{path}: reading {', '.join(f'split {cell!r} as {split}' for cell, split in self._splits.items())}")

    def read(self, row: TableRow) -> Row:
        """One row."""
        columns = dict(zip(self._table.header, row.cells, strict=False))
        text = {column: columns.get(column, "") for column in _TEXT_COLUMNS}
        optional = {column: text[column].strip() or None for column in ("split", "generator", "rating", TEXT_AUTHOR)}
        labels, problems = self._labels(columns, row.number)
        deviations = self._deviations(columns, problems)
        counts = self._add_ratings(columns, labels, deviations, problems)
        self.has_mark[row.number] |= bool(labels)
        if len(row.cells) != len(self._table.header):
            problems.insert(0, wrong_width(row, self._table.header))
        name = self._name(text["name"], problems)
        prompt = text["prompt"] if text["prompt"].strip() else self._prompt
        if self._prompts and not prompt.strip():
            problems.append("the prompt is empty")
        optional["split"] = self._split(optional["split"], problems)
        if optional[TEXT_AUTHOR] not in (None, *TEXT_AUTHORS):
            problems.append(f"{TEXT_AUTHOR} {optional[TEXT_AUTHOR]!r} is none of {', '.join(TEXT_AUTHORS)}")
        descriptions = {of: columns[one] for one, of in self._described.items() if columns.get(one, "").strip()}
        about: dict[str, Any] = {"labels": labels, "deviations": deviations, "counts": counts}
        about |= {"descriptions": descriptions, **optional}
        return Row(number=row.number, name=name, prompt=prompt, problems=tuple(problems), **about)

    def _split(self, cell: str | None, problems: list[str]) -> str | None:
        if cell is None or cell in SPLITS:
            return cell
        split = split_of(cell)
        if split in SPLITS:
            self._splits[cell] = split
        else:
            problems.append(f"split {cell!r} is none of {', '.join(SPLITS)}")
        return split

    def _name(self, written: str, problems: list[str]) -> str:
        """The name of the image; appends what is wrong with it to `problems`."""
        name = _slashed(written)
        self._backslashes += name != written
        if self._finder is not None and name.strip() and ".." not in PurePosixPath(name).parts:
            try:
                name = self._finder.name_of(name)
            except DataError as error:
                problems.append(str(error))
                return name
        problems.extend(_name_problems(name))
        return name

    def _labels(self, columns: Mapping[str, str], line: int) -> tuple[dict[str, float], list[str]]:
        """The MOS by aspect, and what is wrong with them."""
        labels: dict[str, float] = {}
        problems: list[str] = []
        marks = {column: cell for column in self._marks if (cell := columns.get(column, "").strip())}
        self.has_mark[line] = bool(marks)
        for column, cell in marks.items():
            assert self._range is not None
            try:
                shown = self._table.written[column]
                labels[ASPECT_COLUMNS[column]] = self.mos.read(shown, cell, self._range, line)
            except DataError as error:
                problems.append(str(error))
        return labels, problems

    def _deviations(self, columns: Mapping[str, str], problems: list[str]) -> dict[str, float]:
        """The standard deviations of the ratings by aspect; appends what is wrong with them to `problems`."""
        found: dict[str, float] = {}
        for column in self._spreads:
            if cell := columns.get(column, "").strip():
                try:
                    found[DEVIATION_COLUMNS[column]] = read_deviation(self._table.written[column], cell)
                except DataError as error:
                    problems.append(str(error))
        return found

    def _add_ratings(
        self, columns: Mapping[str, str], labels: dict[str, float], deviations: dict[str, float], problems: list[str]
    ) -> dict[str, float]:
        """The counts of single ratings; adds MOS and deviations where there are none, and what is wrong."""
        counts: dict[str, float] = {}
        for aspect in self.ratings.aspects if self._range is not None else ():
            assert self._range is not None
            try:
                found = self.ratings.read(columns, aspect, self._range)
            except DataError as error:
                problems.append(str(error))
                continue
            if found is None:
                continue
            problems += self.ratings.contradictions(columns, found, aspect)
            labels.setdefault(aspect, found.mos)
            if found.std is not None:
                deviations.setdefault(aspect, found.std)
            counts |= count_columns(aspect, found.counts)
        return counts

    def with_fitting_counts(self, row: Row) -> Row:
        """The row, without counts of aspects of which some ratings of the table are between the levels."""
        kept = {name: value for name, value in row.counts.items() if self.ratings.fitting(name.rpartition("_")[0])}
        return replace(row, counts=kept)


def _name_problems(name: str) -> Iterator[str]:
    if not name.strip():
        yield "the name is empty"
        return
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not name.isprintable():
        yield f"the name {name!r} is not a plain relative path below the folder of the images"
