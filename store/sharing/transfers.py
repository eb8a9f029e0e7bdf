"""Moving many objects at once: threads that stop together, waits for a busy remote, and the count of what was moved.

HTTP 408, 425, 429, 500, 502, 503 and 504, and connections that break or never begin, are retried; any other status from
400 on (401, 403, 404 ...) is final. A `Retry-After` of the server, in seconds or as a date, is kept to.
"""

import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar

from agiqa.errors import RemoteError
from agiqa.progress import say

JOBS = 8
"""Objects moved at a time by default."""
TRIES = 6
"""Failures in a row after which agiqa stops trying."""
FIRST_WAIT = 0.2
"""Seconds after the first failure, doubled after each further one: 6 in all."""
LONGEST_WAIT = 300.0
"""The longest `Retry-After` in seconds that agiqa waits for; a longer one ends the transfer at once."""
_SHOWN_FROM = 1.0
"""Seconds from which on a wait is shown."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}

Answer = TypeVar("Answer")
Job = TypeVar("Job")


class Halted(Exception):  # a signal between threads, never seen by a caller
    """Raised in a thread whose work another thread's failure, or Ctrl-C, has made useless."""


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What a push or a pull did."""

    objects: int
    """Objects sent or fetched, without those that already existed."""
    bytes: int
    """Bytes sent or fetched, retries included."""
    skipped: int
    """Objects that already existed."""
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


class Tally:
    """Counts what many threads move, and passes it on to `advance`, one thread at a time."""

    def __init__(self, advance: Callable[[int], None] = lambda _bytes: None) -> None:
        """`advance` is called with bytes that are done: moved, or there already."""
        self.halt = threading.Event()
        self._advance = advance
        self._lock = threading.Lock()
        self._started = time.monotonic()
        self._objects = self._bytes = self._skipped = 0

    def count(self, *, objects: int = 0, size: int = 0, skipped: int = 0, progress: int = 0) -> None:
        """Add `objects`, `size` bytes and `skipped` objects, and call `advance` with `progress` bytes.

        Negative `progress` is work to be redone. Raises Halted once the work as a whole has failed.
        """
        if self.halt.is_set():
            raise Halted
        with self._lock:
            self._objects += objects
            self._bytes += size
            self._skipped += skipped
            if progress:
                self._advance(progress)

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


def retrying(ask: Callable[[], Answer], *, halt: threading.Event | None = None) -> Answer:
    """The result of `ask`, tried again after temporary failures. Raises what `ask` raises, and as `wait_after`."""
    for failures in count(1):
        try:
            return ask()
        except RemoteError as error:
            wait_after(failures, error, halt=halt)
    raise AssertionError  # the loop has no end


def wait_after(failures: int, error: RemoteError, *, halt: threading.Event | None = None) -> None:
    """Wait before the next try, after `failures` in a row, and show the wait.

    Raises `error` where another try is useless, and Halted once `halt` is set.
    """
    if error.refused or failures >= TRIES:
        raise error
    seconds = max(FIRST_WAIT * 2 ** (failures - 1), error.retry_after)
    if error.retry_after > LONGEST_WAIT:
        error.add_note(
            f"The server asks to wait for {error.retry_after:.0f} seconds; agiqa waits {LONGEST_WAIT:.0f} at most. "
            "Run the same command again after that time."
        )
        raise error
    if seconds >= _SHOWN_FROM:
        say(f"{error}; trying again in {seconds:.0f} s")
    if (halt or threading.Event()).wait(seconds):
        raise Halted


def describe_failure(failure: RemoteError, error: Exception) -> None:
    """Set on `failure` what the driver's `error` says: whether it is final, and when to try again."""
    status, headers = _status_and_headers(error)
    failure.refused = isinstance(error, PermissionError) or (
        status is not None and status >= 400 and status not in _PASSING
    )
    failure.retry_after = seconds_asked(str(headers.get("retry-after") or ""))


def status_of(error: Exception) -> int | None:
    """The HTTP status that a driver's error carries."""
    return _status_and_headers(error)[0]


def _status_and_headers(error: Exception) -> tuple[int | None, Mapping[str, Any]]:
    """HTTP status and headers in the errors of aiohttp, httpx, botocore (which s3fs wraps) and gcsfs."""
    for found in (error, error.__cause__):
        response = getattr(found, "response", None)
        if isinstance(response, dict):
            about = response.get("ResponseMetadata", {})
            return about.get("HTTPStatusCode"), about.get("HTTPHeaders", {})
    response = getattr(error, "response", None)
    carrier = error if response is None else response
    for name in ("status", "status_code", "code"):
        status = getattr(carrier, name, None)
        if isinstance(status, int):
            return status, getattr(carrier, "headers", None) or {}
    return None, {}


def seconds_asked(retry_after: str) -> float:
    """Seconds from now that a Retry-After header means; 0 where it cannot be read."""
    if re.fullmatch(r"\s*\d+(\.\d+)?\s*", retry_after, re.ASCII):
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except (OverflowError, ValueError):
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
