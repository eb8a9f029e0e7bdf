"""How good predicted spreads are: likelihoods, and agreement with the known standard deviations of ratings."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.evaluation.metrics import score

Array = NDArray[np.float64]


def spread_fields(predicted: Array, spread: Array, labels: Array, known: Array) -> dict[str, Any]:
    """The entry `spread` of the metrics of one label, from values (items,), ready for JSON.

    `known` are the standard deviations of the ratings, NaN for unknown ones. `mean` is the mean spread, `nll` the mean
    negative log likelihood of the MOS under Gaussians of prediction and spread, in nats. Of the `n_std` items with a
    known deviation: `rating_nll`, the same of single ratings (its expectation over ratings with that mean and
    deviation), and `srcc`, `plcc` and `rmse` of the spreads with the deviations; null where undefined.
    """
    found: dict[str, Any] = {"mean": float(spread.mean()), "nll": _likelihood(predicted, spread, labels, 0.0)}
    given = np.isfinite(known)
    found["n_std"] = int(given.sum())
    if given.any():
        pair = predicted[given], spread[given]
        agreement = score(spread[given], known[given])
        found["rating_nll"] = _likelihood(*pair, labels[given], known[given])
        found |= {name: None if math.isnan(agreement[name]) else agreement[name] for name in ("srcc", "plcc", "rmse")}
    return found


def _likelihood(predicted: Array, spread: Array, labels: Array, deviations: Array | float) -> float:
    """Mean negative log likelihood of values with the means `labels` and these standard deviations."""
    squares = (np.square(labels - predicted) + np.square(deviations)) / np.square(spread)
    return float(np.mean(0.5 * math.log(2.0 * math.pi) + np.log(spread) + 0.5 * squares))
