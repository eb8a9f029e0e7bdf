"""The mapping from predicted to true MOS after which papers often report PLCC and RMSE.

`logistic4` is the curve of VQEG (2000; also ITU-T J.149), b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)). With fewer than
CURVE_ITEMS validation items it is `linear`, b1 x + b2. Both are least-squares fits on validation items, for use on
others: fitted on the items that it measures, a mapping flatters every predictor.

A mapping always rises (b1 > b2; b1 > 0 for the line), so it never reverses the order of predictions. Predictions and
MOS are standardised first, so that their units do not matter.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares
from scipy.special import expit

from agiqa.errors import DataError

Array = NDArray[np.float64]

CURVE_ITEMS = 100
"""Validation items that a logistic curve needs; with fewer it costs more PLCC than it gains."""
_LINE_ITEMS = 10
_PARAMETERS = {"logistic4": 4, "linear": 2}
_OLD = "logistic5"
_OLD_REASON = "five parameters give a curve that may fall where MOS rise; the fit that the run recorded is not applied"
_WIDTHS = (0.3, 20.0)
"""Narrowest and widest curve, in deviations of the predictions: steeper curves fit noise, wider ones are lines."""
_STARTS = (0.5, 1.0, 10.0)
"""Initial widths of the search."""
_CENTRE_MARGIN = 1.0
"""How far outside the predictions the centre may lie, in their deviations; otherwise single items bend the curve."""
_DECIMALS = 9
"""Of standardised values; later digits are rounding noise that depends on the unit."""
_TOLERANCE = 1e-12
_MOST_STEPS = 500
_SMALLEST_RISE = 1e-3


@dataclass(frozen=True, kw_only=True)
class MosMapping:
    """A fitted mapping, in the units of the predictions and MOS that it was fitted to."""

    kind: str
    """logistic4 or linear."""
    parameters: tuple[float, ...]
    """b1, b2, ... of the formula."""
    n: int
    """Items of the fit."""

    def __call__(self, predicted: Array) -> Array:
        """The mapped predictions (items,), float64."""
        if self.kind == "linear":
            slope, constant = self.parameters
            return np.asarray(slope * predicted + constant)
        high, low, centre, width = self.parameters
        return np.asarray(low + (high - low) * expit((predicted - centre) / abs(width)))

    def rescaled(self, slope: float, offset: float) -> "MosMapping":
        """The mapping on another scale, `slope` (above 0) times this scale plus `offset`, of predictions and MOS."""
        if self.kind == "linear":
            own, constant = self.parameters
            return replace(self, parameters=(own, slope * constant + offset - own * offset))
        *values, width = self.parameters
        return replace(self, parameters=(*(slope * value + offset for value in values), slope * width))

    def record(self) -> dict[str, Any]:
        """The entry of metrics.json."""
        return {"parameters": list(self.parameters), "fitted_on": "validation", "n": self.n}


@dataclass(frozen=True, kw_only=True)
class Mappings:
    """Fitted mappings by kind, and why a kind is absent."""

    fitted: Mapping[str, MosMapping]
    absent: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """The entry `logistic` of metrics.json: for each kind the fit, or `{"absent": reason}`."""
        reasons = {kind: {"absent": reason} for kind, reason in self.absent.items()}
        return {**{kind: mapping.record() for kind, mapping in self.fitted.items()}, **reasons}

    def rescaled(self, slope: float, offset: float) -> "Mappings":
        """Each rescaled as by `MosMapping.rescaled`."""
        return replace(self, fitted={kind: one.rescaled(slope, offset) for kind, one in self.fitted.items()})

    @classmethod
    def none(cls, reason: str) -> "Mappings":
        """No mapping of any kind."""
        return cls(fitted={}, absent={"logistic4": reason})

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Mappings":
        """Parse what `record` made. Raises KeyError, TypeError or ValueError for anything else.

        A fit of five parameters, from an old version of agiqa, becomes absent.
        """
        absent = {kind: str(entry["absent"]) for kind, entry in record.items() if "absent" in entry}
        recorded = {kind: entry for kind, entry in record.items() if kind not in absent}
        old = {kind: _OLD_REASON for kind in recorded if kind == _OLD}
        fitted = {kind: _from_record(kind, entry) for kind, entry in recorded.items() if kind not in old}
        return cls(fitted=fitted, absent={**absent, **old})


def _from_record(kind: str, entry: Mapping[str, Any]) -> MosMapping:
    parameters = _finite(entry["parameters"])
    if len(parameters) != _PARAMETERS[kind]:
        message = f"{kind} has {len(parameters)} parameters, expected {_PARAMETERS[kind]}"
        raise ValueError(message)
    return MosMapping(kind=kind, parameters=parameters, n=int(entry["n"]))


def fit_mappings(predicted: Array, labels: Array) -> Mappings:
    """Fit the curve, or a line, to predictions and MOS (items,) of the validation part; a failed fit becomes absent."""
    try:
        if len(labels) >= CURVE_ITEMS:
            return Mappings(fitted={"logistic4": fit_logistic(predicted, labels)}, absent={})
        line = fit_line(predicted, labels)
    except DataError as error:
        return Mappings.none(str(error))
    why = f"a curve needs {CURVE_ITEMS} validation items, and there are {len(labels)}: a line is fitted instead"
    return Mappings(fitted={"linear": line}, absent={"logistic4": why})


def fit_line(predicted: Array, labels: Array) -> MosMapping:
    """The least-squares line. Raises DataError for items that determine no line, or a line that does not rise."""
    pairs = _Pairs.of(predicted, labels)
    slope = pairs.slope * pairs.height / pairs.spread
    return MosMapping(kind="linear", parameters=_finite((slope, pairs.level - slope * pairs.middle)), n=len(labels))


def fit_logistic(predicted: Array, labels: Array) -> MosMapping:
    """The least-squares `logistic4`, on any scale of predictions and labels (items,).

    Raises DataError as `fit_line`, and where the fit does not converge.
    """
    pairs = _Pairs.of(predicted, labels)
    reach = float(pairs.x.min()) - _CENTRE_MARGIN, float(pairs.x.max()) + _CENTRE_MARGIN
    lowest, highest = zip((-math.inf, math.inf), (0.0, math.inf), reach, map(math.log, _WIDTHS), strict=True)
    solutions: list[OptimizeResult] = [
        least_squares(
            pairs.residuals,
            pairs.start(width),
            jac=pairs.jacobian,
            bounds=(lowest, highest),
            ftol=_TOLERANCE,
            xtol=_TOLERANCE,
            gtol=_TOLERANCE,
            max_nfev=_MOST_STEPS,
        )
        for width in _STARTS
    ]
    best = min(solutions, key=lambda one: float(one.cost))
    if best.status == 0:
        message = f"the fit did not converge in {_MOST_STEPS} steps"
        raise DataError(message)
    low, rise, centre, log_width = best.x.tolist()
    bottom, top = (pairs.level + pairs.height * value for value in (low, low + rise))
    width = pairs.spread * math.exp(log_width)
    parameters = _finite((top, bottom, pairs.middle + pairs.spread * centre, width))
    return MosMapping(kind="logistic4", parameters=parameters, n=len(labels))


@dataclass(frozen=True, kw_only=True)
class _Pairs:
    """Predictions and labels with mean 0 and deviation 1, and the curve through them.

    The curve's parameters are the low end, the rise to the high end, the centre, and the logarithm of the width.
    """

    x: Array
    y: Array
    middle: float
    spread: float
    level: float
    height: float

    @classmethod
    def of(cls, predicted: Array, labels: Array) -> "_Pairs":
        """Raises DataError as `fit_line`."""
        _check(predicted, labels)
        middle, spread = float(predicted.mean()), float(predicted.std())
        level, height = float(labels.mean()), float(labels.std())
        x, y = (predicted - middle) / spread, (labels - level) / height
        made = cls(x=x.round(_DECIMALS), y=y.round(_DECIMALS), middle=middle, spread=spread, level=level, height=height)
        if made.slope <= 0:
            message = "the validation MOS do not rise with the predictions"
            raise DataError(message)
        return made

    @property
    def slope(self) -> float:
        """Of the least-squares line."""
        return float(self.x @ self.y) / float(self.x @ self.x)

    def start(self, width: float) -> Array:
        """The curve of this width centred on the predictions, with the best rising ends."""
        wave = expit(self.x / width)
        rise = max(float((wave - wave.mean()) @ self.y / np.square(wave - wave.mean()).sum()), _SMALLEST_RISE)
        return np.array([float(self.y.mean() - rise * wave.mean()), rise, 0.0, math.log(width)])

    def residuals(self, point: Array) -> Array:
        """The curve minus the labels (items,)."""
        low, rise, centre, log_width = point
        return np.asarray(low + rise * expit((self.x - centre) / math.exp(log_width)) - self.y)

    def jacobian(self, point: Array) -> Array:
        """Derivatives of the residuals (items, 4)."""
        _, rise, centre, log_width = point
        place = (self.x - centre) / math.exp(log_width)
        wave = expit(place)
        steep = rise * wave * (1 - wave)
        return np.stack([np.ones_like(wave), wave, -steep / math.exp(log_width), -steep * place], axis=1)


def _check(predicted: Array, labels: Array) -> None:
    """Raise DataError for items that determine no line."""
    if len(labels) < _LINE_ITEMS:
        message = f"a line needs {_LINE_ITEMS} validation items, and there are {len(labels)}"
    elif not (np.isfinite(predicted).all() and np.isfinite(labels).all()):
        message = "a validation prediction or label is not finite"
    elif np.ptp(predicted) == 0:
        message = "all validation predictions are equal"
    elif np.ptp(labels) == 0:
        message = "all validation labels are equal"
    else:
        return
    raise DataError(message)


def _finite(values: Iterable[float]) -> tuple[float, ...]:
    """The values as floats. Raises DataError where one is not finite."""
    found = tuple(float(value) for value in values)
    if not all(math.isfinite(value) for value in found):
        message = "a parameter of the fit is not finite"
        raise DataError(message)
    return found
