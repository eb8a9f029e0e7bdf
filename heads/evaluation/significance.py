"""Standard errors of metrics over prompts and training seeds, confidence intervals, and p-values.

Images of one prompt are not independent, so the error over items is that of a jackknife over prompts (Efron and
Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11). Heads of different seeds differ too. Prompts and seeds
are crossed, so the variance of a head with several seeds has three parts (Cameron, Gelbach and Miller, J. of Business &
Economic Statistics 29, 2011):

    prompts: jackknife of the mean over seeds
    + seeds: variance over seeds of the metric of all items, divided by the number of seeds
    - both: jackknife of each seed's deviation from the mean, which the two above count twice

Quantiles are those of Student's t, with degrees of freedom from the parts (Satterthwaite, Biometrics Bulletin 2, 1946).
Such intervals are too narrow for few seeds that differ much, as the variance over few seeds is often small by chance.
So with fewer than 5 seeds the quantile is the mean of the quantiles of the parts, each with its own degrees of freedom,
weighted by its share of the variance (Cochran, Biometrics 20, 1964). This errs on the safe side.

`python -m agiqa.bench.measurements.inference` measures the coverage of intervals and the errors of p-values.
bench/LOG.md has the figures, also for the percentile bootstrap, which is wrong in both for few prompts or seeds.
Intervals of RMSE cover .86 to .92 where a few items or one prompt hold much of the squared error, as with errors of
Student's t with 3 degrees of freedom, or a prompt with a fifth of all items; intervals of correlations cover .93 and
more there too.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq

from agiqa.errors import ConfigError

METRICS = ("srcc", "plcc", "krcc", "rmse")
FEWEST_PROMPTS = {"srcc": 10, "plcc": 10, "krcc": 10, "rmse": 20}
"""With fewer prompts an interval at 95 % covers less than 93 % even for normal errors, so none is given."""
FEW_PROMPTS = 50
"""With fewer prompts results carry a caution."""
ROUNDING = 1e-12
"""Relative difference of two metrics below which they differ by rounding only."""
_NO_INTERVAL = "rmse", 2
"""Metric and number of seeds without an interval: none at 95 % covers 93 % where seeds differ much."""
_FEWEST_DOF = 4
"""Degrees of freedom of the variance over seeds that Satterthwaite's t needs: 5 seeds."""
_LEAST_TAIL = 1e-200
"""Below it scipy's quantiles of t overflow."""
_MARGIN = 1e-6
"""Relative margin around the tails of the parts, between which a p-value is searched."""
_MOST_BLOCKS = 1000

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SamplingError:
    """The sampling variance of an estimate, NaN where it is unknown, and its parts."""

    variance: float
    parts: tuple[tuple[float, float], ...]
    """Variance and degrees of freedom: of prompts, then of the seeds of each head. What both count is included."""

    def interval(self, estimate: float, confidence: float) -> list[float] | None:
        """The symmetric interval around `estimate`; None where estimate or variance is unknown."""
        if not math.isfinite(estimate + self.variance):
            return None
        reach = self._quantile(confidence) * math.sqrt(self.variance)
        return [estimate - reach, estimate + reach]

    def metric_interval(self, estimate: float, metric: str, confidence: float) -> list[float] | None:
        """The interval of a metric: of a correlation on Fisher's z scale, of RMSE on the scale of 1 / RMSE.

        On these scales estimates are closer to normal; the slope converts the standard error.
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
        """Wilson's interval of a share from 0 to 1 (J. of the American Statistical Association 22, 1927).

        Its number of items is the number of independent items with this variance (Korn and Graubard, Survey Methodology
        24, 1998), or the number of blocks for a share of 0 or 1.
        """
        if not math.isfinite(estimate + self.variance):
            return None
        items = estimate * (1.0 - estimate) / self.variance if self.variance > 0.0 else self.parts[0][1] + 1.0
        squared = self._quantile(confidence) ** 2 / items
        centre = (estimate + squared / 2.0) / (1.0 + squared)
        reach = math.sqrt(squared * (estimate * (1.0 - estimate) + squared / 4.0)) / (1.0 + squared)
        return [max(0.0, centre - reach), min(1.0, centre + reach)]

    def p_value(self, difference: float) -> float | None:
        """Two-sided p-value of no difference; None where difference or variance is unknown."""
        if not math.isfinite(difference + self.variance):
            return None
        if self.variance == 0.0:
            return 1.0 if difference == 0.0 else 0.0
        distance = abs(difference) / math.sqrt(self.variance)
        tails = [float(stats.t.sf(distance, dof)) for share, dof in self._quantiles() if share > 0.0]
        if len(tails) == 1:
            return 2.0 * tails[0]
        # It lies between the tails of the parts. The margin allows for rounding, as two tails may be equal.
        most, least = math.log(max(*tails, _LEAST_TAIL)) + _MARGIN, math.log(max(min(tails), _LEAST_TAIL)) - _MARGIN
        if self._exceeded(math.exp(least)) <= distance:
            return 2.0 * math.exp(least)
        where = brentq(lambda tail: self._exceeded(math.exp(tail)) - distance, least, most)
        return min(1.0, 2.0 * math.exp(where))

    def _quantile(self, confidence: float) -> float:
        return self._exceeded(0.5 - confidence / 2.0)

    def _exceeded(self, tail: float) -> float:
        """The distance, in standard errors, that the estimate exceeds by chance with probability `tail`."""
        return sum(share * float(stats.t.isf(tail, dof)) for share, dof in self._quantiles())

    def _quantiles(self) -> list[tuple[float, float]]:
        """Weight and degrees of freedom of each t whose quantiles are averaged."""
        (_, blocks), *of_seeds = self.parts
        if not self.variance > 0.0:
            return [(1.0, blocks)]
        if min((dof for _, dof in of_seeds), default=math.inf) < _FEWEST_DOF:
            shares = [variance / self.variance for variance, _ in of_seeds]
            return [(max(1.0 - sum(shares), 0.0), blocks), *zip(shares, (dof for _, dof in of_seeds), strict=True)]
        doubt = sum(variance**2 / dof for variance, dof in self.parts)
        return [(1.0, max(1.0, self.variance**2 / doubt))]


@dataclass(frozen=True, kw_only=True)
class MetricBySeed:
    """One metric of one head, for each seed: of all items, and without each block of prompts."""

    values: Float[np.ndarray, " seed"]
    left_out: Float[np.ndarray, "seed block"]


def sampling_error(*heads: MetricBySeed) -> SamplingError:
    """Of the mean over seeds of one head, or of the difference of two heads on the same prompts.

    A head of one seed adds no variance for seeds. The variance is NaN where a metric is undefined without some block.
    """
    means = heads[0].left_out.mean(axis=0) - (heads[1].left_out.mean(axis=0) if len(heads) > 1 else 0.0)
    of_seeds: list[tuple[float, float]] = []
    both = 0.0
    for head in heads:
        seeds = len(head.values)
        if seeds > 1:
            of_seeds.append((float(head.values.var(ddof=1)) / seeds, seeds - 1.0))
            deviations = head.left_out - head.left_out.mean(axis=0)
            both += sum(_jackknife(row) for row in deviations) / (seeds - 1) / seeds
    of_prompts, of_all_seeds = _jackknife(means), sum(variance for variance, _ in of_seeds)
    total = max(of_prompts + of_all_seeds - both, of_prompts, of_all_seeds)
    return SamplingError(variance=total, parts=((of_prompts, len(means) - 1.0), *of_seeds))


def metric_intervals(
    values: Float[np.ndarray, "seed metric"],
    left_out: Float[np.ndarray, "seed block metric"],
    groups: NDArray[np.int64],
    confidence: float,
) -> dict[str, list[float] | None]:
    """The interval of the mean over seeds of each of METRICS; `groups` numbers the prompt of each item.

    None for fewer prompts than `FEWEST_PROMPTS`, and of RMSE for two seeds. `left_out` is from `leave_one_out`.
    """
    count = group_count(groups)
    found: dict[str, list[float] | None] = dict.fromkeys(METRICS)
    for k, name in enumerate(METRICS):
        if count >= FEWEST_PROMPTS[name] and (name, len(values)) != _NO_INTERVAL:
            one = MetricBySeed(values=values[:, k], left_out=left_out[:, :, k])
            found[name] = sampling_error(one).metric_interval(float(values[:, k].mean()), name, confidence)
    return found


def _jackknife(left_out: Array) -> float:
    """The jackknife variance of an estimate, from its values without each block (blocks,)."""
    blocks = len(left_out)
    return float((blocks - 1) / blocks * np.square(left_out - left_out.mean()).sum())


def prompt_blocks(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """The block of each item (items,), left out as a whole: its prompt, or above 1,000 prompts one of 1,000 parts.

    `groups` numbers the prompt of each item from 0, without gaps.
    """
    return groups % _MOST_BLOCKS


def group_count(groups: NDArray[np.int64]) -> int:
    """The number of groups; `groups` numbers the group of each item from 0, without gaps, for one item at least."""
    return int(groups.max()) + 1


def few_prompts(groups: NDArray[np.int64], *, rmse: bool = True) -> str | None:
    """A caution for fewer than `FEW_PROMPTS` prompts, else None; `rmse` says whether RMSE is among the metrics."""
    count, least = group_count(groups), FEWEST_PROMPTS["srcc"]
    if count >= FEW_PROMPTS:
        return None
    if count < least:
        return f"{count} prompts only: an interval needs {least}"
    of_rmse = f", and that of RMSE needs {FEWEST_PROMPTS['rmse']}" if rmse and count < FEWEST_PROMPTS["rmse"] else ""
    return f"{count} prompts only: intervals are wide and rough{of_rmse}"


def leave_one_out(
    predicted: Float[np.ndarray, "seed item"], labels: Float[np.ndarray, " item"], blocks: NDArray[np.int64]
) -> Float[np.ndarray, "seed block metric"]:
    """METRICS of the items outside each block; NaN where a correlation is undefined, and all NaN for a single block.

    The time grows with items times blocks.
    """
    count = group_count(blocks)
    if count == 1:
        return np.full((len(predicted), 1, len(METRICS)), np.nan)
    order = np.argsort(blocks, kind="stable")
    starts = np.flatnonzero(np.diff(blocks[order], prepend=-1))
    truth, block = labels[order], blocks[order]
    rank, ranks = _dense_ranks(truth), [_dense_ranks(row) for row in predicted[:, order]]
    found = np.empty((len(predicted), count, len(METRICS)))
    found[:, :, 0] = _spearman(np.stack([rank, *ranks]), block, count)
    for result, row, ranked in zip(found, predicted[:, order], ranks, strict=True):
        pearson, result[:, 3] = _linear(row, truth, starts)
        result[:, 1] = np.where(np.isnan(result[:, 0]), np.nan, pearson)
        result[:, 2] = _kendall(ranked, rank, block, starts)
    return found


def _dense_ranks(values: Array) -> NDArray[np.int64]:
    """The number of distinct smaller values of each."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _kendall(a: NDArray[np.int64], b: NDArray[np.int64], block: NDArray[np.int64], starts: NDArray[np.intp]) -> Array:
    """Kendall's correlation (tau-b) without each block, from dense ranks; items are sorted by block."""
    spans = len(a) + 1
    touching, inside = _pairs(a, b), _pairs(a + spans * block, b + spans * block)
    inside -= len(a) - np.diff(np.append(starts, len(a)))[block]
    left = touching.sum(axis=1, keepdims=True) - np.add.reduceat(2 * touching - inside, starts, axis=1)
    return _ratio(*left.astype(np.float64))


