"""What relabelling, repair and garbage collection share: one of them at a time, and never beside a seal."""

import contextlib
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agiqa.store.files import open_lock, telling_disk_errors, try_lock
from agiqa.store.layout import StoreLayout

UPKEEP_LOCK = "seal"
"""All that write MANIFEST.json hold the lock of the seal."""


@contextmanager
def upkeep_lock(
    layout: StoreLayout, *, doing: str = "working on", kept: str = "nothing of it is lost"
) -> Generator[None]:
    """Hold the store at `layout` against other upkeep and the seal, after waiting for those at work.

    An OSError from inside gets a note that says what was being done, with `doing` and `kept`.
    A finished store has no `locks` folder, so there the lock is removed by its holder; who waited for a removed
    lock file tries again.
    """
    path = layout.locks / UPKEEP_LOCK
    while True:
        with telling_disk_errors(f"{doing} {layout.root}", kept), open_lock(path) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(file, path):
                continue
            try:
                yield
            finally:
                if layout.manifest.exists():
                    path.unlink(missing_ok=True)
                    with contextlib.suppress(OSError):  # of other holders
                        layout.locks.rmdir()
                fcntl.flock(file, fcntl.LOCK_UN)  # closing does not release it while a forked child has the file open
            return


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock file `lock` at this moment; creates nothing."""
    try:
        with lock.open() as file:
            return not try_lock(file)
    except (FileNotFoundError, IsADirectoryError):
        return False


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
