"""The labels that a head learns: one, such as `quality`, or several joined by `+`, as `quality+correspondence`.

Arrays of items have a column per label, in that order, even for one label. Results for people and files are plain for
one label, and keyed by name for several.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError

Array = NDArray[np.float64]


def parse_labels(label: str) -> tuple[str, ...]:
    """The names that `label` joins, in its order. Raises ConfigError for an empty or repeated name."""
    names = tuple(name.strip() for name in label.split("+"))
    if not all(names):
        message = f"The label {label!r} has an empty part. Write a name, or several as in 'quality+correspondence'."
        raise ConfigError(message)
    if len(set(names)) < len(names):
        message = f"The label {label!r} has a name twice. Write each once, as in 'quality+correspondence'."
        raise ConfigError(message)
    return names


def columns(values: Array) -> list[Array]:
    """The column (items,) of each label, contiguous, so that sums round as they do for a single label."""
    return list(np.ascontiguousarray(values.T))


def labelled_pairs(values: Array, labels: Array) -> list[tuple[Array, Array]]:
    """For each label its columns of `values` and `labels`, both (items, labels), without the items that lack it."""
    pairs = list(zip(columns(values), columns(labels), strict=True))
    return [(of_label[has], mos[has]) for of_label, mos in pairs for has in (~np.isnan(mos),)]


def without_label_axis(values: Array) -> Array:
    """Values (items, labels) for the caller: (items,) for one label."""
    return values[:, 0] if values.shape[1] == 1 else values


def by_label(labels: Sequence[str], results: Sequence[Any]) -> Any:
    """The result of a single label, or a dict of the results by label."""
    return results[0] if len(labels) == 1 else dict(zip(labels, results, strict=True))


def of_each_label(labels: Sequence[str], results: Any) -> list[Any]:
    """The list that `by_label` combined. Raises KeyError or TypeError for anything else."""
    return [results] if len(labels) == 1 else [results[label] for label in labels]


def column_names(labels: Sequence[str], what: str) -> list[str]:
    """Table columns for `what`: `what` for one label, else `what_LABEL` for each."""
    return [what] if len(labels) == 1 else [f"{what}_{label}" for label in labels]


def side_by_side(
    labels: Sequence[str], mos: Array, predicted: Array, spread: Array | None = None
) -> tuple[list[str], list[list[float | None]]]:
    """Column names and rows of a table of true and predicted MOS and of spreads (items, labels), label by label.

    NaN becomes None, an empty cell: an item lacks this label.
    """
    values = {"mos": mos, "predicted": predicted, **({} if spread is None else {"spread": spread})}
    groups = zip(*(column_names(labels, what) for what in values), strict=True)
    titles = [title for group in groups for title in group]
    rows = np.stack([*values.values()], axis=2).reshape(len(mos), len(titles)).tolist()
    return titles, [[None if math.isnan(value) else value for value in row] for row in rows]
