"""Labels: their names, the scale of a MOS, and how values get from one scale to another.

The scale of a MOS is its lowest and its highest possible value. `Items.mos_ranges` records it. Older stores do not: of
their scale one knows only that it must hold all their values.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.progress import say
from agiqa.store.disk.files import canonical_json

ASPECT_COLUMNS = {
    "mos": "quality",
    "mos_quality": "quality",
    "mos_align": "correspondence",
    "mos_alignment": "correspondence",
    "mos_correspondence": "correspondence",
    "mos_authenticity": "authenticity",
}
"""Aspect by the column names of AGIQA-3k, AIGCIQA2023 and AIGIQA-20k."""

DEVIATION_COLUMNS = {
    "std_quality": "quality",
    "std_align": "correspondence",
    "std_alignment": "correspondence",
    "std_correspondence": "correspondence",
    "std_authenticity": "authenticity",
}
"""Aspect by the names of columns with the standard deviation of the single ratings."""

ASPECT_NAMES = {column.removeprefix("mos_"): aspect for column, aspect in ASPECT_COLUMNS.items() if "_" in column}
"""Aspect by its name in file and column names: `align` and `alignment` are correspondence."""

SPLITS = ("train", "val", "test")
_OTHER_SPLITS = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}

RATING_WORDS = ("bad", "poor", "fair", "good", "excellent")
"""From the lowest to the highest fifth of the MOS range."""

MosRange = tuple[float, float]
Values = NDArray[np.float64]

DEFAULT_RANGE: MosRange = (0.0, 5.0)
"""The scale of a table unless the user gives another."""
IMPORT_RECORD, IMPORT_FORMAT = "source.json", "agiqa.import"
"""The file beside an imported data.csv that says where it is from and which scale its MOS have, and its format."""
IMPORTED_TABLE = "data.csv"
"""The table that an import writes."""
_USUAL_RANGES: tuple[MosRange, ...] = ((0.0, 1.0), (-1.0, 1.0), (0.0, 5.0), (0.0, 10.0), (0.0, 100.0))
_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_FEW = 20
"""Fewer than one in so many MOS outside the scale are mistakes of their rows, not another scale."""
_LONGEST_RECORD = 100
_ENOUGH = 8
"""With this many values, all of them in the lowest quarter of a scale is no chance."""


def split_of(cell: str) -> str:
    """The split that `cell` means, in any case; `cell` itself where it is none."""
    plain = cell.strip().lower()
    return plain if plain in SPLITS else _OTHER_SPLITS.get(plain, cell)


def check_range(scale: Sequence[float]) -> MosRange:
    """`scale` as (lowest, highest). Raises ConfigError unless both are finite and the lowest comes first."""
    low, high = (float(end) for end in scale)
    if not (low < high and math.isfinite(high - low)):
        message = f"The MOS range {low:g} to {high:g} is empty; give the lowest value first."
        raise ConfigError(message)
    return low, high


def range_record(scale: MosRange) -> str:
    """A scale as files record it: canonical JSON, `[low,high]`."""
    return canonical_json(list(scale))


def read_range(record: str | bytes) -> MosRange:
    """The scale in a `range_record`. Raises ValueError for anything else."""
    message = f"its mos_range is {record[:_LONGEST_RECORD]!r}, not [low,high]"
    if len(record) > _LONGEST_RECORD:
        raise ValueError(message)
    try:
        found = json.loads(record)
        if isinstance(found, list) and len(found) == 2 and all(type(end) in (int, float) for end in found):
            return check_range(found)
    except (ConfigError, OverflowError, ValueError) as error:
        raise ValueError(message) from error
    raise ValueError(message)


def import_record(path: Path) -> dict[str, Any] | None:
    """The content of the file `path`, if `agiqa data import` wrote it."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("format") == IMPORT_FORMAT else None


def scale_of(table: Path, given: Sequence[float] | None = None) -> MosRange:
    """The scale of the MOS in `table`: the `given` one, else that which an import recorded, else DEFAULT_RANGE.

    Announces the scale of an import for another table than its own. Raises ConfigError for an empty scale, and
    DataError for a record without a scale.
    """
    if given is not None:
        return check_range(given)
    path = table.parent / IMPORT_RECORD
    record = import_record(path)
    if record is None:
        return DEFAULT_RANGE
    try:
        scale = read_range(json.dumps(record.get("mos_range")))
    except ValueError as error:
        message = f"{path}: {error}; import the set again."
        raise DataError(message) from error
    if table.name != IMPORTED_TABLE:
        say(f"{table}: MOS from {range_text(scale)}, the scale in {path}; --mos-range gives another one")
    return scale


def range_text(scale: MosRange | None) -> str:
    """A scale in the words of messages."""
    return "a scale that is not recorded" if scale is None else f"{scale[0]:g} to {scale[1]:g}"


