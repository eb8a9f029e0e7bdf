"""How far a metric may be off: standard errors over prompts and training seeds, intervals, and p-values.

Images of one prompt are not independent, so the error over items is that of a jackknife which leaves out whole prompts
(Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11). Heads of other seeds differ too, so the
error of a head that was trained with several seeds has three parts, as prompts and seeds are crossed (Cameron, Gelbach
and Miller, J. of Business & Economic Statistics 29, 2011):

    prompts: jackknife of the mean over seeds
    + seeds: variance over seeds of the metric of all items, by the number of seeds
    - both: jackknife of what sets a seed apart from the mean, which the two above count twice

Quantiles are those of Student's t, whose degrees of freedom come from the parts (Satterthwaite, Biometrics Bulletin 2,
1946). That covers too little for heads of few seeds which differ much, as the variance over them comes out small by
chance too often. So with fewer than 5 seeds the quantile is the mean of those of the parts, each with degrees of
freedom of its own and its share of the variance (Cochran, Biometrics 20, 1964), which errs on the safe side.

`python -m agiqa.bench.measurements.inference` measures what intervals cover and how often p-values err; bench/LOG.md
has the figures, also those of the percentile bootstrap, which is wrong in both for few prompts or seeds. The interval
of RMSE covers .86 to .92 where a few items or one prompt hold much of the squared error, as with errors of Student's t
with 3 degrees of freedom, or a prompt with a fifth of all items; those of correlations cover .93 and more there too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

METRICS = ("srcc", "plcc", "krcc", "rmse")
FEWEST_PROMPTS = {"srcc": 10, "plcc": 10, "krcc": 10, "rmse": 20}
"""With fewer prompts an interval at 95 % covers less than 93 % also where errors are normal, so there is none."""
FEW_PROMPTS = 50
"""With fewer prompts a reader is told how many there are."""
ROUNDING = 1e-12
"""How far apart, as a share of them, two metrics are at least that differ by more than the rounding of sums."""
_TOO_OPEN = "rmse", 2
"""A metric and the number of seeds of which no interval at 95 % covers 93 % where seeds differ much."""
_FEWEST_DOF = 4
"""Of the variance over seeds, for the t of Satterthwaite: 5 seeds."""
_LEAST_TAIL = 1e-200
"""Below it scipy's quantiles of t overflow."""
_BEYOND = 1e-6
"""How far beyond the tails of its parts, as a share of them, a p-value is looked for."""
_MOST_BLOCKS = 1000
_CELLS_AT_ONCE = 100_000

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The variance of an estimate, NaN where it is not known, and what it is made of."""

    variance: float
    parts: tuple[tuple[float, float], ...]
    """Variance and degrees of freedom of prompts, then of the seeds of each side; what prompts and seeds both count is
    not taken off."""

    def interval(self, estimate: float, confidence: float) -> list[float] | None:
        """The symmetric interval around `estimate`; None where one of the two is not known."""
        if not math.isfinite(estimate + self.variance):
            return None
        reach = self._quantile(confidence) * math.sqrt(self.variance)
        return [estimate - reach, estimate + reach]

    def metric_interval(self, estimate: float, metric: str, confidence: float) -> list[float] | None:
        """The interval of a metric: of a correlation on Fisher's z scale, of RMSE on the scale of 1 / RMSE.

        There the estimates are nearer to a normal distribution; the standard error is carried over by the slope.
        """
        if not math.isfinite(estimate + self.variance):
            return None
        if self.variance == 0.0 or (metric != "rmse" and 1.0 - abs(estimate) < ROUNDING):
            return [estimate, estimate]
        reach = self._quantile(confidence) * math.sqrt(self.variance)
        if metric == "rmse":
            share = reach / estimate
            return [estimate / (1.0 + share), estimate / (1.0 - share)] if share < 1.0 else None
        centre, reach = math.atanh(estimate), reach / (1.0 - estimate**2)
        return [math.tanh(centre - reach), math.tanh(centre + reach)]

    def share_interval(self, estimate: float, confidence: float) -> list[float] | None:
        """The interval of a share from 0 to 1, Wilson's (J. of the American Statistical Association 22, 1927).

        Its number of items is that of independent ones with this variance (Korn and Graubard, Survey Methodology 24,
        1998); where all or none count, that of the blocks.
        """
        if not math.isfinite(estimate + self.variance):
            return None
        items = estimate * (1.0 - estimate) / self.variance if self.variance > 0.0 else self.parts[0][1] + 1.0
        squared = self._quantile(confidence) ** 2 / items
        centre = (estimate + squared / 2.0) / (1.0 + squared)
        reach = math.sqrt(squared * (estimate * (1.0 - estimate) + squared / 4.0)) / (1.0 + squared)
        return [max(0.0, centre - reach), min(1.0, centre + reach)]

    def p_value(self, difference: float) -> float | None:
        """Two-sided p of no difference; None where one of the two is not known."""
        if not math.isfinite(difference + self.variance):
            return None
        if self.variance == 0.0:
            return 1.0 if difference == 0.0 else 0.0
        distance = abs(difference) / math.sqrt(self.variance)
        tails = [float(stats.t.sf(distance, dof)) for share, dof in self._quantiles() if share > 0.0]
        if len(tails) == 1:
            return 2.0 * tails[0]
        # Between the parts' own tails, and a little further out than rounding, as two may be next to each other.
        most, least = math.log(max(*tails, _LEAST_TAIL)) + _BEYOND, math.log(max(min(tails), _LEAST_TAIL)) - _BEYOND
        if self._exceeded(math.exp(least)) <= distance:
            return 2.0 * math.exp(least)
        where = brentq(lambda tail: self._exceeded(math.exp(tail)) - distance, least, most)
        return min(1.0, 2.0 * math.exp(where))

    def _quantile(self, confidence: float) -> float:
        return self._exceeded(0.5 - confidence / 2.0)

    def _exceeded(self, tail: float) -> float:
        """What the estimate exceeds by chance in a share of `tail`, in standard errors."""
        return sum(share * float(stats.t.isf(tail, dof)) for share, dof in self._quantiles())

    def _quantiles(self) -> list[tuple[float, float]]:
        """The degrees of freedom of the t whose quantiles are averaged, and the weight of each."""
        (_, blocks), *of_seeds = self.parts
        if not self.variance > 0.0:
            return [(1.0, blocks)]
        if min((dof for _, dof in of_seeds), default=math.inf) < _FEWEST_DOF:
            shares = [variance / self.variance for variance, _ in of_seeds]
            return [(max(1.0 - sum(shares), 0.0), blocks), *zip(shares, (dof for _, dof in of_seeds), strict=True)]
        doubt = sum(variance**2 / dof for variance, dof in self.parts)
        return [(1.0, max(1.0, self.variance**2 / doubt))]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One metric of one head: its seeds, and each of them without each block of prompts."""

    values: Float[np.ndarray, " seed"]
    left_out: Float[np.ndarray, "seed block"]

    @property
    def seeds(self) -> int:
        return len(self.values)


