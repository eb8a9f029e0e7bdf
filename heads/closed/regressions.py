"""Ridge and kernel ridge on one vector per item, with settings that a cross-validation over prompts chooses.

The folds share no group, such as a prompt, and the mean squared error decides. Dense vectors are solved exactly, in
float64, on any device; sparse ones by scikit-learn's iterative solver.

ridge         min_b sum_i w_i (y_i - b0 - x_i b)^2 + strength |b|^2
kernel ridge  y = mean + K a with (K + strength W^-1) a = y - mean; Saunders et al. 1998
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse import issparse
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from torch import Tensor

from agiqa.errors import ConfigError, DataError
from agiqa.heads.data.keeping import available_memory

Array = NDArray[np.float64]
Positions = NDArray[np.int64]
Folds = Sequence[tuple[Positions, Positions]]
"""The kept and the held items of each fold."""

RIDGE, KERNEL_RIDGE = "ridge", "kernel ridge"
STRENGTHS: Array = np.logspace(-1, 5, 13)
"""Strengths of a ridge: text and one-hot vectors have length 1, standardised features one per channel."""
KERNEL_STRENGTHS: Array = np.logspace(-1.5, 0.5, 5)
"""Strengths of a kernel ridge, as multiples of the spread of its kernel: 1 (its diagonal) minus its mean.

