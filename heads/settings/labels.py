"""The labels that a head learns: one, such as `quality`, or several joined by `+`, as `quality+correspondence`.

Arrays of several items have a column per label, in that order, also where there is one. What is told to people and
written to files is plain for one label, and per name for several.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError

Array = NDArray[np.float64]


def parse_labels(label: str) -> tuple[str, ...]:
    """The names that `label` joins, in its order. Raises ConfigError for a name that is empty or there twice."""
    names = tuple(name.strip() for name in label.split("+"))
    if not all(names):
        message = f"The label {label!r} has an empty part. Write a name, or several as in 'quality+correspondence'."
        raise ConfigError(message)
    if len(set(names)) < len(names):
        message = f"The label {label!r} has a name twice. Write each once, as in 'quality+correspondence'."
        raise ConfigError(message)
    return names


def columns(values: Array) -> list[Array]:
    """The column (items,) of each label, in memory as that of a label alone, so that its numbers are the same."""
    return list(np.ascontiguousarray(values.T))


def plain(values: Array) -> Array:
    """The values (items, labels) as they are handed out: (items,) for one label."""
    return values[:, 0] if values.shape[1] == 1 else values


def by_label(labels: Sequence[str], results: Sequence[Any]) -> Any:
    """The result of the only label as it is, or a dict with that of each label under its name."""
    return results[0] if len(labels) == 1 else dict(zip(labels, results, strict=True))


def of_each_label(labels: Sequence[str], told: Any) -> list[Any]:
    """The results that `by_label` put together. Raises KeyError or TypeError for what it did not make."""
    return [told] if len(labels) == 1 else [told[label] for label in labels]


def column_names(labels: Sequence[str], what: str) -> list[str]:
    """What a table calls the columns of `what`: `what` for one label, else `what_LABEL` for each."""
    return [what] if len(labels) == 1 else [f"{what}_{label}" for label in labels]


def pair_names(labels: Sequence[str]) -> list[tuple[str, str]]:
    """What a table calls the two columns of each label, true and predicted MOS."""
    return list(zip(*(column_names(labels, what) for what in ("mos", "predicted")), strict=True))


def side_by_side(labels: Sequence[str], mos: Array, predicted: Array) -> tuple[list[str], list[list[float]]]:
    """A table of true and predicted MOS (items, labels): its titles, the two of each label, and a row for each item."""
    titles = [title for pair in pair_names(labels) for title in pair]
    return titles, np.stack([mos, predicted], axis=2).reshape(len(mos), len(titles)).tolist()
