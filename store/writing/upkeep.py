"""What relabelling, repair, garbage collection and the seal share: one of them at a time, and what they tidy up.

`locks` and `commits` may be links to folders elsewhere, which may hold files of others. So what is tidied up there is
known by its name, and the links and the folders that they lead to stay.
"""

import contextlib
import os
import re
import stat
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from agiqa.errors import IncompleteStore
from agiqa.store.disk.files import is_lock_held, open_lock, telling_disk_errors, unlock, wait_for_lock
from agiqa.store.format.layout import PULL_RECORD, StoreLayout

UPKEEP_LOCK = "seal"
"""All that write MANIFEST.json hold the lock of the seal."""
_LOCK = re.compile(r"[0-9]{8,}|model|plan|pull|records|seal")
_RECORD = re.compile(r"(?:[0-9]{8,}|model|plan)\.json")
_KILLED_RECORD = re.compile(r"\.(?:[0-9]{8,}|model|plan)\.json\..+|\.zarr\.json\.new")


@contextmanager
def upkeep_lock(
    layout: StoreLayout, *, doing: str = "working on", kept: str = "nothing of it is lost"
) -> Generator[None]:
    """Hold the store at `layout` against other upkeep and the seal, after waiting for those at work.

    An OSError from inside gets a note that says what was being done, with `doing` and `kept`.
    A finished store has no `locks` folder, so there the lock is removed by its holder; who waited for a removed
    lock file tries again.
    """
    try:
        with telling_disk_errors(f"{doing} {layout.root}", kept), _held(layout.locks / UPKEEP_LOCK) as lock:
            try:
                yield
            finally:
                if layout.manifest.exists():
                    lock.unlink(missing_ok=True)
    finally:  # the lock is closed by now: FUSE file systems keep the names of open files
        if layout.manifest.exists():
            _remove_if_empty(layout.locks)


def require_not_pulling(layout: StoreLayout) -> None:
    """Raise IncompleteStore where a pull was cut off while it installed its store; the caller holds the upkeep lock."""
    if (layout.root / PULL_RECORD).exists() and not layout.manifest.exists():
        message = f"A pull into {layout.root} was cut off: run the same `agiqa store pull` again to finish it."
        raise IncompleteStore(message)


@contextmanager
def _held(path: Path) -> Generator[Path]:
    """Hold the lock file `path`, the one that has that name at last, while inside."""
    while True:
        with open_lock(path) as file:
            wait_for_lock(file)
            if not _is_at(file, path):
                continue
            try:
                yield path
            finally:
                unlock(file)
            return


def lock_files(layout: StoreLayout) -> list[Path]:
    """The lock files of runs on the store at `layout`, which are empty; nothing else that lies in `locks`."""
    return sorted(path for path in layout.locks.glob("*") if _LOCK.fullmatch(path.name) and _is_empty_file(path))


def killed_records(layout: StoreLayout) -> list[Path]:
    """The temporary files that killed writes left in `commits`, and those of runs at work."""
    found = (path for path in layout.commits.glob(".*") if _KILLED_RECORD.fullmatch(path.name))
    return sorted(path for path in found if path.is_symlink() or path.is_file())


def remove_records(layout: StoreLayout) -> None:
    """Remove the commit records, those of killed writes too, and their folder once empty.

    Where `commits` is a link, only the link goes: the files that it leads to may be those of another store.
    """
    if layout.commits.is_symlink():
        layout.commits.unlink()
        return
    records = [path for path in layout.commits.glob("*") if _RECORD.fullmatch(path.name)]
    for path in (*records, *killed_records(layout)):
        path.unlink(missing_ok=True)
    _remove_if_empty(layout.commits)


def remove_locks(layout: StoreLayout, *, mine: str) -> None:
    """Remove the lock files that no process holds and `mine`, which the caller holds, and their folder once empty."""
    for lock in lock_files(layout):
        if lock.name == mine or not is_held(lock):
            lock.unlink(missing_ok=True)
    _remove_if_empty(layout.locks)


def is_held(lock: Path) -> bool:
    """Whether a process holds the lock file `lock` at this moment; creates nothing."""
    try:
        with lock.open() as file:
            return is_lock_held(file)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False


def _is_empty_file(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size == 0


def _remove_if_empty(folder: Path) -> None:
    """Remove `folder`; one that holds other files stays, and so does a link."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
