"""Which column of a label table means what: recognised by its name, or named by the user with `--columns`."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.progress import say
from agiqa.store.format.labels import ASPECT_COLUMNS, ASPECT_NAMES, DEVIATION_COLUMNS
from agiqa.store.format.ratings import COUNT_COLUMNS, LEVELS, RATER, RATINGS, rater_columns, widened
from agiqa.store.format.tables import Table, TableRow, open_table

ColumnNames = Mapping[str, str]
"""Columns by their meaning, as `--columns` gives them."""

_MOS = {"quality": "mos_quality", "correspondence": "mos_correspondence", "authenticity": "mos_authenticity"}
_STD = {aspect: column.replace("mos_", "std_") for aspect, column in _MOS.items()}
_OWN: dict[str, tuple[str, ...]] = {
    "name": ("name",),
    "prompt": ("prompt",),
    **{_MOS[aspect]: tuple(name for name, of in ASPECT_COLUMNS.items() if of == aspect) for aspect in _MOS},
    **{_STD[aspect]: tuple(name for name, of in DEVIATION_COLUMNS.items() if of == aspect) for aspect in _MOS},
    **{name: (name,) for name in ("split", "generator", "description", "rating", "text_author", "answer")},
    **{f"description_{aspect}": (f"description_{aspect}",) for aspect in _MOS},
    RATER: (RATER,),
    **{column: (column,) for column in COUNT_COLUMNS},
}
"""The documented names of columns by meaning. Written exactly so, they come before the others."""
_ALIASES: dict[str, tuple[str, ...]] = {
    "name": (
        *("image", "img", "image_name", "img_name", "imagename", "filename", "file_name", "image_path", "img_path"),
        *("path", "file", "image_file"),
    ),
    "prompt": ("text", "caption", "text_prompt", "prompts"),
    "mos_quality": (
        *("quality_mos", "quality", "gt_score", "quality_score", "mos_score", "mean_opinion_score", "score", "mean"),
    ),
    "mos_correspondence": (
        *("align_mos", "alignment_mos", "correspondence_mos", "align", "alignment", "correspondence"),
        *("align_score", "alignment_score"),
    ),
    "mos_authenticity": ("authenticity_mos", "authenticity", "authenticity_score"),
    RATER: (
        *("rater_id", "subject_id", "observer", "observer_id", "annotator", "annotator_id", "participant"),
        *("participant_id", "worker_id", "user_id"),
    ),
    "std_quality": ("std", "sd", "mos_std", "std_mos", "mos_sd", "quality_std", "standard_deviation"),
    "std_correspondence": ("align_std", "alignment_std", "correspondence_std"),
    "std_authenticity": ("authenticity_std",),
    "generator": ("gen_model", "generator_name", "generative_model", "model"),
}
"""Other names, lower case and with `_`."""
_FIVE_COUNTS = {f"c{level}": f"count_quality_{level}" for level in range(1, LEVELS + 1)}
"""Names of counts, as in KonIQ-10k, which mean that only where all five are there."""
_IMAGE = re.compile(r"\S.*\.(png|jpe?g|webp|bmp|tiff?|gif)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class LabelTable:
    """A table whose columns are called by what they mean."""

    path: Path
    header: list[str]
    """Columns that mean something under the names that agiqa reads; the others as the file calls them."""
    rows: Iterator[TableRow]
    """Can be read once."""
    written: Mapping[str, str]
    """The file's own name of each column of `header`."""

    def shown(self) -> str:
        """The columns of the file, for messages."""
        return f"found: {', '.join(self.written[column] for column in self.header)}"

    def need(self, meaning: str, *, why: str = "", instead: str = "") -> None:
        """Raise DataError unless there is a column `meaning`; `why` says what for, `instead` what would do too."""
        if meaning not in self.header:
            needed, other = f", {why}" if why else "", f", or {instead}" if instead else ""
            message = (
                f"{self.path}: no column {meaning!r} ({self.shown()}){needed}; if another column holds it, add "
                f"--columns {meaning}=COLUMN{other}."
            )
            raise DataError(message)


