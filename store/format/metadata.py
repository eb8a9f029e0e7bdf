"""The metadata of a store: root attributes, provenance, and the form of every array; checked before any use."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from agiqa.errors import DamagedStore, IncompleteStore, SchemaError
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.arrays import STORAGE_DTYPES, Geometry, object_rows, rows_dtype, storage_dtype
from agiqa.store.format.layers import (
    RowContent,
    basis_group,
    content_problem,
    layer_array,
    layer_of_array,
    probe_array,
    scale_group,
    token_scale_array,
)
from agiqa.store.format.layout import ENCODINGS, FORMAT, PULL_RECORD, VERSIONS, StoreLayout, is_row_array

LARGEST = 64 << 30
"""Most bytes of an object, of a unit, and of an array that is read whole. More counts as damaged: no item and no W_lm
is that large."""
_MOST_UNITS = 1 << 22
"""Most units of a store: 256 TiB in the usual units."""
_ROOM, _EXPANSION = 64 << 20, 256
"""Most bytes of an array of the model: `_ROOM`, and `_EXPANSION` per byte of its objects. A model's values hardly
compress, so an array above this limit holds something else."""
_LEAST_OBJECT = 1 << 20
"""Fewest bytes of values per object, on average, in an array that is read whole and has several objects."""
_GEOMETRY = ("units", "unit_rows", "chunk_rows", "width")
REMEDY = "Copy the store again, or extract it to another path."

UNREADABLE = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors of Zarr for invalid metadata."""

Form = tuple[tuple[int | None, ...], np.dtype[Any] | None]
"""Shape and dtype of an array; None for any length or dtype."""


def open_group(layout: StoreLayout) -> zarr.Group:
    """The Zarr group with all arrays.

    Raises SchemaError without a group, IncompleteStore if a pull has yet to fetch it, and DamagedStore if it cannot be
    read.
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
    """Raise IncompleteStore if a pull is replacing the store at `layout`, or was cut off while it did."""
    if (layout.root / PULL_RECORD).exists():
        message = (
            f"A pull into {layout.root} is running or was cut off: run the same `agiqa store pull` again to finish it."
        )
        raise IncompleteStore(message)


def check_attributes(path: Path, attributes: dict[str, Any], *, remedy: str = REMEDY) -> Geometry:
    """The geometry in a store's root attributes.

    Raises SchemaError for an unknown format, version, encoding or dtype, and DamagedStore, with `remedy`, if attributes
    are missing or contradict each other.
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
    """Raise SchemaError unless `found`, root attributes or a manifest, has the format and version read here."""
    if found.get("format") != FORMAT:
        message = f"{where} is no feature store: its format is {found.get('format')!r}, expected {FORMAT!r}."
        raise SchemaError(message)
    if found.get("version") not in VERSIONS or type(found.get("version")) is not int:
        read = " and ".join(f"v{version}" for version in VERSIONS)
        message = (
            f"{where} is {FORMAT} v{found.get('version')}; this agiqa reads {FORMAT} {read}. "
            "A newer agiqa may read it: pip install -U agiqa."
        )
        raise SchemaError(message)


def _contradiction(attributes: dict[str, Any]) -> str | None:
    """What is missing among the root attributes, or contradicts the provenance; None if they are sound."""
    provenance = attributes.get("provenance")
    try:
        same = isinstance(provenance, dict) and store_id(provenance) == attributes.get("id")
    except (ValueError, RecursionError) as error:  # NaN, a lone surrogate, or endless nesting
        return f"its provenance has no canonical JSON ({error})"
    if not same:
        return "its id is not the hash of its provenance"
    for name in ("encoding", "logical_dtype", "width"):
        if attributes["provenance"].get(name) != attributes.get(name):
            return f"its attribute {name} is not that of its provenance"
    views: Any = attributes["provenance"].get("prefixes", [])
    if not isinstance(views, list) or not all(isinstance(name, str) for name in views):
        return f"its provenance has prefixes {views!r}"
    if views and (attributes.get("pooled") or attributes.get("tap")):
        return "it records shorter conversations, and its rows are not those of tokens"
    for name in _GEOMETRY:
        value = attributes.get(name)
        if type(value) is not int or value < 1:
            return f"its attribute {name} is {value!r}"
    if attributes["units"] > _MOST_UNITS:
        return f"its attribute units is {attributes['units']}, which is no plausible number"
    return content_problem(attributes, attributes["provenance"]) or _dtype_problem(attributes)


def _dtype_problem(attributes: Mapping[str, Any]) -> str | None:
    dtypes = RowContent.of(attributes).layer_dtypes
    wrong = sorted(name for name, dtype in dtypes.items() if dtype not in STORAGE_DTYPES)
    return f"its layer {wrong[0]} has the dtype {dtypes[wrong[0]]!r}" if wrong else None


