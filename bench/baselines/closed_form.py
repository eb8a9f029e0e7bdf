"""Ridge and kernel ridge regression in closed form, whose settings a cross-validation within the known items chooses.

The folds of the cross-validation share no group, such as a prompt, and its mean squared error decides.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import euclidean_distances
from sklearn.model_selection import GroupKFold

from agiqa.errors import DataError

Array = NDArray[np.float64]
Groups = NDArray[np.int64]

RIDGE, KERNEL_RIDGE = "ridge", "kernel ridge"
STRENGTHS = np.logspace(-1, 5, 13)
"""Of a ridge: text and one-hot vectors have length 1, standardised features as many as channels."""
KERNEL_STRENGTHS = np.logspace(-1.5, 0.5, 5)
"""Of a kernel ridge, as multiples of the spread of its kernel: 1, which it is on the diagonal, minus its mean.

A wide kernel hardly falls off between two items, and the same strength would smooth it more than a narrow one.
"""
WIDTHS = (0.5, 1.0, 2.0)
"""Of the kernel, as multiples of the median distance between known items."""
KERNEL_ITEMS = 5_000
"""More known items have no kernel ridge: its time grows with their third power."""

_FOLDS = 5


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A kind of regression with settings, and how well a cross-validation found it to do."""

    kind: str
    """RIDGE or KERNEL_RIDGE."""
    strength: float
    """For KERNEL_RIDGE as a multiple of the spread of the kernel."""
    width: float | None
    """Of the kernel, as a multiple of the median distance between known items; None for RIDGE."""
    inner_rmse: float
    """Root mean squared error of the cross-validation, on the scale of the MOS."""
    at_edge: tuple[str, ...]
    """Which of `strength` and `width` is the first or the last that was tried: a further one may do better."""

    def record(self) -> dict[str, Any]:
        """What a result line tells of it, ready for JSON."""
        width = {} if self.width is None else {"width": self.width}
        told = {"regression": self.kind, "strength": self.strength, **width, "inner_rmse": self.inner_rmse}
        return {**told, "at_edge": list(self.at_edge)}

    def predict(self, known: Any, mos: Array, unknown: Any) -> Array:
        """Predictions for the rows of `unknown` by a fit to all rows of `known`."""
        if self.width is None:
            return np.asarray(Ridge(alpha=self.strength).fit(known, mos).predict(unknown), dtype=np.float64)
        squares = euclidean_distances(known, squared=True)
        scale, mean = self.width * _median_distance(squares), float(mos.mean())
        kernel = _gaussian(squares, scale)
        alpha = _alpha(self.strength * _spread(kernel))
        model = KernelRidge(alpha=alpha, kernel="precomputed").fit(kernel, mos - mean)
        beside = _gaussian(euclidean_distances(unknown, known, squared=True), scale)
        return np.asarray(model.predict(beside), dtype=np.float64) + mean


def best_ridge(known: Any, mos: Array, groups: Groups) -> Regression:
    """The ridge regression, with an intercept, on the rows of `known`, dense or sparse.

    Its strength is one of STRENGTHS. Raises DataError for fewer than two groups.
    """
    errors = np.zeros(len(STRENGTHS))
    for kept, held in _folds(groups):
        model = Ridge(alpha=_alpha(STRENGTHS)).fit(known[kept], _repeated(mos[kept], STRENGTHS))
        errors += np.square(model.predict(known[held]) - mos[held, None]).sum(axis=0)
    chosen = int(errors.argmin())
    return Regression(
        kind=RIDGE,
        strength=float(STRENGTHS[chosen]),
        width=None,
        inner_rmse=math.sqrt(errors[chosen] / len(mos)),
        at_edge=_edges(strength=(chosen, len(STRENGTHS))),
    )


def best_kernel_ridge(known: Array, mos: Array, groups: Groups) -> Regression:
    """The ridge regression with a Gaussian kernel, exp(-d^2 / 2 s^2), on the rows of `known`; MOS minus their mean.

    Its strength is one of KERNEL_STRENGTHS times the spread of the kernel; s is one of WIDTHS times the median distance
    d between two rows. Raises DataError for fewer than two groups, more than KERNEL_ITEMS rows, and a median distance
    of zero.
    """
    if len(known) > KERNEL_ITEMS:
        message = (
            f"kernel ridge is not tried on more than {KERNEL_ITEMS:,} training items, and there are {len(known):,}"
        )
        raise DataError(message)
    squares = euclidean_distances(known, squared=True)
    median = _median_distance(squares)
    if median == 0:
        message = "kernel ridge is not tried: half of all pairs of training items, or more, have equal features"
        raise DataError(message)
    folds = _folds(groups)
    errors = np.zeros((len(WIDTHS), len(KERNEL_STRENGTHS)))
    for of_width, width in zip(errors, WIDTHS, strict=True):
        kernel = _gaussian(squares, width * median)
        alpha = _alpha(KERNEL_STRENGTHS * _spread(kernel))
        for kept, held in folds:
            mean = mos[kept].mean()
            model = KernelRidge(alpha=alpha, kernel="precomputed")
            model.fit(kernel[np.ix_(kept, kept)], _repeated(mos[kept] - mean, KERNEL_STRENGTHS))
            missed = model.predict(kernel[np.ix_(held, kept)]) + mean - mos[held, None]
            of_width += np.square(missed).sum(axis=0)
    width, strength = (int(place) for place in np.unravel_index(errors.argmin(), errors.shape))
    return Regression(
        kind=KERNEL_RIDGE,
        strength=float(KERNEL_STRENGTHS[strength]),
        width=WIDTHS[width],
        inner_rmse=math.sqrt(errors[width, strength] / len(mos)),
        at_edge=_edges(strength=(strength, len(KERNEL_STRENGTHS)), width=(width, len(WIDTHS))),
    )


def _folds(groups: Groups) -> Sequence[tuple[Groups, Groups]]:
    """The kept and the held items of each fold. Raises DataError for fewer than two groups."""
    count = len(np.unique(groups))
    if count < 2:
        message = "the strength of a ridge is chosen by prompt, and the training items have one prompt only"
        raise DataError(message)
    return list(GroupKFold(min(_FOLDS, count)).split(groups, groups=groups))


def _alpha(strength: float | Array) -> Any:
    """One strength, or one for each column of the targets, neither of which the annotations of `alpha` tell."""
    return strength


def _repeated(mos: Array, strengths: Array) -> Array:
    return np.repeat(mos[:, None], len(strengths), axis=1)


def _median_distance(squares: Array) -> float:
    """The median distance between two different rows, from the squared distances of all."""
    return math.sqrt(float(np.median(squares[np.triu_indices(len(squares), 1)])))


def _gaussian(squares: Array, scale: float) -> Array:
    return np.exp(squares / (-2 * scale * scale))


def _spread(kernel: Array) -> float:
    return 1 - float(kernel.mean())


def _edges(**chosen: tuple[int, int]) -> tuple[str, ...]:
    """The names of the settings, each given as its place and how many were tried, that are the first or the last."""
    return tuple(name for name, (place, count) in chosen.items() if place in (0, count - 1))
