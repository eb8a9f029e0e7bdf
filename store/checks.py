"""Whether a store's metadata can be believed: what it says of itself must agree before any of it is used."""

from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, SchemaError
from agiqa.store.arrays import Geometry, object_rows
from agiqa.store.layout import ENCODINGS, FORMAT, VERSION
from agiqa.store.provenance import store_id

_LARGEST_UNIT = 64 << 30
"""Bytes of a unit above which metadata counts as damaged: no item is that long, and no machine could read it."""


def check_attributes(path: Path, attributes: dict[str, Any]) -> Geometry:
    """The geometry that a store's root attributes state.

    Raises SchemaError for a foreign format, version or encoding, and DamagedStore for attributes that are missing or
    contradict each other.
    """
    found, version = attributes.get("format"), attributes.get("version")
    if found != FORMAT or version != VERSION:
        message = f"{path} is {found} v{version}; this agiqa reads {FORMAT} v{VERSION}."
        raise SchemaError(message)
    if attributes.get("encoding") not in ENCODINGS:
        message = f"{path}: encoding {attributes.get('encoding')!r}; this agiqa reads {', '.join(ENCODINGS)}."
        raise SchemaError(message)
    provenance = attributes.get("provenance")
    if not isinstance(provenance, dict) or store_id(provenance) != attributes.get("id"):
        raise damaged(path, "its id is not the hash of its provenance")
    for name in ("encoding", "logical_dtype", "width"):
        if provenance.get(name) != attributes.get(name):
            raise damaged(path, f"its attribute {name} is not that of its provenance")
    numbers: dict[str, int] = {}
    for name in ("units", "unit_rows", "chunk_rows", "width"):
        value = attributes.get(name)
        if not isinstance(value, int) or value < 1:
            raise damaged(path, f"its attribute {name} is {value!r}")
        numbers[name] = value
    return Geometry(**numbers)


def check_rows_array(path: Path, array: zarr.Array[Any], geometry: Geometry, dtype: np.dtype[Any]) -> None:
    """Raise DamagedStore unless `features` has the shape, dtype and shards that the attributes state."""
    stated = (geometry.shape, dtype, geometry.unit_rows)
    found = (array.shape, array.dtype, object_rows(array))
    if stated != found:
        raise damaged(path, f"its features have (shape, dtype, shard rows) {found}, its attributes say {stated}")
    if geometry.unit_rows * geometry.width * dtype.itemsize > _LARGEST_UNIT:
        raise damaged(path, f"a unit of {geometry.unit_rows} rows of {geometry.width} values is no plausible size")


def check_index(
    path: Path,
    geometry: Geometry,
    *,
    n_tokens: NDArray[np.int32],
    row_starts: NDArray[np.int64],
    units: NDArray[np.int32],
) -> None:
    """Raise DamagedStore, naming the first such item, where an item's rows do not lie inside its unit."""
    lengths = n_tokens.astype(np.int64)
    begin = units.astype(np.int64) * geometry.unit_rows
    inside = (lengths >= 0) & (units >= 0) & (units < geometry.units)
    inside &= (row_starts >= begin) & (row_starts + lengths <= begin + geometry.unit_rows)
    if not inside.all():
        item = int(np.argmin(inside))
        what = f"{lengths[item]} rows from {row_starts[item]} in unit {units[item]}"
        raise damaged(path, f"its index says that item {item} has {what}, which is outside of that unit")


def check_object_path(path: Path, listed: Any) -> str:
    """The path of an object as a manifest or record lists it. Raises DamagedStore where it leads out of the store."""
    text = str(listed)
    if not text or "\\" in text or PurePosixPath(text).is_absolute() or ".." in PurePosixPath(text).parts:
        raise damaged(path, f"it lists the object {text!r}, which is not inside the store")
    return text


def damaged(path: Path, what: str) -> DamagedStore:
    """The error for a store that contradicts itself."""
    return DamagedStore(f"{path} is damaged: {what}. Copy the store again, or extract it to another path.")
