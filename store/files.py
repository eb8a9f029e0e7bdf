"""Files that are whole or absent: atomic writes, durable names, hashes and locks."""

import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from agiqa.errors import DamagedStore

_BLOCK = 1 << 20


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
    try:
        with temporary.open("wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)
    sync_file(path.parent)
    return {"bytes": size, "sha256": digest.hexdigest()}


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
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return Path(name)


def read_json(path: Path) -> Any:
    """The JSON value in `path`. Raises DamagedStore, naming the file, when it holds none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path} is damaged: it is not JSON ({error}). Copy the store again."
        raise DamagedStore(message) from error


@contextmanager
def exclusive_lock(path: Path) -> Generator[bool]:
    """Hold the lock file `path` while inside; yields False at once when another process holds it.

    The kernel drops the lock when its process ends, however it ends, so a killed run leaves nothing to clean up.
    """
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing does not release it while a forked child has the file open


@contextmanager
def waiting_lock(path: Path) -> Generator[None]:
    """Hold the lock file `path` while inside, after waiting for any other process that holds it."""
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)
