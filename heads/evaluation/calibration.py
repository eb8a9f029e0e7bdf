"""Calibration: the line from predictions to the scale of the MOS, and whether a head needs one.

The line is the least-squares fit of MOS on predictions: slope 1 and intercept 0 for unbiased predictions. A slope above
1 means that predictions vary too little, below 1 that they vary too much. Both matter for errors such as RMSE, not for
correlations. A loss that only orders items, such as `fidelity` or `plcc`, determines neither.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.scales import Line
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY
from agiqa.heads.settings.labels import Array, by_label, labelled_pairs

RIGHT_SLOPES = (0.8, 1.2)
"""Validation slopes without a warning."""
_NO_CHANGE: Line = (1.0, 0.0)


def calibration_line(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> Line:
    """Slope and intercept of `labels` on `predicted` (items,).

    Both are NaN for fewer than two items, values that are not finite, and predictions that are all equal.
    """
    if len(labels) < 2 or not (np.isfinite(predicted).all() and np.isfinite(labels).all()) or np.ptp(predicted) == 0:
        return math.nan, math.nan
    centre, mean = float(predicted.mean()), float(labels.mean())
    deviations = (predicted - centre) / np.ptp(predicted)
    slope = float(deviations @ (labels - mean) / (deviations @ deviations) / np.ptp(predicted))
    return slope, mean - slope * centre


def calibration_fields(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, float | None]:
    """`{"slope", "intercept"}` of `calibration_line` for JSON, null for NaN."""
    slope, intercept = calibration_line(predicted, labels)
    return {"slope": None, "intercept": None} if math.isnan(slope) else {"slope": slope, "intercept": intercept}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A line for each label of a head, fitted on validation items after the epoch was chosen."""

    lines: tuple[Line, ...]
    """(1, 0) for a label without a fitted line."""
    refused: tuple[str | None, ...]
    """Why a label has no fitted line."""
    items: tuple[int, ...]
    """The number of validation items that have each label."""

    @classmethod
    def fit(cls, predicted: Array, labels: Array) -> "Calibration":
        """Fit predictions and MOS, both (items, labels).

        A label gets no line for fewer than FEWEST_TO_CHOOSE_BY items, and for a slope that is not above 0.
        """
        pairs = labelled_pairs(predicted, labels)
        found = [_fit(*pair) for pair in pairs]
        lines, refused = tuple(line for line, _ in found), tuple(why for _, why in found)
        return cls(lines=lines, refused=refused, items=tuple(len(mos) for _, mos in pairs))

    def applied(self, predicted: Array) -> Array:
        """Predictions (items, labels) mapped by the lines."""
        slopes, intercepts = np.array(self.lines).T
        mapped: Array = predicted * slopes + intercepts
        return mapped

    def record(self, names: Sequence[str], *, refit: bool) -> dict[str, Any]:
        """The entry of metrics.json, `by_label`; `refit` says whether the line was applied to a refit head."""
        entries = [
            {"slope": slope, "intercept": intercept, "n": count, "applied_to_refit": refit}
            if why is None
            else {"slope": None, "intercept": None, "n": count, "not_fitted": why}
            for (slope, intercept), why, count in zip(self.lines, self.refused, self.items, strict=True)
        ]
        found: dict[str, Any] = by_label(names, entries)
        return found

    def warnings(self, names: Sequence[str]) -> list[str]:
        """A warning for each label without a fitted line."""
        return [
            f"`calibrate` left the {name} predictions as they are: {why}."
            for name, why in zip(names, self.refused, strict=True)
            if why is not None
        ]

    def mark(self, scores: Sequence[dict[str, Any]]) -> None:
        """Mark the validation metrics of each label whose line was fitted to the same items."""
        for score, why in zip(scores, self.refused, strict=True):
            if why is None:
                score["calibrated_here"] = True


def calibration_warnings(
    names: Sequence[str], predicted: Array, labels: Array, *, calibrate: bool = False
) -> list[str]:
    """Warnings about the scale of validation predictions (items, labels); none for few items (FEWEST_TO_CHOOSE_BY).

    `calibrate` is the setting: where it is on, it is not advised.
    """
    found: list[str] = []
    for name, (guesses, mos) in zip(names, labelled_pairs(predicted, labels), strict=True):
        found += _warnings(name, guesses, mos, calibrate=calibrate)
    return found


def _fit(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> tuple[Line, str | None]:
    if len(labels) < FEWEST_TO_CHOOSE_BY:
        return _NO_CHANGE, f"{len(labels)} validation items are too few to fit a line to ({FEWEST_TO_CHOOSE_BY} needed)"
    slope, intercept = calibration_line(predicted, labels)
    if math.isnan(slope):
        return _NO_CHANGE, "all validation predictions are equal, or one is not finite"
    if slope <= 0.0:
        return _NO_CHANGE, f"the slope of validation MOS on predictions is {slope:.3g}, and a line must rise"
    return (slope, intercept), None


def _warnings(name: str, predicted: NDArray[np.float64], labels: NDArray[np.float64], *, calibrate: bool) -> list[str]:
    found: list[str] = []
    if len(labels) < FEWEST_TO_CHOOSE_BY:
        return found
    slope, _ = calibration_line(predicted, labels)
    remedy = "Train with other settings."
    if slope > 0.0 and not calibrate:
        remedy = "Set `calibrate`, which fits a line on validation items, or train with other settings."
    if not math.isnan(slope) and not RIGHT_SLOPES[0] <= slope <= RIGHT_SLOPES[1]:
        how = "too little" if slope > 1.0 else "too much" if slope > 0.0 else "the wrong way"
        found.append(
            f"On {len(labels)} validation items the {name} MOS changes by {slope:.2f} where the prediction changes by "
            f"1: predictions vary {how}, and errors such as RMSE are larger than necessary. {remedy}"
        )
    rmse, deviation = math.sqrt(float(np.mean(np.square(predicted - labels)))), float(labels.std())
    if rmse > deviation:
        found.append(
            f"On {len(labels)} validation items the RMSE of {name} is {rmse:.3g}, above the standard deviation of the "
            f"MOS, {deviation:.3g}: their mean alone would be a better prediction. {remedy}"
        )
    return found
