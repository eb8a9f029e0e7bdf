"""A finished store as one HDF5 file, for tools that read HDF5 and not Zarr.

A process killed while it changes an HDF5 file can leave one that nothing can open, and no flush protocol of HDF5
promises otherwise for a file that is opened again to be written. So each unit is compressed into a file of its own,
renamed when it is whole; in the end the compressed chunks are moved, as they are, into one file, and that is renamed to
OUT. A killed export loses the unit at work, or the move. The price: at the end the disk holds the compressed
features twice.
"""

import hashlib
import re
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import zarr

from agiqa.errors import BusyStore, DamagedStore, IncompleteStore, SettingsConflict
from agiqa.store.care.verification import verify
from agiqa.store.disk.files import (
    canonical_json,
    read_json,
    removed_on_failure,
    sync_file,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.format.arrays import object_rows
from agiqa.store.format.layout import ROW_ARRAYS
from agiqa.store.hdf5.common import (
    METADATA_SHA256,
    chosen_compression,
    create_dataset,
    dataset_of,
    metadata_sha256,
    read_attributes,
    write_attributes,
    write_items,
)
from agiqa.store.hdf5.files import open_hdf5, reading, writing_hdf5
from agiqa.store.reading.store import Store

_CONTENT = "content_sha256"
_COMPRESSION = "compression"
_BASE, _LOCK = "base", "lock"
_PART = re.compile(rf"(?:{_BASE}|[0-9]{{8,}})\.h5|(?:part|merged)\.new|\.?export\.json.*")


@dataclass(frozen=True, kw_only=True)
class HDF5Export:
    """What an export wrote, or found written."""

    path: Path
    id: str
    compression: str
    """zstd, gzip or none."""
    bytes: int
    """Size of the file."""
    already_there: bool

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "path": str(self.path)}


def export_hdf5(
    store: Store, out: Path, *, compression: str = "auto", advance: Callable[[int], None] = lambda _tokens: None
) -> HDF5Export:
    """Write `store` to the HDF5 file `out`, or go on with the export that was begun there.

    `compression` is zstd (through hdf5plugin), gzip, none, or auto: zstd if it is installed, else gzip. `advance` is
    called with the tokens of every finished unit. A file that holds this very store is left as it is.

    Raises IncompleteStore for a store that is not finished, DamagedStore naming what of it is missing or unreadable,
    SettingsConflict where `out` is anything else, BusyStore while another process exports to `out`, UnknownName for
    another compression, and ConfigError for zstd without its plugin.
    """
    chosen, asked = chosen_compression(compression), compression
    _require_sound(store)
    if store.path.resolve() in out.resolve().parents:
        message = f"{out} lies inside the store, whose files are all listed. Give a path outside of it."
        raise SettingsConflict(message)
    content, work = _content_sha256(store), out.with_name(f".{out.name}.parts")
    found = _found(store, out, content, asked)
    if found and not work.exists():
        return found
    with telling_disk_errors(f"exporting to {out}", "finished units are kept"), _lock(out, work) as mine:
        if not mine:
            message = f"Another process is exporting to {out}. Wait for it, or give another path."
            raise BusyStore(message)
        found = _found(store, out, content, asked)
        if not found:
            _Export(store, work, content=content, compression=chosen).write(out, advance)
        _remove_parts(work)
        (work / _LOCK).unlink()
    size = out.stat().st_size
    return found or HDF5Export(path=out, id=store.id, compression=chosen, bytes=size, already_there=False)


