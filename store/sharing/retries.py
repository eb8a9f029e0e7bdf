"""Which failures of a remote pass by themselves, and how long to wait for that.

HTTP 408, 425, 429, 500, 502, 503 and 504, and connections that break or never begin, are waited out; any other status
from 400 on (401, 403, 404 ...) is an answer. A `Retry-After` of the server, in seconds or as a date, is kept to.
"""

import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import count
from typing import Any, TypeVar

from agiqa.errors import RemoteError
from agiqa.progress import say
from agiqa.store.sharing.transfers import Halted

TRIES = 6
"""Failures in a row after which a remote is given up."""
FIRST_WAIT = 0.2
"""Seconds after the first failure, doubled after each further one: 6 in all."""
LONGEST_WAIT = 300.0
"""Seconds that are waited at a time because a server asks for it; one that asks for more is given up at once."""
_TOLD_FROM = 1.0
"""Seconds of a wait that is worth a message."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}

Answer = TypeVar("Answer")


def wait_after(failures: int, error: RemoteError, *, halt: threading.Event | None = None) -> None:
    """Wait before the next try, and say so; raises `error` where there is no use in one, and Halted once `halt` is set.

    `failures` is how many there were in a row.
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
    if seconds >= _TOLD_FROM:
        say(f"{error}; trying again in {seconds:.0f} s")
    if (halt or threading.Event()).wait(seconds):
        raise Halted


def patiently(ask: Callable[[], Answer], *, halt: threading.Event | None = None) -> Answer:
    """What `ask` returns, after waiting out failures that pass. Raises what `ask` raises, and as `wait_after`."""
    for failures in count(1):
        try:
            return ask()
        except RemoteError as error:
            wait_after(failures, error, halt=halt)
    raise AssertionError  # the loop has no end


def describe_failure(failure: RemoteError, error: Exception) -> None:
    """Note on `failure` what the driver's `error` says: whether the answer is final, and when to ask again."""
    status, headers = _answer(error)
    failure.refused = isinstance(error, PermissionError) or (status is not None and _is_final(status))
    failure.retry_after = _seconds(str(headers.get("retry-after") or ""))


def status_of(error: Exception) -> int | None:
    """The HTTP status that a driver's error carries."""
    return _answer(error)[0]


def _is_final(status: int) -> bool:
    return status >= 400 and status not in _PASSING


def _answer(error: Exception) -> tuple[int | None, Mapping[str, Any]]:
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


def _seconds(retry_after: str) -> float:
    """Seconds from now that a Retry-After header means; 0 where it says nothing that can be read."""
    if retry_after.strip().isdecimal():
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except (OverflowError, ValueError):
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max(0.0, (moment - datetime.now(UTC)).total_seconds())
