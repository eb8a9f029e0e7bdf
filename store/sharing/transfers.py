"""Moving many objects at once: threads that stop together, and the count of what was moved."""

import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

JOBS = 8
"""Objects moved at a time, unless told otherwise."""

Job = TypeVar("Job")


class Halted(Exception):  # a signal between threads, never seen by a caller
    """Raised in a thread whose work another thread's failure, or Ctrl-C, has made useless."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a push or a pull did."""

    objects: int
    """Objects sent or fetched; those that were there already do not count."""
    bytes: int
    """Bytes sent or fetched, retries included."""
    skipped: int
    """Objects that were there already."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class Tally:
    """Counts what many threads move, and tells `advance`, one thread at a time."""

    def __init__(self, advance: Callable[[int], None] = lambda _bytes: None) -> None:
        """`advance` is called with bytes that are done: moved, or found to be there already."""
        self.halt = threading.Event()
        self._advance = advance
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._objects = self._bytes = self._skipped = 0

    def moved(self, count: int) -> None:
        """`count` bytes came or went. Raises Halted once the work as a whole has failed."""
        if self.halt.is_set():
            raise Halted
        with self._lock:
            self._bytes += count
            self._advance(count)

    def found(self, count: int) -> None:
        """`count` bytes of an object are here from an earlier run (or, negative, must be fetched after all)."""
        with self._lock:
            self._advance(count)

    def finished(self) -> None:
        """One object, whose bytes `moved` was told of, is whole."""
        with self._lock:
            self._objects += 1

    def sent(self, count: int, *, progress: int) -> None:
        """One object of `count` bytes was sent in one go; `progress` is what `advance` hears of it."""
        with self._lock:
            self._objects += 1
            self._bytes += count
            self._advance(progress)

    def skipped(self, count: int) -> None:
        """One object of `count` bytes was there already."""
        with self._lock:
            self._skipped += 1
            self._advance(count)

    def result(self) -> Transfer:
        """The count so far."""
        seconds = round(time.monotonic() - self._started, 3)
        return Transfer(objects=self._objects, bytes=self._bytes, skipped=self._skipped, seconds=seconds)


def in_parallel(
    work: Callable[[Job], None], jobs: Iterable[Job], *, threads: int, halt: threading.Event | None = None
) -> None:
    """Call `work` with each of `jobs` in `threads` threads.

    The first failure, Ctrl-C included, sets `halt`, drops the jobs that have not begun and is raised.
    """
    with ThreadPoolExecutor(max_workers=threads) as pool:
        try:  # Ctrl-C may come while jobs are handed out
            running = [pool.submit(work, job) for job in jobs]
            for done in as_completed(running):
                done.result()
        except BaseException:
            if halt is not None:
                halt.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
