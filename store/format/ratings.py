"""Single ratings in label tables: their mean, their standard deviation, and how many each of five levels got.

Three forms are read. A column for each rater, `rater_1_quality`; a row for each rating, with a column `rater`; and
counts of five levels, `count_quality_1` to `count_quality_5`. A row for each rating becomes columns of raters first.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Protocol

import numpy as np

from agiqa.errors import DataError
from agiqa.store.format.labels import (
    ASPECT_COLUMNS,
    ASPECT_NAMES,
    DEVIATION_COLUMNS,
    RATING_WORDS,
    MosRange,
    range_text,
)
from agiqa.store.format.tables import TableRow

LEVELS = len(RATING_WORDS)
RATER = "rater"
"""The meaning of the column that says who gave the rating of a row."""
COUNT_PREFIX = "count_"
_ASPECTS: tuple[str, ...] = ("quality", "correspondence", "authenticity")
COUNT_COLUMNS = {
    f"{COUNT_PREFIX}{aspect}_{level}": f"{aspect}_{level}" for aspect in _ASPECTS for level in range(1, LEVELS + 1)
}
"""Names of the columns with counts, and what their columns are called in item tables, after the prefix."""
RATINGS = {f"ratings_{aspect}": aspect for aspect in _ASPECTS}
"""Meanings that `--columns` gives to all columns of a pattern, such as `ratings_quality=score_*`."""
_PEOPLE = "rater|subject|observer|annotator|participant|worker|evaluator|user"
_NAMES = "|".join(ASPECT_NAMES)
_WIDE = re.compile(rf"(?:{_PEOPLE})_?(\d+)(?:_(?P<after>{_NAMES}))?|(?P<before>{_NAMES})_(?:{_PEOPLE})_?(\d+)")
_CANONICAL = re.compile(rf"rater_\d+_({'|'.join(_ASPECTS)})")
_CLOSE = 1e-6


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The ratings of one image for one aspect."""

    mos: float
    std: float | None
    """With n - 1 in the denominator; None for a single rating."""
    counts: tuple[int, ...] | None
    """Ratings of each level; None where some are between the levels."""


def rater_columns(
    header: Sequence[str], plain: Callable[[str], str], patterns: Mapping[str, str], taken: Iterable[int]
) -> dict[int, str]:
    """What the columns of single ratings are called, by position: `rater_3_quality` is the third of quality.

    `patterns` are columns by meanings of RATINGS, where `*` stands for any text. Raises DataError for one that no
    column matches.
    """
    free = [position for position in range(len(header)) if position not in set(taken)]
    aspects: dict[int, str] = {}
    for meaning, pattern in patterns.items():
        found = [position for position in free if fnmatchcase(header[position], pattern)]
        if not found:
            message = f"no column matches {pattern!r}, which --columns gives for {meaning}; found: {', '.join(header)}."
            raise DataError(message)
        aspects |= dict.fromkeys(found, RATINGS[meaning])
    for position in free:
        match = _WIDE.fullmatch(plain(header[position]))
        if match and position not in aspects:
            named = match["after"] or match["before"]
            aspects[position] = ASPECT_NAMES[named] if named else "quality"
    numbers = dict.fromkeys(_ASPECTS, 0)
    called: dict[int, str] = {}
    for position in sorted(aspects):
        numbers[aspects[position]] += 1
        called[position] = f"rater_{numbers[aspects[position]]}_{aspects[position]}"
    return called


def raters_of(header: Sequence[str]) -> dict[str, list[str]]:
    """The columns of single ratings in the header of a LabelTable, by aspect."""
    found: dict[str, list[str]] = {}
    for column in header:
        if match := _CANONICAL.fullmatch(column):
            found.setdefault(match[1], []).append(column)
    return found


def widened(where: str, header: Sequence[str], rows: Iterable[TableRow]) -> tuple[list[str], list[TableRow]]:
    """A table with a row for each rating as one with a row for each image and a column for each rater.

    Columns of MOS hold the ratings. Raises DataError where there are none, and listing images that one rater rated
    twice, or whose other columns differ between rows.
    """
    marks = [column for column in header if column in ASPECT_COLUMNS]
    if not marks or raters_of(header):
        message = (
            f"{where}: a table with a column {RATER!r} has a rating in each row, in a column such as mos_quality; "
            f"found: {', '.join(header)}."
        )
        raise DataError(message)
    others = [column for column in header if column not in (*marks, RATER)]
    first: dict[str, tuple[int, dict[str, str]]] = {}
    given: dict[str, dict[str, str]] = {}
    raters: dict[str, int] = {}
    problems: list[str] = []
    for row in rows:
        cells = dict(zip(header, row.cells, strict=False))
        name, who = cells.get("name", ""), cells.get(RATER, "").strip()
        number, before = first.setdefault(name, (row.number, cells))
        ratings, place = given.setdefault(name, {}), raters.setdefault(who, len(raters) + 1)
        if not who:
            problems.append(f"line {row.number}: the rater is empty")
        problems += [
            f"line {row.number}, {name!r}: {column} is {cells.get(column)!r}, in line {number} {before.get(column)!r}"
            for column in others
            if cells.get(column, "") != before.get(column, "")
        ]
        for column in marks:
            key = f"rater_{place}_{ASPECT_COLUMNS[column]}"
            if key in ratings:
                problems.append(f"line {row.number}: the rater {who!r} rated {name!r} twice")
            ratings[key] = cells.get(column, "")
    if problems:
        raise DataError.from_problems(where, problems)
    people = [f"rater_{place}_{ASPECT_COLUMNS[column]}" for column in marks for place in raters.values()]
    wide = [
        TableRow(
            number=first[name][0],
            cells=[
                *(first[name][1].get(column, "") for column in others),
                *(ratings.get(person, "") for person in people),
            ],
        )
        for name, ratings in given.items()
    ]
    return [*others, *people], wide


