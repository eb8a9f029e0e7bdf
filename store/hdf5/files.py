"""HDF5 files that hold a store: opened with clear errors, written safely on full disks, compressed and described.

One file holds every array of the Zarr group under its name, with its attributes, and the item table as the columns
`items/name`, `items/prompt`, ... Where a text column has gaps, `items/missing/COLUMN` (uint8) has a 1 for each item
without a value, since HDF5 has no null; an unknown MOS is NaN. Texts are fixed-length UTF-8. An attribute that HDF5
cannot hold natively is JSON text, and `json_attributes` beside it names it.

Checksums cover the whole file: chunks have Fletcher-32 (gzip has none), the HDF5 1.10 format protects all metadata but
the texts of attributes, and `metadata_sha256` of the root group covers those.
"""

import hashlib
import io
import json
import os
import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from agiqa.errors import AgiqaError, BusyStore, ConfigError, DamagedStore, SchemaError, UnknownName
from agiqa.store.disk.files import canonical_json
from agiqa.store.disk.locks import NO_LOCKS

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

COMPRESSIONS = ("auto", "zstd", "gzip", "none")
METADATA_SHA256 = "metadata_sha256"
INSTALL = "pip install 'agiqa[hdf5]'"
_JSON_ATTRIBUTES = "json_attributes"
_LIBVER = ("v110", "v110")
"""Any HDF5 from 1.10 (2016) on; the formats before it have no checksums on their metadata."""
_ZSTD_FILTER = 32015
"""The number that the HDF Group registered for zstd."""


@contextmanager
def reading(path: Path, what: str) -> Generator[None]:
    """Turn what HDF5 raises at damaged bytes of the file `path` into DamagedStore, naming `what` was read.

    An OSError with a number comes from the system (no right to read, a failing disk) and stays as it is.
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
    """The HDF5 file `path`, open for reading.

    Raises SchemaError where it is no HDF5 file, DamagedStore where it is cut off, BusyStore while another program has
    it open for writing, and OSError where this user may not read it.
    """
    if not path.is_file():
        message = f"{path} is not there, or no file."
        raise SchemaError(message)
    path.open("rb").close()  # h5py calls a file that it may not read no HDF5 file
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
def writing_hdf5(path: Path) -> Generator[tuple[h5py.File, Callable[[], None]]]:
    """A new HDF5 file at `path`, and a function `check` that raises what the disk refused.

    Call `check` often: until then refused bytes stay in memory, and Ctrl-C and SIGTERM wait. Without a call the OSError
    comes when the file is closed. It names no file; what the disk holds is worthless then.
    """
    with _held_back_signals() as let_through:
        disk = _Disk(path)

        def check() -> None:
            disk.check()
            let_through()

        try:
            with h5py.File(disk, "w", libver=_LIBVER) as file:
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

    if threading.current_thread() is threading.main_thread():  # only the main thread runs and sets handlers
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


class _Disk(io.FileIO):
    """A file for HDF5 to write to in which no write fails: it keeps in memory what the disk does not take.

    The HDF5 library cannot close a file once a write to it has failed, and crashes the process at its end.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, "w+")
        self._refused: list[tuple[int, bytes]] = []
        """Position and content of what the disk did not take, oldest first."""
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first error of the disk, if there was one."""
        if self._error is not None:
            raise self._error

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """As of any file; its end is that of the refused bytes too."""
        position = super().seek(offset, whence)
        if whence != os.SEEK_END:
            return position
        return super().seek(max(position, *(at + len(content) + offset for at, content in self._refused), 0))

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill all of `buffer`, with zeros beyond the end; its length in bytes."""
        view, start = memoryview(buffer).cast("B"), self.tell()
        stop = start + len(view)
        view[:] = bytes(len(view))
        super().readinto(view)
        for at, content in self._refused:
            first, last = max(at, start), min(at + len(content), stop)
            if first < last:
                view[first - start : last - start] = content[first - at : last - at]
        self.seek(stop)
        return len(view)

    def write(self, content: "ReadableBuffer", /) -> int:
        """Write all of `content`, to the disk as far as it takes it; its length in bytes."""
        view, start, done = memoryview(content).cast("B"), self.tell(), 0
        try:
            while self._error is None and done < len(view):
                done += super().write(view[done:])
        except OSError as error:
            self._error = error
        if done < len(view):
            self._refused.append((start + done, bytes(view[done:])))
            self.seek(start + len(view))
        return len(view)

    def truncate(self, size: int | None = None, /) -> int:
        """Set the length of the file."""
        length = self.tell() if size is None else size
        try:
            if self._error is None:
                super().truncate(length)
        except OSError as error:
            self._error = error
        return length


