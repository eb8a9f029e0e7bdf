"""The learning curves of a fit: a row for each epoch, the epoch that was kept and why, and the test scores of each.

The released code of the paper evaluates on the test items after every epoch and keeps the best one, so its number is
the largest of as many draws as there are epochs. The setting `paper_compatible` records the test scores of every epoch,
and reports the best and by how much it exceeds the number of the run. Test scores are never used for selection.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.heads.closed.combined import AnyHead
from agiqa.heads.data.features import FeatureSet, FeatureSource, read_labels
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY
from agiqa.heads.evaluation.metrics import score
from agiqa.heads.evaluation.scoring import predict_items
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.labels import (
    by_label,
    column_names,
    labelled_pairs,
    of_each_label,
    parse_labels,
    without_label_axis,
)

STILL_RISING = 0.02
"""A larger gain of validation SRCC over the last quarter of a training brings the advice to train for more epochs."""
_FOLLOWED = ("srcc", "plcc")


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of the curves. Losses are in the scale of the loss, RMSE in the unit of the labels.

    With several labels each number is the mean over them, undefined where the number of one label is undefined.
    """

    stage: str
    epoch: int
    """From 1."""
    lr: float
    """Learning rate of the last step, without the projection's own scale."""
    train_loss: float
    validation_srcc: float | None
    """None without validation items, NaN where undefined."""
    validation_plcc: float | None
    validation_rmse: float | None
    seconds: float
    """Duration of training and validation."""
    test: Mapping[str, float] = field(default_factory=dict[str, float])
    """Columns of test scores, never used for selection. Empty without `paper_compatible`."""

    def line(self, *, of: int) -> str:
        """The epoch, one of `of`, in one line for people."""
        text = f"epoch {self.epoch}/{of}: loss {self.train_loss:.4f}"
        if self.validation_srcc is not None and self.validation_plcc is not None:
            text += f", validation SRCC {self.validation_srcc:.4f} PLCC {self.validation_plcc:.4f}"
        return f"{text}, {self.seconds:.1f} s"

    def row(self) -> dict[str, Any]:
        """The columns of curves.csv."""
        row = asdict(self)
        del row["test"]
        return {**row, **self.test}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The epochs of a fit, and the one that was chosen."""

    curves: list[Epoch]
    epoch: int
    """The chosen epoch, from 1; 0 for the closed form of `init` alone."""
    choice: str
    """How it was chosen, in words."""
    validation_predictions: NDArray[np.float64]
    """(items, labels)."""
    validation_spreads: NDArray[np.float64] | None = None
    """Of these predictions, (items, labels); None for a head that predicts no spread."""

    def record(self) -> dict[str, Any]:
        """The outcome in tensors and plain values, for a checkpoint; predictions of one label are (items,)."""
        return {
            "curves": [asdict(epoch) for epoch in self.curves],
            "epoch": self.epoch,
            "choice": self.choice,
            "validation_predictions": torch.from_numpy(without_label_axis(self.validation_predictions)),
            "validation_spreads": None
            if self.validation_spreads is None
            else torch.from_numpy(self.validation_spreads),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Outcome":
        """The outcome that `record` returned."""
        predictions, spreads = record["validation_predictions"].numpy().copy(), record.get("validation_spreads")
        return cls(
            curves=[Epoch(**row) for row in record["curves"]],
            epoch=record["epoch"],
            choice=record["choice"],
            validation_predictions=predictions[:, None] if predictions.ndim == 1 else predictions,
            validation_spreads=None if spreads is None else spreads.numpy().copy(),
        )


def epoch_warnings(outcome: Outcome, config: TrainConfig, *, calibration: int = 0) -> list[str]:
    """Warnings about the choice of the epoch: too few items, the first epoch, or a validation SRCC that still rose.

    `calibration` is the number of validation items that did not choose.
    """
    items = len(outcome.validation_predictions) - calibration
    scores = [row.validation_srcc for row in outcome.curves]
    if not items:
        return []
    if items < FEWEST_TO_CHOOSE_BY:
        kept = "the last epoch" if outcome.epoch else "the closed form of `init` alone"
        return [
            f"There {'is only 1 validation item' if items == 1 else f'are only {items} validation items'}: too few to "
            f"choose an epoch by ({FEWEST_TO_CHOOSE_BY} needed), so {kept} was kept. Their scores say little. "
            "Raise `validation`, or set it to 0 to train on them."
        ]
    epochs = len(scores)
    if outcome.epoch == 0:
        return [
            f"None of {epochs} epochs has a higher validation SRCC than the closed form of `init` alone, which was kept"
            ". Lower `lr`, or use the closed form as the encoder."
        ]
    if outcome.epoch == 1 and epochs > 1:
        return [
            f"The first of {epochs} epochs was kept: validation SRCC was never higher later. Lower `lr`; or raise "
            "`epochs`, where the training loss still falls."
        ]
    last, before = scores[-1], scores[-1 - math.ceil(epochs / 4)] if epochs > 1 else None
    if outcome.epoch < config.epochs or last is None or before is None or not last - before > STILL_RISING:
        return []
    return [
        f"Validation SRCC still rose at the end, from {before:.3f} to {last:.3f} over the last {math.ceil(epochs / 4)} "
        f"of {epochs} epochs: this head is not fully trained. Raise `epochs` or `lr`."
    ]


class TestScorer:
    """Computes SRCC and PLCC of a head on the test items, after every epoch."""

    def __init__(
        self,
        source: FeatureSource,
        items: NDArray[np.int64],
        *,
        label: str,
        batch_size: int,
        kept: tuple[FeatureSet, NDArray[np.int64]] | None,
    ) -> None:
        """Scores `items`, in the same batches as the prediction of the run; `kept` as of `predict_items`.

        Raises as `read_labels`.
        """
        self._source = source
        self._items = items
        self._names = parse_labels(label)
        self._labels = read_labels(source, items, label=label)
        self._batch_size = batch_size
        self._kept = kept

    def __call__(self, head: AnyHead) -> dict[str, float]:
        """The columns that an epoch adds to curves.csv: `test_srcc` and `test_plcc`, or both of each of several labels.

        NaN where undefined. `head` and the random state stay as they are.
        """
        was_training = head.training
        head.eval()
        try:
            # compiled code would be compiled once more, without gradients
            with torch.compiler.set_stance("force_eager"):
                predicted = predict_items(head, self._source, self._items, batch_size=self._batch_size, kept=self._kept)
        finally:
            head.train(was_training)
        scores = [score(*pair) for pair in labelled_pairs(predicted, self._labels)]
        return {
            column: scores[number][metric]
            for metric in _FOLLOWED
            for number, column in enumerate(column_names(self._names, f"test_{metric}"))
        }


def best_on_test(curves: Sequence[Epoch], honest: Any, label: str) -> Any:
    """The entry `paper_compatible` of metrics.json, from the epochs of a fit and the test metrics of the run.

    `{"chosen_by", "epoch", "srcc", "plcc", "bias": {"srcc", "plcc"}}`, or that of each label under its name: one epoch
    for all labels, chosen by their mean SRCC. `bias` is the best epoch's metric minus the `honest` one. None where
    nothing is defined.
    """
    names = parse_labels(label)
    followed = {metric: _followed(curves, names, metric) for metric in _FOLLOWED}
    means = followed["srcc"].mean(axis=1)
    best = int(np.nanargmax(means)) if np.isfinite(means).any() else None
    what = "test SRCC" if len(names) == 1 else f"mean test SRCC of {', '.join(names)}"
    found: list[dict[str, Any]] = []
    for number, own in enumerate(of_each_label(names, honest)):
        values = {metric: None if best is None else _number(followed[metric][best, number]) for metric in _FOLLOWED}
        found.append(
            {
                "chosen_by": f"highest {what}" if best is not None else f"none, as the {what} was never defined",
                "epoch": None if best is None else curves[best].epoch,
                **values,
                "bias": {metric: _difference(values[metric], own[metric]) for metric in _FOLLOWED},
            }
        )
    return by_label(names, found)


def bias_warnings(best: Any, honest: Any, label: str) -> list[str]:
    """A line for each label with both numbers side by side; `best` as of `best_on_test`."""
    names = parse_labels(label)
    pairs = zip(names, of_each_label(names, best), of_each_label(names, honest), strict=True)
    return [
        f"paper-compatible{'' if len(names) == 1 else f', {name}'}: the best epoch on the test part itself "
        f"({theirs['epoch']}) has test {_spelled(theirs)}; this run, which chose without the test part, has "
        f"{_spelled(own)}. The difference, {_spelled(theirs['bias'], sign='+')}, is bias."
        for name, theirs, own in pairs
    ]


def _followed(curves: Sequence[Epoch], names: Sequence[str], metric: str) -> NDArray[np.float64]:
    """A metric (epochs, labels)."""
    titles = column_names(names, f"test_{metric}")
    return np.array([[epoch.test[title] for title in titles] for epoch in curves], dtype=np.float64)


def _number(value: float) -> float | None:
    """The value, or None for NaN, which JSON lacks."""
    return None if math.isnan(value) else float(value)


def _difference(best: float | None, honest: float | None) -> float | None:
    return None if best is None or honest is None else best - honest


def _spelled(scores: Mapping[str, Any], sign: str = "") -> str:
    """SRCC and PLCC for people."""
    return " ".join(
        f"{metric.upper()} {'undefined' if scores[metric] is None else format(scores[metric], f'{sign}.4f')}"
        for metric in _FOLLOWED
    )
