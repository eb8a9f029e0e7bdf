"""Predictions with conformal intervals: of a run folder on any store that its head can read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, read_labels
from agiqa.heads.data.layers import base_of
from agiqa.heads.data.splits import calibration_mask
from agiqa.heads.data.variants import as_variant
from agiqa.heads.evaluation.conformal import USUAL_LEVEL, ConformalScores, kind_of_run, recorded_errors
from agiqa.heads.evaluation.runs import PREDICTIONS, Run
from agiqa.heads.evaluation.scoring import Moments, positions_of, run_moments
from agiqa.heads.settings.labels import column_names, without_label_axis

UNLIKE = (
    "these images are not from the store that the head was trained on. Intervals promise nothing for other generators, "
    "prompts or data sets; `agiqa evaluate` measures what holds where MOS are known."
)


@dataclass(frozen=True, kw_only=True)
class PredictedIntervals:
    """Predictions with intervals: (items,) for a head with one label, (items, labels) for several."""

    mos: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    spread: NDArray[np.float64] | None
    """None for a head that predicts no spread."""
    level: float


def predict_intervals(
    run: Run,
    source: FeatureSource,
    items: Sequence[int] | NDArray[Any] | None = None,
    *,
    level: float = USUAL_LEVEL,
    variant: str | None = None,
    device: str = "auto",
    batch_size: int = 32,
) -> PredictedIntervals:
    """The predicted MOS of `items`, or of all, and intervals that hold the true MOS of a share `level` of images.

    The promise is for images that are drawn as the validation items of the run were; see conformal.py. Intervals are
    cut at the ends of the MOS scale, where it is known. Raises as `predict`, and ConfigError where `level` is not
    between 0 and 1 or the run has too few validation items for it.
    """
    source = as_variant(source, variant or run.train.variant)
    chosen = np.arange(len(source.items.names)) if items is None else positions_of(items, source)
    found, (low, high) = _with_intervals(run, source, chosen, level, device=device, batch_size=batch_size)
    return PredictedIntervals(
        mos=without_label_axis(found.mos),
        low=without_label_axis(low),
        high=without_label_axis(high),
        spread=None if found.spread is None else without_label_axis(found.spread),
        level=level,
    )


def predicted_columns(
    run: Run,
    source: FeatureSource,
    *,
    level: float | None,
    device: str = "auto",
    batch_size: int = 32,
) -> dict[str, NDArray[np.float64]]:
    """The columns of a table of predictions of all items of `source`, (items,) each, by their names.

    `source` is the variant of a store that the run reads, see `as_variant`.

    For each label `predicted`, `spread` if the head predicts one and, if `level` is given, `low` and `high`. Raises as
    `predict_intervals`.
    """
    everything = np.arange(len(source.items.names))
    values: dict[str, NDArray[np.float64] | None]
    if level is None:
        found = run_moments(run, source, everything, device=device, batch_size=batch_size)
        values = {"predicted": found.mos, "spread": found.spread}
    else:
        found, ends = _with_intervals(run, source, everything, level, device=device, batch_size=batch_size)
        values = {"predicted": found.mos, "spread": found.spread, "low": ends[0], "high": ends[1]}
    names = run.train.labels
    return {
        title: column[:, label]
        for label in range(len(names))
        for what, column in values.items()
        if column is not None
        for title in [column_names(names, what)[label]]
    }


def _with_intervals(
    run: Run, source: FeatureSource, items: NDArray[np.int64], level: float, *, device: str, batch_size: int
) -> tuple[Moments, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Predictions of `items`, and their lowest and highest MOS."""
    scores = conformal_scores(run, source, device=device, batch_size=batch_size)
    scores.check(level)  # too few items are said before the features are read
    found = run_moments(run, source, items, device=device, batch_size=batch_size)
    return found, scores.intervals(found.mos, found.spread, level=level, scales=run.scales)


def conformal_scores(
    run: Run, source: FeatureSource | None = None, *, device: str = "auto", batch_size: int = 32
) -> ConformalScores:
    """`recorded_errors` of the run or, where predictions.csv is gone, the same computed on `source`.

    Raises HeadError where there is no such file, and `source` is not the store of the run or the head has learned the
    validation items: one that was refit, a closed form, or a stack, which may hold such heads.
    """
    if (run.path / PREDICTIONS).exists():
        return recorded_errors(run)
    learned = run.train.refit or run.head.is_closed
    if source is None or base_of(source).id != run.store_id or learned:
        message = f"{run.path} has no {PREDICTIONS}, whose validation rows intervals are made from. " + (
            "The head has learned its validation items, so they cannot be computed again: train it anew."
            if learned
            else "Give the store that the head was trained on, or train it anew."
        )
        raise HeadError(message)
    everything = np.arange(len(source.items.names))
    items = everything[run.parts().contain(source, everything, "validation")]
    held_back = calibration_mask(source, items, run.train)
    items = items[held_back] if held_back.any() else items
    found = run_moments(run, source, items, device=device, batch_size=batch_size)
    labels = read_labels(source, items, label=run.train.label)
    return ConformalScores.of(kind_of_run(run), found.mos, labels, found.spread)