def convert_mos(values: Values, source: MosRange, target: MosRange) -> Values:
    """`values` (any shape) of the scale `source` on the scale `target`: linear, ends to ends."""
    (low, high), (new_low, new_high) = source, target
    return np.asarray((values - low) / (high - low) * (new_high - new_low) + new_low, np.float64)


def convert_deviations(values: Values, source: MosRange, target: MosRange) -> Values:
    """Standard deviations (any shape) of the scale `source` on the scale `target`."""
    return np.asarray(values * ((target[1] - target[0]) / (source[1] - source[0])), np.float64)


def is_plausible(values: Values, scale: MosRange) -> bool:
    """Whether `values` (NaN for missing ones) may be on `scale`: none lies outside, and 8 or more are not all in the
    lowest quarter.
    """
    known, (low, high) = values[np.isfinite(values)], scale
    if not len(known):
        return True
    highest = float(known.max())
    inside = low <= float(known.min()) and highest <= high
    return inside and (len(known) < _ENOUGH or highest > low + (high - low) / 4)


def scale_warning(aspect: str, values: Values, scale: MosRange) -> str | None:
    """A note if `values` look like those of a smaller scale than `scale`; None if they do not."""
    if is_plausible(values, scale):
        return None
    return (
        f"note: the highest of {int(np.isfinite(values).sum())} MOS of {aspect} is {np.nanmax(values):g}, in the "
        f"lowest quarter of {range_text(scale)}. If that is not their scale, add {_option(values)}."
    )


def likely_range(values: Values) -> MosRange:
    """The smallest usual scale that holds all `values`, or whole numbers around them."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    usual = (scale for scale in _USUAL_RANGES if scale[0] <= low and high <= scale[1])
    return next(usual, (math.floor(low), math.floor(high) + 1))


def _option(values: Values) -> str:
    low, high = likely_range(values)
    return f"--mos-range {low:g} {high:g}"


def rating_numbers(mos: Values, scale: MosRange) -> NDArray[np.int64]:
    """The index in RATING_WORDS of each MOS (items,): five equal bins, of which the last one holds its upper end too.

    Raises ConfigError for an empty scale, and DataError for MOS outside of it, NaN included.
    """
    low, high = check_range(scale)
    outside = mos[~((mos >= low) & (mos <= high))]
    if len(outside):
        message = f"{len(outside)} of {len(mos)} MOS are outside {low:g} to {high:g}, the first of them {outside[0]:g}."
        raise DataError(message)
    count = len(RATING_WORDS)
    bounds = [(low * (count - k) + high * k) / count for k in range(1, count)]
    return np.searchsorted(bounds, mos, side="right").astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class ScaledColumn:
    """The MOS of one aspect in one store."""

    where: str
    """The store's name in messages."""
    values: Values
    """(items,), NaN for missing ones."""
    scale: MosRange | None


@dataclass(frozen=True, kw_only=True)
class JoinedColumn:
    """The MOS of one aspect of several stores on one scale."""

    values: Values
    """(items of all stores,), NaN for missing ones."""
    scale: MosRange | None
    """None if no store records one."""
    notes: tuple[str, ...]
    """What was converted, and what was assumed."""


def join_columns(aspect: str, columns: Sequence[ScaledColumn]) -> JoinedColumn:
    """The values of all `columns` on the first scale that one of them records.

    A store that records no scale is assumed to be on that scale, with a note, if its values are plausible there, see
    `is_plausible`. Otherwise raises DataError: the values would be mixed.
    """
    holders = [column for column in columns if np.isfinite(column.values).any()]
    scale = next((column.scale for column in holders if column.scale is not None), None)
    named = next((column.where for column in holders if column.scale is not None), "")
    notes = [_warning_of(aspect, column) for column in holders if not _is_likely(column)] if len(holders) > 1 else []
    unknown = [column for column in holders if column.scale is None]
    if unknown and len(holders) > 1:
        _refuse_mixture(aspect, holders, unknown, scale, named)
        where = " and ".join(column.where for column in unknown)
        taken = "one scale" if scale is None else f"{range_text(scale)}, as in {named}"
        notes.append(f"the scale of the {aspect} MOS of {where} is not recorded; they are taken to be on {taken}")
    values: list[Values] = []
    for column in columns:
        if scale is None or column.scale in (None, scale) or not any(column is holder for holder in holders):
            values.append(column.values)
            continue
        values.append(convert_mos(column.values, column.scale, scale))
        notes.append(
            f"the {aspect} MOS of {column.where} are converted from {range_text(column.scale)} to {range_text(scale)}, "
            f"the scale of {named}"
        )
    return JoinedColumn(values=np.concatenate(values), scale=scale, notes=tuple(notes))


def _is_likely(column: ScaledColumn) -> bool:
    return column.scale is None or is_plausible(column.values, column.scale)


def _warning_of(aspect: str, column: ScaledColumn) -> str:
    """The note on a store whose values look like those of a smaller scale than the recorded one."""
    return (
        f"the {aspect} MOS of {column.where} are recorded on {range_text(column.scale)} and go from "
        f"{np.nanmin(column.values):g} to {np.nanmax(column.values):g}. If that is not their scale, a head learns to "
        "tell the stores apart: record it, `agiqa store labels STORE TABLE.csv --mos-range LOW HIGH`"
    )