def open_labels(path: Path, columns: ColumnNames | None = None) -> LabelTable:
    """The table in the file `path`; `columns` beat what is recognised. Announces each column that is renamed.

    A file without header is recognised by an image name in its first line; `columns` number its columns from 0.
    Raises UnknownName for a meaning or column in `columns` that is none, ConfigError where they contradict each other,
    DataError where two columns may mean the same or columns without names may mean several things, and as
    `agiqa.store.format.tables.open_table`.
    """
    table, given = open_table(path), _plain_meanings(columns or {})
    if _is_headless(table.header):
        return _without_header(table, given)
    patterns = {meaning: given.pop(meaning) for meaning in [*given] if meaning in RATINGS}
    meanings = _given(table, given)
    meanings |= _rating_columns(table, patterns, meanings)
    taken, passed_over = set(meanings.values()), dict[str, str]()
    for meaning in _OWN:
        if meaning not in taken:
            found, others = _recognised(path, meaning, table.header, meanings)
            meanings |= found
            passed_over |= dict.fromkeys(others, meaning)
    header = [_called(position, column, meanings) for position, column in enumerate(table.header)]
    _refuse_repeats(path, header, table.header)
    written = dict(zip(header, table.header, strict=True))
    _announce(path, written, passed_over)
    rows: Iterator[TableRow] = table.rows
    if RATER in header:
        header, wide = widened(str(path), header, table.rows)
        rows, written = iter(wide), {column: written.get(column, column) for column in header}
        say(f"{path}: a rating in each row; {len(wide)} images")
    return LabelTable(path=path, header=header, rows=rows, written=written)


def _rating_columns(table: Table, patterns: ColumnNames, taken: Mapping[int, str]) -> dict[int, str]:
    """The columns of ratings and of counts `c1` to `c5`, by position. Announces them, and raises as `rater_columns`."""
    try:
        found = rater_columns(table.header, _plain, patterns, taken)
    except DataError as error:
        message = f"{table.path}: {error}"
        raise DataError(message) from None
    for aspect in sorted({called.rpartition("_")[2] for called in found.values()}):
        columns = [table.header[place] for place, called in found.items() if called.endswith(aspect)]
        say(f"{table.path}: reading {len(columns)} columns of ratings of {aspect}, {columns[0]!r} to {columns[-1]!r}")
    counted = {place: name for place, column in enumerate(table.header) if (name := _FIVE_COUNTS.get(_plain(column)))}
    return found | {place: name for place, name in counted.items() if len(counted) == LEVELS and place not in taken}


def wrong_width(row: TableRow, header: Sequence[str]) -> str:
    """What is wrong with a row that has more or fewer fields than the header."""
    fault = f"has {len(row.cells)} fields where the header has {len(header)}"
    whole, part = row.cells[-2:] if len(row.cells) > len(header) else ("", "")
    if whole.strip().lstrip("+-").isdecimal() and part.strip().isdecimal():
        number = f"{whole.strip()}.{part.strip()}"
        return f"{fault}; if {whole.strip()},{part.strip()} is one number with a decimal comma, write {number}"
    return fault


def _plain_meanings(columns: ColumnNames) -> dict[str, str]:
    """`columns` by the meanings that agiqa reads: `quality` is `mos_quality`. Raises UnknownName and ConfigError."""
    known = {*_OWN, *ASPECT_COLUMNS, *ASPECT_NAMES, *DEVIATION_COLUMNS, *_MOS, *RATINGS}
    given: dict[str, str] = {}
    for meaning, column in columns.items():
        if meaning not in known:
            unknown = UnknownName.of("meaning of a column", meaning, known)
            unknown.add_note("--columns is written MEANING=COLUMN, such as --columns name=filename,mos_quality=score")
            raise unknown
        aspect = ASPECT_COLUMNS.get(meaning) or ASPECT_NAMES.get(meaning) or (meaning if meaning in _MOS else None)
        plain = _MOS[aspect] if aspect else _STD.get(DEVIATION_COLUMNS.get(meaning, ""), meaning)
        if plain in given:
            message = f"--columns names two columns for {plain}, {given[plain]!r} and {column!r}; give one of them."
            raise ConfigError(message)
        given[plain] = column
    return given


def _given(table: Table, given: Mapping[str, str], *, named: bool = True) -> dict[int, str]:
    """The meanings that the user gave, by the position of the column; `named`: whether the columns have names.

    Raises UnknownName for a column that is none, DataError for a name that two columns have, and ConfigError for a
    column with two meanings.
    """
    found: dict[int, str] = {}
    for meaning, column in given.items():
        same = [position for position, name in enumerate(table.header) if named and name == column]
        if len(same) > 1:
            choices = " or ".join(f"--columns {meaning}={position}" for position in same)
            message = f"{table.path}: {len(same)} columns are called {column!r}; give the number of one: {choices}."
            raise DataError(message)
        if not same and column.isdecimal() and int(column) < len(table.header):
            same = [int(column)]
        if not same:
            numbers = [str(position) for position in range(len(table.header))]
            unknown = UnknownName.of("column", column, table.header if named else numbers)
            unknown.add_note(f"{table.path}: --columns {meaning}={column}")
            raise unknown
        if same[0] in found:
            message = f"--columns gives {column!r} two meanings, {found[same[0]]} and {meaning}; give it one."
            raise ConfigError(message)
        found[same[0]] = meaning
    return found


