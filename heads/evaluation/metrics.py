"""SRCC, PLCC, KRCC and RMSE with intervals over prompts.

Items of one prompt are not independent, so intervals leave out whole prompts (uncertainty.py). A correlation that
is not defined is null, with the reason beside it; it is never a number. PLCC and RMSE can also be had after mappings
(logistic.py); the other two do not change under one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from agiqa.errors import DataError
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.evaluation.logistic import LogisticMap
from agiqa.heads.evaluation.uncertainty import (
    METRICS,
    few_prompts,
    group_count,
    leave_one_out,
    metric_intervals,
    prompt_blocks,
)


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
    if not (np.isfinite(predicted).all() and np.isfinite(labels).all()):
        return "a prediction or a label is not finite"
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
    mappings: Mapping[str, LogisticMap] | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Metrics, their intervals and what is undefined, ready for JSON.

    `{"n", "prompts", "srcc", "plcc", "krcc", "rmse", "ci": {metric: [low, high]}, "confidence"}`, and `"undefined"`,
    the reason, where correlations are null. Each of `mappings`, by its name, adds `plcc_NAME` and `rmse_NAME` of the
    mapped predictions, with intervals for the mapping as it is.
    Intervals are about other prompts, not other seeds (uncertainty.py), and null for fewer than 10 prompts (RMSE: 20).
    Below 50 prompts `"caution"` says how many there are.
    Raises DataError without items, for unequal numbers of them, and for predictions or labels that are not finite.
    """
    _check(predicted, labels, prompts)
    groups = prompt_groups(prompts)
    metrics, intervals, reason = _scored(predicted, labels, groups, confidence)
    for kind, mapping in (mappings or {}).items():
        mapped, mapped_intervals, undefined = _scored(mapping(predicted), labels, groups, confidence)
        for name in ("plcc", "rmse"):
            metrics[f"{name}_{kind}"] = mapped[name]
            intervals[f"{name}_{kind}"] = mapped_intervals[name]
        reason = reason or undefined
    caution = few_prompts(groups)
    return {
        "n": len(labels),
        "prompts": group_count(groups),
        **{name: _number(value) for name, value in metrics.items()},
        "ci": intervals,
        "confidence": confidence,
        **({} if caution is None else {"caution": caution}),
        **({} if reason is None else {"undefined": reason}),
    }


def _scored(
    predicted: NDArray[np.float64], labels: NDArray[np.float64], groups: NDArray[np.int64], confidence: float
) -> tuple[dict[str, float], dict[str, list[float] | None], str | None]:
    """The metrics, their intervals, and why correlations are not defined."""
    metrics = score(predicted, labels)
    values = np.array([[metrics[name] for name in METRICS]])
    without = leave_one_out(predicted[None], labels, prompt_blocks(groups))
    return metrics, metric_intervals(values, without, groups, confidence), undefined_reason(predicted, labels)


def _check(predicted: NDArray[np.float64], labels: NDArray[np.float64], prompts: Sequence[str]) -> None:
    """Raise DataError for what has no metrics at all."""
    if not len(predicted) == len(labels) == len(prompts):
        message = f"There are {len(predicted)} predictions, {len(labels)} labels and {len(prompts)} prompts."
    elif not len(labels):
        message = "There are no items to evaluate."
    elif not (np.isfinite(predicted).all() and np.isfinite(labels).all()):
        wrong = [f"{(~np.isfinite(values)).sum()} of {len(values)}" for values in (predicted, labels)]
        message = f"{wrong[0]} predictions and {wrong[1]} labels are not finite numbers; nothing can be scored."
    else:
        return
    raise DataError(message)


def _pearson(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Pearson's correlation of two vectors, neither of them constant."""
    a, b = a - a.mean(), b - b.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip(a @ b / math.sqrt(float(a @ a) * float(b @ b)), -1.0, 1.0))


def _number(value: float) -> float | None:
    """The value, or None for NaN, which JSON has no word for."""
    return None if math.isnan(value) else value
