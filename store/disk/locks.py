"""Lock files: `flock` on an empty file. The kernel releases a lock when its process ends, however it ends.

A killed run therefore leaves nothing to clean up. Every function raises ConfigError where the file system has no locks,
or grants one lock twice.
"""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from agiqa.errors import ConfigError

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of `flock` on file systems without locks."""


@contextmanager
def exclusive_lock(path: Path, *, keeps_name: bool = True) -> Generator[bool]:
    """Hold the lock file `path` while inside. Yields False, without waiting, while another process holds it.

    A holder may rename or remove a file that does not keep its name, such as a data file that serves as its own lock.
    If one did so meanwhile, this yields False too.
    """
    with _open_lock(path) as file:
        if not (_try_lock(file) and (keeps_name or _has_name(file, path))):
            yield False
            return
        try:
            yield True
        finally:
            _unlock(file)


@contextmanager
def waiting_lock(path: Path) -> Generator[None]:
    """Hold the lock file `path` while inside, after waiting for any other process that holds it."""
    while True:
        with _open_lock(path) as file:
            _wait_for_lock(file)
            if not _has_name(file, path):  # its last holder removed it: another process may hold its successor
                continue
            try:
                yield
            finally:
                _unlock(file)
            return


@contextmanager
def new_lock(path: Path) -> Generator[None]:
    """Create the lock file `path` and hold it while inside. The file gets its name after it is locked.

    A file of that name that nobody holds was therefore left by a process that has ended, see `abandoned_lock`.
    """
    path.parent.mkdir(exist_ok=True)
    nameless = path.with_name(f".{path.name}.new")
    with nameless.open("x") as file:
        _wait_for_lock(file)
        nameless.replace(path)
        try:
            yield
        finally:
            _unlock(file)


@contextmanager
def abandoned_lock(path: Path) -> Generator[bool]:
    """Hold the lock file `path` of a process that has ended. Yields False while a process holds it, or without a file.

    Yields False for the file of another user, too: that user clears it away.
    """
    try:
        file = path.open("r+")
    except (FileNotFoundError, PermissionError):
        yield False
        return
    with file:
        yield _try_lock(file)


def is_held(path: Path) -> bool:
    """Whether a process holds the lock file `path` at this moment; creates nothing.

    Tries a shared lock, since NFS grants an exclusive one only on files that are open for writing.
    """
    try:
        with path.open() as file:
            return not _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, of=file.name)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return False


def _open_lock(path: Path) -> IO[str]:
    """The lock file `path`, open and not yet locked; creates the file and its folder.

    Opens the file of another user, who does not let this user write to it, for reading. That suffices to lock it.
    """
    while True:
        try:
            path.parent.mkdir(exist_ok=True)
        except FileExistsError:
            message = "no folder, nor a link to one"
            raise NotADirectoryError(errno.ENOTDIR, message, str(path.parent)) from None
        with suppress(FileNotFoundError):  # the seal of another run has removed the folder in between
            try:
                return path.open("a")
            except PermissionError:
                if not path.exists():
                    raise
                return path.open()


def _try_lock(file: IO[str]) -> bool:
    """Lock `file` and return True, or return False while another process holds it."""
    if not _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, of=file.name):
        return False
    _require_exclusive(file)
    return True


def _wait_for_lock(file: IO[str]) -> None:
    _flock(file.fileno(), fcntl.LOCK_EX, of=file.name)
    _require_exclusive(file)


def _unlock(file: IO[str]) -> None:
    """Release the lock. Closing the file would not release it while a forked child has it open."""
    fcntl.flock(file, fcntl.LOCK_UN)


def _flock(descriptor: int, operation: int, *, of: str) -> bool:
    """`flock` on the open lock file named `of`; False while another process holds it."""
    try:
        fcntl.flock(descriptor, operation)
    except (BlockingIOError, PermissionError):  # SMB reports a missing right for a lock that another process holds
        return False
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise _no_locks(of, str(error.strerror)) from error
        if error.errno == errno.EBADF:
            message = "a lock file must be writable on this file system (as NFS), and it is another user's"
            raise PermissionError(errno.EACCES, message, of) from error
        raise
    return True


def _require_exclusive(file: IO[str]) -> None:
    """Raise ConfigError if a second open file of this process can get the lock that `file` holds."""
    try:
        second = os.open(file.name, os.O_WRONLY if file.writable() else os.O_RDONLY)
    except FileNotFoundError:  # another run has removed it in between
        return
    try:
        same = os.path.samestat(os.fstat(second), os.fstat(file.fileno()))
        if same and _flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB, of=file.name):
            raise _no_locks(file.name, "two can hold one lock at the same time")
    finally:
        os.close(second)


def _has_name(file: IO[str], path: Path) -> bool:
    """Whether the open `file` is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _no_locks(lock: str, why: str) -> ConfigError:
    message = (
        f"Locks do not work on the file system of {lock} ({why}), and runs would harm each other without them: use "
        "another file system, or make the folder of the lock a link to one."
    )
    return ConfigError(message)
