"""Files that are whole or absent: atomic writes, durable names, hashes, JSON, and what to do about a disk's errors."""

import errno
import hashlib
import json
import os
import re
import uuid
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agiqa.errors import AgiqaError, BusyStore, DamagedStore, DataError
from agiqa.store.disk.locks import exclusive_lock, waiting_lock

FOLDER_LOCK = "lock"
"""The file that the process holds that works in a folder of results."""
_BLOCK = 16 << 20
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
_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK)
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_LFS_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
"""First lines of Git LFS pointers: the text that stands for a file in a clone made without git-lfs. The second is that
of the earliest releases."""


@contextmanager
def telling_disk_errors(doing: str, kept: str) -> Generator[None]:
    """Add a note to an OSError from inside: what was being done, what is kept, and the remedy.

    An error that already has a note gets no other: the innermost note is the most precise.
    """
    try:
        yield
    except AgiqaError:
        raise
    except OSError as error:
        if not hasattr(error, "__notes__"):
            remedy = _REMEDIES.get(error.errno or 0, "Solve this problem")
            error.add_note(f"while {doing}; {kept}. {remedy} and run the same command again.")
        raise


@contextmanager
def working_in_folder(out: Path, what: str, *, kept: str) -> Generator[None]:
    """Make the folder `out` and hold its lock inside; `what` names the work, such as `ablation`.

    Raises BusyStore where another process holds it. An OSError from inside gets a note, with what is `kept`.
    """
    with telling_disk_errors(f"working in {out}", kept):
        out.mkdir(parents=True, exist_ok=True)
        lock = out / FOLDER_LOCK
        with exclusive_lock(lock) as held:
            if not held:
                message = f"Another {what} is at work in {out} and holds {lock}. Wait for it, or choose another OUT."
                raise BusyStore(message)
            yield


def canonical_json(value: Any) -> str:
    """The JSON text of `value` that hashes are taken over, see FORMAT.md. Raises ValueError for NaN and infinity."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_of_file(path: Path) -> str:
    """Hex sha256 of the bytes of a file.

    Blocks are large, since a thread waits up to 5 ms after each for its turn while another one runs Python.
    """
    digest = hashlib.sha256()
    block = memoryview(bytearray(min(path.stat().st_size + 1, _BLOCK)))
    with path.open("rb", buffering=0) as file:
        while read := file.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def sync_file(path: Path) -> None:
    """Flush the file or folder at `path` to the disk; a folder only if its file system supports that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def files_below(folder: Path) -> list[Path]:
    """All files below `folder`, sorted; empty without such a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def describe_object(root: Path, path: Path) -> dict[str, Any]:
    """The entry of the file `path` in a listing: path relative to `root`, bytes, sha256."""
    return {
        "path": path.relative_to(root).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": sha256_of_file(path),
    }


def write_text_atomically(path: Path, text: str) -> None:
    """Replace `path` by `text`. Readers, also after a crash, find the old file or the new one, never a part."""
    temporary = _write_temporary(path, text)
    temporary.replace(path)
    sync_file(path.parent)


def write_bytes_atomically(path: Path, pieces: Iterable[bytes]) -> dict[str, Any]:
    """Write `pieces` to `path` and create its folder; returns `bytes` and `sha256`.

    A crash or a full disk leaves a file named `*.partial`, never a part under the final name.
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
    """Append `content` to `path`, which is created if absent, and flush it to the disk."""
    with path.open("ab") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_file(path.parent)


def whole_lines(path: Path) -> bytes:
    """The complete lines of `path`: a kill may have cut off the last one. Empty if the file is absent."""
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def put_text_if_absent(path: Path, text: str, *, lock: Path) -> bool:
    """Create `path` with `text` in one step. Returns False, and changes nothing, if it exists.

    The step is a hard link, or a rename under the lock file `lock` on file systems without hard links.
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
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # not `tempfile`, which ignores the umask
    with removed_on_failure(temporary, of=path), temporary.open("x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    return temporary


@contextmanager
def naming(path: Path) -> Generator[None]:
    """Set `path` as the file name of an OSError from inside that names none, as the one of a full disk."""
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
    """Remove `temporary` if writing it fails; the error names `of`."""
    try:
        with naming(of):
            yield
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def safetensors_errors(path: Path) -> Generator[None]:
    """Raise an OSError for an error of the disk that safetensors, writing `path` inside, reports as its own."""
    from safetensors import SafetensorError  # only writers of weights need it

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def read_json(path: Path, *, remedy: str = "Copy the store again.") -> Any:
    """The JSON value in `path`. Raises DamagedStore, with the file name and `remedy`, if it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        message = f"{path} is damaged: it is not JSON ({error}). {remedy}"
        raise DamagedStore(message) from error


def read_text(path: Path) -> str:
    """The UTF-8 text of `path`, without a byte-order mark. Raises DataError unless there is some."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8."
        raise DataError(message) from error
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror or error})."
        raise DataError(message) from error
    refuse_lfs_pointers([path], DataError)
    if not text.strip():
        message = f"{path}: the file is empty."
        raise DataError(message)
    return text


def _is_lfs_pointer(path: Path) -> bool:
    """Whether the file at `path` is a Git LFS pointer; False if it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_LFS_BEGINNINGS[0])).startswith(_LFS_BEGINNINGS)
    except OSError:
        return False


def refuse_lfs_pointers(paths: Iterable[Path], error: type[Exception]) -> None:
    """Raise `error` for the first of `paths` that is a Git LFS pointer."""
    for path in paths:
        if _is_lfs_pointer(path):
            message = (
                f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in its repository, or download "
                "the file."
            )
            raise error(message)
