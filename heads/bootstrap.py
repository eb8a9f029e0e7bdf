"""The cluster bootstrap of the metrics, for all resamples at once.

A resample that draws whole groups is a weight per group, so nothing is ever repeated in memory: RMSE and PLCC
are weighted moments, SRCC is the PLCC of weighted mid-ranks, and KRCC (tau-b) is a ratio of quadratic forms in
the weights, whose matrices of pair counts are summed by group once. Equal to scoring the repeated items.
One seed draws the same groups for every metric.
"""

from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

FEWEST_GROUPS = 5
"""Four groups make 35 different resamples, too few for one in forty to lie beyond each end of a 95% interval."""
_WEIGHTS_AT_ONCE = 2_000_000
_PAIRS_AT_ONCE = 4_000_000

Array = NDArray[np.float64]


def group_count(groups: NDArray[np.int64]) -> int:
    """How many groups there are; `groups` numbers the group of each of one or more items from 0, without gaps."""
    return int(groups.max()) + 1


def draw_groups(groups: NDArray[np.int64], *, seed: int, resamples: int) -> Array:
    """How often each resample draws each group (resamples, groups): as many draws as there are groups.

    `groups` as of `group_count`.
    """
    count = group_count(groups)
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return drawn.astype(np.float64)


def interval(values: Array, confidence: float, *, groups: NDArray[np.int64]) -> list[float] | None:
    """Percentiles over the resamples in which a metric is defined (not NaN); None when it is so in none.

    None too where there are fewer than `FEWEST_GROUPS` groups to draw from; `groups` as of `group_count`.
    """
    defined = values[np.isfinite(values)]
    if not len(defined) or group_count(groups) < FEWEST_GROUPS:
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return [float(low), float(high)]


def bootstrap_metrics(
    predicted: Array, labels: Array, groups: NDArray[np.int64], *, seed: int, resamples: int
) -> Array:
    """SRCC, PLCC, KRCC and RMSE (resamples, 4), NaN where a resample has no correlation; `groups` as `draw_groups`."""
    drawn = draw_groups(groups, seed=seed, resamples=resamples)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    pairs = _pair_sums(predicted[order], labels[order], starts)
    results = [
        _score_weighted(predicted, labels, draws[:, groups], draws, pairs) for draws in _pieces(drawn, len(labels))
    ]
    return np.concatenate(results)


def bootstrap_linear(predicted: Array, labels: Array, groups: NDArray[np.int64], *, seed: int, resamples: int) -> Array:
    """PLCC and RMSE alone (resamples, 2), of the same resamples as `bootstrap_metrics`."""
    results: list[Array] = []
    for draws in _pieces(draw_groups(groups, seed=seed, resamples=resamples), len(labels)):
        weights = draws[:, groups]
        defined = _varies(predicted, weights) & _varies(labels, weights)
        result = np.full((len(draws), 2), np.nan)
        result[defined, 0] = _pearson(predicted[None], labels[None], weights[defined])
        result[:, 1] = _rmse(predicted, labels, weights)
        results.append(result)
    return np.concatenate(results)


def _pieces(drawn: Array, items: int) -> Generator[Array]:
    """The resamples in pieces whose weights by item are small enough to hold."""
    yield from np.array_split(drawn, -(-len(drawn) * items // _WEIGHTS_AT_ONCE))


def _score_weighted(
    predicted: Array, labels: Array, weights: Array, draws: Array, pairs: tuple[Array, Array, Array]
) -> Array:
    """The metrics (resamples, 4) of items with `weights` (resamples, items) and groups with `draws`."""
    agree, differ_a, differ_b = (np.einsum("rg,rg->r", draws @ matrix, draws) for matrix in pairs)
    defined = (differ_a > 0) & (differ_b > 0)
    results = np.full((len(draws), 4), np.nan)
    results[:, 3] = _rmse(predicted, labels, weights)
    some = weights[defined]
    results[defined, 0] = _pearson(_ranks(predicted, some), _ranks(labels, some), some)
    results[defined, 1] = _pearson(predicted[None], labels[None], some)
    results[defined, 2] = agree[defined] / np.sqrt(differ_a[defined] * differ_b[defined])
    return results


def _pair_sums(a: Array, b: Array, starts: NDArray[np.intp]) -> tuple[Array, Array, Array]:
    """Sums over pairs of items, by pair of groups: sign(a) sign(b), |sign(a)|, |sign(b)| of the differences.

    Items are sorted by group; `starts` is where each group begins.
    """
    rows = max(1, _PAIRS_AT_ONCE // len(a))
    sums = np.zeros((3, len(a), len(starts)))
    for start in range(0, len(a), rows):
        part = slice(start, start + rows)
        sign_a = np.sign(a[part, None] - a)
        sign_b = np.sign(b[part, None] - b)
        for k, pairs in enumerate((sign_a * sign_b, np.abs(sign_a), np.abs(sign_b))):
            sums[k, part] = np.add.reduceat(pairs, starts, axis=1)
    agree, differ_a, differ_b = np.add.reduceat(sums, starts, axis=1)
    return agree, differ_a, differ_b


def _rmse(predicted: Array, labels: Array, weights: Array) -> Array:
    """Root of the weighted mean square error (resamples,)."""
    return np.asarray(np.sqrt(weights @ np.square(predicted - labels) / weights.sum(1)))


def _varies(values: Array, weights: Array) -> NDArray[np.bool_]:
    """Whether the values that a resample draws (resamples, items) are not all equal (resamples,)."""
    drawn = weights > 0
    return np.asarray(np.where(drawn, values, -np.inf).max(1) > np.where(drawn, values, np.inf).min(1))


def _ranks(values: Array, weights: Array) -> Array:
    """Mid-ranks (resamples, items) of values that occur as often as their weights say."""
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    ties = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(ties, axis=1) - ties + (ties + 1.0) / 2.0
    inverse = np.searchsorted(values[order][starts], values)
    return np.asarray(ranks[:, inverse])


def _pearson(a: Array, b: Array, weights: Array) -> Array:
    """Weighted correlation (resamples,) of two arrays (resamples or 1, items)."""
    total = weights.sum(1, keepdims=True)
    a = a - (weights * a).sum(1, keepdims=True) / total
    b = b - (weights * b).sum(1, keepdims=True) / total
    spread = np.sqrt((weights * a * a).sum(1) * (weights * b * b).sum(1))
    return np.asarray(np.clip((weights * a * b).sum(1) / spread, -1.0, 1.0))
