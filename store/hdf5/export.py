"""A finished store as one HDF5 file, for tools that read HDF5 and not Zarr.

A killed process can leave an HDF5 file that nothing can open. So the export is written to `.NAME.partial` beside the
file to be made, and renamed when it is complete. An interrupted export starts again.
"""

import hashlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, DamagedStore, IncompleteStore, SchemaError, SettingsConflict
from agiqa.store.care.verification import verify
from agiqa.store.disk.files import canonical_json, naming, sync_file, telling_disk_errors
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.format.arrays import object_rows
from agiqa.store.format.items import COUNT_PREFIX, DEVIATION_PREFIX, LABEL_PREFIX, MOS_RANGE, Items
from agiqa.store.format.labels import range_record
from agiqa.store.format.layout import is_row_array
from agiqa.store.hdf5.files import (
    METADATA_SHA256,
    chosen_compression,
    create_dataset,
    metadata_sha256,
    open_hdf5,
    read_attributes,
    reading,
    write_attributes,
    writing_hdf5,
)
from agiqa.store.reading.store import Store

_CONTENT = "content_sha256"
_COMPRESSION = "compression"
_CHUNK_BYTES = 1 << 20
"""Bytes of a chunk of the item table."""


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
    """Write `store` to the HDF5 file `out`; a file that already holds this store is left unchanged.

    `compression` is zstd (through hdf5plugin), gzip, none, or auto: zstd if it is installed, else gzip. `advance` is
    called with the tokens of every finished unit.

    Raises IncompleteStore for a store that is not finished, DamagedStore naming its missing or unreadable objects,
    SettingsConflict where `out` is anything else, BusyStore while another process exports to `out`, UnknownName for
    another compression, and ConfigError for zstd without its plugin.
    """
    chosen = chosen_compression(compression)
    _require_sound(store)
    if store.path.resolve() in out.resolve().parents:
        message = f"{out} lies inside the store, whose files are all listed. Give a path outside of it."
        raise SettingsConflict(message)
    content = _content_sha256(store)
    if found := _found(store, out, content, compression):
        return found
    with telling_disk_errors(f"exporting to {out}", "no file is left behind"), _partial(out) as partial:
        if found := _found(store, out, content, compression):  # of an export that has just ended
            partial.unlink()
            return found
        with writing_hdf5(partial) as (file, check):
            _write(store, file, {_CONTENT: content, _COMPRESSION: chosen}, check=check, advance=advance)
        sync_file(partial)
        partial.replace(out)
        sync_file(out.parent)
    return HDF5Export(path=out, id=store.id, compression=chosen, bytes=out.stat().st_size, already_there=False)


@contextmanager
def _partial(out: Path) -> Generator[Path]:
    """The file in which the export to `out` is made, locked against other exports; removed when it fails.

    Raises BusyStore when another process holds it, and SettingsConflict for a link in its place. A killed export leaves
    it, unlocked, and the next one uses it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.partial")
    if path.is_symlink():
        message = f"{path} is a link; nothing is written where it leads. Give another path, or remove the link."
        raise SettingsConflict(message)
    with naming(out), exclusive_lock(path, keeps_name=False) as mine:
        if not mine:
            message = f"Another process is exporting to {out}. Wait for it, or give another path."
            raise BusyStore(message)
        try:
            yield path
        except BaseException:
            path.unlink(missing_ok=True)
            raise


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
    """Hash of all that decides the content of the file: the bytes of every object, and the item table."""
    objects = sorted([entry["path"], entry["sha256"]] for entry in store.manifest["objects"])
    content: dict[str, Any] = {"objects": objects, "items": store.items.table().to_pydict()}
    if store.items.mos_ranges:
        content["mos_ranges"] = store.items.mos_ranges
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _found(store: Store, out: Path, content: str, asked: str) -> HDF5Export | None:
    """The export of this store at `out`; None if `out` does not exist. Raises SettingsConflict for anything else."""
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


def _write(
    store: Store,
    file: h5py.File,
    about: dict[str, str],
    *,
    check: Callable[[], None],
    advance: Callable[[int], None],
) -> None:
    """Write all of `store` to `file`, and `about` beside its root attributes. `check` raises what the disk refused."""
    compression = about[_COMPRESSION]
    datasets: dict[str, h5py.Dataset] = {}

    def copy(name: str, first: int, last: int) -> None:
        step = object_rows(store.array(name))
        for start in range(first, last, step):
            stop = min(start + step, last)
            datasets[name][start:stop] = store.stored_rows(name, start, stop)
            check()

    for name, node in sorted(store.group.members(max_depth=None)):
        if isinstance(node, zarr.Group):
            write_attributes(file.require_group(name), dict(node.attrs))
            continue
        array = store.array(name)
        datasets[name] = create_dataset(
            file, name, shape=array.shape, dtype=array.dtype, chunks=array.chunks, compression=compression
        )
        write_attributes(datasets[name], dict(array.attrs))
        if not is_row_array(name):
            copy(name, 0, len(datasets[name]))
    _write_items(file.create_group("items"), store.items, compression)
    write_attributes(file, {**store.group.attrs, **about})
    file.attrs[METADATA_SHA256] = metadata_sha256(file)
    for unit in range(store.geometry.units):
        first, used = unit * store.geometry.unit_rows, store.rows_used(unit)
        for name in datasets:
            if is_row_array(name):
                copy(name, first, first + used)
        advance(used)


def _write_items(group: h5py.Group, items: Items, compression: str) -> None:
    """Write the columns of `items` into `group`.

    Raises SchemaError for a text with a NUL at its end, which HDF5 would drop.
    """

    def write(name: str, values: NDArray[Any]) -> None:
        chunks = (max(1, _CHUNK_BYTES // values.dtype.itemsize),)
        dataset = create_dataset(
            group, name, shape=values.shape, dtype=values.dtype, chunks=chunks, compression=compression
        )
        dataset[...] = values

    for name, column in items.table().to_pydict().items():
        if name.startswith((LABEL_PREFIX, DEVIATION_PREFIX, COUNT_PREFIX)):
            write(name, np.array(column, np.float64))  # None becomes NaN
            scale = items.mos_ranges.get(name.removeprefix(LABEL_PREFIX)) if name.startswith(LABEL_PREFIX) else None
            if scale is not None:
                group[name].attrs[MOS_RANGE] = range_record(scale)
            continue
        write(name, _text_bits(name, column))
        missing = np.array([text is None for text in column], np.uint8)
        if missing.any():
            write(f"missing/{name}", missing)


def _text_bits(name: str, column: list[str | None]) -> NDArray[np.bytes_]:
    texts = [(text or "").encode() for text in column]
    if any(text.endswith(b"\0") for text in texts):
        message = f"Column {name!r} of the items has a text that ends in a NUL character, which HDF5 cannot hold."
        raise SchemaError(message)
    return np.array(texts, h5py.string_dtype("utf-8", max(1, *map(len, texts))))
