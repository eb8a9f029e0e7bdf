"""Ctrl-C and processes that are started: a terminal sends it to all of them, and only the first one is to act on it."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def ctrl_c_kept_away() -> Generator[None]:
    """Start processes inside that Ctrl-C does not reach, from their first instruction on.

    One that comes meanwhile is raised in this process afterwards.
    """
    resource_tracker.ensure_running()  # which would let it through again if it were started inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
