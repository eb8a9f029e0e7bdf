"""TensorBoard event files of a training: the loss and learning rate of every step, the metrics of every epoch.

Of a head with several labels they are the means that curves.csv has.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from agiqa.errors import ConfigError
from agiqa.heads.training.outcome import Epoch

_STEPS_PER_WRITE = 50
"""Losses are fetched from the device so many at a time, since every fetch waits for it."""


def check_tensorboard() -> None:
    """Raise ConfigError, with the way to install it, where the package tensorboard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        message = "`tensorboard` is set and the package is not installed: pip install 'agiqa[tensorboard]'"
        raise ConfigError(message)


class EventLog:
    """The event files of one stage. The horizontal axis of every curve is the number of steps."""

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        """Write to `folder`. `after` is the step that a resumed training starts from: what a killed one had written
        beyond it is hidden from readers. Raises as `check_tensorboard`.
        """
        check_tensorboard()
        from torch.utils.tensorboard.writer import SummaryWriter  # tensorboard is an extra

        make_writer: Any = SummaryWriter
        self._writer = make_writer(str(folder), purge_step=None if after is None else after + 1)
        self._waiting: list[tuple[int, Tensor, float]] = []

    def step(self, number: int, loss: Tensor, lr: float) -> None:
        """Note step `number` (from 1), its loss (a scalar on any device) and learning rate."""
        self._waiting.append((number, loss, lr))
        if len(self._waiting) >= _STEPS_PER_WRITE:
            self._write_steps()

    def epoch(self, number: int, epoch: Epoch) -> None:
        """Write the validation metrics of an epoch whose last step was `number`, and all that waits, to the disk."""
        self._write_steps()
        self._writer.add_scalar("epoch", epoch.epoch, number)
        for metric in ("srcc", "plcc", "rmse"):
            value = getattr(epoch, f"validation_{metric}")
            if value is not None:
                self._writer.add_scalar(f"validation/{metric}", value, number)
        self._writer.flush()

    def close(self) -> None:
        """Write what waits and close the files."""
        self._write_steps()
        self._writer.close()

    def _write_steps(self) -> None:
        if not self._waiting:
            return
        losses = torch.stack([loss for _, loss, _ in self._waiting]).tolist()
        for (number, _, lr), loss in zip(self._waiting, losses, strict=True):
            self._writer.add_scalar("train/loss", loss, number)
            self._writer.add_scalar("train/lr", lr, number)
        self._waiting = []
