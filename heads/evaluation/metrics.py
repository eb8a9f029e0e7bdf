"""SRCC, PLCC, KRCC and RMSE of heads, over the seeds that they were trained with, with intervals and comparisons.

Intervals and p-values come from significance.py: items of one prompt are not independent, so they leave out whole
prompts. They are about other prompts and other seeds; `sd` is the deviation between seeds on the same items. One seed
does not show how much seeds matter: then an interval is about prompts alone, `covers` says so, and there is no p-value.

An undefined correlation is null, with the reason beside it, never a number. PLCC and RMSE can also be computed after a
mapping (mos_mappings.py), which does not change rank correlations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from agiqa.errors import DataError
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.evaluation.mos_mappings import MosMapping
from agiqa.heads.evaluation.significance import (
    FEWEST_PROMPTS,
    METRICS,
    ROUNDING,
    MetricBySeed,
    few_prompts,
    group_count,
    leave_one_out,
    metric_intervals,
    prompt_blocks,
    sampling_error,
)
from agiqa.heads.settings.labels import Array

BOTH, PROMPTS = "prompts and seeds", "prompts"
"""What an interval covers."""
ONE_SEED = "one seed does not show how much seeds matter: no p-value"


def score(predicted: Array, labels: Array) -> dict[str, float]:
    """The four metrics of predictions and labels (items,); correlations are NaN where `undefined_reason` has one."""
    rmse = math.sqrt(float(np.mean(np.square(predicted - labels)))) if len(labels) else math.nan
    if undefined_reason(predicted, labels) is not None:
        return {"srcc": math.nan, "plcc": math.nan, "krcc": math.nan, "rmse": rmse}
    return {
        "srcc": _pearson(stats.rankdata(predicted), stats.rankdata(labels)),
        "plcc": _pearson(predicted, labels),
        "krcc": float(stats.kendalltau(predicted, labels).statistic),
        "rmse": rmse,
    }


def undefined_reason(predicted: Array, labels: Array) -> str | None:
    """Why these items have no correlation; None where they have one."""
    if len(labels) < 2:
        return f"a correlation needs two items or more, and there are {len(labels)}"
    if not (np.isfinite(predicted).all() and np.isfinite(labels).all()):
        return "a prediction or a label is not finite"
    if np.ptp(predicted) == 0:
        return "all predictions are equal"
    if np.ptp(labels) == 0:
        return "all labels are equal"
    return None


@dataclass(frozen=True, kw_only=True)
class SeedScores:
    """The metrics of a head on some items, for each of its seeds, and without each block of prompts.

    Keep it to compare a head with several others: leaving out every block takes most of the time.
    """

    n: int
    """Items."""
    values: Float[np.ndarray, "seed metric"]
    """Of all items; NaN for an undefined correlation."""
    left_out: Float[np.ndarray, "seed block metric"]
    """From `leave_one_out`."""
    undefined: str | None
    """Why a correlation of all items is undefined, for the first seed where it is."""
    labels: Float[np.ndarray, " item"]
    groups: NDArray[np.int64]
    """The number of each item's prompt."""
    seedless: bool
    """Whether no seed influenced the predictions, as with a closed form."""

    @classmethod
    def of(cls, predicted: Array, labels: Array, prompts: Sequence[str], *, seedless: bool = False) -> "SeedScores":
        """Score each row of `predicted` (seeds, items) against `labels` (items,).

        Raises DataError for shapes that do not fit, for no seeds or items, and for values that are not finite.
        """
        _check(predicted, labels, prompts)
        groups, rows = prompt_groups(prompts), np.asarray(predicted, dtype=np.float64)
        reasons = [reason for row in rows if (reason := undefined_reason(row, labels)) is not None]
        return cls(
            n=len(labels),
            values=np.array([[metrics[name] for name in METRICS] for metrics in (score(row, labels) for row in rows)]),
            left_out=leave_one_out(rows, labels, prompt_blocks(groups)),
            undefined=reasons[0] if reasons else None,
            labels=labels,
            groups=groups,
            seedless=seedless,
        )

    @property
    def means(self) -> Array:
        """The mean over seeds of each metric, NaN where a seed has NaN."""
        return np.asarray(self.values.mean(axis=0))

    @property
    def covers(self) -> str:
        """What intervals cover: other prompts, and other seeds if there are several or none."""
        return BOTH if self.seedless or len(self.values) > 1 else PROMPTS

    def intervals(self, confidence: float) -> dict[str, list[float] | None]:
        """The interval of each of METRICS."""
        return metric_intervals(self.values, self.left_out, self.groups, confidence)

    def score(self, *, confidence: float = 0.95) -> dict[str, Any]:
        """The result of `seeds_score`."""
        several = len(self.values) > 1
        sd = self.values.std(axis=0, ddof=1) if several else np.full(len(METRICS), math.nan)
        return {
            "n": self.n,
            "prompts": group_count(self.groups),
            **_numbers(self.means),
            "sd": _numbers(sd),
            "seeds": len(self.values),
            "ci": self.intervals(confidence),
            "covers": self.covers,
            **self.remarks(confidence, self.undefined),
        }

    def against(self, other: "SeedScores", *, confidence: float = 0.95) -> dict[str, Any]:
        """The result of `paired` for this head, a, and the `other`, b. Raises DataError for other items."""
        if not (np.array_equal(self.labels, other.labels) and np.array_equal(self.groups, other.groups)):
            message = "Two heads can be compared on the same items only, and these differ in labels or prompts."
            raise DataError(message)
        alike = np.isclose(self.means, other.means, rtol=ROUNDING, atol=0.0)
        difference, count = np.where(alike, 0.0, self.means - other.means), group_count(self.groups)
        covers = BOTH if self.covers == other.covers == BOTH else PROMPTS
        intervals: dict[str, list[float] | None] = dict.fromkeys(METRICS)
        p: dict[str, float | None] = dict.fromkeys(METRICS)
        for k, name in enumerate(METRICS):
            if count >= min(FEWEST_PROMPTS.values()):
                error = sampling_error(self._by_seed(k), other._by_seed(k))
                intervals[name] = error.interval(float(difference[k]), confidence)
                p[name] = error.p_value(float(difference[k])) if covers == BOTH else None
        return {
            "n": self.n,
            "prompts": count,
            "seeds": [len(self.values), len(other.values)],
            "difference": _numbers(difference),
            "ci": intervals,
            "p": p,
            "covers": covers,
            **({} if covers == BOTH else {"no_p": ONE_SEED}),
            **self.remarks(confidence, self.undefined or other.undefined),
        }

    def _by_seed(self, metric: int) -> MetricBySeed:
        return MetricBySeed(values=self.values[:, metric], left_out=self.left_out[:, :, metric])

    def remarks(self, confidence: float, undefined: str | None) -> dict[str, Any]:
        """The fields that end every result."""
        caution = few_prompts(self.groups)
        return {
            "confidence": confidence,
            **({} if caution is None else {"caution": caution}),
            **({} if undefined is None else {"undefined": undefined}),
        }


