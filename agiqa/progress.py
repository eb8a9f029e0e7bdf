"""Progress on the error stream: a bar with rate and time left on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar

_SECONDS_BETWEEN_LINES = 15.0

Advance = Callable[[int], None]
Note = Callable[[], str]


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


_listener: ContextVar[Callable[[str], None]] = ContextVar("agiqa_listener", default=_print)


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


@contextmanager
def track(label: str, total: int, unit: str, *, note: Note = str) -> Generator[Advance]:
    """Show the progress of `total` `unit`s (a plural noun) of the job `label`; yields a function that adds to it.

    `note` says what else to show, each time.
    """
    if sys.stderr.isatty():
        with _bar(label, total, unit, note) as advance:
            yield advance
    else:
        with _lines(label, total, unit, note) as advance:
            yield advance


@contextmanager
def _bar(label: str, total: int, unit: str, note: Note) -> Generator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(f"{unit} {{task.fields[rate]}}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(label, total=total, rate="", note=note())

        def advance(count: int) -> None:
            progress.advance(task, count)
            speed = progress.tasks[0].speed
            progress.update(task, rate=f"{speed:.1f}/s" if speed else "", note=note())

        yield advance


@contextmanager
def _lines(label: str, total: int, unit: str, note: Note) -> Generator[Advance]:
    started = spoken = time.monotonic()
    done = 0

    def more() -> str:
        return f", {text}" if (text := note()) else ""

    def advance(count: int) -> None:
        nonlocal done, spoken
        done += count
        now = time.monotonic()
        if now - spoken >= _SECONDS_BETWEEN_LINES:
            spoken = now
            rate = done / (now - started)
            say(f"{label}: {done}/{total} {unit}, {rate:.1f}/s, {(total - done) / rate:.0f} s left{more()}")

    yield advance
    say(f"{label}: {done}/{total} {unit} in {time.monotonic() - started:.1f} s{more()}")
