"""Soft labels: the distribution of an image's ratings over five levels, from its MOS and their standard deviation.

The levels are evenly spaced from the lowest to the highest possible MOS. As in DeQA-Score (arXiv 2501.11561, section
3.2), a Gaussian of the MOS and the standard deviation is integrated over a bin around each level. What lies outside the
five bins is lost, so that the mean is no longer the MOS. DeQA-Score corrects that by a line, which goes below 0 near
the ends. Here the bins are multiplied by exp(t level) with the t that restores the mean: of all distributions with
that mean, it is the nearest to the bins in Kullback-Leibler divergence, and none of its numbers is negative.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, softmax

from agiqa.errors import DataError
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.scales import Scales
from agiqa.heads.settings.config import TrainConfig
from agiqa.store.format.labels import likely_range

Array = NDArray[np.float64]

LEVELS = 5
"""From bad to excellent."""
NARROWEST = 0.25
"""The smallest standard deviation that five levels can tell, as a share of their distance."""
_STEEPEST = 60.0
"""Largest |t|, per distance of two levels: it leaves a mean 1e-26 away from the end."""
_HALVINGS = 80
_FARTHEST_MEAN = 0.05
"""Largest distance from the mean of the counted ratings to the MOS, as a share of the scale."""


@runtime_checkable
class Deviating(Protocol):
    """An item table that records the standard deviation of single ratings, as those of stores do."""

    @property
    def deviations(self) -> Mapping[str, Array]: ...


@runtime_checkable
class Counted(Protocol):
    """An item table that records how many ratings each level got, as those of stores do: `quality_1` to `quality_5`."""

    @property
    def counts(self) -> Mapping[str, Array]: ...


def level_values(scales: Scales, labels: Array) -> Array:
    """The MOS of each level, (labels, 5). `labels` (items, labels) give the scale of a label whose scale is unknown."""
    known = [scale or likely_range(column) for scale, column in zip(scales, labels.T, strict=True)]
    return np.asarray([np.linspace(low, high, LEVELS) for low, high in known], np.float64)


def grouping_variance(levels: Array) -> Array:
    """The variance that rounding a Gaussian to `levels` (labels, 5) adds, (labels,): Sheppard's correction."""
    return np.asarray(np.square(levels[:, 1] - levels[:, 0]) / 12.0)


def gaussian_levels(mos: Array, std: Array, levels: Array) -> Array:
    """The share of ratings on each of `levels` (5,) for each item, (items, 5), from its MOS and deviation (items,).

    The mean is the MOS. A deviation below NARROWEST distances of two levels counts as that.
    """
    distance = float(levels[1] - levels[0])
    std = np.maximum(std, NARROWEST * distance)
    edges = np.concatenate([levels - distance / 2, [levels[-1] + distance / 2]])
    bins = np.diff(ndtr((edges - mos[:, None]) / std[:, None]), axis=1)
    bins = np.log(np.maximum(bins, np.finfo(np.float64).tiny))
    steps = np.arange(LEVELS) - (LEVELS - 1) / 2
    wanted = (mos - levels.mean()) / distance
    low, high = np.full(len(mos), -_STEEPEST), np.full(len(mos), _STEEPEST)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        below = softmax(bins + middle[:, None] * steps, axis=1) @ steps < wanted
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray(softmax(bins + low[:, None] * steps, axis=1), np.float64)


def known_deviations(source: FeatureSource, items: NDArray[np.int64], names: Sequence[str]) -> Array:
    """The standard deviation of the ratings of each item, (items, labels); NaN where `source` has none."""
    recorded = source.items.deviations if isinstance(source.items, Deviating) else {}
    missing = np.full(len(source.items.names), np.nan)
    return np.stack([np.asarray(recorded.get(name, missing), np.float64)[items] for name in names], axis=1)


