"""Files that are whole or absent: atomic writes, durable names, hashes and locks."""

import errno
import fcntl
import hashlib
import json
import os
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from agiqa.errors import AgiqaError, ConfigError, DamagedStore

_BLOCK = 1 << 20
_REMEDIES = {
    errno.ENOSPC: "Free some space",
    errno.EDQUOT: "Free some space of your quota",
    errno.EROFS: "Make the file system writable",
    errno.EACCES: "Give this user the right to write there",
    errno.EPERM: "Give this user the right to write there",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`)",
    errno.EMFILE: "Raise the limit on open files (`ulimit -n`)",
    errno.EIO: "Check the disk",
}
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What `flock` fails with on file systems without locks."""
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def telling_disk_errors(doing: str, kept: str) -> Generator[None]:
    """Add to an OSError from inside what was being done, what is kept and the remedy; it travels on unchanged.

    One that bears notes already is left alone: whoever was nearest to it knew most.
    """
    try:
        yield
    except AgiqaError:
        raise
    except OSError as error:
        if not hasattr(error, "__notes__"):
            remedy = _REMEDIES.get(error.errno or 0, "Put that right")
            error.add_note(f"while {doing}; {kept}. {remedy} and run the same command again.")
        raise


def canonical_json(value: Any) -> str:
    """The one JSON text of `value`: sorted keys, no spaces, UTF-8, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of the file's bytes, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Force the file (or folder) at `path` to the disk; folders only where their file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; none where there is no such folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe_object(root: Path, path: Path) -> dict[str, Any]:
    """The record of one object: path relative to `root`, bytes, sha256."""
    return {
        "path": path.relative_to(root).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader or a crash sees the old file or the new one, never a part."""
    temporary = _write_temporary(path, text)
    temporary.replace(path)
    sync_file(path.parent)


def write_bytes_atomically(path: Path, pieces: Iterable[bytes]) -> dict[str, Any]:
    """Write `pieces` one after the other to `path`, in a folder made for it; its bytes and sha256.

    What a crash or a full disk leaves is a file named `*.partial`, never a part under the name of the whole.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.partial")
    digest, size = hashlib.sha256(), 0
    with removed_on_failure(temporary, of=path):
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    sync_file(path.parent)
    return {"bytes": size, "sha256": digest.hexdigest()}


def append_durably(path: Path, content: bytes) -> None:
    """Add `content` to the end of `path`, which is made where it is not there, and force it to the disk."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_file(path.parent)


def whole_lines(path: Path) -> bytes:
    """What `path` holds up to the last line's end, which a kill may have torn off; nothing where it is not there."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def put_text_if_absent(path: Path, text: str, *, lock: Path) -> bool:
    """Create `path` with `text` in one step; False, and nothing changed, when it exists already.

    Where the file system has no hard links, the one step is a rename, and the lock file `lock` keeps others away.
    """
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        return _rename_if_absent(temporary, path, lock)
    finally:
        temporary.unlink(missing_ok=True)
    sync_file(path.parent)
    return True


def _rename_if_absent(temporary: Path, path: Path, lock: Path) -> bool:
    with waiting_lock(lock):
        if path.exists():
            return False
        temporary.rename(path)
        sync_file(path.parent)
        return True


def _write_temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # readable to whom the umask lets read it
    with removed_on_failure(temporary, of=path), temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Give an OSError from inside that names no file, as that of a full disk, the name `path`."""
    try:
        yield
    except AgiqaError:
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def removed_on_failure(temporary: Path, *, of: Path) -> Generator[None]:
    """Remove `temporary` when writing it fails; the error names `of`."""
    try:
        with naming(of):
            yield
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path, *, remedy: str = "Copy the store again.") -> Any:
    """The JSON value in `path`. Raises DamagedStore, naming the file and `remedy`, when it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        message = f"{path} is damaged: it is not JSON ({error}). {remedy}"
        raise DamagedStore(message) from error


@contextmanager
def exclusive_lock(path: Path) -> Generator[bool]:
    """Hold the lock file `path` while inside; yields False at once when another process holds it.

    The kernel drops the lock when its process ends, however it ends, so a killed run leaves nothing to clean up.
    """
    with open_lock(path) as file:
        if not try_lock(file):
            yield False
            return
        try:
            yield True
        finally:
            unlock(file)


@contextmanager
def new_lock(path: Path) -> Generator[None]:
    """Create the lock file `path` and hold it while inside; it has its name only once it is held.

    So one that is there and free was left by a process that has ended, see `left_lock`.
    """
    path.parent.mkdir(exist_ok=True)
    nameless = path.with_name(f".{path.name}.new")
    with nameless.open("x") as file:
        wait_for_lock(file)
        nameless.replace(path)
        try:
            yield
        finally:
            unlock(file)


@contextmanager
def left_lock(path: Path) -> Generator[bool]:
    """Hold the lock file `path` that another process left; yields False where one holds it, or where there is none."""
    try:
        file = path.open("r+")
    except (FileNotFoundError, PermissionError):  # one of another user is not ours to clear away
        yield False
        return
    with file:
        yield try_lock(file)


@contextmanager
def waiting_lock(path: Path) -> Generator[None]:
    """Hold the lock file `path` while inside, after waiting for any other process that holds it."""
    with open_lock(path) as file:
        wait_for_lock(file)
        try:
            yield
        finally:
            unlock(file)


def try_lock(file: IO[str]) -> bool:
    """Lock the open lock file `file` unless another process holds it; whether it is ours now.

    Raises ConfigError where the file system has no locks, or locks that keep nobody out.
    """
    if not _flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, of=file.name):
        return False
    _require_exclusive(file)
    return True


def is_lock_held(file: IO[str]) -> bool:
    """Whether another process holds the lock file `file`, which is open for reading. Raises ConfigError without locks.

    A shared lock is tried, since NFS gives an exclusive one only of files that are open for writing.
    """
    return not _flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB, of=file.name)


def wait_for_lock(file: IO[str]) -> None:
    """Lock the open lock file `file` once no other process holds it. Raises as `try_lock`."""
    _flock(file.fileno(), fcntl.LOCK_EX, of=file.name)
    _require_exclusive(file)


def unlock(file: IO[str]) -> None:
    """Release the lock on `file`; closing it does not, while a forked child has it open."""
    fcntl.flock(file, fcntl.LOCK_UN)


def _flock(descriptor: int, operation: int, *, of: str) -> bool:
    """`flock` of the open lock file `of`; False when another one holds it."""
    try:
        fcntl.flock(descriptor, operation)
    except (BlockingIOError, PermissionError):  # SMB says that it has no right to what another one holds
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
    """Raise ConfigError where the lock of `file`, which this process holds, can be had a second time."""
    try:
        second = os.open(file.name, os.O_WRONLY if file.writable() else os.O_RDONLY)
    except FileNotFoundError:  # removed by another run since
        return
    try:
        same = os.path.samestat(os.fstat(second), os.fstat(file.fileno()))
        if same and _flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB, of=file.name):
            raise _no_locks(file.name, "two can hold one lock at the same time")
    finally:
        os.close(second)


def _no_locks(lock: str, why: str) -> ConfigError:
    message = (
        f"Locks do not work on the file system of {lock} ({why}), and runs would harm each other without them: use "
        "another file system, or make the folder of the lock a link to one."
    )
    return ConfigError(message)


def open_lock(path: Path) -> IO[str]:
    """The lock file `path`, in a folder made for it, open and not yet locked.

    One of another user, who does not let this one write to it, is opened for reading, which is enough to lock it.
    """
    while True:
        try:
            path.parent.mkdir(exist_ok=True)
        except FileExistsError:
            message = "no folder, nor a link to one"
            raise NotADirectoryError(errno.ENOTDIR, message, str(path.parent)) from None
        with suppress(FileNotFoundError):  # the seal of another run has removed the folder since
            try:
                return path.open("a")
            except PermissionError:
                if not path.exists():
                    raise
                return path.open()
