"""Whether a store's metadata can be believed: what it says of itself must agree before any of it is used."""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, IncompleteStore, SchemaError, StoreError
from agiqa.store.arrays import Geometry, object_rows
from agiqa.store.bits import STORAGE_DTYPES, storage_dtype
from agiqa.store.files import read_json, sha256_of_file
from agiqa.store.items import Items, count_items
from agiqa.store.layout import ENCODINGS, FORMAT, PULL_RECORD, ROW_ARRAYS, VERSION, StoreLayout
from agiqa.store.provenance import store_id

_LARGEST = 64 << 30
"""Bytes of a unit, or of an array that is read whole, above which metadata counts as damaged: no item or W_lm is that
large, and no machine could read it."""
_MOST_UNITS = 1 << 22
"""Units above which metadata counts as damaged: 256 TiB in the usual units."""
_LEAST_OBJECT = 1 << 20
"""Bytes of values that an array read whole has per object, if it has several: files are opened one by one."""
_NAMES_PER_BYTE = 16
"""Rows of an item table per byte of its file, at most: the names differ, and a million counted ones take 0.7 bytes."""
_OBJECT_PATH = re.compile(r"items\.parquet|store\.zarr(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254})+")
_LONGEST_PATH = 1000
_SHA256 = re.compile(r"[0-9a-f]{64}")

UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Zarr raises for metadata that make no sense."""

Shape = tuple[int | None, ...]


def open_group(layout: StoreLayout) -> zarr.Group:
    """The group of all arrays.

    Raises SchemaError where there is none, IncompleteStore where a pull has yet to bring it, and DamagedStore where it
    cannot be read.
    """
    if not (layout.zarr / "zarr.json").is_file():
        if (layout.root / PULL_RECORD).exists():
            message = f"A pull into {layout.root} was cut off: run the same `agiqa store pull` again to finish it."
            raise IncompleteStore(message)
        message = f"{layout.root} is not a feature store: it has no {layout.zarr.name}/zarr.json."
        raise SchemaError(message)
    try:
        return zarr.open_group(layout.zarr, mode="r")
    except UNREADABLE as error:
        message = f"{layout.zarr}/zarr.json cannot be read ({error}). Copy the store again, or extract it again."
        raise DamagedStore(message) from error


def check_attributes(path: Path, attributes: dict[str, Any]) -> Geometry:
    """The geometry that a store's root attributes state.

    Raises SchemaError for a foreign format, version, encoding or dtype, and DamagedStore for attributes that are
    missing or contradict each other.
    """
    check_version(path, attributes)
    for name, known in (("encoding", ENCODINGS), ("logical_dtype", tuple(STORAGE_DTYPES))):
        if attributes.get(name) not in known:
            message = f"{path}: {name} {attributes.get(name)!r}; this agiqa reads {', '.join(known)}."
            raise SchemaError(message)
    provenance = attributes.get("provenance")
    if not isinstance(provenance, dict) or _id_of(path, provenance) != attributes.get("id"):
        raise damaged(path, "its id is not the hash of its provenance")
    for name in ("encoding", "logical_dtype", "width"):
        if provenance.get(name) != attributes.get(name):
            raise damaged(path, f"its attribute {name} is not that of its provenance")
    numbers: dict[str, int] = {}
    for name in ("units", "unit_rows", "chunk_rows", "width"):
        value = attributes.get(name)
        if type(value) is not int or value < 1:
            raise damaged(path, f"its attribute {name} is {value!r}")
        numbers[name] = value
    if numbers["units"] > _MOST_UNITS:
        raise damaged(path, f"its attribute units is {numbers['units']}, which is no plausible number")
    return Geometry(**numbers)


def check_version(path: Path, found: dict[str, Any]) -> None:
    """Raise SchemaError unless `found`, attributes or a manifest, states the format and version read here."""
    if (found.get("format"), found.get("version")) != (FORMAT, VERSION):
        message = f"{path} is {found.get('format')} v{found.get('version')}; this agiqa reads {FORMAT} v{VERSION}."
        raise SchemaError(message)


def _id_of(path: Path, provenance: dict[str, Any]) -> str:
    try:
        return store_id(provenance)
    except (ValueError, RecursionError) as error:  # NaN, half a character, or nested without end
        raise damaged(path, f"its provenance has no canonical JSON ({error})") from error


def array_forms(geometry: Geometry, attributes: dict[str, Any]) -> dict[str, tuple[Shape, np.dtype[Any] | None]]:
    """Shape and dtype of every array that a store with these attributes may have; None for what is not decided."""
    (rows, width), encoding = geometry.shape, attributes["encoding"]
    bits, float32 = storage_dtype(attributes["logical_dtype"]), np.dtype(np.float32)
    return {
        "features": ((rows, width), np.dtype(np.int8) if encoding == "int8" else bits),
        "logits": ((rows, attributes["provenance"].get("kept_logits")), bits),
        "tokens/ids": ((rows,), np.dtype(np.int32)),
        "tokens/roles": ((rows,), np.dtype(np.uint8)),
        "tokens/scale": ((rows,), float32),
        "index/row_start": ((None,), np.dtype(np.int64)),
        "index/n_tokens": ((None,), np.dtype(np.int32)),
        "index/unit": ((None,), np.dtype(np.int32)),
        "index/item_key": ((None, 32), np.dtype(np.uint8)),
        "index/status": ((None,), np.dtype(np.uint8)),
        "lm_head/weight": ((None, width), None),
        "basis/map": ((width, None), float32),
        "basis/q": ((None, width), float32),
        "basis/energy": ((None,), np.dtype(np.float64)),
        "basis/mean": ((width,), float32),
        "scale/mean": ((width,), float32),
        "scale/rms": ((width,), float32),
        "probe/rows": ((None,), np.dtype(np.int64)),
        "probe/logits": ((None, width if encoding == "logits" else None), None),
    }


def check_array(path: Path, name: str, array: zarr.Array[Any], geometry: Geometry, attributes: dict[str, Any]) -> None:
    """Raise DamagedStore unless the array has the shape, dtype and objects that the store's root attributes ask for.

    Arrays that FORMAT.md does not know are not looked at.
    """
    shape, dtype = array_forms(geometry, attributes).get(name, (None, None))
    if shape is None:
        return
    fits = len(array.shape) == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, array.shape, strict=True)
    )
    if not fits or dtype not in (None, array.dtype):
        wanted = ", ".join("any" if length is None else str(length) for length in shape)
        what = f"{name} is {array.dtype} {array.shape}, its attributes say {dtype or 'any dtype'} ({wanted})"
        raise damaged(path, what)
    size = math.prod(array.shape) * array.dtype.itemsize
    if not _is_cut_well(name, array, geometry, size):
        raise damaged(path, f"{name} is cut into objects of {object_rows(array)} rows and chunks of {array.chunks}")
    if size // (geometry.units if name in ROW_ARRAYS else 1) > _LARGEST:
        raise damaged(path, f"{name} has the shape {array.shape}, which is no plausible size")


def _is_cut_well(name: str, array: zarr.Array[Any], geometry: Geometry, size: int) -> bool:
    """Whether the array of `size` bytes is cut along its first axis only, into objects and chunks as a store's are."""
    rows = object_rows(array)
    if min(rows, array.chunks[0]) < 1 or array.chunks[1:] != array.shape[1:]:
        return False
    if name == "logits":
        return geometry.unit_rows % rows == 0
    if name == "features":
        return (rows, array.chunks[0]) == (geometry.unit_rows, geometry.chunk_rows)
    if name in ROW_ARRAYS:
        return rows == geometry.unit_rows
    return -(-array.shape[0] // rows) <= 1 + size // _LEAST_OBJECT


def check_item_count(path: Path, *, table: Path) -> int:
    """Rows of the item table of the store at `path`. Raises DamagedStore where its file is too small for them."""
    count, size = count_items(table), table.stat().st_size
    if count > _NAMES_PER_BYTE * size:
        raise damaged(path, f"{table.name} says that it has {count} rows, in {size} bytes")
    return count


def check_items(path: Path, items: Items) -> Items:
    """The items themselves. Raises DamagedStore unless each has a name of its own and a prompt."""
    columns: dict[str, Sequence[object]] = {"name": items.names, "prompt": items.prompts}
    for column, values in columns.items():
        if not all(isinstance(value, str) for value in values):
            raise damaged(path, f"items.parquet has rows without a {column}, or one that is no text")
    if len(set(items.names)) < len(items):
        raise damaged(path, "items.parquet has two rows of one name")
    return items


def check_index(
    path: Path,
    geometry: Geometry,
    *,
    n_tokens: NDArray[np.int32],
    row_start: NDArray[np.int64],
    unit: NDArray[np.int32],
) -> None:
    """Raise DamagedStore, naming the first such item, unless items follow each other in units without gap or overlap.

    The three arrays are (items,).
    """
    lengths = n_tokens.astype(np.int64)
    begin = np.clip(unit, 0, geometry.units).astype(np.int64) * geometry.unit_rows
    inside = (lengths >= 0) & (unit >= 0) & (unit < geometry.units)
    inside &= (row_start >= begin) & (row_start <= begin + geometry.unit_rows)
    inside &= lengths <= geometry.unit_rows - (row_start - begin) * inside
    if not inside.all():
        item = int(np.argmin(inside))
        what = f"{lengths[item]} rows from {row_start[item]} in unit {unit[item]}"
        raise damaged(path, f"its index says that item {item} has {what}, which is outside of that unit")
    same = np.diff(unit, prepend=-1) == 0
    expected = np.where(same, np.concatenate([[0], (row_start + lengths)[:-1]]), begin) if len(unit) else begin
    placed = (expected == row_start) & (np.diff(unit, prepend=0) >= 0)
    if not placed.all():
        item = int(np.argmin(placed))
        what = f"item {item} begins at row {row_start[item]} of unit {unit[item]}, where {expected[item]} was next"
        raise damaged(path, f"its index says that {what}")


def read_record(path: Path) -> list[dict[str, Any]]:
    """The objects that the commit record, or the manifest, at `path` lists. Raises DamagedStore where it is none."""
    remedy = "Copy the store again, or extract it to another path."
    if path.stem.isdigit() or path.stem == "model":
        remedy = (
            f"`agiqa store repair {path.parent.parent}` drops it; what it stood for is computed anew by the next run."
        )
    record = read_json(path, remedy=remedy)
    objects = record.get("objects") if isinstance(record, dict) else None
    if not isinstance(objects, list) or not all(map(_is_entry, objects)):
        message = f"{path} is damaged: it is no record of objects. {remedy}"
        raise DamagedStore(message)
    return objects


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size, sha256 = entry.get("bytes"), entry.get("sha256")
    return (
        isinstance(entry.get("path"), str)
        and (type(size) is int and size >= 0)
        and (isinstance(sha256, str) and _SHA256.fullmatch(sha256) is not None)
    )


def read_manifest(path: Path, *, store_id: str) -> dict[str, Any]:
    """The manifest at `path`, its entries whole, and that of the store with this id.

    Raises SchemaError for a foreign format or version, and DamagedStore where it is anything else.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise damaged(path, "it is no manifest")
    check_version(path, manifest)
    if not isinstance(manifest.get("objects"), list) or not all(map(_is_entry, manifest["objects"])):
        raise damaged(path, "it does not list objects as it should")
    labels: list[Any] = [manifest.get("labels")]
    labels += [manifest["labels_next"]] if "labels_next" in manifest else []
    if not all(_is_entry(entry) and entry["path"] == "items.parquet" for entry in labels):
        raise damaged(path, "it does not list items.parquet as it should")
    if manifest.get("id") != store_id:
        raise damaged(path, f"it is that of the store {str(manifest.get('id'))[:12]}, the metadata of {store_id[:12]}")
    state, units = manifest.get("state"), manifest.get("units", [])
    if state not in ("complete", "partial") or not isinstance(units, list) or (state == "partial") != bool(units):
        raise damaged(path, f"its state is {state!r}, of units {units!r}"[:200])
    if not all(type(unit) is int for unit in units):
        raise damaged(path, "its units are no numbers")
    return manifest


def check_root_metadata(layout: StoreLayout, manifest: dict[str, Any]) -> None:
    """Raise DamagedStore unless the metadata of all arrays, which the seal gathered, are what the manifest lists."""
    path = layout.zarr / "zarr.json"
    listed = [entry["sha256"] for entry in manifest["objects"] if layout.root / entry["path"] == path]
    if listed != [sha256_of_file(path)]:
        raise damaged(path, f"it is not what {layout.manifest.name} lists")


def check_object_path(path: Path, listed: Any, *, listed_in: str) -> str:
    """The path of an object as `listed_in`, the manifest or a record of the store at `path`, lists it.

    Raises DamagedStore where it leads out of the store, by itself or through a link.
    """
    text = str(listed)
    if not _OBJECT_PATH.fullmatch(text) or len(text) > _LONGEST_PATH:
        raise damaged(path, f"{listed_in} lists {text[:200]!r}, which is no object of a store")
    check_inside(path, path / text)
    return text


def check_inside(path: Path, place: Path) -> None:
    """Raise DamagedStore where `place`, in the store at `path`, is outside of it once links are followed."""
    try:
        real = place.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise damaged(path, f"{place.relative_to(path)} is a link that leads nowhere ({error})") from error
    if not real.is_relative_to(path.resolve()):
        message = (
            f"{path}: {place.relative_to(path)} is a link out of the store, to {real}. Nothing is written or removed "
            "there. Copy the store with its links followed (`cp -RL`)."
        )
        raise DamagedStore(message)


def empty_array(path: Path, what: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Room for `what` of the store at `path`. Raises StoreError where there is not as much memory."""
    try:
        return np.empty(shape, dtype)
    except (MemoryError, ValueError) as error:
        message = (
            f"{path}: {what} takes more memory than there is ({error}). Read less at a time; where the store should "
            f"not hold that much, `agiqa store verify --level full {path}` says what is damaged."
        )
        raise StoreError(message) from error


def damaged(path: Path, what: str) -> DamagedStore:
    """The error for a store that contradicts itself."""
    return DamagedStore(f"{path} is damaged: {what}. Copy the store again, or extract it to another path.")
