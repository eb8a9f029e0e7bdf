"""What a training reports while it runs: a bar on a terminal or lines elsewhere, and TensorBoard event files."""

import importlib.util
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from rich.console import Console
from torch import Tensor

from agiqa.errors import ConfigError
from agiqa.heads.training.curves import Epoch
from agiqa.notebooks import in_notebook
from agiqa.progress import SECONDS_BETWEEN_LINES, Clock, Meter, Tracker, duration_text, track

_STEPS_PER_WRITE = 50
"""Losses fetched from the device at a time; every fetch waits for the device."""


@runtime_checkable
class TrainingProgress(Protocol):
    """What the training loop calls at stages, steps and epochs."""

    def begin(self, stage: str, *, epochs: int, steps: int, done: int) -> None:
        """A stage of so many epochs, each of so many optimiser steps, begins; `done` epochs were done before."""

    def step(self) -> None:
        """One optimiser step is done."""

    def validated(self) -> None:
        """One batch of validation items is predicted."""

    def epoch(self, epoch: Epoch) -> None:
        """An epoch is over."""

    def end(self) -> None:
        """The stage is over, finished or failed."""


class LineProgress:
    """Passes lines to a function of text: one per stage and epoch, and the steps within long epochs."""

    def __init__(self, write: Callable[[str], None], *, clock: Clock = time.monotonic) -> None:
        """`write` gets lines without a newline; `clock` gives seconds."""
        self._write, self._clock = write, clock
        self._epochs = self._steps = self._step = 0
        self._meter = Meter(0, clock=clock)
        self._spoken = clock()

    def begin(self, stage: str, *, epochs: int, steps: int, done: int) -> None:
        """Write the stage."""
        self._meter = Meter(epochs, done=done, clock=self._clock)
        self._epochs, self._steps, self._step = epochs, steps, 0
        before = f", {done} of them done before" if done else ""
        self._tell(f"{stage}: {epochs} epoch{'s' * (epochs > 1)} of {steps} step{'s' * (steps > 1)}{before}")

    def step(self) -> None:
        """Write how far the epoch is, if a line is due."""
        self._step += 1
        self._meter.under_way = self._step / self._steps
        self._tell_if_due(f"step {self._step}/{self._steps}")

    def validated(self) -> None:
        """Write it, if a line is due."""
        self._tell_if_due("validation")

    def epoch(self, epoch: Epoch) -> None:
        """Write the epoch and the time left."""
        self._meter.done, self._meter.under_way, self._step = epoch.epoch, 0.0, 0
        self._tell(f"{epoch.line(of=self._epochs)}{self._left() if epoch.epoch < self._epochs else ''}")

    def end(self) -> None:
        """Nothing to clear away."""

    def _tell_if_due(self, what: str) -> None:
        if self._clock() - self._spoken >= SECONDS_BETWEEN_LINES:
            self._tell(f"epoch {int(self._meter.done) + 1}/{self._epochs}: {what}{self._left()}")

    def _tell(self, line: str) -> None:
        self._spoken = self._clock()
        self._write(line)

    def _left(self) -> str:
        left = self._meter.left
        return "" if left is None else f", {duration_text(left)} left"


class BarProgress:
    """A bar with epochs, steps and time left, and the epochs' lines above it."""

    def __init__(self, console: Console) -> None:
        """`console` is where the bar is drawn."""
        self._console = console
        self._stack = ExitStack()
        self._tracker: Tracker | None = None
        self._epochs = self._steps = self._step = 0

    def begin(self, stage: str, *, epochs: int, steps: int, done: int) -> None:
        """Draw a new bar."""
        self._epochs, self._steps, self._step = epochs, steps, 0
        tracked = track(stage, epochs, "epochs", done=done, note=self._place, console=self._console)
        self._tracker = self._stack.enter_context(tracked)

    def step(self) -> None:
        """Move the bar."""
        self._step += 1
        self._show(self._step / self._steps)

    def validated(self) -> None:
        """The bar stays where it is."""

    def epoch(self, epoch: Epoch) -> None:
        """Print above the bar."""
        self._step = 0
        if self._tracker is not None:
            self._tracker.line(epoch.line(of=self._epochs))
            self._tracker.meter.done = epoch.epoch
        self._show(0.0)

    def end(self) -> None:
        """Leave the bar as it stands, with the whole time unless an error ends the stage."""
        self._stack.__exit__(*sys.exc_info())
        self._tracker = None

    def _place(self) -> str:
        return f"step {self._step}/{self._steps}" if self._step else ""

    def _show(self, under_way: float) -> None:
        if self._tracker is not None:
            self._tracker.meter.under_way = under_way
            self._tracker.pulse()


def training_progress(console: Console) -> TrainingProgress:
    """The bar in a notebook and where `console` is a terminal, else lines printed to it."""
    if in_notebook() or console.is_terminal:
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
