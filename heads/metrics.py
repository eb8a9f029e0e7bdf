"""SRCC, PLCC, KRCC and RMSE with bootstrap intervals, resampled by prompt.

Items of one prompt are not independent, so the bootstrap draws whole prompts (a cluster bootstrap, percentile
intervals). A correlation that is not defined is null, with the reason beside it; it is never a number.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agiqa.errors import DataError
from agiqa.heads.bootstrap import bootstrap_metrics
from agiqa.heads.prompts import prompt_groups

METRICS = ("srcc", "plcc", "krcc", "rmse")


def score(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, float]:
    """The four metrics; the correlations are NaN where `undefined_reason` gives one."""
    rmse = math.sqrt(float(np.mean(np.square(predicted - labels)))) if len(labels) else math.nan
    if undefined_reason(predicted, labels) is not None:
        return {"srcc": math.nan, "plcc": math.nan, "krcc": math.nan, "rmse": rmse}
    return {
        "srcc": _pearson(stats.rankdata(predicted), stats.rankdata(labels)),
        "plcc": _pearson(predicted, labels),
        "krcc": float(stats.kendalltau(predicted, labels).statistic),
        "rmse": rmse,
    }


def undefined_reason(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> str | None:
    """Why these items have no correlation, or None when they have one."""
    if len(labels) < 2:
        return f"a correlation needs two items or more, and there are {len(labels)}"
    if np.ptp(predicted) == 0:
        return "all predictions are equal"
    if np.ptp(labels) == 0:
        return "all labels are equal"
    return None


def evaluate_scores(
    predicted: NDArray[np.float64],
    labels: NDArray[np.float64],
    prompts: Sequence[str],
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Metrics, their intervals and what is undefined, ready for JSON.

    `{"n", "srcc", "plcc", "krcc", "rmse", "ci": {metric: [low, high]}, "confidence", "resamples"}`, and
    `"undefined"`, the reason, where correlations are null. Raises DataError without items.
    """
    if not len(labels):
        message = "There are no items to evaluate."
        raise DataError(message)
    metrics = score(predicted, labels)
    drawn = bootstrap_metrics(predicted, labels, prompt_groups(prompts), seed=seed, resamples=resamples)
    reason = undefined_reason(predicted, labels)
    result: dict[str, Any] = {
        "n": len(labels),
        **{name: _number(metrics[name]) for name in METRICS},
        "ci": {name: _interval(drawn[:, k], confidence) for k, name in enumerate(METRICS)},
        "confidence": confidence,
        "resamples": resamples,
    }
    return result if reason is None else {**result, "undefined": reason}


def _interval(values: NDArray[np.float64], confidence: float) -> list[float] | None:
    """Percentiles over the resamples in which the metric is defined; None when it is so in none."""
    defined = values[np.isfinite(values)]
    if not len(defined):
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(defined, [tail, 1.0 - tail])
    return [float(low), float(high)]


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's correlation of two vectors, neither of them constant."""
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / math.sqrt(float(a @ a) * float(b @ b)), -1.0, 1.0))


def _number(value: float) -> float | None:
    """The value, or None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else value
