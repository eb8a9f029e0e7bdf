"""Comparing heads that were trained with several seeds: means over seeds, paired differences, and their intervals.

Two sources of chance are told apart: `sd` is between seeds, over the same items; intervals and p-values are of the
items, by the cluster bootstrap of bootstrap.py, which draws the same prompts for every seed and for both sides of a
comparison. In each resample a metric is the mean over seeds of the metric of each.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.heads.bootstrap import bootstrap_metrics, interval
from agiqa.heads.metrics import METRICS, score, undefined_reason
from agiqa.heads.prompts import prompt_groups

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class SeedScores:
    """The metrics of a head on some items, over its seeds, and in resamples of the items.

    `seeds_score` and `paired` are made from these; whoever compares a head with several others keeps them, as the
    resamples take the time.
    """

    n: int
    """Items."""
    values: Float[np.ndarray, "seed metric"]
    """Of all items; NaN where a correlation is not defined."""
    drawn: Float[np.ndarray, "resample metric"]
    """Mean over seeds; NaN where that of a seed is."""
    undefined: str | None
    """Why a correlation of all items is not defined, of the first seed that has none."""
    labels: Float[np.ndarray, " item"]
    groups: NDArray[np.int64]
    """The prompt of each item, numbered."""
    seed: int
    """Of the resamples."""

    @classmethod
    def of(
        cls,
        predicted: Array,
        labels: Array,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        resamples: int = 1000,
    ) -> "SeedScores":
        """Score each row of `predicted` (seeds, items) by `labels` (items,).

        Raises DataError for shapes that do not fit, nothing to score, and values that are not finite.
        """
        _check(predicted, labels, prompts)
        groups = prompt_groups(prompts)
        rows = list(np.asarray(predicted, dtype=np.float64))
        resampled = [bootstrap_metrics(row, labels, groups, seed=seed, resamples=resamples) for row in rows]
        reasons = [reason for row in rows if (reason := undefined_reason(row, labels)) is not None]
        return cls(
            n=len(labels),
            values=np.array([[metrics[name] for name in METRICS] for metrics in (score(row, labels) for row in rows)]),
            drawn=np.mean(resampled, axis=0),
            undefined=reasons[0] if reasons else None,
            labels=labels,
            groups=groups,
            seed=seed,
        )

    @property
    def means(self) -> Array:
        """The mean over seeds of each metric, NaN where that of a seed is."""
        return np.asarray(self.values.mean(axis=0))

    def _intervals(self, drawn: Array, confidence: float) -> dict[str, list[float] | None]:
        """The interval of each metric; null for fewer than five prompts."""
        return {name: interval(drawn[:, k], confidence, groups=self.groups) for k, name in enumerate(METRICS)}

    def score(self, *, confidence: float = 0.95) -> dict[str, Any]:
        """What `seeds_score` tells."""
        several = len(self.values) > 1
        spread = self.values.std(axis=0, ddof=1) if several else np.full(len(METRICS), math.nan)
        told: dict[str, Any] = {
            "n": self.n,
            **_numbers(self.means),
            "sd": _numbers(spread),
            "seeds": len(self.values),
            "ci": self._intervals(self.drawn, confidence),
            "confidence": confidence,
            "resamples": len(self.drawn),
        }
        return told if self.undefined is None else {**told, "undefined": self.undefined}

    def against(self, other: "SeedScores", *, confidence: float = 0.95) -> dict[str, Any]:
        """What `paired` tells of this head, a, and the `other`, b.

        Raises DataError for other items, and ConfigError for other resamples.
        """
        if not (np.array_equal(self.labels, other.labels) and np.array_equal(self.groups, other.groups)):
            message = "Two heads can be compared on the same items only, and these differ in labels or prompts."
            raise DataError(message)
        if (self.seed, len(self.drawn)) != (other.seed, len(other.drawn)):
            message = (
                f"A paired comparison needs the same resamples, and these are {len(self.drawn)} of seed {self.seed} "
                f"and {len(other.drawn)} of seed {other.seed}."
            )
            raise ConfigError(message)
        drawn = self.drawn - other.drawn
        told: dict[str, Any] = {
            "n": self.n,
            "seeds": [len(self.values), len(other.values)],
            "difference": _numbers(self.means - other.means),
            "ci": self._intervals(drawn, confidence),
            "p": {name: _two_sided(drawn[:, k]) for k, name in enumerate(METRICS)},
            "confidence": confidence,
            "resamples": len(drawn),
        }
        reason = self.undefined or other.undefined
        return told if reason is None else {**told, "undefined": reason}


def seeds_score(
    predicted: Array,
    labels: Array,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """The metrics of one head over its seeds, `predicted` (seeds, items), ready for JSON.

    `{"n", "srcc", "plcc", "krcc", "rmse", "sd": {metric: of seeds}, "seeds", "ci": {metric: [low, high]},
    "confidence", "resamples"}`: each metric is the mean over seeds of that of all items, `sd` the standard deviation
    over seeds (n - 1 in the denominator, null for one seed), `ci` percentiles of that mean over resamples of the
    prompts. What is not defined for every seed is null, with the reason under `"undefined"`. One seed has the
    numbers of `evaluate_scores`. Raises DataError as `SeedScores.of`.
    """
    return SeedScores.of(predicted, labels, prompts, seed=seed, resamples=resamples).score(confidence=confidence)


def paired(
    predicted_a: Array,
    predicted_b: Array,
    labels: Array,
    prompts: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Head a minus head b on the same items, each `predicted` (seeds of its own, items), ready for JSON.

    `{"n", "seeds": [a, b], "difference": {metric: a - b}, "ci": {metric: [low, high]}, "p": {metric: two-sided},
    "confidence", "resamples"}`, differences of the means over seeds. The same prompts are drawn for both. p is twice
    the share of resamples on the rarer side of no difference, one added to numerator and denominator (Davison and
    Hinkley, Bootstrap Methods and their Application, 1997, section 4.4), at most 1. Null and `"undefined"` as in
    `seeds_score`. Raises DataError as `SeedScores.of`.
    """
    a, b = (
        SeedScores.of(predicted, labels, prompts, seed=seed, resamples=resamples)
        for predicted in (predicted_a, predicted_b)
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


def _two_sided(differences: Array) -> float | None:
    """The p-value of no difference, from the resamples in which there is one; None where there is none."""
    defined = differences[np.isfinite(differences)]
    if not len(defined):
        return None
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, 2.0 * (rarer + 1) / (len(defined) + 1)))


def _numbers(values: Array) -> dict[str, float | None]:
    """The values by metric, None for NaN, which JSON has no word for."""
    return {name: None if math.isnan(value) else float(value) for name, value in zip(METRICS, values, strict=True)}
