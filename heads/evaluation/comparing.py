"""Comparing heads that were trained with several seeds: means over seeds, paired differences, and their intervals.

`sd` is between seeds, over the same items. Intervals and p-values are about other prompts and other seeds alike
(uncertainty.py), with the same prompts left out for every seed and for both sides of a comparison. One seed cannot tell
how much seeds matter: then an interval is about prompts alone, `covers` says so, and there is no p-value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.evaluation.metrics import score, undefined_reason
from agiqa.heads.evaluation.uncertainty import (
    FEWEST_PROMPTS,
    METRICS,
    ROUNDING,
    Side,
    few_prompts,
    group_count,
    leave_one_out,
    metric_intervals,
    numbers,
    prompt_blocks,
    spread,
)

Array = NDArray[np.float64]
BOTH, PROMPTS = "prompts and seeds", "prompts"
"""What an interval covers."""
ONE_SEED = "one seed tells nothing of how much seeds matter: no p-value"


@dataclass(frozen=True, kw_only=True)
class SeedScores:
    """The metrics of a head on some items, over its seeds, and without each block of prompts.

    `seeds_score` and `paired` are made from these; whoever compares a head with several others keeps them, as leaving
    out every block takes the time.
    """

    n: int
    """Items."""
    values: Float[np.ndarray, "seed metric"]
    """Of all items; NaN where a correlation is not defined."""
    left_out: Float[np.ndarray, "seed block metric"]
    """As of `leave_one_out`."""
    undefined: str | None
    """Why a correlation of all items is not defined, of the first seed that has none."""
    labels: Float[np.ndarray, " item"]
    groups: NDArray[np.int64]
    """The prompt of each item, numbered."""
    seedless: bool
    """Whether nothing in the predictions was drawn by a seed, as with a closed form."""

    @classmethod
    def of(cls, predicted: Array, labels: Array, prompts: Sequence[str], *, seedless: bool = False) -> "SeedScores":
        """Score each row of `predicted` (seeds, items) by `labels` (items,).

        Raises DataError for shapes that do not fit, nothing to score, and values that are not finite.
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
        """The mean over seeds of each metric, NaN where that of a seed is."""
        return np.asarray(self.values.mean(axis=0))

    @property
    def covers(self) -> str:
        """What intervals cover: other prompts, and other seeds where that can be told."""
        return BOTH if self.seedless or len(self.values) > 1 else PROMPTS

    def _side(self, metric: int) -> Side:
        return Side(values=self.values[:, metric], left_out=self.left_out[:, :, metric])

    def _told(self, confidence: float, reason: str | None) -> dict[str, Any]:
        """What is told of the items, whatever is scored on them."""
        caution = few_prompts(self.groups)
        return {
            "confidence": confidence,
            **({} if caution is None else {"caution": caution}),
            **({} if reason is None else {"undefined": reason}),
        }

    def score(self, *, confidence: float = 0.95) -> dict[str, Any]:
        """What `seeds_score` tells."""
        several = len(self.values) > 1
        sd = self.values.std(axis=0, ddof=1) if several else np.full(len(METRICS), math.nan)
        return {
            "n": self.n,
            "prompts": group_count(self.groups),
            **numbers(self.means),
            "sd": numbers(sd),
            "seeds": len(self.values),
            "ci": metric_intervals(self.values, self.left_out, self.groups, confidence),
            "covers": self.covers,
            **self._told(confidence, self.undefined),
        }

    def against(self, other: "SeedScores", *, confidence: float = 0.95) -> dict[str, Any]:
        """What `paired` tells of this head, a, and the `other`, b. Raises DataError for other items."""
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
                found = spread(self._side(k), other._side(k))
                intervals[name] = found.interval(float(difference[k]), confidence)
                p[name] = found.p_value(float(difference[k])) if covers == BOTH else None
        return {
            "n": self.n,
            "prompts": count,
            "seeds": [len(self.values), len(other.values)],
            "difference": numbers(difference),
            "ci": intervals,
            "p": p,
            "covers": covers,
            **({} if covers == BOTH else {"no_p": ONE_SEED}),
            **self._told(confidence, self.undefined or other.undefined),
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
    "covers": "prompts and seeds" or "prompts", "confidence"}`: each metric is the mean over seeds of that of all items,
    `sd` the standard deviation over seeds (n - 1 in the denominator, null for one seed), `ci` as uncertainty.py says,
    null for fewer than 10 prompts (RMSE: 20, or two seeds). Below 50 prompts `"caution"` says so. What is not defined
    for every seed is null, with the reason under `"undefined"`. One seed has the numbers of `evaluate_scores`.
    `seedless` are predictions that no seed has a part in, such as those of a closed form. Raises DataError as
    `SeedScores.of`.
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
    """Head a minus head b on the same items, each `predicted` (seeds of its own, items), ready for JSON.

    `{"n", "prompts", "seeds": [a, b], "difference": {metric: a - b}, "ci": {metric: [low, high]}, "p": {metric:
    two-sided}, "covers", "confidence"}`, differences of the means over seeds. Intervals and p are those of
    uncertainty.py, on the scale of the metric; null for fewer than 10 prompts. Where a side has one seed p is null too,
    with the reason under `"no_p"`, unless no seed has a part in that side (`seedless`). The rest as in `seeds_score`.
    Raises DataError as `SeedScores.of`.
    """
    a, b = (
        SeedScores.of(predicted, labels, prompts, seedless=without)
        for predicted, without in zip((predicted_a, predicted_b), seedless, strict=True)
    )
    return a.against(b, confidence=confidence)


def holm(p: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number by the step-down of Holm (Scandinavian J. of Statistics 6, 1979).

    In their order; an adjusted value up to alpha rejects, with a chance of alpha at most for any false rejection.
    Raises ConfigError for what is no p-value.
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
        message = "A prediction or a label is not a finite number; nothing can be scored."
    else:
        return
    raise DataError(message)
