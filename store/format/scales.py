"""The scale of a MOS: its lowest and its highest possible value, and how values go from one scale to another.

A scale is recorded with the values, as `Items.mos_ranges`. That of a store that was made before is unknown: its values
alone can say which scales they are not on.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.store.disk.files import canonical_json

MosRange = tuple[float, float]
Values = NDArray[np.float64]

DEFAULT_RANGE: MosRange = (0.0, 5.0)
"""Of tables whose reader was not told another."""
_LONGEST_RECORD = 100
_ENOUGH = 8
"""So many values or more are not all in the lowest quarter of their scale by chance."""


def check_range(scale: Sequence[float]) -> MosRange:
    """`scale` as (lowest, highest). Raises ConfigError unless these are two finite numbers, the lower one first."""
    low, high = (float(end) for end in scale)
    if not (low < high and math.isfinite(high - low)):
        message = f"The MOS range {low:g} to {high:g} is empty; give the lowest value first."
        raise ConfigError(message)
    return low, high


def range_record(scale: MosRange) -> str:
    """What a file says of a scale: canonical JSON, `[low,high]`."""
    return canonical_json(list(scale))


def read_range(record: str | bytes) -> MosRange:
    """The scale that `range_record` wrote. Raises ValueError for anything else."""
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


def spelled(scale: MosRange | None) -> str:
    """A scale for people."""
    return "a scale that is not recorded" if scale is None else f"{scale[0]:g} to {scale[1]:g}"


def converted(values: Values, source: MosRange, target: MosRange) -> Values:
    """`values` (any shape) of the scale `source` on the scale `target`, by the line through both pairs of ends."""
    (low, high), (new_low, new_high) = source, target
    return np.asarray((values - low) / (high - low) * (new_high - new_low) + new_low, np.float64)


def is_plausible(values: Values, scale: MosRange) -> bool:
    """Whether `values` (NaN where there is none) may be on `scale`.

    None lies outside, and where there are 8 or more they are not all in the lowest quarter.
    """
    known, (low, high) = values[np.isfinite(values)], scale
    if not len(known):
        return True
    highest = float(known.max())
    inside = low <= float(known.min()) and highest <= high
    return inside and (len(known) < _ENOUGH or highest > low + (high - low) / 4)


def doubts(aspect: str, values: Values, scale: MosRange) -> str | None:
    """A note where `values` lie on `scale` but look like those of a smaller one; None where they do not."""
    if is_plausible(values, scale):
        return None
    return (
        f"note: the highest of {int(np.isfinite(values).sum())} MOS of {aspect} is {np.nanmax(values):g}, in the "
        f"lowest quarter of {spelled(scale)}. If that is not their scale, give it by --mos-range."
    )


@dataclass(frozen=True, kw_only=True)
class ScaledColumn:
    """The MOS of one aspect in one store."""

    where: str
    """What messages call the store."""
    values: Values
    """(items,), NaN where there is none."""
    scale: MosRange | None


@dataclass(frozen=True, kw_only=True)
class JoinedColumn:
    """The MOS of one aspect of several stores on one scale."""

    values: Values
    """(items of all stores,), NaN where there is none."""
    scale: MosRange | None
    """None where no store records one."""
    notes: tuple[str, ...]
    """What was converted, and what is taken to be so."""


def join_columns(aspect: str, columns: Sequence[ScaledColumn]) -> JoinedColumn:
    """The values of all `columns` on the scale of the first that has one.

    A store whose scale is not recorded is taken to be on that scale where its values may be, with a note. Raises
    DataError where they cannot be, see `is_plausible`: then the values would be mixed.
    """
    holders = [column for column in columns if np.isfinite(column.values).any()]
    scale = next((column.scale for column in holders if column.scale is not None), None)
    named = next((column.where for column in holders if column.scale is not None), "")
    notes = [_doubts_of(aspect, column) for column in holders if not _is_likely(column)] if len(holders) > 1 else []
    unknown = [column for column in holders if column.scale is None]
    if unknown and len(holders) > 1:
        _refuse_mixture(aspect, holders, unknown, scale, named)
        where = " and ".join(column.where for column in unknown)
        taken = "one scale" if scale is None else f"{spelled(scale)}, as in {named}"
        notes.append(f"the scale of the {aspect} MOS of {where} is not recorded; they are taken to be on {taken}")
    values: list[Values] = []
    for column in columns:
        if scale is None or column.scale in (None, scale) or not any(column is holder for holder in holders):
            values.append(column.values)
            continue
        values.append(converted(column.values, column.scale, scale))
        notes.append(
            f"the {aspect} MOS of {column.where} are converted from {spelled(column.scale)} to {spelled(scale)}, "
            f"the scale of {named}"
        )
    return JoinedColumn(values=np.concatenate(values), scale=scale, notes=tuple(notes))


def _is_likely(column: ScaledColumn) -> bool:
    return column.scale is None or is_plausible(column.values, column.scale)


def _doubts_of(aspect: str, column: ScaledColumn) -> str:
    """A note on a store whose values look like those of a smaller scale than it records."""
    return (
        f"the {aspect} MOS of {column.where} are recorded on {spelled(column.scale)} and go from "
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
    """Raise DataError where `unknown`, the holders without a scale, cannot be on `scale`, or on one if it is None."""
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
    beside = f"{named} is on {spelled(scale)}" if scale else f"those of all stores go from {taken[0]:g} to {taken[1]:g}"
    error = DataError.from_problems(f"The {aspect} MOS of these stores are on different scales ({beside})", problems)
    error.add_note(
        "Record the scale of each, and they are converted: `agiqa store labels STORE TABLE.csv --mos-range LOW HIGH`, "
        "with the table of the store."
    )
    raise error
