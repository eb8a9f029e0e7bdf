"""HDF5 files on disk: read with an error that says what is wrong, and written so that a full disk is an error too."""

import io
import os
import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal

import h5py

from agiqa.errors import AgiqaError, BusyStore, DamagedStore, SchemaError
from agiqa.store.disk.locks import NO_LOCKS

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

LIBVER = ("v110", "v110")
"""Any HDF5 from 1.10 (2016) on; the formats before it have no checksums on their metadata."""


@contextmanager
def reading(path: Path, what: str) -> Generator[None]:
    """Turn what HDF5 raises at damaged bytes of the file `path` into DamagedStore, naming `what` was read.

    An OSError with a number is the system's (no right to read, a failing disk) and travels on unchanged.
    """
    try:
        yield
    except AgiqaError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        message = f"{path}: {what} cannot be read, the file is damaged or cut off ({error}). Copy or export it again."
        raise DamagedStore(message) from error


@contextmanager
def open_hdf5(path: Path) -> Generator[h5py.File]:
    """The HDF5 file `path`, to read.

    Raises SchemaError where it is none, DamagedStore where it is cut off, BusyStore while another program has it open
    for writing, and OSError where this user may not read it.
    """
    if not path.is_file():
        message = f"{path} is not there, or no file."
        raise SchemaError(message)
    path.open("rb").close()  # h5py says of a file that it may not read that it is no HDF5 file
    if not h5py.is_hdf5(path):
        message = f"{path} is no HDF5 file, or its first bytes are damaged."
        raise SchemaError(message)
    with reading(path, "the file"):
        file = _open(path)
    try:
        yield file
    finally:
        file.close()


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except BlockingIOError as error:
        message = f"{path} is locked: another program has it open for writing. Close it there, then run this again."
        raise BusyStore(message) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return h5py.File(path, "r", locking=False)


@contextmanager
def writing_hdf5(path: Path, mode: Literal["w", "r+"] = "w") -> Generator[tuple[h5py.File, Callable[[], None]]]:
    """The HDF5 file `path`, to write (`w`) or to add to (`r+`), and a function that raises what the disk refused.

    That function is to be called now and then: what the disk does not take stays in memory until the file is closed,
    and so long Ctrl-C and SIGTERM wait. The OSError is raised at the end at the latest, without a file name; what the
    disk holds of the file is worthless then.
    """
    with _held_back_signals() as let_through:
        disk = _Disk(path, "w+b" if mode == "w" else "r+b")

        def check() -> None:
            disk.check()
            let_through()

        try:
            with h5py.File(disk, mode, libver=LIBVER) as file:
                yield file, check
        finally:
            disk.close()
        disk.check()


@contextmanager
def _held_back_signals() -> Generator[Callable[[], None]]:
    """Run the handlers of SIGINT and SIGTERM at the end, or when the function that this yields is called.

    They raise, and HDF5 must not see an exception come out of the file that it writes to.
    """
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}
    waiting: list[int] = []

    def let_through() -> None:
        while waiting:
            number = waiting.pop()
            handlers[number](number, None)

    if threading.current_thread() is threading.main_thread():  # no other one runs handlers, or may set them
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in found.items() if callable(handler)}
    for number in handlers:
        signal.signal(number, lambda number, _frame: waiting.append(number))
    try:
        yield let_through
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        let_through()


class _Disk(io.RawIOBase):
    """A file in which no write ever fails, for HDF5 to write to: what the disk does not take is kept in memory.

    The HDF5 library cannot close a file once a write to it has failed, and crashes the process at its end.
    """

    def __init__(self, path: Path, mode: Literal["w+b", "r+b"]) -> None:
        self._file = path.open(mode, buffering=0)
        self._position = 0
        self._refused: list[tuple[int, bytes]] = []
        """Where what the disk did not take belongs in the file, oldest first."""
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Close the file on disk; nothing is written any more."""
        self._file.close()
        super().close()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, as of any file."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size()}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` from the position on, with zeros beyond the end; its bytes."""
        view = memoryview(buffer).cast("B")
        view[:] = bytes(len(view))
        os.preadv(self._file.fileno(), [view], self._position)
        for at, content in self._refused:
            first, last = max(at, self._position), min(at + len(content), self._position + len(view))
            if first < last:
                view[first - self._position : last - self._position] = content[first - at : last - at]
        self._position += len(view)
        return len(view)

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write `content` at the position, on the disk as far as it takes it; its bytes."""
        view = memoryview(content).cast("B")
        done = 0
        try:
            while self._error is None and done < len(view):
                done += os.pwrite(self._file.fileno(), view[done:], self._position + done)
        except OSError as error:
            self._error = error
        if done < len(view):
            self._refused.append((self._position + done, bytes(view[done:])))
        self._position += len(view)
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length of the file."""
        length = self._position if size is None else size
        try:
            if self._error is None:
                os.ftruncate(self._file.fileno(), length)
        except OSError as error:
            self._error = error
        return length

    def _size(self) -> int:
        ends = (at + len(content) for at, content in self._refused)
        return max(os.fstat(self._file.fileno()).st_size, *ends, 0)
