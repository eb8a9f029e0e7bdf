"""Labels: the csv tables that they come from, the scale of a MOS, and how values get from one scale to another.

The scale of a MOS is its lowest and its highest possible value. `Items.mos_ranges` records it. Older stores do not: of
their scale one knows only that it must hold all their values.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.store.disk.files import canonical_json, read_text

ASPECT_COLUMNS = {
    "mos": "quality",
    "mos_quality": "quality",
    "mos_align": "correspondence",
    "mos_alignment": "correspondence",
    "mos_correspondence": "correspondence",
    "mos_authenticity": "authenticity",
}
"""Aspect by the column names of AGIQA-3k, AIGCIQA2023 and AIGIQA-20k."""

ASPECT_NAMES = {column.removeprefix("mos_"): aspect for column, aspect in ASPECT_COLUMNS.items() if "_" in column}
"""Aspect by its name in file and column names: `align` and `alignment` are correspondence."""

SPLITS = ("train", "val", "test")

RATING_WORDS = ("bad", "poor", "fair", "good", "excellent")
"""From the lowest to the highest fifth of the MOS range."""

MosRange = tuple[float, float]
Values = NDArray[np.float64]

DEFAULT_RANGE: MosRange = (0.0, 5.0)
"""The scale of a table unless the user gives another."""
_LONGEST_RECORD = 100
_ENOUGH = 8
"""With this many values, all of them in the lowest quarter of a scale is no chance."""


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


def range_text(scale: MosRange | None) -> str:
    """A scale in the words of messages."""
    return "a scale that is not recorded" if scale is None else f"{scale[0]:g} to {scale[1]:g}"


def convert_mos(values: Values, source: MosRange, target: MosRange) -> Values:
    """`values` (any shape) of the scale `source` on the scale `target`: linear, ends to ends."""
    (low, high), (new_low, new_high) = source, target
    return np.asarray((values - low) / (high - low) * (new_high - new_low) + new_low, np.float64)


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
        f"lowest quarter of {range_text(scale)}. If that is not their scale, give it by --mos-range."
    )


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


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row of a csv file."""

    number: int
    """The line on which the row ends, counted from 1."""
    cells: list[str]


def read_table(path: Path) -> tuple[list[str], list[TableRow]]:
    """Header and rows of the csv file `path`, without blank lines.

    Raises DataError unless the file is UTF-8 csv and has rows.
    """
    header, rows = open_table(path)
    return header, list(rows)


def open_table(path: Path) -> tuple[list[str], Iterator[TableRow]]:
    """As `read_table`, but one row at a time: an error in a row is raised when the row is reached."""
    rows = _rows(path)
    return [cell.strip() for cell in next(rows).cells], rows


def _rows(path: Path) -> Iterator[TableRow]:
    """The header, and then the rows."""
    reader, count = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 0
    try:
        for cells in reader:
            if cells or not count:
                yield TableRow(number=reader.line_num, cells=cells)
                count += 1
    except csv.Error as error:
        message = f"{path}, line {reader.line_num}: not a csv file ({error})."
        raise DataError(message) from error
    if count < 2:
        message = f"{path}: a header but no rows."
        raise DataError(message)


def read_mos(column: str, cell: str, mos_range: MosRange) -> float:
    """The MOS in `cell`. Raises DataError, worded for a list of problems, unless it lies in `mos_range`."""
    low, high = mos_range
    try:
        value = float(cell)
    except ValueError:
        message = f"{column} is {cell!r}, not a number"
        raise DataError(message) from None
    if not (math.isfinite(value) and low <= value <= high):
        remedy = " (give the range of these MOS by --mos-range)" if math.isfinite(value) else ""
        message = f"{column} is {cell}, outside {low:g} to {high:g}{remedy}"
        raise DataError(message)
    return value