def spread(*sides: Side) -> Spread:
    """Of the mean over seeds of one side, or of the difference of two sides on the same prompts.

    A side of one seed adds nothing for seeds: either it has none, or nobody knows. NaN where a metric is not defined
    without some block.
    """
    means = sides[0].left_out.mean(axis=0) - (sides[1].left_out.mean(axis=0) if len(sides) > 1 else 0.0)
    of_seeds: list[tuple[float, float]] = []
    both = 0.0
    for side in sides:
        if side.seeds > 1:
            of_seeds.append((float(side.values.var(ddof=1)) / side.seeds, side.seeds - 1.0))
            apart = side.left_out - side.left_out.mean(axis=0)
            both += sum(_jackknife(row) for row in apart) / (side.seeds - 1) / side.seeds
    prompts, seeds = _jackknife(means), sum(variance for variance, _ in of_seeds)
    total = max(prompts + seeds - both, prompts, seeds)
    return Spread(variance=total, parts=((prompts, len(means) - 1.0), *of_seeds))


def metric_intervals(
    values: Float[np.ndarray, "seed metric"],
    left_out: Float[np.ndarray, "seed block metric"],
    groups: NDArray[np.int64],
    confidence: float,
) -> dict[str, list[float] | None]:
    """The interval of the mean over seeds of each of METRICS.

    Null for fewer prompts than `FEWEST_PROMPTS`, and of RMSE for two seeds. `left_out` as of `leave_one_out`; `groups`
    numbers the prompt of each item.
    """
    count = group_count(groups)
    found: dict[str, list[float] | None] = dict.fromkeys(METRICS)
    for k, name in enumerate(METRICS):
        if count >= FEWEST_PROMPTS[name] and (name, len(values)) != _TOO_OPEN:
            side = Side(values=values[:, k], left_out=left_out[:, :, k])
            found[name] = spread(side).metric_interval(float(values[:, k].mean()), name, confidence)
    return found