def evaluate_scores(
    predicted: Array,
    labels: Array,
    prompts: Sequence[str],
    *,
    mappings: Mapping[str, MosMapping] | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The metrics of one head on items (items,), ready for JSON.

    `{"n", "prompts", "srcc", "plcc", "krcc", "rmse", "ci": {metric: [low, high]}, "confidence"}`, and `"undefined"`,
    the reason, where correlations are null. Each of `mappings`, by its name, adds `plcc_NAME` and `rmse_NAME` of the
    mapped predictions, with intervals that take the mapping as fixed.
    Intervals are about other prompts, not other seeds, and null for fewer than 10 prompts (RMSE: 20). Below 50 prompts
    `"caution"` gives their number.
    Raises DataError without items, for unequal numbers of them, and for predictions or labels that are not finite.
    """
    scores = SeedScores.of(predicted[None], labels, prompts)
    metrics, intervals, undefined = _numbers(scores.means), scores.intervals(confidence), scores.undefined
    for kind, mapping in (mappings or {}).items():
        mapped = SeedScores.of(mapping(predicted)[None], labels, prompts)
        values, mapped_intervals = _numbers(mapped.means), mapped.intervals(confidence)
        metrics |= {f"{name}_{kind}": values[name] for name in ("plcc", "rmse")}
        intervals |= {f"{name}_{kind}": mapped_intervals[name] for name in ("plcc", "rmse")}
        undefined = undefined or mapped.undefined
    return {
        "n": scores.n,
        "prompts": group_count(scores.groups),
        **metrics,
        "ci": intervals,
        **scores.remarks(confidence, undefined),
    }


def seeds_score(
    predicted: Array,
    labels: Array,
    prompts: Sequence[str],
    *,
    seedless: bool = False,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The metrics of one head over its seeds, `predicted` (seeds, items), ready for JSON.

    `{"n", "prompts", "srcc", "plcc", "krcc", "rmse", "sd": {metric: of seeds}, "seeds", "ci": {metric: [low, high]},
    "covers": "prompts and seeds" or "prompts", "confidence"}`. Each metric is the mean over seeds, `sd` the standard
    deviation over seeds (n - 1 in the denominator, null for one seed). `ci` is null for fewer than 10 prompts (RMSE:
    20, or two seeds). Below 50 prompts `"caution"` gives their number. What is undefined for some seed is null, with
    the reason under `"undefined"`. One seed gives the numbers of `evaluate_scores`. Set `seedless` for predictions that
    no seed influenced, such as those of a closed form. Raises DataError as `SeedScores.of`.
    """
    return SeedScores.of(predicted, labels, prompts, seedless=seedless).score(confidence=confidence)


def paired(
    predicted_a: Array,
    predicted_b: Array,
    labels: Array,
    prompts: Sequence[str],
    *,
    seedless: tuple[bool, bool] = (False, False),
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Head a minus head b on the same items, each `predicted` (its seeds, items), ready for JSON.

    `{"n", "prompts", "seeds": [a, b], "difference": {metric: a - b}, "ci": {metric: [low, high]}, "p": {metric:
    two-sided}, "covers", "confidence"}`, of the means over seeds. Intervals and p are null for fewer than 10 prompts. p
    is also null where a head has one seed, with the reason under `"no_p"`, unless it is `seedless`. The rest is as in
    `seeds_score`. Raises DataError as `SeedScores.of`.
    """
    a, b = (
        SeedScores.of(predicted, labels, prompts, seedless=without)
        for predicted, without in zip((predicted_a, predicted_b), seedless, strict=True)
    )
    return a.against(b, confidence=confidence)


def _check(predicted: Array, labels: Array, prompts: Sequence[str]) -> None:
    """Raise DataError for what cannot be scored."""
    if predicted.ndim != 2 or predicted.shape[1] != len(labels) or len(labels) != len(prompts):
        message = (
            f"Predictions have the shape {predicted.shape}, expected (seeds, items); there are {len(labels)} labels "
            f"and {len(prompts)} prompts."
        )
    elif not predicted.size:
        message = f"There is nothing to score: {len(predicted)} seeds, {len(labels)} items."
    elif not (np.isfinite(predicted).all() and np.isfinite(labels).all()):
        wrong = [f"{(~np.isfinite(values)).sum()} of {values.size}" for values in (predicted, labels)]
        message = f"{wrong[0]} predictions and {wrong[1]} labels are not finite numbers; nothing can be scored."
    else:
        return
    raise DataError(message)


def _pearson(a: Array, b: Array) -> float:
    """Pearson's correlation of two vectors, neither of them constant."""
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / math.sqrt(float(a @ a) * float(b @ b)), -1.0, 1.0))


def _numbers(values: Array) -> dict[str, float | None]:
    """The values by metric, None for NaN, which JSON lacks."""
    return {name: None if math.isnan(value) else float(value) for name, value in zip(METRICS, values, strict=True)}