def _spearman(ranks: NDArray[np.int64], block: NDArray[np.int64], blocks: int) -> Float[np.ndarray, "seed block"]:
    """Spearman's correlation of the first row of dense ranks with each other row, without each block."""
    products = np.empty((3, len(ranks) - 1, blocks))
    spans = int(ranks.max()) + 1
    numbered = ranks + spans * np.arange(len(ranks))[:, None]
    for number in range(blocks):
        truth, *rows = _centred(numbered[:, block != number], spans)
        products[1, :, number] = truth @ truth
        for row, product in zip(rows, products[:, :, number].T, strict=True):
            product[0], product[2] = truth @ row, row @ row
    return np.stack([_ratio(*of_row) for of_row in products.swapaxes(0, 1)])


def _centred(numbered: NDArray[np.int64], spans: int) -> Array:
    """Twice the centred mid-ranks of each row: the number of items below each item minus the number above.

    A row holds dense ranks plus `spans` times the number of the row.
    """
    rows, items = numbered.shape
    counts = np.bincount(numbered.ravel(), minlength=rows * spans).reshape(rows, spans)
    values: Array = (2 * np.cumsum(counts, axis=1) - counts - items).astype(np.float64).ravel()
    return np.take(values, numbered)


def _pairs(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """Kendall's three sums over the pairs of each item (3, items): sign(a) sign(b), |sign(a)|, |sign(b)|."""
    items = len(a)
    a, below_a, equal_a = _standing(a)
    b, below_b, equal_b = _standing(b)
    # By a then b, those before an item have a smaller a, or its a and a smaller b; and the other way round.
    _, by_a_then_b, equal = _standing(a * items + b)
    _, by_b_then_a, _ = _standing(b * items + a)
    both_below = _both_below(a, b)
    only_a = below_a - both_below - (by_b_then_a - below_b)
    only_b = below_b - both_below - (by_a_then_b - below_a)
    both_above = items - equal_a - equal_b + equal - both_below - only_a - only_b
    return np.stack([both_below + both_above - only_a - only_b, items - equal_a, items - equal_b])


def _standing(values: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """For each item its dense rank, the number of smaller items, and the number of items with its value."""
    _, ranks, counts = np.unique(values, return_inverse=True, return_counts=True)
    return ranks.astype(np.int64), (np.cumsum(counts) - counts)[ranks], counts[ranks]


def _both_below(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each item, the number of others with a smaller a and a smaller b.

    Sorted by a, ties with the largest b first, these are the earlier items with a smaller b. They are counted as a
    merge sort counts inversions: in runs of 2, 4, 8 ... items, those of the first half for each item of the second.
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
    """Pearson's correlation (NaN for constants) and RMSE without each block; items are sorted by block."""
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


def holm(p: Sequence[float]) -> list[float]:
    """The p-values, in their order, adjusted by Holm's step-down (Scandinavian J. of Statistics 6, 1979).

    Rejecting adjusted values up to alpha gives a chance of alpha at most for any false rejection. Raises ConfigError
    for a value outside 0 to 1.
    """
    values = np.asarray(p, dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        message = f"p-values go from 0 to 1, and there are {list(p)}."
        raise ConfigError(message)
    order = np.argsort(values, kind="stable")
    stepped = np.maximum.accumulate(values[order] * np.arange(len(values), 0, -1))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(value) for value in adjusted]