def _recognised(
    path: Path, meaning: str, header: Sequence[str], taken: Mapping[int, str]
) -> tuple[dict[int, str], list[str]]:
    """The position of the column that means `meaning`, if there is one, and other columns that might mean it.

    A documented name, exactly written, comes before the others. Raises DataError listing all columns that may be meant.
    """
    own = _OWN[meaning]
    names = {*own, *_ALIASES.get(meaning, ())}
    found = [position for position, column in enumerate(header) if position not in taken and _plain(column) in names]
    exact = [position for position in found if header[position] in own]
    others = [position for position in found if _plain(header[position]) not in own]
    if len(found) > 1 and not (len(exact) == 1 and len(others) == len(found) - 1):
        shown = " and ".join(repr(header[position]) for position in found)
        choices = " or ".join(f"--columns {meaning}={header[position]}" for position in found)
        if len({header[position] for position in found}) < len(found):
            choices = " or ".join(f"--columns {meaning}={position}" for position in found)
        message = f"{path}: two columns mean the same: {shown} may be the {_spoken(meaning)}; add {choices}."
        raise DataError(message)
    if len(found) > 1:
        return {exact[0]: meaning}, [header[position] for position in others]
    return dict.fromkeys(found, meaning), []


def _plain(column: str) -> str:
    return re.sub(r"[\s_-]+", "_", column.strip().lower())


def _called(position: int, column: str, meanings: Mapping[int, str]) -> str:
    """What the column is called in the header of a LabelTable."""
    meaning = meanings.get(position)
    if meaning is None:
        return f"{column} (not read)" if _is_documented(column) else column or f"column {position}"
    return column if column in _OWN.get(meaning, ()) else meaning


def _refuse_repeats(path: Path, header: Sequence[str], written: Sequence[str]) -> None:
    """Raise DataError for a name of a column that two columns have."""
    repeated = next((column for column in header if _means(column) and header.count(column) > 1), None)
    if repeated is not None:
        message = f"{path}: two columns mean the same: {repeated!r} (found: {', '.join(written)}); keep one of them."
        raise DataError(message)


def _announce(path: Path, written: Mapping[str, str], passed_over: Mapping[str, str]) -> None:
    renamed = [(column, name) for column, name in written.items() if column != name and _means(column)]
    if renamed:
        parts = ", ".join(f"{name!r} as {_spoken(column)}" for column, name in renamed)
        say(f"{path}: reading {'columns' if len(renamed) > 1 else 'column'} {parts}")
    for column, meaning in passed_over.items():
        say(f"{path}: column {column!r} is not read; if it is the {_spoken(meaning)}, add --columns {meaning}={column}")


def _spoken(column: str) -> str:
    """What a column means, in the words of messages."""
    return ASPECT_COLUMNS.get(column, {"rating": "rating word"}.get(column, column))


def _is_documented(column: str) -> bool:
    return any(column in names for names in _OWN.values())


def _means(column: str) -> bool:
    return _is_documented(column) or column.startswith("description_")


def _is_headless(header: Sequence[str]) -> bool:
    """Whether the first line is one of the rows: it holds an image name."""
    return any(_IMAGE.fullmatch(cell) for cell in header)


def _without_header(table: Table, given: Mapping[str, str]) -> LabelTable:
    """A table whose first line is a row already. Raises DataError unless its columns are given or can be told."""
    first = table.header
    meanings = _given(table, given, named=False) if given else _told(table)
    width = len(first)
    header = [meanings.get(position, f"column {position}") for position in range(width)]
    if not given:
        parts = ", ".join(f"column {position} as {meaning}" for position, meaning in meanings.items())
        say(f"{table.path}: no header; reading {parts}")
    rows = chain([TableRow(number=table.first_number, cells=first)], table.rows)
    even = (TableRow(number=row.number, cells=(row.cells + [""] * width)[:width]) for row in rows)
    return LabelTable(path=table.path, header=header, rows=even, written={column: column for column in header})


def _told(table: Table) -> dict[int, str]:
    """The only column of image names and the only one of numbers."""
    names = [position for position, cell in enumerate(table.header) if _IMAGE.fullmatch(cell)]
    numbers = [position for position, cell in enumerate(table.header) if _is_number(cell)]
    if len(names) == len(numbers) == 1:
        return {names[0]: "name", numbers[0]: "mos_quality"}
    example = f"name={names[0]},mos_quality={numbers[-1] if numbers else 'N'}"
    message = (
        f"{table.path}: no header; the first line is {', '.join(table.header)[:80]!r}. Say what its columns mean, "
        f"counted from 0, such as --columns {example}."
    )
    raise DataError(message)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True
