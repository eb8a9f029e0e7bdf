"""What a training says while it runs: a bar or lines with loss and tokens per second, and TensorBoard event files."""

import importlib.util
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError
from agiqa.progress import Advance, say, track

_SECONDS_BETWEEN_LOSSES = 30.0


def check_tensorboard() -> None:
    """Raise ConfigError, with the way to install it, where the package tensorboard is missing."""
    if importlib.util.find_spec("tensorboard") is None:
        message = "--tensorboard was given and the package is not installed: pip install 'agiqa[tensorboard]'"
        raise ConfigError(message)


class Reporter:
    """Speaks to the user; a silent one belongs to a process that is not the first."""

    def __init__(self, *, advance: Advance | None = None, events: Any = None, steps: int = 0) -> None:
        """`events` is a SummaryWriter of TensorBoard."""
        self._advance = advance
        self._events = events
        self._steps = steps
        self._spoken = time.monotonic()
        self._tokens = 0

    def say(self, text: str) -> None:
        """A line."""
        if self._advance is not None:
            say(text)

    def step(self, values: Mapping[str, float]) -> None:
        """Note a step's loss, lr, grad_norm and tokens."""
        if self._advance is not None:
            self._advance(1)
        self._tokens += int(values["tokens"])
        now = time.monotonic()
        if now - self._spoken >= _SECONDS_BETWEEN_LOSSES:
            rate = self._tokens / (now - self._spoken)
            self.say(f"step {values['step']} of {self._steps}: loss {values['loss']:.4f}, {rate:.0f} tokens/s")
            self._spoken, self._tokens = now, 0
        self._write("train", values, ("loss", "lr", "grad_norm"))

    def validation(self, values: Mapping[str, float], *, best: int | None, stopped: bool) -> None:
        """Note a validation."""
        done, loss, accuracy = int(values["step"]), values["validation_loss"], values["word_accuracy"]
        mark = " (best)" if best == done else ""
        self.say(f"validation after step {done}: loss {loss:.4f}, rating words right {accuracy:.1%}{mark}")
        if stopped:
            self.say(f"stopped early: no better validation loss since step {best}")
        self._write("validation", values, ("validation_loss", "word_accuracy"))

    def _write(self, group: str, values: Mapping[str, float], names: tuple[str, ...]) -> None:
        if self._events is not None:
            for name in names:
                self._events.add_scalar(
                    f"{group}/{name.removeprefix('validation_')}", values[name], int(values["step"])
                )


@contextmanager
def reporting(steps: int, done: int, events: Path | None) -> Generator[Reporter]:
    """A reporter for the steps after `done`; event files go to `events`. Raises as `check_tensorboard`."""
    writer: Any = None
    if events is not None:
        check_tensorboard()
        from torch.utils.tensorboard.writer import SummaryWriter  # tensorboard is an extra

        make_writer: Any = SummaryWriter
        writer = make_writer(str(events), purge_step=done + 1 if done else 0)  # lines of a run without a checkpoint go
    try:
        with track("tune", steps, "steps", done=done) as advance:
            yield Reporter(advance=advance, events=writer, steps=steps)
    finally:
        if writer is not None:
            writer.close()
