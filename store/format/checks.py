"""Whether a store's metadata can be believed: what it says of itself must agree before any of it is used."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, IncompleteStore, SchemaError, StoreError
from agiqa.store.format.arrays import Geometry, object_rows
from agiqa.store.format.bits import STORAGE_DTYPES, rows_dtype, storage_dtype
from agiqa.store.format.items import Items
from agiqa.store.format.layout import ENCODINGS, FORMAT, PULL_RECORD, ROW_ARRAYS, VERSION, StoreLayout
from agiqa.store.format.provenance import store_id

_LARGEST = 64 << 30
"""Bytes of a unit, or of an array that is read whole, above which metadata counts as damaged: no item or W_lm is that
large, and no machine could read it."""
_MOST_UNITS = 1 << 22
"""Units above which metadata counts as damaged: 256 TiB in the usual units."""
_ROOM, _EXPANSION = 64 << 20, 256
"""Bytes that an array of the model may take: so many, and so many more for each byte of its objects. Values of a model
are noise to a compressor; one that takes more holds something else."""
_LEAST_OBJECT = 1 << 20
"""Bytes of values that an array read whole has per object, if it has several: files are opened one by one."""
_GEOMETRY = ("units", "unit_rows", "chunk_rows", "width")
REMEDY = "Copy the store again, or extract it to another path."

UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What Zarr raises for metadata that make no sense."""

Form = tuple[tuple[int | None, ...], np.dtype[Any] | None]
"""Shape and dtype of an array; None for what is not decided."""


def open_group(layout: StoreLayout) -> zarr.Group:
    """The group of all arrays.

    Raises SchemaError where there is none, IncompleteStore where a pull has yet to bring it, and DamagedStore where it
    cannot be read.
    """
    if not (layout.zarr / "zarr.json").is_file():
        require_no_pull(layout)
        message = f"{layout.root} is not a feature store: it has no {layout.zarr.name}/zarr.json."
        raise SchemaError(message)
    try:
        return zarr.open_group(layout.zarr, mode="r")
    except UNREADABLE as error:
        message = f"{layout.zarr}/zarr.json cannot be read ({error}). Copy the store again, or extract it again."
        raise DamagedStore(message) from error


def require_no_pull(layout: StoreLayout) -> None:
    """Raise IncompleteStore where a pull has begun to replace what is at `layout`, which is no store before it ends."""
    if (layout.root / PULL_RECORD).exists():
        message = (
            f"A pull into {layout.root} is at work or was cut off: run the same `agiqa store pull` again to finish it."
        )
        raise IncompleteStore(message)


def check_attributes(path: Path, attributes: dict[str, Any], *, remedy: str = REMEDY) -> Geometry:
    """The geometry that a store's root attributes state.

    Raises SchemaError for a foreign format, version, encoding or dtype, and DamagedStore, with `remedy`, for attributes
    that are missing or contradict each other.
    """
    check_version(path, attributes)
    for name, known in (("encoding", ENCODINGS), ("logical_dtype", tuple(STORAGE_DTYPES))):
        if attributes.get(name) not in known:
            message = f"{path}: {name} {attributes.get(name)!r}; this agiqa reads {', '.join(known)}."
            raise SchemaError(message)
    if problem := _contradiction(attributes):
        raise damaged(path, problem, remedy=remedy)
    return Geometry(**{name: attributes[name] for name in _GEOMETRY})


def check_version(where: Path | str, found: dict[str, Any]) -> None:
    """Raise SchemaError unless `found`, attributes or a manifest, states the format and version read here."""
    if found.get("format") != FORMAT:
        message = f"{where} is no feature store: its format is {found.get('format')!r}, expected {FORMAT!r}."
        raise SchemaError(message)
    if found.get("version") != VERSION:
        message = f"{where} is {FORMAT} v{found.get('version')}; this agiqa reads {FORMAT} v{VERSION}."
        raise SchemaError(message)


def _contradiction(attributes: dict[str, Any]) -> str | None:
    """What is missing among a store's root attributes, or not what its provenance says; None for sound ones."""
    provenance = attributes.get("provenance")
    try:
        same = isinstance(provenance, dict) and store_id(provenance) == attributes.get("id")
    except (ValueError, RecursionError) as error:  # NaN, half a character, or nested without end
        return f"its provenance has no canonical JSON ({error})"
    if not same:
        return "its id is not the hash of its provenance"
    for name in ("encoding", "logical_dtype", "width"):
        if attributes["provenance"].get(name) != attributes.get(name):
            return f"its attribute {name} is not that of its provenance"
    for name in _GEOMETRY:
        value = attributes.get(name)
        if type(value) is not int or value < 1:
            return f"its attribute {name} is {value!r}"
    if attributes["units"] > _MOST_UNITS:
        return f"its attribute units is {attributes['units']}, which is no plausible number"
    return None


def array_forms(geometry: Geometry, attributes: dict[str, Any], *, items: int | None = None) -> dict[str, Form]:
    """The form of every array that a store with these attributes, and so many `items`, may have."""
    (rows, width), encoding = geometry.shape, attributes["encoding"]
    bits, float32 = storage_dtype(attributes["logical_dtype"]), np.dtype(np.float32)
    return {
        "features": ((rows, width), rows_dtype(encoding, attributes["logical_dtype"])),
        "logits": ((rows, attributes["provenance"].get("kept_logits")), bits),
        "tokens/ids": ((rows,), np.dtype(np.int32)),
        "tokens/roles": ((rows,), np.dtype(np.uint8)),
        "tokens/scale": ((rows,), float32),
        "index/row_start": ((items,), np.dtype(np.int64)),
        "index/n_tokens": ((items,), np.dtype(np.int32)),
        "index/unit": ((items,), np.dtype(np.int32)),
        "index/item_key": ((items, 32), np.dtype(np.uint8)),
        "index/status": ((items,), np.dtype(np.uint8)),
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
    form = array_forms(geometry, attributes).get(name)
    if form is None:
        return
    if problem := form_problem(name, array.shape, array.dtype, form):
        raise damaged(path, problem)
    size = math.prod(array.shape) * array.dtype.itemsize
    if not _is_cut_well(name, array, geometry, size):
        raise damaged(path, f"{name} is cut into objects of {object_rows(array)} rows and chunks of {array.chunks}")
    if size // (geometry.units if name in ROW_ARRAYS else 1) > _LARGEST:
        raise damaged(path, f"{name} has the shape {array.shape}, which is no plausible size")


def check_expansion(path: Path, name: str, array: zarr.Array[Any], *, listed: int) -> None:
    """Raise DamagedStore where a whole array of the model is too large for its objects, which have `listed` bytes."""
    size = math.prod(array.shape) * array.dtype.itemsize
    if size > _ROOM + _EXPANSION * listed:
        raise damaged(path, f"{name} has the shape {array.shape}, {size} bytes, in objects of {listed} bytes")


def form_problem(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], form: Form) -> str | None:
    """How the array `name`, of this `shape` and `dtype`, differs from the `form` that it must have; None if not."""
    lengths, kind = form
    fits = len(shape) == len(lengths) and all(
        wanted in (None, found) for wanted, found in zip(lengths, shape, strict=True)
    )
    if fits and kind in (None, dtype):
        return None
    wanted = ", ".join("any" if length is None else str(length) for length in lengths)
    return f"{name} is {dtype} {shape}, its attributes say {kind or 'any dtype'} ({wanted})"


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


def damaged(path: Path | str, what: str, *, remedy: str = REMEDY) -> DamagedStore:
    """The error for a store that contradicts itself."""
    return DamagedStore(f"{path} is damaged: {what}. {remedy}")
