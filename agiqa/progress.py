"""Progress on the error stream: a bar on a terminal, a bar below the cell in a notebook, plain lines elsewhere.

All of them show what is done, the rate and the time left. They serve loops of your own too:

    for batch in tracked(batches, "my training", "batches"):
        ...
"""

import sys
import time
from collections.abc import Callable, Generator, Iterable, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

from agiqa.notebooks import CellBar, in_notebook

if TYPE_CHECKING:
    from rich.console import Console

SECONDS_BETWEEN_LINES = 15.0
"""A line is due this long after the last one. Steps of up to 15 s then leave no gap of more than 30 s."""
_SECONDS_BETWEEN_DRAWINGS = 0.1
_SECONDS_BETWEEN_UPDATES = 0.25
"""A notebook keeps every update that it gets."""

Advance = Callable[[int], None]
Note = Callable[[], str]
Clock = Callable[[], float]
Member = TypeVar("Member")


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_listener: ContextVar[Callable[[str], None]] = ContextVar("agiqa_listener", default=_print)
_bars = 0
"""How many bars this process draws: inside one, further jobs write lines above it."""


def say(text: str) -> None:
    """Print a line to the error stream (the output stream is for results), or pass it to the listener of `said_to`."""
    _listener.get()(text)


@contextmanager
def said_to(listener: Callable[[str], None]) -> Generator[None]:
    """Pass the lines of this thread to `listener` inside the block, so that parallel jobs do not mix their lines."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


class Meter:
    """How much of a job is done, how fast it goes, and how long the rest takes at that rate."""

    def __init__(self, total: float | None, *, done: float = 0.0, clock: Clock = time.monotonic) -> None:
        """`total` is None where it is unknown. `done` was done before, which is no part of the rate."""
        self.total, self.done = total, done
        self.under_way = 0.0
        """What the unfinished parts add to `done`."""
        self.clock = clock
        self._before = done
        self._started = clock()

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self.clock() - self._started

    def skip(self, amount: float) -> None:
        """Leave `amount`, a part of `under_way` or `done` that was there before, out of the rate."""
        self._before += amount

    @property
    def rate(self) -> float | None:
        """Per second; None before anything is done."""
        made, seconds = self.done + self.under_way - self._before, self.seconds
        return made / seconds if made > 0 and seconds > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds; None where they cannot be estimated."""
        rate = self.rate
        if self.total is None or rate is None:
            return None
        return max(0.0, self.total - self.done - self.under_way) / rate

    def text(self, unit: str, note: str) -> str:
        """`3/24 heads, 1.5/min, 12 min 3 s left, NOTE`."""
        parts = [f"{self.count} {unit}"]
        if (rate := self.rate) is not None:
            parts.append(rate_text(rate))
        if (left := self.left) is not None:
            parts.append(f"{duration_text(left)} left")
        return ", ".join([*parts, *([note] if note else [])])

    @property
    def count(self) -> str:
        """`3/24`, or `3` where the total is unknown."""
        return f"{self.done:.0f}" if self.total is None else f"{self.done:.0f}/{self.total:.0f}"


def rate_text(rate: float) -> str:
    """A rate per second, minute or hour, whichever gives a number of 1 or more."""
    if rate >= 1:
        return f"{rate:.1f}/s"
    return f"{60 * rate:.1f}/min" if 60 * rate >= 1 else f"{3600 * rate:.1f}/h"


