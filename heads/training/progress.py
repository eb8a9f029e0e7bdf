"""How training tells of itself: a rich bar on a terminal, a plain line per epoch elsewhere."""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@runtime_checkable
class TrainingProgress(Protocol):
    """Told of stages, steps and epochs by the training loop."""

    def begin(self, stage: str, steps: int) -> None:
        """A stage of so many optimiser steps begins."""

    def step(self) -> None:
        """One optimiser step is done."""

    def epoch(self, line: str) -> None:
        """An epoch is over; `line` sums it up."""

    def end(self) -> None:
        """The stage is over, finished or failed."""


class LineProgress:
    """A line per stage and epoch, handed to any function of text."""

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
