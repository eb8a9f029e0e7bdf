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

from agiqa.errors import AgiqaError, DamagedStore

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
    """Force the file (or folder) at `path` to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
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
    with _removed_on_failure(temporary, of=path):
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


def put_text_if_absent(path: Path, text: str) -> bool:
    """Create `path` with `text` in one step; False, and nothing changed, when it exists already."""
    temporary = _write_temporary(path, text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_file(path.parent)
    return True


def _write_temporary(path: Path, text: str) -> Path:
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # readable to whom the umask lets read it
    with _removed_on_failure(temporary, of=path), temporary.open("x", encoding="utf-8") as file:
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
        if error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def _removed_on_failure(temporary: Path, *, of: Path) -> Generator[None]:
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
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not release it while a forked child has the file open


@contextmanager
def new_lock(path: Path) -> Generator[None]:
    """Create the lock file `path` and hold it while inside; it has its name only once it is held.

    So one that is there and free was left by a process that has ended, see `left_lock`.
    """
    path.parent.mkdir(exist_ok=True)
    nameless = path.with_name(f".{path.name}.new")
    with nameless.open("x") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        nameless.replace(path)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def left_lock(path: Path) -> Generator[bool]:
    """Hold the lock file `path` that another process left; yields False where one holds it, or where there is none."""
    try:
        file = path.open()
    except (FileNotFoundError, PermissionError):  # one of another user is not ours to clear away
        yield False
        return
    with file:
        yield try_lock(file)


@contextmanager
def waiting_lock(path: Path) -> Generator[None]:
    """Hold the lock file `path` while inside, after waiting for any other process that holds it."""
    with open_lock(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)


def try_lock(file: IO[str]) -> bool:
    """Lock the open lock file `file` unless another process holds it; whether it is ours now."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> IO[str]:
    """The lock file `path`, in a folder made for it, open and not yet locked."""
    while True:
        path.parent.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # the seal of another run has removed the folder since
            return path.open("a")
