"""What a fit tells of itself: a row of the curves per epoch, and which epoch was kept and why."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.labels import without_label_axis

STILL_RISING = 0.02
"""What the validation SRCC must have gained over the last quarter of a training for more epochs to be advised."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of the curves. Losses are in the scale of the loss, RMSE in the unit of the labels.

    Of a head with several labels each number is the mean over them, and undefined where that of one label is.
    """

    stage: str
    epoch: int
    """From 1."""
    lr: float
    """Of the last step, before the projection's own scale."""
    train_loss: float
    validation_srcc: float | None
    """None without validation items, NaN where it is not defined."""
    validation_plcc: float | None
    validation_rmse: float | None
    seconds: float
    """Of training and validation."""
    test: Mapping[str, float] = field(default_factory=dict[str, float])
    """Columns of test scores, which no choice hears of; see paper_compatible.py. Empty where they are not followed."""

    def line(self) -> str:
        """The epoch in one line for people."""
        text = f"epoch {self.epoch}: loss {self.train_loss:.4f}"
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
    """The chosen epoch, from 1."""
    choice: str
    """How it was chosen, in words."""
    validation_predictions: NDArray[np.float64]
    """(items, labels)."""

    def record(self) -> dict[str, Any]:
        """The outcome in tensors and plain values, as a checkpoint can hold it; predictions of one label (items,)."""
        return {
            "curves": [asdict(epoch) for epoch in self.curves],
            "epoch": self.epoch,
            "choice": self.choice,
            "validation_predictions": torch.from_numpy(without_label_axis(self.validation_predictions)),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Outcome":
        """The outcome that `record` was made of."""
        predictions = record["validation_predictions"].numpy().copy()
        return cls(
            curves=[Epoch(**row) for row in record["curves"]],
            epoch=record["epoch"],
            choice=record["choice"],
            validation_predictions=predictions[:, None] if predictions.ndim == 1 else predictions,
        )


def epoch_warnings(outcome: Outcome, config: TrainConfig) -> list[str]:
    """What a reader must know of how the epoch was chosen: on too few items, at the first epoch, or on the way up."""
    items, scores = len(outcome.validation_predictions), [row.validation_srcc for row in outcome.curves]
    if not items:
        return []
    if items < FEWEST_TO_CHOOSE_BY:
        return [
            f"There {'is only 1 validation item' if items == 1 else f'are only {items} validation items'}: too few to "
            f"choose an epoch by ({FEWEST_TO_CHOOSE_BY} needed), so the last epoch was kept. Their scores say little. "
            "Raise `validation`, or set it to 0 to train on them."
        ]
    epochs = len(scores)
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