def array_forms(geometry: Geometry, attributes: dict[str, Any], *, items: int | None = None) -> dict[str, Form]:
    """The forms of all arrays that a store with these attributes may have; `items` is the number of its items."""
    (rows, width), encoding = geometry.shape, attributes["encoding"]
    bits, float32 = storage_dtype(attributes["logical_dtype"]), np.dtype(np.float32)
    views = len(attributes["provenance"].get("prefixes", ()))
    return {
        **_layer_forms(geometry, attributes),
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
        "index/prefixes": ((items, views), np.dtype(np.int32)),
        "index/prefix_authors": ((items, views), np.dtype(np.uint8)),
        "index/prefix_keys": ((items, views * 32), np.dtype(np.uint8)),
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


def _layer_forms(geometry: Geometry, attributes: dict[str, Any]) -> dict[str, Form]:
    """The forms of the arrays of other layers. Those of `logits` hold hidden states: middle layers have no logits."""
    content, rows = RowContent.of(attributes), geometry.shape[0]
    encoding, float32 = attributes["encoding"], np.dtype(np.float32)
    forms: dict[str, Form] = {}
    for layer in content.others:
        width = content.layer_widths.get(layer, geometry.width)
        dtype = rows_dtype(encoding, content.layer_dtypes.get(layer, attributes["logical_dtype"]))
        scale, basis = scale_group(layer), basis_group(layer)
        forms |= {
            layer_array(layer): ((rows, width), dtype),
            token_scale_array(layer): ((rows,), float32),
            f"{scale}/mean": ((width,), float32),
            f"{scale}/rms": ((width,), float32),
            f"{basis}/map": ((width, None), float32),
            f"{basis}/energy": ((None,), np.dtype(np.float64)),
            f"{basis}/mean": ((width,), float32),
        }
    return forms | {probe_array(layer): ((None, None), None) for layer in content.layers}


def check_array(path: Path, name: str, array: zarr.Array[Any], geometry: Geometry, attributes: dict[str, Any]) -> None:
    """Raise DamagedStore unless the shape, dtype and objects of the array follow from the root attributes.

    Accepts any array that FORMAT.md does not name.
    """
    form = array_forms(geometry, attributes).get(name)
    if form is None:
        return
    if problem := form_problem(name, array.shape, array.dtype, form):
        raise damaged(path, problem)
    size = math.prod(array.shape) * array.dtype.itemsize
    if not _is_cut_well(name, array, geometry, size):
        raise damaged(path, f"{name} is cut into objects of {object_rows(array)} rows and chunks of {array.chunks}")
    if size // (geometry.units if is_row_array(name) else 1) > LARGEST:
        raise damaged(path, f"{name} has the shape {array.shape}, which is no plausible size")


def check_expansion(path: Path, name: str, array: zarr.Array[Any], *, listed: int) -> None:
    """Raise DamagedStore if an array of the model is too large for its objects, which have `listed` bytes in all."""
    size = math.prod(array.shape) * array.dtype.itemsize
    if size > _ROOM + _EXPANSION * listed:
        raise damaged(path, f"{name} has the shape {array.shape}, {size} bytes, in objects of {listed} bytes")


def form_problem(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], form: Form) -> str | None:
    """How the array `name`, of this `shape` and `dtype`, differs from the required `form`; None if it does not."""
    lengths, kind = form
    fits = len(shape) == len(lengths) and all(
        wanted in (None, found) for wanted, found in zip(lengths, shape, strict=True)
    )
    if fits and kind in (None, dtype):
        return None
    wanted = ", ".join("any" if length is None else str(length) for length in lengths)
    return f"{name} is {dtype} {shape}, its attributes say {kind or 'any dtype'} ({wanted})"


def _is_cut_well(name: str, array: zarr.Array[Any], geometry: Geometry, size: int) -> bool:
    """Whether the array of `size` bytes is cut into objects and chunks as FORMAT.md says, along its first axis only."""
    rows = object_rows(array)
    if min(rows, array.chunks[0]) < 1 or array.chunks[1:] != array.shape[1:]:
        return False
    if name == "logits":
        return geometry.unit_rows % rows == 0
    if name == "features" or layer_of_array(name) is not None:
        return (rows, array.chunks[0]) == (geometry.unit_rows, geometry.chunk_rows)
    if is_row_array(name):
        return rows == geometry.unit_rows
    return -(-array.shape[0] // rows) <= 1 + size // _LEAST_OBJECT


def damaged(path: Path | str, what: str, *, remedy: str = REMEDY) -> DamagedStore:
    """The error for damage or a contradiction `what` in the store or file at `path`."""
    return DamagedStore(f"{path} is damaged: {what}. {remedy}")


def store_id(provenance: Mapping[str, Any]) -> str:
    """Hex sha256 of the canonical JSON of `provenance`. Stores of one id hold interchangeable features."""
    return hashlib.sha256(canonical_json(provenance).encode()).hexdigest()


def differing(there: Any, here: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every leaf in which two JSON values differ: its dotted name, below `where`, and both values.

    A missing key counts as None.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        for key in sorted({*there, *here}):
            yield from differing(there.get(key), here.get(key), f"{where}.{key}" if where else str(key))
    elif there != here:
        yield where, there, here


def differences(there: Any, here: Any, where: str = "") -> Iterator[str]:
    """One line `dotted.name: stored X, asked Y` per leaf of `differing`."""
    for name, stored, asked in differing(there, here, where):
        yield f"{name}: stored {stored!r}, asked {asked!r}"
