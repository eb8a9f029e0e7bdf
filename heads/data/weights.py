"""Weights of training items by how far the raters of each disagreed."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.settings.config import TrainConfig

Array = NDArray[np.float64]


@runtime_checkable
class Rated(Protocol):
    """An item table with standard deviations of ratings, as those of stores are."""

    @property
    def deviations(self) -> Mapping[str, NDArray[np.float64]]: ...


def item_weights(source: FeatureSource, items: NDArray[np.int64], labels: Array, config: TrainConfig) -> Array:
    """The weights (items, labels) of training items, of mean 1 over the items that have the label; others have 1.

    `deviation` is 1 / (std^2 + s^2) with the median s of the std of these items. Raises DataError, naming the label or
    the items, where a standard deviation is missing.
    """
    found = np.ones_like(labels)
    if config.weights == "equal":
        return found
    columns = source.items.deviations if isinstance(source.items, Rated) else {}
    for number, name in enumerate(config.labels):
        has = ~np.isnan(labels[:, number])
        if name not in columns:
            message = (
                f"{location_of(source)} has no column std_{name}, which `weights: deviation` needs. Join it with "
                "`agiqa store labels`, or set `weights` to equal."
            )
            raise DataError(message)
        spread = np.asarray(columns[name], dtype=np.float64)[items][has]
        missing = [source.items.names[item] for item in items[has][~np.isfinite(spread)]]
        if missing:
            problems = [f"{one!r} has a {name} MOS and no std_{name}" for one in missing]
            error = DataError.from_problems(location_of(source), problems)
            error.add_note("Set `weights` to equal, or join the deviations with `agiqa store labels`.")
            raise error
        squares = np.square(spread)
        weights = 1 / np.maximum(squares + np.median(spread) ** 2, np.finfo(np.float64).tiny)
        if spread.any():
            found[has, number] = weights / weights.mean()
    return found