@contextmanager
def _lock(out: Path, work: Path) -> Generator[bool]:
    """Hold the folder `work`, made for the export to `out`; yields False when another process holds it.

    The folder goes at the end if it is empty then, and no link.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive_lock(work / _LOCK) as mine:
            yield mine
    finally:  # the lock is closed by now: FUSE file systems keep the names of open files
        with suppress(OSError):
            work.rmdir()


def _remove_parts(work: Path) -> None:
    """Remove what exports left in `work`, which may be a link to a folder that holds files of others."""
    for path in work.iterdir():
        if _PART.fullmatch(path.name):
            path.unlink()


def _require_sound(store: Store) -> None:
    if store.state != "complete":
        message = f"{store.path} is not whole, and only finished stores are exported. {store.remedy}"
        raise IncompleteStore(message)
    report = verify(store, "quick")
    if not report.sound:
        lines = "\n".join(f"  {damage.problem}" for damage in report.damage[:20])
        message = f"{store.path} cannot be exported, {len(report.damage)} of its objects are damaged:\n{lines}"
        raise DamagedStore(message)


def _content_sha256(store: Store) -> str:
    """What decides the content of the file: the bytes of every object, and the item table."""
    objects = sorted([entry["path"], entry["sha256"]] for entry in store.manifest["objects"])
    content: dict[str, Any] = {"objects": objects, "items": store.items.table().to_pydict()}
    if store.items.mos_ranges:
        content["mos_ranges"] = store.items.mos_ranges
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _found(store: Store, out: Path, content: str, asked: str) -> HDF5Export | None:
    """The export of this store that lies at `out`, or None where nothing does."""
    if not out.exists():
        return None
    attributes: dict[str, Any] = {}
    if out.is_file() and h5py.is_hdf5(out):
        with open_hdf5(out) as file, reading(out, "its attributes"):
            attributes = read_attributes(file)
    if attributes.get(_CONTENT) != content:
        same = attributes.get("id") == store.id
        what = "an export of this store with other labels or bits" if same else "not an export of this store"
        message = f"{out} exists and is {what}. Give another path, or move it away."
        raise SettingsConflict(message)
    there = str(attributes[_COMPRESSION])
    if asked not in ("auto", there):
        message = f"{out} holds this store already, compressed with {there}. Give another path, or move it away."
        raise SettingsConflict(message)
    return HDF5Export(path=out, id=store.id, compression=there, bytes=out.stat().st_size, already_there=True)


class _Export:
    """One export at work, in the folder `work` beside the file to be made."""

    def __init__(self, store: Store, work: Path, *, content: str, compression: str) -> None:
        self._store, self._work = store, work
        self._content, self._compression = content, compression
        self._check_disk: Callable[[], None] = lambda: None
        """Raises what the disk refused of the file that is being written."""
        nodes = dict(store.group.members(max_depth=None))
        self._groups = {name: node for name, node in sorted(nodes.items()) if isinstance(node, zarr.Group)}
        self._arrays = {name: store.array(name) for name, node in sorted(nodes.items()) if isinstance(node, zarr.Array)}
        self._per_unit = [name for name in self._arrays if name in ROW_ARRAYS]

    def write(self, out: Path, advance: Callable[[int], None]) -> None:
        """Make what parts are not there yet, then `out` of them."""
        self._begin()
        self._part(_BASE, self._write_base)
        for unit in range(self._store.geometry.units):
            self._part(f"{unit:08d}", partial(self._write_unit, unit))
            advance(self._store.rows_used(unit))
        merged = self._merge(out)
        merged.replace(out)
        sync_file(out.parent)

    def _begin(self) -> None:
        """Keep the parts of a killed export of the same content, and remove any others."""
        state, record = {_CONTENT: self._content, _COMPRESSION: self._compression}, self._work / "export.json"
        if record.exists() and read_json(record) == state:
            return
        _remove_parts(self._work)
        write_text_atomically(record, canonical_json(state))

    def _part(self, name: str, write: Callable[[h5py.File], None]) -> None:
        path = self._work / f"{name}.h5"
        if path.exists():
            return
        temporary = self._work / "part.new"
        with removed_on_failure(temporary, of=path):
            with writing_hdf5(temporary) as (file, self._check_disk):
                write(file)
            sync_file(temporary)
        temporary.replace(path)
        sync_file(self._work)

    def _write_base(self, file: h5py.File) -> None:
        """All but the rows of units: groups, attributes, whole arrays, items."""
        for name, group in self._groups.items():
            write_attributes(file.require_group(name), dict(group.attrs))
        for name, array in self._arrays.items():
            dataset = self._dataset(file, name, array.shape)
            write_attributes(dataset, dict(array.attrs))
            if name not in self._per_unit:
                self._copy(name, dataset, first=0, rows=len(dataset))
        write_items(file.create_group("items"), self._store.items, self._compression)
        write_attributes(file, dict(self._store.group.attrs))
        write_attributes(file, {_CONTENT: self._content, _COMPRESSION: self._compression})
        file.attrs[METADATA_SHA256] = metadata_sha256(file)

    def _write_unit(self, unit: int, file: h5py.File) -> None:
        unit_rows, used = self._store.geometry.unit_rows, self._store.rows_used(unit)
        for name in self._per_unit:
            dataset = self._dataset(file, name, (unit_rows, *self._arrays[name].shape[1:]))
            self._copy(name, dataset, first=unit * unit_rows, rows=used)

    def _dataset(self, file: h5py.File, name: str, shape: tuple[int, ...]) -> h5py.Dataset:
        array = self._arrays[name]
        return create_dataset(
            file, name, shape=shape, dtype=array.dtype, chunks=array.chunks, compression=self._compression
        )

    def _copy(self, name: str, dataset: h5py.Dataset, *, first: int, rows: int) -> None:
        """Copy `rows` rows of the array `name` from row `first` on to the start of `dataset`, one object at a time."""
        step = object_rows(self._arrays[name])
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            dataset[start:stop] = self._store.stored_rows(name, first + start, first + stop)
            self._check_disk()

    def _merge(self, out: Path) -> Path:
        """One file of all parts; chunks are moved as they are, neither decompressed nor compressed again."""
        merged = self._work / "merged.new"
        with removed_on_failure(merged, of=out):
            shutil.copyfile(self._work / f"{_BASE}.h5", merged)
            with writing_hdf5(merged, "r+") as (file, self._check_disk):
                for unit in range(self._store.geometry.units):
                    self._move_unit(unit, file)
            sync_file(merged)
        return merged

    def _move_unit(self, unit: int, file: h5py.File) -> None:
        first = unit * self._store.geometry.unit_rows
        with open_hdf5(self._work / f"{unit:08d}.h5") as part:
            for name in self._per_unit:
                _move_chunks(dataset_of(part, name), dataset_of(file, name), first, check=self._check_disk)


def _move_chunks(source: h5py.Dataset, target: h5py.Dataset, first: int, *, check: Callable[[], None]) -> None:
    for number in range(source.id.get_num_chunks()):
        row, *columns = source.id.get_chunk_info(number).chunk_offset
        mask, data = source.id.read_direct_chunk((row, *columns))
        target.id.write_direct_chunk((first + row, *columns), data, mask)
        check()
