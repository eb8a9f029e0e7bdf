"""The cluster bootstrap of the four metrics, for all resamples at once.

A resample that draws whole groups is a weight per group, so nothing is ever repeated in memory: RMSE and PLCC
are weighted moments, SRCC is the PLCC of weighted mid-ranks, and KRCC (tau-b) is a ratio of quadratic forms in
the weights, whose matrices of pair counts are summed by group once. Equal to scoring the repeated items.
"""

import numpy as np
from numpy.typing import NDArray

_WEIGHTS_AT_ONCE = 2_000_000
_PAIRS_AT_ONCE = 4_000_000

Array = NDArray[np.float64]


def bootstrap_metrics(
    predicted: Array, labels: Array, groups: NDArray[np.int64], *, seed: int, resamples: int
) -> Array:
    """SRCC, PLCC, KRCC and RMSE (resamples, 4), NaN where a resample has no correlation.

    `groups` numbers the group of each item from 0, without gaps; there is one item or more.
    """
    count = int(groups.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    order = np.argsort(groups, kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    agree, differ_a, differ_b = _pair_sums(predicted[order], labels[order], starts)
    pieces = -(-resamples * len(labels) // _WEIGHTS_AT_ONCE)
    results = [
        _score_weighted(predicted, labels, draws[:, groups], draws, (agree, differ_a, differ_b))
        for draws in np.array_split(drawn.astype(np.float64), pieces)
    ]
    return np.concatenate(results)


def _score_weighted(
    predicted: Array, labels: Array, weights: Array, draws: Array, pairs: tuple[Array, Array, Array]
) -> Array:
    """The metrics (resamples, 4) of items with `weights` (resamples, items) and groups with `draws`."""
    agree, differ_a, differ_b = (np.einsum("rg,rg->r", draws @ matrix, draws) for matrix in pairs)
    defined = (differ_a > 0) & (differ_b > 0)
    results = np.full((len(draws), 4), np.nan)
    results[:, 3] = np.sqrt(weights @ np.square(predicted - labels) / weights.sum(1))
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