def duration_text(seconds: float) -> str:
    """Seconds as `40 s`, `3 min 5 s` or `2 h 10 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


class Tracker:
    """The progress of one job. Call it with the number of units that were done since the last call."""

    def __init__(self, meter: Meter, display: "_Display") -> None:
        """Use `track`."""
        self.meter = meter
        self._display = display

    def __call__(self, count: int, /) -> None:
        """Add `count` units."""
        self.meter.done += count
        self._display.update()

    def pulse(self) -> None:
        """Show what has changed otherwise, such as the note or `meter.under_way`."""
        self._display.update()

    def line(self, text: str) -> None:
        """Show a line above the bar, or as one of the lines."""
        self._display.line(text)


@runtime_checkable
class _Display(Protocol):
    """How a meter is shown."""

    def update(self) -> None:
        """Show it anew, where it is time."""

    def line(self, text: str) -> None:
        """Show a line of text."""

    def close(self, *, failed: bool) -> None:
        """Show it a last time."""


@contextmanager
def track(
    label: str,
    total: int | None,
    unit: str,
    *,
    done: int = 0,
    note: Note = str,
    brief: bool = False,
    console: "Console | None" = None,
    clock: Clock = time.monotonic,
) -> Generator[Tracker]:
    """Show the progress of `total` `unit`s (a plural noun) of the job `label`; yields a function that adds to it.

    `done` units were done by an earlier run: the bar starts there, and the rate leaves them out. `note` says what else
    to show, each time. A `brief` job writes no line if it ends before the first is due, and leaves no bar. `console`
    is where a bar is drawn, the error stream by default.
    """
    global _bars
    meter = Meter(total, done=done, clock=clock)
    listened = _listener.get() is not _print or _bars > 0
    display: _Display
    if not listened and in_notebook():
        display = _Cell(label, meter, unit, note, brief=brief)
    elif not listened and (sys.stderr.isatty() if console is None else console.is_terminal):
        display = _Bar(label, meter, unit, note, console, brief=brief)
    else:
        display = _Lines(label, meter, unit, note, brief=brief)
    drawn, failed = isinstance(display, _Bar), True
    _bars += drawn
    try:
        yield Tracker(meter, display)
        failed = False
    finally:
        _bars -= drawn
        display.close(failed=failed)


def tracked(
    members: Iterable[Member], label: str, unit: str = "items", *, total: int | None = None
) -> Generator[Member]:
    """The members of a loop, each counted once the loop is done with it; `total` where `len` does not know it."""
    if total is None and isinstance(members, Sized):
        total = len(members)
    with track(label, total, unit) as advance:
        for member in members:
            yield member
            advance(1)


class _Bar:
    """A bar that rich draws, with the note in a line below it."""

    def __init__(
        self, label: str, meter: Meter, unit: str, note: Note, console: "Console | None", *, brief: bool
    ) -> None:
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        class Noted(Progress):
            def get_renderables(self) -> Iterable[RenderableType]:
                yield from super().get_renderables()
                if shown := note():
                    yield Text(f"  {shown}", no_wrap=True, overflow="ellipsis")

        self._meter, self._unit, self._drawn = meter, unit, meter.clock()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            TextColumn("{task.fields[text]}", markup=False),
        )
        self._progress = Noted(*columns, console=console or Console(stderr=True), transient=brief)
        self._task = self._progress.add_task(label, total=meter.total, text="")
        self.update()
        self._progress.start()

    def update(self) -> None:
        """Move the bar, which is drawn ten times per second."""
        self._show(self._meter.text(self._unit, ""))

    def line(self, text: str) -> None:
        """A line above the bar."""
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self, *, failed: bool) -> None:
        """Leave the bar as it stands, with the whole time."""
        if not failed:
            self._show(f"{self._meter.count} {self._unit} in {duration_text(self._meter.seconds)}")
        self._progress.stop()

    def _show(self, text: str) -> None:
        now, done = self._meter.clock(), self._meter.done + self._meter.under_way
        due = now - self._drawn >= _SECONDS_BETWEEN_DRAWINGS
        self._drawn = now if due else self._drawn
        self._progress.update(self._task, completed=done, text=text, refresh=due)


class _Cell:
    """A bar below the cell of a notebook."""

    def __init__(self, label: str, meter: Meter, unit: str, note: Note, *, brief: bool) -> None:
        self._label, self._meter, self._unit, self._note, self._brief = label, meter, unit, note, brief
        self._bar = CellBar()
        self._shown = meter.clock()
        self._show(meter.text(unit, note()))

    def update(self) -> None:
        """Move the bar, at most four times per second."""
        if self._meter.clock() - self._shown >= _SECONDS_BETWEEN_UPDATES:
            self._show(self._meter.text(self._unit, self._note()))

    def line(self, text: str) -> None:
        """A line above the bar."""
        self._bar.line(text)

    def close(self, *, failed: bool) -> None:
        """Leave the bar as it stands, with the whole time; a brief job leaves nothing."""
        meter = self._meter
        if self._brief and not failed:
            self._bar.clear()
            return
        ended = f"{meter.count} {self._unit} in {duration_text(meter.seconds)}"
        self._show(meter.text(self._unit, self._note()) if failed else ended)

    def _show(self, text: str) -> None:
        self._shown = self._meter.clock()
        self._bar.show(self._meter.done + self._meter.under_way, self._meter.total, f"{self._label}: {text}")


class _Lines:
    """A line when it is due, and one at the end."""

    def __init__(self, label: str, meter: Meter, unit: str, note: Note, *, brief: bool) -> None:
        self._label, self._meter, self._unit, self._note, self._brief = label, meter, unit, note, brief
        self._say = _listener.get()  # of the job itself, also while one of its parts has a listener of its own
        self._spoken = meter.clock()

    def update(self) -> None:
        """Say how far the job is, if a line is due."""
        if self._meter.clock() - self._spoken >= SECONDS_BETWEEN_LINES:
            self._spoken = self._meter.clock()
            self._brief = False
            self._say(f"{self._label}: {self._meter.text(self._unit, self._note())}")

    def line(self, text: str) -> None:
        """Say the line."""
        self._spoken = self._meter.clock()
        self._say(text)

    def close(self, *, failed: bool) -> None:
        """Say how long it took; nothing about a job that failed."""
        if not (failed or self._brief):
            more = f", {text}" if (text := self._note()) else ""
            self._say(f"{self._label}: {self._meter.count} {self._unit} in {self._meter.seconds:.1f} s{more}")
