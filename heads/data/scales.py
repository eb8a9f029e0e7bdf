"""The scale of the labels that a head learned, and the conversion to that of another store.

A store records the lowest and the highest possible MOS of each label; a run records those of its store. Sources that
are no stores may have no scales; no warning mentions scales for them.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.store.format.labels import MosRange, check_range, convert_mos, is_plausible, range_text

Scales = tuple[MosRange | None, ...]
"""The scale of each label of a head, in the order of the labels; None where it is unknown."""
Line = tuple[float, float]
"""Slope and offset that convert a value from one scale to another."""


@runtime_checkable
class Scaled(Protocol):
    """An item table that records scales, as those of stores do."""

    @property
    def mos_ranges(self) -> Mapping[str, MosRange]: ...


def scales_of(source: FeatureSource, labels: Sequence[str]) -> Scales:
    """The scale of each of `labels` in `source`."""
    ranges = source.items.mos_ranges if isinstance(source.items, Scaled) else {}
    return tuple(ranges.get(label) for label in labels)


def scales_record(labels: Sequence[str], scales: Scales) -> dict[str, list[float] | None]:
    """`scales` by label, for a file; None (JSON null) is unknown."""
    pairs = zip(labels, scales, strict=True)
    return {label: None if scale is None else [float(end) for end in scale] for label, scale in pairs}


def read_scales(record: Mapping[str, Any], labels: Sequence[str]) -> Scales:
    """What `scales_record` wrote. Raises ConfigError, TypeError or ValueError for anything else."""
    found = [record.get(label) for label in labels]
    return tuple(None if scale is None else check_range(scale) for scale in found)


def lines_between(sources: Scales, targets: Scales) -> list[Line]:
    """The line of each label from its scale of `sources` to that of `targets`; (1, 0) where one is unknown."""
    found: list[Line] = []
    for source, target in zip(sources, targets, strict=True):
        if source is None or target is None or source == target:
            found.append((1.0, 0.0))
            continue
        slope = (target[1] - target[0]) / (source[1] - source[0])
        found.append((slope, target[0] - slope * source[0]))
    return found


def convert_columns(values: NDArray[np.float64], sources: Scales, targets: Scales) -> NDArray[np.float64]:
    """Each column of `values` (items, labels) on its scale of `targets`; unchanged where a scale is unknown."""
    columns = [
        column if source is None or target is None or source == target else convert_mos(column, source, target)
        for column, source, target in zip(values.T, sources, targets, strict=True)
    ]
    return np.stack(columns, axis=1)


def conversions(labels: Sequence[str], sources: Scales, targets: Scales) -> list[str]:
    """`quality from 0 to 100 to 0 to 5` of each label that `convert_columns` converts."""
    return [
        f"{label} from {range_text(source)} to {range_text(target)}"
        for label, source, target in zip(labels, sources, targets, strict=True)
        if source is not None and target is not None and source != target
    ]


def on_another_scale(mos: NDArray[np.float64], learned: MosRange | None, recorded: MosRange | None) -> bool:
    """Whether `mos`, whose scale is not `recorded`, cannot be on the scale that a head has `learned`."""
    return recorded is None and learned is not None and not is_plausible(mos, learned)


def unknown_scales(
    head: str, learned: Scales, source: FeatureSource, labels: Sequence[str], values: NDArray[np.float64]
) -> list[str]:
    """A warning for each label whose scale the head or `source` does not record; none where `source` is no store.

    `head` is the name of the head in messages, `learned` are its scales, and `values` the MOS of `source`
    (items, labels).
    """
    if not isinstance(source.items, Scaled):
        return []
    where, found = location_of(source), list[str]()
    for label, ours, theirs, mos in zip(labels, learned, scales_of(source, labels), values.T, strict=True):
        known = ours or theirs
        if ours is not None and theirs is not None:
            continue
        warning = f"The scale of the {label} MOS of {head if ours is None else where} is not recorded"
        if known is None:
            warning += f", nor is that of {where}; errors such as RMSE hold if both are the same"
        elif not on_another_scale(mos, ours, theirs):
            warning += f"; it is taken to be {range_text(known)}"
        else:
            warning += (
                f", and they go from {np.nanmin(mos):g} to {np.nanmax(mos):g}, while {head} is on {range_text(known)}: "
                "errors such as RMSE mean nothing"
            )
        found.append(f"{warning}. `agiqa store labels STORE TABLE.csv --mos-range LOW HIGH` records it in a store.")
    return found
