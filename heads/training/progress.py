"""What a training reports while it runs: a bar on a terminal or a line per epoch, and TensorBoard event files."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from agiqa.errors import ConfigError
from agiqa.heads.training.curves import Epoch

_STEPS_PER_WRITE = 50
"""Losses fetched from the device at a time; every fetch waits for the device."""


@runtime_checkable
class TrainingProgress(Protocol):
    """What the training loop calls at stages, steps and epochs."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage of so many optimiser steps begins."""

    def step(self) -> None:
        """One optimiser step is done."""

    def epoch(self, line: str) -> None:
        """An epoch is over; `line` sums it up."""

    def end(self) -> None:
        """The stage is over, finished or failed."""


class LineProgress:
    """Passes a line per stage and epoch to a function of text."""

    def __init__(self, write: Callable[[str], None]) -> None:
        """`write` gets lines without a newline."""
        self._write = write

    def begin(self, stage: str, steps: int) -> None:
        """Write the stage."""
        self._write(f"{stage}: {steps} steps")

    def step(self) -> None:
        """Steps are too many for lines."""

    def epoch(self, line: str) -> None:
        """Write the line."""
        self._write(line)

    def end(self) -> None:
        """Nothing to clear away."""


class BarProgress:
    """A rich bar with steps and time left, and the epochs' lines above it."""

    def __init__(self, console: Console) -> None:
        """`console` is where the bar is drawn."""
        self._console = console
        self._bar: Progress | None = None

    def begin(self, stage: str, steps: int) -> None:
        """Draw a new bar."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=self._console)
        self._bar.add_task(stage, total=steps)
        self._bar.start()

    def step(self) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.advance(self._bar.task_ids[0])

    def epoch(self, line: str) -> None:
        """Print above the bar."""
        self._console.print(line, highlight=False, markup=False)

    def end(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def training_progress(console: Console) -> TrainingProgress:
    """The bar where `console` is a terminal, else lines printed to it."""
    if console.is_terminal:
        return BarProgress(console)
    return LineProgress(lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))


def check_tensorboard() -> None:
    """Raise ConfigError, with the way to install it, where the package tensorboard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        message = "`tensorboard` is set and the package is not installed: pip install 'agiqa[tensorboard]'"
        raise ConfigError(message)


class EventLog:
    """The event files of one stage: loss and learning rate of every step, metrics of every epoch, as in curves.csv.

    The horizontal axis of every curve is the number of steps.
    """

    def __init__(self, folder: Path, *, after: int | None = None) -> None:
        """Write to `folder`. `after` is the step that a resumed training starts from: readers do not see later steps
        of the killed training. Raises as `check_tensorboard`.
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
        """Write the validation metrics of an epoch whose last step was `number`, and all steps so far, to the disk."""
        self._write_steps()
        self._writer.add_scalar("epoch", epoch.epoch, number)
        for metric in ("srcc", "plcc", "rmse"):
            value = getattr(epoch, f"validation_{metric}")
            if value is not None:
                self._writer.add_scalar(f"validation/{metric}", value, number)
        self._writer.flush()

    def close(self) -> None:
        """Write the last steps and close the files."""
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
