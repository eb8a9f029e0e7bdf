"""The logistic mappings from predicted to true MOS that PLCC and RMSE are often reported after.

`logistic4` is the curve of VQEG (2000; also ITU-T J.149), b2 + (b1 - b2) / (1 + exp(-(x - b3) / |b4|)), and `logistic5`
that of Sheikh, Sabir and Bovik (2006), b1 (1/2 - 1 / (1 + exp(b2 (x - b3)))) + b4 x + b5. They are fitted by least
squares on validation items and then only applied: fitted on the items that it is to measure, a mapping flatters
every predictor.

Both curves are linear in all but the centre b3 and the width (b4, or 1 / b2), so the search runs over these two, with
the rest solved exactly (variable projection), from a grid of starts. The direction of the curve comes out of the data.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import OptimizeResult, least_squares

from agiqa.errors import DataError, UnknownName

Array = NDArray[np.float64]

PARAMETERS = {"logistic4": 4, "logistic5": 5}
"""How many parameters each mapping has."""

_ITEMS_PER_PARAMETER = 5
_WIDTHS = (0.05, 20.0)
"""Narrowest and widest curve, in standard deviations of the predictions: nearly a step, and nearly a line."""
_BEYOND = 2.0
"""How far outside the predictions the centre may lie, in widths: so no curve shoots up where one item is."""
_GRID = (9, 7)
_TOLERANCE = 1e-12
_MOST_STEPS = 300
_SMALLEST_SHARE = 1e-8


@dataclass(frozen=True, kw_only=True)
class LogisticMap:
    """A fitted mapping, in the units of the predictions and MOS that it was fitted to."""

    kind: str
    """logistic4 or logistic5."""
    parameters: tuple[float, ...]
    """b1, b2, ... of the formula at the top of this module."""
    n: int
    """Items that it was fitted to."""
    monotone: bool
    """Whether it only rises or only falls over the predictions that it was fitted to; logistic4 always does."""

    def __call__(self, predicted: Array) -> Array:
        """The mapped predictions (items,), float64."""
        if self.kind == "logistic4":
            b1, b2, b3, b4 = self.parameters
            return np.asarray((b1 + b2) / 2 + (b1 - b2) / 2 * np.tanh((predicted - b3) / (2 * abs(b4))))
        b1, b2, b3, b4, b5 = self.parameters
        return np.asarray(b1 / 2 * np.tanh(b2 * (predicted - b3) / 2) + b4 * predicted + b5)

    def rescaled(self, slope: float, offset: float) -> "LogisticMap":
        """The same mapping on another scale of predictions and MOS: `slope` (above 0) times this one, and `offset`."""
        if self.kind == "logistic4":
            b1, b2, b3, b4 = self.parameters
            high, low, centre = (slope * value + offset for value in (b1, b2, b3))
            return replace(self, parameters=(high, low, centre, slope * b4))
        b1, b2, b3, b4, b5 = self.parameters
        centre, constant = slope * b3 + offset, slope * b5 + offset - b4 * offset
        return replace(self, parameters=(slope * b1, b2 / slope, centre, b4, constant))

    def record(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {"parameters": list(self.parameters), "fitted_on": "validation", "n": self.n, "monotone": self.monotone}


@dataclass(frozen=True, kw_only=True)
class Mappings:
    """Every mapping by its kind: fitted, or the reason why there is none."""

    fitted: Mapping[str, LogisticMap]
    absent: Mapping[str, str]

    def record(self) -> dict[str, Any]:
        """What metrics.json says under `logistic`: per kind, the fit or `{"absent": reason}`."""
        reasons = {kind: {"absent": reason} for kind, reason in self.absent.items()}
        return {**{kind: mapping.record() for kind, mapping in self.fitted.items()}, **reasons}

    def rescaled(self, slope: float, offset: float) -> "Mappings":
        """Each as `LogisticMap.rescaled`."""
        return replace(self, fitted={kind: one.rescaled(slope, offset) for kind, one in self.fitted.items()})

    @classmethod
    def none(cls, reason: str) -> "Mappings":
        """No mapping of any kind."""
        return cls(fitted={}, absent=dict.fromkeys(PARAMETERS, reason))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Mappings":
        """What `record` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        fitted = {kind: _from_record(kind, entry) for kind, entry in record.items() if "absent" not in entry}
        return cls(fitted=fitted, absent={kind: str(e["absent"]) for kind, e in record.items() if "absent" in e})


def _from_record(kind: str, entry: Mapping[str, Any]) -> LogisticMap:
    parameters = _finite(entry["parameters"])
    if len(parameters) != PARAMETERS[kind]:
        message = f"{kind} has {len(parameters)} parameters, expected {PARAMETERS[kind]}"
        raise ValueError(message)
    return LogisticMap(kind=kind, parameters=parameters, n=int(entry["n"]), monotone=bool(entry["monotone"]))


def fit_mappings(predicted: Array, labels: Array) -> Mappings:
    """Fit every mapping to the predictions and MOS (items,) of the validation part; what has no fit says why."""
    fitted: dict[str, LogisticMap] = {}
    absent: dict[str, str] = {}
    for kind in PARAMETERS:
        try:
            fitted[kind] = fit_logistic(predicted, labels, kind)
        except DataError as error:
            absent[kind] = str(error)
    return Mappings(fitted=fitted, absent=absent)