def _refuse_mixture(
    aspect: str,
    holders: Sequence[ScaledColumn],
    unknown: Sequence[ScaledColumn],
    scale: MosRange | None,
    named: str,
) -> None:
    """Raise DataError if a store of `unknown`, those without a scale, cannot be on `scale`.

    If that is None, too, they must all fit the range of all values.
    """
    everything = np.concatenate([column.values for column in holders])
    taken = scale or (float(np.nanmin(everything)), float(np.nanmax(everything)))
    problems = [
        f"{column.where} does not record its scale, and its MOS go from {np.nanmin(column.values):g} to "
        f"{np.nanmax(column.values):g}"
        for column in unknown
        if not is_plausible(column.values, taken)
    ]
    if not problems:
        return
    beside = (
        f"{named} is on {range_text(scale)}" if scale else f"those of all stores go from {taken[0]:g} to {taken[1]:g}"
    )
    error = DataError.from_problems(f"The {aspect} MOS of these stores are on different scales ({beside})", problems)
    error.add_note(
        "Record the scale of each, and they are converted: `agiqa store labels STORE TABLE.csv --mos-range LOW HIGH`, "
        "with the table of the store."
    )
    raise error


class MosReader:
    """Reads the MOS of one table, and tells mistakes of the whole table from those of a row."""

    def __init__(self, path: Path) -> None:
        """`path` is the table, for messages."""
        self._path = path
        self._values: dict[str, list[float]] = {}
        self._outside: dict[str, list[float]] = {}
        self._scales: dict[str, MosRange] = {}
        self._commas: list[tuple[int, str, str]] = []
        self._words: dict[str, list[str]] = {}
        """By column, the values that are no numbers."""

    def read(self, column: str, cell: str, scale: MosRange, line: int) -> float:
        """As `read_mos`."""
        if _DECIMAL_COMMA.fullmatch(cell):
            self._commas.append((line, column, cell))
        try:
            value = read_mos(column, cell, scale)
        except OutsideScale as error:
            self._outside.setdefault(column, []).append(error.value)
            self._scales[column] = scale
            raise
        except DataError:
            self._words.setdefault(column, []).append(cell)
            raise
        self._values.setdefault(column, []).append(value)
        return value

    def check(self) -> None:
        """Raise DataError for decimal commas, a column without any number, and one on another scale."""
        if self._commas:
            line, column, cell = self._commas[0]
            message = (
                f"{self._path}, line {line}: {column} is {cell!r}, with a decimal comma, as are {len(self._commas)} "
                f"values in all; write {cell.replace(',', '.')} instead."
            )
            raise DataError(message)
        for column, words in self._words.items():
            if len(words) > 1 and column not in self._values and column not in self._outside:
                message = (
                    f"{self._path}: none of the {len(words)} values of {column} is a number; the first is "
                    f"{words[0]!r}. If another column has the MOS, add --columns mos_quality=COLUMN (or "
                    "mos_correspondence, mos_authenticity), and give this one another name."
                )
                raise DataError(message)
        for column, outside in self._outside.items():
            values = np.array([*self._values.get(column, []), *outside])
            if len(outside) > 1 and len(outside) * _FEW >= len(values):
                message = (
                    f"{self._path}: {len(outside)} of {len(values)} values of {column} are outside "
                    f"{range_text(self._scales[column])}; they go from {values.min():g} to {values.max():g}. If all "
                    f"are right, add {_option(values)}, or the two ends of their scale if those are others."
                )
                raise DataError(message)


class OutsideScale(DataError):
    """A finite MOS outside the scale."""

    value: float = math.nan


def read_mos(column: str, cell: str, mos_range: MosRange) -> float:
    """The MOS in `cell`. Raises DataError, worded for a list of problems, unless it lies in `mos_range`."""
    low, high = mos_range
    try:
        value = float(cell)
    except ValueError:
        remedy = f"; write {cell.replace(',', '.')}" if _DECIMAL_COMMA.fullmatch(cell) else ""
        message = f"{column} is {cell!r}, not a number{remedy}"
        raise DataError(message) from None
    if math.isfinite(value) and low <= value <= high:
        return value
    if not math.isfinite(value):
        message = f"{column} is {cell}, outside {low:g} to {high:g}"
        raise DataError(message)
    outside = OutsideScale(
        f"{column} is {cell}, outside {low:g} to {high:g} (give the range of these MOS by --mos-range)"
    )
    outside.value = value
    raise outside


def read_deviation(column: str, cell: str) -> float:
    """The standard deviation in `cell`. Raises DataError, worded for a list of problems, unless it is 0 or more."""
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if math.isfinite(value) and value >= 0.0:
        return value
    message = f"{column} is {cell!r}, not a standard deviation (a number of 0 or more)"
    raise DataError(message)