def _jackknife(left_out: Array) -> float:
    """The jackknife's variance of an estimate from its values without each block (blocks,)."""
    blocks = len(left_out)
    return float((blocks - 1) / blocks * np.square(left_out - left_out.mean()).sum())


def prompt_blocks(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The block of each item (items,) that is left out together: its prompt, or of many prompts one of 1,000 parts.

    `groups` numbers the prompt of each item from 0, without gaps.
    """
    return groups % _MOST_BLOCKS


def group_count(groups: NDArray[np.int64]) -> int:
    """How many groups there are; `groups` numbers the group of each of one or more items from 0, without gaps."""
    return int(groups.max()) + 1


def few_prompts(groups: NDArray[np.int64], *, rmse: bool = True) -> str | None:
    """What a reader must know where there are fewer than `FEW_PROMPTS` prompts, else None; `rmse`: it is a metric."""
    count, least = group_count(groups), FEWEST_PROMPTS["srcc"]
    if count >= FEW_PROMPTS:
        return None
    if count < least:
        return f"{count} prompts only: an interval needs {least}"
    of_rmse = rmse and count < FEWEST_PROMPTS["rmse"]
    told = f", and that of RMSE needs {FEWEST_PROMPTS['rmse']}" if of_rmse else ""
    return f"{count} prompts only: intervals are wide and rough{told}"


def leave_one_out(
    predicted: Float[np.ndarray, "seed item"], labels: Float[np.ndarray, " item"], blocks: NDArray[np.int64]
) -> Float[np.ndarray, "seed block metric"]:
    """The four METRICS of the items outside of each block; NaN where a correlation is not defined there.

    Of a single block, outside of which there is nothing, all are NaN. Takes the time of items times blocks.
    """
    count = group_count(blocks)
    if count == 1:
        return np.full((len(predicted), 1, len(METRICS)), np.nan)
    order = np.argsort(blocks, kind="stable")
    starts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
    truth, block = labels[order], blocks[order]
    found = np.empty((len(predicted), count, len(METRICS)))
    for result, row in zip(found, predicted[:, order], strict=True):
        spearman, kendall = _rank_correlations(row, truth, block, starts)
        result[:, 0], result[:, 2] = spearman, kendall
        pearson, result[:, 3] = _linear(row, truth, starts)
        result[:, 1] = np.where(np.isnan(spearman), np.nan, pearson)
    return found


def _rank_correlations(a: Array, b: Array, block: NDArray[np.int64], starts: NDArray[np.intp]) -> tuple[Array, Array]:
    """Spearman's and Kendall's (tau-b) correlation without each block, of items sorted by block."""
    rank_a, rank_b = (np.unique(values, return_inverse=True)[1].astype(np.int64) for values in (a, b))
    spans = len(a) + 1
    touching = _pairs(rank_a, rank_b)
    inside = _pairs(rank_a + spans * block, rank_b + spans * block)
    inside -= len(a) - np.diff(np.append(starts, len(a)))[block]
    left = touching.sum(axis=1, keepdims=True) - np.add.reduceat(2 * touching - inside, starts, axis=1)
    return _spearman(rank_a, rank_b, block, len(starts)), _ratio(*left.astype(np.float64))


def _spearman(a: NDArray[np.int64], b: NDArray[np.int64], block: NDArray[np.int64], blocks: int) -> Array:
    """Spearman's correlation without each block, of dense ranks.

    The items below an item less those above it are twice its centred rank, of all items or of those outside a block.
    """
    ranked = [_Ranked.of(values) for values in (a, b)]
    found, at_once = np.empty(blocks), max(1, _CELLS_AT_ONCE // len(a))
    for first in range(0, blocks, at_once):
        part = np.arange(first, min(blocks, first + at_once))
        inside = block == part[:, None]
        outside = 1.0 - inside
        rank_a, rank_b = (outside * one.without(inside) for one in ranked)
        products = ((rank_a, rank_b), (rank_a, rank_a), (rank_b, rank_b))
        found[part] = _ratio(*(np.einsum("ki,ki->k", one, other) for one, other in products))
    return found


@dataclass(frozen=True, kw_only=True)
class _Ranked:
    """Items in the order of a value."""

    order: NDArray[np.intp]
    below: NDArray[np.intp]
    """How many items are below each (items,)."""
    up_to: NDArray[np.intp]
    """The same with the item and its equals."""

    @classmethod
    def of(cls, values: NDArray[np.int64]) -> "_Ranked":
        order = np.argsort(values, kind="stable")
        below, up_to = (np.searchsorted(values[order], values, side=side) for side in ("left", "right"))
        return cls(order=order, below=below, up_to=up_to)

    def without(self, inside: NDArray[np.bool_]) -> Array:
        """Of each item, how many are below it less how many are above it, those inside not counted (set, items)."""
        counted = np.zeros((len(inside), len(self.order) + 1))
        np.cumsum(~inside[:, self.order], axis=1, out=counted[:, 1:])
        return np.take(counted, self.below, axis=1) + np.take(counted, self.up_to, axis=1) - counted[:, -1:]


def _pairs(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Kendall's three sums over the pairs of each item (3, items): sign(a) sign(b), |sign(a)|, |sign(b)|."""
    agreeing = _both_below(a, b) + _both_below(-a, -b) - _both_below(a, -b) - _both_below(-a, b)
    return np.stack([agreeing, *(len(a) - _equal(values) for values in (a, b))])


def _equal(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each item, how many have its value."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return counts[places]


def _both_below(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each item, how many others have a smaller a and a smaller b.

    In the order of a, of equals with the largest b first, these are the ones before it with a smaller b. They are
    counted as a merge sort counts inversions: among 2, 4, 8 ... items at a time, the early half for the late half.
    """
    order = np.lexsort((-b, a))
    by_b = np.lexsort((-np.arange(len(b)), b[order]))
    counted = np.zeros(len(b), dtype=np.int64)
    for level in range(len(b).bit_length()):
        places = by_b[np.argsort(by_b >> (level + 1), kind="stable")]
        is_late = (places >> level & 1).astype(bool)
        late = places[is_late]
        of_earlier_parts = (late >> (level + 1)) << level
        counted[late] += np.cumsum(~is_late)[is_late] - of_earlier_parts
    found = np.empty_like(counted)
    found[order] = counted
    return found


def _linear(a: Array, b: Array, starts: NDArray[np.intp]) -> tuple[Array, Array]:
    """Pearson's correlation and RMSE without each block, of items sorted by block; no correlation of constants."""
    error = np.square(a - b)
    a, b = ((values - values.mean()) / (np.ptp(values) or 1.0) for values in (a, b))
    columns = np.stack([np.ones_like(a), a, b, a * b, a * a, b * b, error])
    left = columns.sum(axis=1, keepdims=True) - np.add.reduceat(columns, starts, axis=1)
    items, sum_a, sum_b, ab, aa, bb, errors = left
    ab, aa, bb = ab - sum_a * sum_b / items, aa - sum_a * sum_a / items, bb - sum_b * sum_b / items
    return _ratio(ab, aa, bb), np.sqrt(np.maximum(errors, 0.0) / items)


def _ratio(ab: Array, aa: Array, bb: Array) -> Array:
    """ab / sqrt(aa bb), NaN where either is not positive."""
    defined = (aa > 0.0) & (bb > 0.0)
    found = np.full(len(ab), np.nan)
    found[defined] = np.clip(ab[defined] / np.sqrt(aa[defined] * bb[defined]), -1.0, 1.0)
    return found


def numbers(values: Sequence[float] | Array) -> dict[str, float | None]:
    """The values by metric, None for NaN, which JSON has no word for."""
    return {name: None if math.isnan(value) else float(value) for name, value in zip(METRICS, values, strict=True)}