def chosen_compression(name: str) -> str:
    """`name`, with `auto` settled: zstd if its plugin is installed, else gzip.

    Raises UnknownName for another name, ConfigError for zstd without the plugin.
    """
    if name not in COMPRESSIONS:
        raise UnknownName.of(kind="HDF5 compression", name=name, known=COMPRESSIONS)
    if name == "auto":
        return "zstd" if _has_zstd() else "gzip"
    if name == "zstd" and not _has_zstd():
        message = f"HDF5 writes zstd through the plugin hdf5plugin: {INSTALL}, or choose gzip."
        raise ConfigError(message)
    return name


def _has_zstd() -> bool:
    with suppress(ImportError):
        import_module("hdf5plugin")  # registers its filters with the HDF5 library
    return bool(h5py.h5z.filter_avail(_ZSTD_FILTER))


def require_filters(path: Path, dataset: h5py.Dataset) -> None:
    """Raise SchemaError, with the remedy, where `dataset` cannot be decompressed here."""
    creation = dataset.id.get_create_plist()
    for position in range(creation.get_nfilters()):
        code, _, _, description = creation.get_filter(position)
        if not (_has_zstd() if code == _ZSTD_FILTER else h5py.h5z.filter_avail(code)):
            name = description.decode(errors="replace") or f"number {code}"
            message = f"{path}: {dataset.name} needs the HDF5 filter {name!r}, which is not installed. {INSTALL}"
            raise SchemaError(message)


def create_dataset(
    group: h5py.Group, name: str, *, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...], compression: str
) -> h5py.Dataset:
    """Create the dataset `name`, zeros until written: byte shuffle, `compression` and Fletcher-32 per chunk."""
    if 0 in shape or not shape:  # HDF5 cannot cut these into chunks
        return group.create_dataset(name, shape=shape, dtype=dtype)
    filters: dict[str, dict[str, Any]] = {
        "zstd": {"compression": _ZSTD_FILTER, "compression_opts": (1,), "shuffle": True},
        "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
        "none": {},
    }
    fitting = tuple(min(chunk, length) for chunk, length in zip(chunks, shape, strict=True))
    return group.create_dataset(name, shape=shape, dtype=dtype, chunks=fitting, fletcher32=True, **filters[compression])


def write_attributes(node: h5py.Group | h5py.Dataset, attributes: Mapping[str, Any]) -> None:
    """Write `attributes` (JSON values) to `node`: texts, numbers and truth values natively, the rest as JSON text."""
    as_json = sorted(name for name, value in attributes.items() if not _is_native(value))
    for name, value in attributes.items():
        node.attrs[name] = canonical_json(value) if name in as_json else value
    if as_json:
        node.attrs[_JSON_ATTRIBUTES] = canonical_json(as_json)


def _is_native(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, str | bool | float)


def read_attributes(node: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """The attributes that `write_attributes` wrote to `node`."""
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in node.attrs.items()}
    for name in json.loads(found.pop(_JSON_ATTRIBUTES, "[]")):
        found[name] = json.loads(found[name])
    return found


def metadata_sha256(file: h5py.File) -> str:
    """Hex sha256 of the attributes of all groups and datasets, but the one that holds this hash."""
    found = {"": {name: value for name, value in read_attributes(file).items() if name != METADATA_SHA256}}
    file.visititems(lambda name, node: found.update({name: read_attributes(node)}))
    return hashlib.sha256(canonical_json(found).encode()).hexdigest()
