"""Calibration: whether predictions are on the scale of the MOS, and the line that puts them there.

The slope and intercept of the MOS on the predictions, by least squares: 1 and 0 where predictions are right in the
mean. A slope over 1 says that predictions spread too little, one under 1 that they spread too much. Rank correlations
and PLCC do not feel either; errors such as RMSE do. A loss that only orders items, as `fidelity` and `plcc`, leaves
both open.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.scales import Line
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY
from agiqa.heads.settings.labels import Array, by_label, columns

RIGHT_SLOPES = (0.8, 1.2)
"""The validation slopes of which nothing is said."""
_AS_IT_IS: Line = (1.0, 0.0)


def calibration_line(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> Line:
    """Slope and intercept of `labels` on `predicted` (items,); NaN for both where no line is defined.

    That is for fewer than two items, values that are not finite, and predictions that are all equal.
    """
    if len(labels) < 2 or not (np.isfinite(predicted).all() and np.isfinite(labels).all()) or np.ptp(predicted) == 0:
        return math.nan, math.nan
    centre, mean = float(predicted.mean()), float(labels.mean())
    apart = (predicted - centre) / np.ptp(predicted)
    slope = float(apart @ (labels - mean) / (apart @ apart) / np.ptp(predicted))
    return slope, mean - slope * centre


def calibration_fields(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> dict[str, float | None]:
    """`{"slope", "intercept"}` of `calibration_line` for JSON, null where it is not defined."""
    line = calibration_line(predicted, labels)
    return {
        name: None if math.isnan(value) else value for name, value in zip(("slope", "intercept"), line, strict=True)
    }


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A line for each label of a head, fitted on validation items after the epoch was chosen."""

    lines: tuple[Line, ...]
    """(1, 0) for a label that has none."""
    refused: tuple[str | None, ...]
    """Why a label has none."""
    items: int

    @classmethod
    def fit(cls, predicted: Array, labels: Array) -> "Calibration":
        """The lines of predictions and MOS, both (items, labels).

        A label has none for fewer than FEWEST_TO_CHOOSE_BY items, and where its slope is not above 0.
        """
        found = [_fit(*pair) for pair in zip(columns(predicted), columns(labels), strict=True)]
        return cls(lines=tuple(line for line, _ in found), refused=tuple(why for _, why in found), items=len(labels))

    def applied(self, predicted: Array) -> Array:
        """Predictions (items, labels) on the lines."""
        slopes, intercepts = np.array(self.lines).T
        mapped: Array = predicted * slopes + intercepts
        return mapped

    def record(self, names: Sequence[str], *, refit: bool) -> dict[str, Any]:
        """What metrics.json says, `by_label`; `refit` says that another fit than the one it was fitted to has it."""
        told: list[dict[str, Any]] = []
        for (slope, intercept), why in zip(self.lines, self.refused, strict=True):
            if why is None:
                told.append({"slope": slope, "intercept": intercept, "n": self.items, "applied_to_refit": refit})
            else:
                told.append({"slope": None, "intercept": None, "n": self.items, "not_fitted": why})
        found: dict[str, Any] = by_label(names, told)
        return found

    def warnings(self, names: Sequence[str]) -> list[str]:
        """A line for each label that could not be calibrated."""
        return [
            f"`calibrate` left the {name} predictions as they are: {why}."
            for name, why in zip(names, self.refused, strict=True)
            if why is not None
        ]

    def mark(self, scores: Sequence[dict[str, Any]]) -> None:
        """Say in the validation metrics of each label that its line was fitted to the same items."""
        for score, why in zip(scores, self.refused, strict=True):
            if why is None:
                score["calibrated_here"] = True


def calibration_warnings(
    names: Sequence[str], predicted: Array, labels: Array, *, calibrate: bool = False
) -> list[str]:
    """What is wrong with the scale of validation predictions (items, labels); nothing for too few items to tell.

    `calibrate` says whether a line was asked for, which is then no remedy.
    """
    if len(labels) < FEWEST_TO_CHOOSE_BY:
        return []
    pairs = zip(names, columns(predicted), columns(labels), strict=True)
    return [line for name, guesses, mos in pairs for line in _warnings(name, guesses, mos, calibrate=calibrate)]


def _fit(predicted: NDArray[np.float64], labels: NDArray[np.float64]) -> tuple[Line, str | None]:
    if len(labels) < FEWEST_TO_CHOOSE_BY:
        return _AS_IT_IS, f"{len(labels)} validation items are too few to fit a line to ({FEWEST_TO_CHOOSE_BY} needed)"
    slope, intercept = calibration_line(predicted, labels)
    if math.isnan(slope):
        return _AS_IT_IS, "all validation predictions are equal, or one is not finite"
    if slope <= 0.0:
        return _AS_IT_IS, f"the slope of validation MOS on predictions is {slope:.3g}, and a line must rise"
    return (slope, intercept), None


def _warnings(name: str, predicted: NDArray[np.float64], labels: NDArray[np.float64], *, calibrate: bool) -> list[str]:
    found: list[str] = []
    slope, _ = calibration_line(predicted, labels)
    remedy = "Train with other settings."
    if slope > 0.0 and not calibrate:
        remedy = "Set `calibrate`, which fits a line on validation items, or train with other settings."
    if not math.isnan(slope) and not RIGHT_SLOPES[0] <= slope <= RIGHT_SLOPES[1]:
        how = "too little" if slope > 1.0 else "too much" if slope > 0.0 else "the wrong way"
        found.append(
            f"On {len(labels)} validation items the {name} MOS changes by {slope:.2f} where the prediction changes by "
            f"1: predictions spread {how}, and errors such as RMSE are larger than they need be. {remedy}"
        )
    rmse, deviation = math.sqrt(float(np.mean(np.square(predicted - labels)))), float(labels.std())
    if rmse > deviation:
        found.append(
            f"On {len(labels)} validation items the RMSE of {name} is {rmse:.3g}, above the standard deviation of the "
            f"MOS, {deviation:.3g}: their mean alone would be a better prediction. {remedy}"
        )
    return found