def label_deviations(source: FeatureSource, items: NDArray[np.int64], config: TrainConfig) -> Array:
    """`known_deviations`, and `config.label_std` for items without one.

    Raises DataError where that is not given.
    """
    found = known_deviations(source, items, config.labels)
    if config.label_std is not None:
        return np.where(np.isfinite(found), found, config.label_std)
    remedy = (
        "Join the column with `agiqa store labels`, or give one standard deviation for all items without it, on the "
        "scale of the MOS: --label-std."
    )
    for name, column in zip(config.labels, found.T, strict=True):
        if not np.isfinite(column).any():
            message = (
                f"{location_of(source)}: no std column for {name} (std_{name}), which the loss {config.loss!r} needs: "
                f"the standard deviation of the ratings of each image. {remedy}"
            )
            raise DataError(message)
    rows = np.argwhere(~np.isfinite(found)).tolist()
    if rows:
        problems = [f"{source.items.names[items[row]]!r} has no std of {config.labels[label]}" for row, label in rows]
        error = DataError.from_problems(location_of(source), problems)
        error.add_note(remedy)
        raise error
    return found


def counted_levels(source: FeatureSource, items: NDArray[np.int64], name: str) -> Array:
    """The share of ratings on each level, (items, 5), as they were counted. Raises DataError without counts."""
    recorded = source.items.counts if isinstance(source.items, Counted) else {}
    remedy = "Join them with `agiqa store labels`, or use `soft_labels` gaussian."
    columns = [f"{name}_{level}" for level in range(1, LEVELS + 1)]
    if not {*columns} <= {*recorded}:
        message = (
            f"{location_of(source)}: no counts of ratings for {name} (count_{name}_1 to count_{name}_{LEVELS}), which "
            f"`soft_labels` counts needs. {remedy}"
        )
        raise DataError(message)
    counts = np.stack([np.asarray(recorded[column], np.float64)[items] for column in columns], axis=1)
    totals = counts.sum(axis=1)
    missing = np.flatnonzero(~(totals > 0.0))
    if len(missing):
        problems = [f"{source.items.names[items[row]]!r} has no counts of {name}" for row in missing.tolist()]
        error = DataError.from_problems(location_of(source), problems)
        error.add_note(remedy)
        raise error
    return np.asarray(counts / totals[:, None])


def soft_labels(
    source: FeatureSource, items: NDArray[np.int64], labels: Array, config: TrainConfig, levels: Array
) -> Array:
    """The share of ratings on each level, (items, labels, 5), as `config.soft_labels` says.

    `labels` (items, labels) are the MOS, `levels` (labels, 5) the values of the levels. Raises DataError as
    `label_deviations` and `counted_levels`, and for counts whose mean is not the MOS.
    """
    if config.soft_labels == "gaussian":
        deviations = label_deviations(source, items, config)
        columns = zip(labels.T, deviations.T, levels, strict=True)
        return np.stack([gaussian_levels(mos, std, values) for mos, std, values in columns], axis=1)
    found: list[Array] = []
    for name, mos, values in zip(config.labels, labels.T, levels, strict=True):
        shares = counted_levels(source, items, name)
        _check_means(source, items, name, shares @ values, mos, values)
        found.append(shares)
    return np.stack(found, axis=1)


def _check_means(
    source: FeatureSource, items: NDArray[np.int64], name: str, means: Array, mos: Array, levels: Array
) -> None:
    """Raise DataError where the mean of the counted ratings is not the MOS."""
    far = np.flatnonzero(np.abs(means - mos) > _FARTHEST_MEAN * (levels[-1] - levels[0]))
    if len(far):
        first = int(far[0])
        message = (
            f"{location_of(source)}: the counts of {name} contradict its MOS on {len(far)} of {len(items)} items: "
            f"{source.items.names[items[first]]!r} has the MOS {mos[first]:.4g}, and its counts have the mean "
            f"{means[first]:.4g} on levels from {levels[0]:g} to {levels[-1]:g}. Record the scale of the ratings with "
            "`agiqa store labels STORE TABLE --mos-range LOW HIGH`, or use `soft_labels` gaussian."
        )
        raise DataError(message)