class RatedTable(Protocol):
    """What is read of a LabelTable."""

    @property
    def path(self) -> Path: ...
    @property
    def header(self) -> list[str]: ...
    @property
    def written(self) -> Mapping[str, str]: ...


class RatingReader:
    """Summarises the ratings of each row of a LabelTable."""

    def __init__(self, table: RatedTable) -> None:
        """`table` is a LabelTable. Raises DataError for some of five counts."""
        header = table.header
        self._raters, self._written = raters_of(header), table.written
        self._counted: dict[str, list[str]] = {}
        self._between: dict[str, MosRange] = {}
        for aspect in _ASPECTS:
            columns = [f"{COUNT_PREFIX}{aspect}_{level}" for level in range(1, LEVELS + 1)]
            found = [column for column in columns if column in header]
            if found and (len(found) < LEVELS or aspect in self._raters):
                message = (
                    f"{table.path} has the columns {', '.join(found)}. Counts need all of {columns[0]} to "
                    f"{columns[-1]}, and no columns of single ratings beside them."
                )
                raise DataError(message)
            if found:
                self._counted[aspect] = found
        self.aspects = (*self._raters, *self._counted)
        """The aspects with ratings."""

    def read(self, cells: Mapping[str, str], aspect: str, scale: MosRange) -> Summary | None:
        """The summary for one aspect; None without ratings.

        Raises DataError, worded for a list of problems, for cells that are no ratings on `scale`.
        """
        levels = np.linspace(*scale, LEVELS)
        if aspect in self._counted:
            counts = [self._count(column, cells.get(column, "").strip()) for column in self._counted[aspect]]
            values, weights = levels, np.array(counts, np.float64)
        else:
            pairs = [(column, cells.get(column, "").strip()) for column in self._raters[aspect]]
            values = np.array([self._rating(column, cell, scale) for column, cell in pairs if cell])
            distance = np.abs(values[:, None] - levels)
            fits = bool((distance.min(axis=1, initial=math.inf) < _CLOSE * (scale[1] - scale[0])).all())
            if not fits:
                self._between[aspect] = scale
            counts = np.bincount(distance.argmin(axis=1), minlength=LEVELS).tolist() if fits else []
            weights = np.ones(len(values))
        total = float(weights.sum())
        if not total:
            return None
        mos = float(weights @ values) / total
        std = math.sqrt(float(weights @ (values - mos) ** 2) / (total - 1)) if total > 1 else None
        return Summary(mos=mos, std=std, counts=tuple(counts) or None)

    def contradictions(self, cells: Mapping[str, str], found: Summary, aspect: str) -> list[str]:
        """What columns of MOS and std in the same row say against the ratings."""
        count = len([one for one in self._raters.get(aspect, ()) if cells.get(one, "").strip()])
        count = count or sum(found.counts or ())
        of_all = None if found.std is None else found.std * math.sqrt((count - 1) / count)
        problems: list[str] = []
        for columns, values, meaning in (
            (ASPECT_COLUMNS, [found.mos], "mean"),
            (DEVIATION_COLUMNS, [value for value in (found.std, of_all) if value is not None], "standard deviation"),
        ):
            for column in [one for one, of in columns.items() if of == aspect and one in self._written]:
                cell = cells.get(column, "").strip()
                if values and _is_number(cell) and all(abs(float(cell) - value) > _rounding(cell) for value in values):
                    problems.append(
                        f"{self._written[column]} is {cell}, and the {meaning} of its {count} ratings is "
                        f"{values[0]:.4g}; keep one of both, or give the scale of the ratings by --mos-range"
                    )
        return problems

    def fitting(self, aspect: str) -> bool:
        """Whether all ratings of the rows that were read are on the five levels of their scale."""
        return aspect not in self._between

    def notes(self) -> list[str]:
        """Notes on ratings that make no counts."""
        return [
            f"note: some ratings of {aspect} are between the five levels of {range_text(scale)}, so that no counts are "
            "kept. If they are whole numbers from 1 to 5, add --mos-range 1 5."
            for aspect, scale in self._between.items()
        ]

    def _rating(self, column: str, cell: str, scale: MosRange) -> float:
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not scale[0] <= value <= scale[1]:
            message = f"{self._written[column]} is {cell!r}, not a rating from {range_text(scale)}"
            raise DataError(message)
        return value

    def _count(self, column: str, cell: str) -> int:
        try:
            value = float(cell or 0)
        except ValueError:
            value = math.nan
        if not (value >= 0.0 and value == math.floor(value)):
            message = f"{self._written[column]} is {cell!r}, not a number of ratings"
            raise DataError(message)
        return int(value)


def _rounding(cell: str) -> float:
    """Half of the last written decimal."""
    _, _, decimals = cell.partition(".")
    return 0.5 * 10.0 ** -len(decimals) + 1e-9 if decimals.isdecimal() or not decimals else _CLOSE


def _is_number(cell: str) -> bool:
    try:
        return math.isfinite(float(cell))
    except ValueError:
        return False


def count_columns(aspect: str, counts: Sequence[int] | None) -> dict[str, float]:
    """The counts of a row by what their columns are called in item tables, after the prefix."""
    return {} if counts is None else {f"{aspect}_{level}": float(n) for level, n in enumerate(counts, start=1)}