def fit_logistic(predicted: Array, labels: Array, kind: str) -> LogisticMap:
    """The least-squares fit of `labels` (items,) by the mapping `kind` of `predicted` (items,), on any scale of either.

    Raises UnknownName for the kind, and DataError when these items cannot determine a fit: too few, equal or not
    finite, or no convergence.
    """
    if kind not in PARAMETERS:
        what = "mapping"
        raise UnknownName.of(what, kind, PARAMETERS)
    _check(predicted, labels, kind)
    middle, spread = float(predicted.mean()), float(predicted.std())
    level, height = float(labels.mean()), float(labels.std())
    curve = _best_curve((predicted - middle) / spread, (labels - level) / height, sloped=kind == "logistic5")
    centre, width, wave = middle + spread * curve.centre, spread * curve.width, height * curve.wave
    slope = height * curve.slope / spread
    bottom = level + height * curve.constant - slope * middle
    if kind == "logistic4":
        parameters = _finite((bottom + wave, bottom - wave, centre, width))
        return LogisticMap(kind=kind, parameters=parameters, n=len(labels), monotone=True)
    parameters = _finite((2 * wave, 1 / width, centre, slope, bottom))
    monotone = _monotone(parameters, float(predicted.min()), float(predicted.max()))
    return LogisticMap(kind=kind, parameters=parameters, n=len(labels), monotone=monotone)


@dataclass(frozen=True, kw_only=True)
class _Curve:
    """wave * tanh((x - centre) / (2 width)) + slope * x + constant."""

    centre: float
    width: float
    wave: float
    slope: float
    constant: float


def _best_curve(x: Array, y: Array, *, sloped: bool) -> _Curve:
    """The least-squares curve through standardised x and y; raises DataError without convergence."""
    middle, reach = (float(x.max()) + float(x.min())) / 2, float(np.ptp(x)) / 2

    def solve(point: Array) -> tuple[_Curve, Array]:
        width = math.exp(point[1])
        return _solve(x, y, middle + (reach + _BEYOND * width) * float(point[0]), width, sloped=sloped)

    def residuals(point: Array) -> Array:
        return solve(point)[1]

    lowest, highest = zip((-1.0, 1.0), map(math.log, _WIDTHS), strict=True)
    solutions: list[OptimizeResult] = [
        least_squares(
            residuals,
            start,
            bounds=(lowest, highest),
            ftol=_TOLERANCE,
            xtol=_TOLERANCE,
            gtol=_TOLERANCE,
            max_nfev=_MOST_STEPS,
        )
        for start in _starts(solve)
    ]
    converged = [one for one in solutions if one.status > 0 and math.isfinite(one.cost)]
    if not converged:
        message = f"the fit did not converge in {_MOST_STEPS} steps from any of {len(solutions)} starts"
        raise DataError(message)
    return solve(min(converged, key=lambda one: float(one.cost)).x)[0]


def _starts(solve: Callable[[Array], tuple[_Curve, Array]]) -> list[Array]:
    """For each of some widths the best of some centres, as the points that `solve` takes."""
    places = np.linspace(-0.9, 0.9, _GRID[0])
    widths = np.linspace(math.log(_WIDTHS[0]), math.log(_WIDTHS[1]), _GRID[1] + 2)[1:-1]
    rows = [[np.array([place, width]) for place in places] for width in widths]
    return [min(row, key=lambda point: float(np.sum(np.square(solve(point)[1])))) for row in rows]


def _solve(x: Array, y: Array, centre: float, width: float, *, sloped: bool) -> tuple[_Curve, Array]:
    """The best curve of this centre and width, and its residuals (items,)."""
    wave = np.tanh((x - centre) / (2 * width))
    design = np.stack([wave, x] if sloped else [wave], axis=1)
    means = design.mean(axis=0)
    if float(np.abs(wave - means[0]).max()) < _SMALLEST_SHARE:
        design[:, 0] = means[0]  # flat over all items: what is left of it is rounding
    factors = np.linalg.lstsq(design - means, y, rcond=_SMALLEST_SHARE)[0]
    residuals = (design - means) @ factors - y
    slope = float(factors[1]) if sloped else 0.0
    constant = -float(means @ factors)
    return _Curve(centre=centre, width=width, wave=float(factors[0]), slope=slope, constant=constant), residuals


def _monotone(parameters: tuple[float, ...], low: float, high: float) -> bool:
    """Whether logistic5 has no turn from `low` to `high`: its slope is extreme at the ends and at the centre."""
    b1, b2, b3, b4, _ = parameters
    points = np.array([low, high, min(max(b3, low), high)])
    slopes = b1 * b2 / 4 / np.cosh(np.minimum(np.abs(b2 * (points - b3) / 2), 300.0)) ** 2 + b4
    return bool((slopes >= 0).all() or (slopes <= 0).all())


def _check(predicted: Array, labels: Array, kind: str) -> None:
    """Raise DataError for items through which no curve of this kind can be fitted."""
    least = _ITEMS_PER_PARAMETER * PARAMETERS[kind]
    if len(labels) < least:
        message = f"a fit of {PARAMETERS[kind]} parameters needs {least} validation items, and there are {len(labels)}"
    elif not (np.isfinite(predicted).all() and np.isfinite(labels).all()):
        message = "a validation prediction or label is not finite"
    elif len(np.unique(predicted)) <= PARAMETERS[kind]:
        message = f"the validation items have {len(np.unique(predicted))} different predictions only"
    elif np.ptp(labels) == 0:
        message = "all validation labels are equal"
    else:
        return
    raise DataError(message)


def _finite(values: Iterable[float]) -> tuple[float, ...]:
    """The values as floats; raises DataError when one is not finite."""
    found = tuple(float(value) for value in values)
    if not all(math.isfinite(value) for value in found):
        message = "a parameter of the fit is not finite"
        raise DataError(message)
    return found