Without the spread, the same strength would smooth a wide kernel more than a narrow one.
"""
WIDTHS = (0.5, 1.0, 2.0)
"""Widths of the kernel, as multiples of the median distance between known items."""
MOST_ITEMS = 20_000
"""Most known items of a kernel matrix, which then takes 3.2 GB, twice while it is solved."""
MOST_TO_CHOOSE_BY = 5_000
"""Settings of larger kernel matrices are chosen on so many items, since the time grows with their third power."""
INNER_FOLDS = 5
_MOVES = (((0, -1), (0, 1)), ((-1, 0), (1, 0)), ((-1, -1), (-1, 1), (1, -1), (1, 1)))
"""Steps of a walk, in the order of trial: along a row first, since another width needs another kernel."""
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A fitted linear function."""

    weights: Array
    """(channels,)."""
    intercept: float

    def predict(self, rows: Any) -> Array:
        """Of rows (items, channels), dense or sparse."""
        return np.asarray(rows @ self.weights + self.intercept, dtype=np.float64)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A fitted sum of Gaussian bumps, exp(-d^2 / 2 scale^2), one around each known item, and a constant."""

    known: Array
    """(known items, channels)."""
    dual: Array
    """The height of each bump, (known items,)."""
    scale: float
    mean: float

    def predict(self, rows: Array) -> Array:
        """Of rows (items, channels)."""
        beside = gaussian(squared_distances(_tensor(rows), _tensor(self.known)), self.scale)
        return (beside @ _tensor(self.dual)).numpy() + self.mean


@dataclass(frozen=True, kw_only=True)
class Regression:
    """A kind of regression with its settings, and its error in cross-validation."""

    kind: str
    """RIDGE or KERNEL_RIDGE."""
    strength: float
    """For KERNEL_RIDGE as a multiple of the spread of the kernel."""
    width: float | None
    """Of the kernel, as a multiple of the median distance between known items; None for RIDGE."""
    inner_rmse: float
    """Root mean squared error of the cross-validation, on the scale of the MOS; NaN where nothing was chosen."""
    at_edge: tuple[str, ...]
    """Which of `strength` and `width` is at an end of the values tried, so that a value beyond may be better."""

    def record(self) -> dict[str, Any]:
        """The facts for a result line, ready for JSON."""
        width = {} if self.width is None else {"width": self.width}
        rmse = None if math.isnan(self.inner_rmse) else self.inner_rmse
        facts = {"regression": self.kind, "strength": self.strength, **width, "inner_rmse": rmse}
        return {**facts, "at_edge": list(self.at_edge)}

    @classmethod
    def of_record(cls, facts: Mapping[str, Any]) -> "Regression":
        """The regression whose `record` is `facts`."""
        return cls(
            kind=facts["regression"],
            strength=facts["strength"],
            width=facts.get("width"),
            inner_rmse=math.nan if facts["inner_rmse"] is None else facts["inner_rmse"],
            at_edge=tuple(facts["at_edge"]),
        )

    def fit(
        self, known: Any, mos: Array, *, weights: Array | None = None, device: torch.device = _CPU
    ) -> Linear | Kernel:
        """The function fitted to all rows of `known`. Raises as `median_distance` and `check_kernel_size`."""
        if issparse(known):
            unequal = None if weights is None or (weights == 1).all() else weights
            model = Ridge(alpha=_alpha(self.strength)).fit(known, mos, sample_weight=unequal)
            return Linear(weights=np.asarray(model.coef_, np.float64), intercept=float(np.asarray(model.intercept_)))
        rows, values = _tensor(known, device), _tensor(mos, device)
        weighing = torch.ones_like(values) if weights is None else _tensor(weights, device)
        if self.width is None:
            return _fit_ridge(rows, values, weighing, self.strength)
        check_kernel_size(len(mos), device)
        scale, mean = self.width * median_distance(known), float(weighing @ values / weighing.sum())
        kernel = squared_distances(rows, rows).div_(-2 * scale * scale).exp_()  # in place: it may take gigabytes
        kernel.diagonal().add_(self.strength * (1 - float(kernel.mean())) / weighing)
        dual = torch.cholesky_solve((values - mean)[:, None], torch.linalg.cholesky(kernel))[:, 0]
        return Kernel(known=np.asarray(known, np.float64), dual=dual.cpu().numpy(), scale=scale, mean=mean)

    def predict(self, known: Any, mos: Array, unknown: Any) -> Array:
        """Predictions for the rows of `unknown` by a fit to all rows of `known`."""
        return self.fit(known, mos).predict(unknown)


def best_ridge(
    known: Any,
    mos: Array,
    groups: Positions,
    *,
    weights: Array | None = None,
    folds: int = INNER_FOLDS,
    device: torch.device = _CPU,
    strengths: Array = STRENGTHS,
) -> Regression:
    """The ridge regression, with an intercept, on the rows of `known`, dense or sparse.

    Its strength is one of `strengths`. `weights` are those of the items, equal if absent. Raises DataError for fewer
    than two groups.
    """
    parts, weighing = inner_folds(groups, folds), np.ones(len(mos)) if weights is None else weights
    if issparse(known):
        errors = _sparse_errors(known, mos, weighing, parts, strengths)
    else:
        errors = _ridge_errors(_tensor(known, device), mos, weighing, parts, strengths)
    chosen = int(errors.argmin())
    return Regression(
        kind=RIDGE,
        strength=float(strengths[chosen]),
        width=None,
        inner_rmse=math.sqrt(errors[chosen] / weighing.sum()),
        at_edge=_edges(strength=(chosen, len(strengths))),
    )


def best_kernel_ridge(
    known: Array,
    mos: Array,
    groups: Positions,
    *,
    weights: Array | None = None,
    folds: int = INNER_FOLDS,
    device: torch.device = _CPU,
    widths: Sequence[float] = WIDTHS,
    strengths: Array = KERNEL_STRENGTHS,
) -> Regression:
    """The ridge regression with a Gaussian kernel, exp(-d^2 / 2 s^2), on the rows of `known`; MOS minus their mean.

    Its strength is one of `strengths` times the spread of the kernel; s is one of `widths` times the median distance
    d between two rows. Raises DataError for fewer than two groups and a median distance of zero, and ConfigError for
    more items than a kernel matrix holds.
    """
    check_kernel_size(len(known), device)
    median, weighing = median_distance(known), np.ones(len(mos)) if weights is None else weights
    parts, rows = inner_folds(groups, folds), _tensor(known, device)
    squares = squared_distances(rows, rows)
    kernels: dict[int, Tensor] = {}  # the latest one only: it may take gigabytes

    def errors(width: int, strength: int) -> float:
        if width not in kernels:
            kernels.clear()
            kernels[width] = gaussian(squares, widths[width] * median)
        scaled = strengths[[strength]] * (1 - float(kernels[width].mean()))
        return float(_kernel_errors(kernels[width], mos, weighing, parts, scaled, centre=False)[0])

    (width, strength), least = lowest(errors, (len(widths), len(strengths)))
    return Regression(
        kind=KERNEL_RIDGE,
        strength=float(strengths[strength]),
        width=widths[width],
        inner_rmse=math.sqrt(least / weighing.sum()),
        at_edge=_edges(strength=(strength, len(strengths)), width=(width, len(widths))),
    )


def lowest(errors: Callable[[int, int], float], shape: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """The place of the lowest of `errors` on a grid, and its value, by walking downhill from the middle.

    A step goes to one of the eight neighbours; along a slanting valley, such as that of wide kernels with weak
    penalties, four are not enough. A walk meets about a third of a grid of 4 x 8.
    """
    known: dict[tuple[int, int], float] = {}

    def at(place: tuple[int, int]) -> float:
        if place not in known:
            known[place] = errors(*place)
        return known[place]

    here, is_lowest = (shape[0] // 2, shape[1] // 2), False
    while not is_lowest:
        for moves in _MOVES:
            beside = [(here[0] + across, here[1] + along) for across, along in moves]
            best = min(
                [here, *(place for place in beside if 0 <= place[0] < shape[0] and 0 <= place[1] < shape[1])], key=at
            )
            is_lowest = best == here
            if not is_lowest:
                here = best
                break
    return here, at(here)


def inner_folds(groups: Positions, folds: int = INNER_FOLDS) -> Folds:
    """The kept and the held items of each fold. Raises DataError for fewer than two groups."""
    count = len(np.unique(groups))
    if count < 2:
        message = "the strength of a ridge is chosen by prompt, and the training items have one prompt only"
        raise DataError(message)
    return list(GroupKFold(min(folds, count)).split(groups, groups=groups))


def some_groups(groups: Positions, most: int, seed: int = 0) -> Positions:
    """The items of whole groups in random order, as many as `most` allows; all items where they are no more."""
    if len(groups) <= most:
        return np.arange(len(groups))
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(names))
    taken = order[np.cumsum(sizes[order]) <= most]
    return np.flatnonzero(np.isin(numbers, taken))


def check_kernel_size(items: int, device: torch.device) -> None:
    """Raise ConfigError where the kernel matrix of so many items is too large, or does not fit into the memory."""
    too_large = kernel_too_large(items, device)
    if too_large is not None:
        message = (
            f"A kernel ridge cannot be fitted: {too_large}. Use the encoder 'ridge', or draw fewer by `training_items`."
        )
        raise ConfigError(message)


def kernel_too_large(items: int, device: torch.device) -> str | None:
    """Why a kernel ridge cannot be fitted to so many items; None where it can."""
    needed, free = 2 * 8 * items * items, available_memory(device)
    if items > MOST_ITEMS:
        return f"its kernel matrix holds at most {MOST_ITEMS:,} training items, and there are {items:,}"
    if needed > free:
        matrix = f"its kernel matrix of {items:,} training items"
        return f"{matrix} needs {needed / 1e9:.1f} GB of {device}, and {free / 1e9:.1f} GB are free"
    return None


def squared_distances(rows: Float[Tensor, "a channel"], others: Float[Tensor, "b channel"]) -> Float[Tensor, "a b"]:
    """Squared Euclidean distances; exactly 0 between a row and itself where both are the same tensor."""
    squares = rows @ others.T
    squares.mul_(-2).add_(rows.square().sum(1)[:, None]).add_(others.square().sum(1)).clamp_(min=0)
    if rows is others:
        squares.fill_diagonal_(0)
    return squares


def gaussian(squares: Float[Tensor, "a b"], scale: float) -> Float[Tensor, "a b"]:
    """exp(-d^2 / 2 scale^2)."""
    return squares.div(-2 * scale * scale).exp_()


def median_distance(known: Array) -> float:
    """The median distance between two different rows; of the first rows and some in between where there are many.

    Raises DataError where it is zero, which is no width of a kernel.
    """
    rows = _tensor(known[:: -(-len(known) // MOST_TO_CHOOSE_BY)])
    squares = squared_distances(rows, rows).numpy()
    median = math.sqrt(float(np.median(squares[np.triu_indices(len(squares), 1)])))
    if median == 0:
        message = "kernel ridge is not tried: half of all pairs of training items, or more, have equal features"
        raise DataError(message)
    return median


def _fit_ridge(rows: Tensor, values: Tensor, weights: Tensor, strength: float) -> Linear:
    """The ridge regression on all rows."""
    shares = weights / weights.sum()
    centre, mean = shares @ rows, shares @ values
    centred = rows - centre
    if len(rows) <= rows.shape[1]:
        dual = _solve(centred @ centred.T, (values - mean)[:, None], strength, weights)
        found = (centred.T @ dual)[:, 0]
    else:
        weighted = centred * weights[:, None]
        found = _solve(centred.T @ weighted, (weighted.T @ (values - mean))[:, None], strength)[:, 0]
    return Linear(weights=found.cpu().numpy(), intercept=float(mean - centre @ found))


def _ridge_errors(rows: Tensor, mos: Array, weights: Array, folds: Folds, strengths: Array) -> Array:
    """The sum of squared errors over all held items, for each of `strengths`."""
    if len(rows) <= rows.shape[1]:
        return _kernel_errors(rows @ rows.T, mos, weights, folds, strengths, centre=True)
    values, weighing = _tensor(mos, rows.device), _tensor(weights, rows.device)
    gram = rows.T @ (rows * weighing[:, None])
    errors = np.zeros(len(strengths))
    for kept, held in _on(folds, rows.device):
        of_fold, total = rows[held], weighing[kept].sum()
        centre, mean = weighing[kept] @ rows[kept] / total, weighing[kept] @ values[kept] / total
        matrix = gram - of_fold.T @ (of_fold * weighing[held, None]) - total * centre[:, None] * centre
        right = rows[kept].T @ (weighing[kept] * (values[kept] - mean))
        for number, strength in enumerate(strengths.tolist()):
            found = _solve(matrix, right[:, None], strength)[:, 0]
            missed = (of_fold - centre) @ found + mean - values[held]
            errors[number] += float(weighing[held] @ missed.square())
    return errors


def _kernel_errors(
    kernel: Tensor, mos: Array, weights: Array, folds: Folds, strengths: Array, *, centre: bool
) -> Array:
    """The sum of squared errors over all held items, for each of `strengths`, from the kernel matrix of all items.

    `centre` centres the kernel on the kept items, which is what the intercept of a ridge does.
    """
    values, weighing = _tensor(mos, kernel.device), _tensor(weights, kernel.device)
    errors = np.zeros(len(strengths))
    for kept, held in _on(folds, kernel.device):
        shares = weighing[kept] / weighing[kept].sum()
        inside, beside = kernel[kept[:, None], kept], kernel[held[:, None], kept]
        if centre:
            means = inside @ shares
            beside = beside - (beside @ shares)[:, None] - means + shares @ means
            inside = inside - means[:, None] - means + shares @ means
        mean = shares @ values[kept]
        for number, strength in enumerate(strengths.tolist()):
            dual = _solve(inside, (values[kept] - mean)[:, None], strength, weighing[kept])[:, 0]
            missed = beside @ dual + mean - values[held]
            errors[number] += float(weighing[held] @ missed.square())
    return errors


def _sparse_errors(known: Any, mos: Array, weights: Array, folds: Folds, strengths: Array) -> Array:
    """The sum of squared errors over all held items, for each of `strengths`."""
    errors = np.zeros(len(strengths))
    for kept, held in folds:
        repeated = np.repeat(mos[kept, None], len(strengths), axis=1)
        weighing = None if (weights == 1).all() else weights[kept]
        model = Ridge(alpha=_alpha(strengths)).fit(known[kept], repeated, sample_weight=weighing)
        errors += weights[held] @ np.square(model.predict(known[held]).reshape(len(held), -1) - mos[held, None])
    return errors


def _solve(matrix: Tensor, right: Tensor, strength: float, weights: Tensor | None = None) -> Tensor:
    """The solution of (matrix + strength diag(1 / weights)) x = right, by Cholesky."""
    penalised = matrix.clone()
    penalised.diagonal().add_(strength if weights is None else strength / weights)
    return torch.cholesky_solve(right, torch.linalg.cholesky(penalised))


def _on(folds: Folds, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for kept, held in folds:
        yield torch.from_numpy(kept).to(device), torch.from_numpy(held).to(device)


def _tensor(values: Array, device: torch.device = _CPU) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float64)).to(device)


def _alpha(strength: float | Array) -> Any:
    """`strength`, one or one for each column of the targets; the annotations of `alpha` allow neither."""
    return strength


def _edges(**chosen: tuple[int, int]) -> tuple[str, ...]:
    """The names of the settings that are the first or the last of `count` values tried."""
    return tuple(name for name, (place, count) in chosen.items() if count > 1 and place in (0, count - 1))
