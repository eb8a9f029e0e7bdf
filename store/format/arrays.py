"""The arrays of a store: the bits of their values, their geometry and codecs, and the creation of each.

Values keep the bits that the model made. NumPy and zarr-python have no bfloat16, so its bits are stored as uint16, and
`logical_dtype` names the real type. FORMAT.md specifies sizes and codecs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from agiqa.errors import UnknownName
from agiqa.store.disk.files import write_bytes_atomically
from agiqa.store.format.layout import object_path
from agiqa.store.format.objects import ObjectCodec

STORAGE_DTYPES = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_BFLOAT16_MAGNITUDE = np.uint16(0x7FFF)
_ROWS_AT_ONCE = 256
"""A block that fits into the processor's cache: ten times as fast as a whole unit at once."""

CHUNK_BYTES = 1 << 20
SHARD_BYTES = 64 << 20
FEWEST_UNITS = 16


def storage_dtype(logical_dtype: str) -> np.dtype[Any]:
    """The NumPy dtype that holds the bits of `logical_dtype`. Raises UnknownName for a name not in STORAGE_DTYPES."""
    try:
        return np.dtype(STORAGE_DTYPES[logical_dtype])
    except KeyError:
        raise UnknownName.of(kind="logical dtype", name=logical_dtype, known=STORAGE_DTYPES) from None


def rows_dtype(encoding: str, logical_dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of `features`. Raises as `storage_dtype`."""
    return np.dtype(np.int8) if encoding == "int8" else storage_dtype(logical_dtype)


def to_float32(bits: NDArray[Any], logical_dtype: str) -> NDArray[np.float32]:
    """`bits` (any shape) as float32; exact for all logical dtypes."""
    if logical_dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], logical_dtype: str) -> NDArray[Any]:
    """`values` (any shape) rounded to `logical_dtype`, ties to even, as storage bits."""
    if logical_dtype == "bfloat16":
        wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounding = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
        rounded = ((wide + rounding) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values.astype(storage_dtype(logical_dtype))


def finite_rows(bits: NDArray[Any], logical_dtype: str) -> NDArray[np.bool_]:
    """Whether each row of `bits` (rows, width) has finite values only; (rows,)."""
    finite = np.empty(len(bits), np.bool_)
    for start in range(0, len(bits), _ROWS_AT_ONCE):
        rows = bits[start : start + _ROWS_AT_ONCE]
        if logical_dtype == "bfloat16":
            finite[start : start + len(rows)] = (rows & _BFLOAT16_MAGNITUDE).max(axis=1, initial=0) < _BFLOAT16_EXPONENT
        else:
            finite[start : start + len(rows)] = np.isfinite(rows).all(axis=1)
    return finite


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Layout of the rows of a store; a row is one token."""

    units: int
    unit_rows: int
    """Capacity of a unit (one shard) in rows; a multiple of `chunk_rows`."""
    chunk_rows: int
    width: int
    """Values per row: hidden size D, sketch rank r, or vocabulary V of raw logits."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the features array."""
        return (self.units * self.unit_rows, self.width)


def chunk_rows_for(*, total_rows: int, row_bytes: int) -> int:
    """Rows of a chunk: a power of two, about 1 MiB, or less so that the store has 16 chunks."""
    rows = max(1, min(CHUNK_BYTES // row_bytes, -(-total_rows // FEWEST_UNITS)))
    return 1 << (rows - 1).bit_length()


def choose_geometry(*, total_rows: int, longest: int, width: int, itemsize: int, other_bytes: int = 0) -> Geometry:
    """The geometry of a unit for items with `total_rows` tokens in all; `units` is 1 until the items are placed.

    A unit is what a killed run loses. It has 64 MiB, or less so that the store has 16 units, and room for the `longest`
    item. `other_bytes` are those that other layers have per row.
    """
    row_bytes = width * itemsize
    chunk = chunk_rows_for(total_rows=total_rows, row_bytes=row_bytes)
    wanted = max(1, longest, min(SHARD_BYTES // (row_bytes + other_bytes), -(-total_rows // FEWEST_UNITS)))
    return Geometry(units=1, unit_rows=-(-wanted // chunk) * chunk, chunk_rows=chunk, width=width)


def _codecs(itemsize: int, chunk_bytes: int) -> list[Any]:
    """Byte shuffle, zstd and crc32c. One Blosc block per chunk: smaller blocks compress worse."""
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=itemsize, blocksize=chunk_bytes)
    return [blosc, Crc32cCodec()]


def create_features(
    group: zarr.Group, geometry: Geometry, *, dtype: np.dtype[Any], logical_dtype: str, name: str = "features"
) -> None:
    """Create `features`, or the array `name` of another layer: one shard per unit."""
    _create_rows(group, name, geometry, shard_rows=geometry.unit_rows, dtype=dtype, logical_dtype=logical_dtype)


def create_kept_logits(group: zarr.Group, geometry: Geometry, *, vocabulary: int, logical_dtype: str) -> None:
    """Create `logits` beside hidden states: the same row addresses, several shards of about 64 MiB per unit."""
    dtype = storage_dtype(logical_dtype)
    row_bytes = vocabulary * dtype.itemsize
    shard_rows = _largest_divisor(geometry.unit_rows, max(1, SHARD_BYTES // row_bytes))
    chunk_rows = _largest_divisor(shard_rows, max(1, CHUNK_BYTES // row_bytes))
    wide = Geometry(units=geometry.units, unit_rows=geometry.unit_rows, chunk_rows=chunk_rows, width=vocabulary)
    _create_rows(group, "logits", wide, shard_rows=shard_rows, dtype=dtype, logical_dtype=logical_dtype)


def _create_rows(
    group: zarr.Group, name: str, geometry: Geometry, *, shard_rows: int, dtype: np.dtype[Any], logical_dtype: str
) -> None:
    group.create_array(
        name,
        shape=geometry.shape,
        shards=(shard_rows, geometry.width),
        chunks=(geometry.chunk_rows, geometry.width),
        dtype=dtype,
        compressors=_codecs(dtype.itemsize, geometry.chunk_rows * geometry.width * dtype.itemsize),
        fill_value=0,
        attributes={"logical_dtype": logical_dtype},
    )


class WritableArrays(LocalStore):
    """A Zarr store in a folder with one writer at a time. Zarr's own class needs hard links there."""

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write `value` unless `key` exists."""
        if not await self.exists(key):
            await self.set(key, value)


def object_rows(array: zarr.Array[Any]) -> int:
    """Rows of one object of `array`: a shard, or a chunk in an array without shards."""
    return int((array.shards or array.chunks)[0])


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)


def create_token_array(group: zarr.Group, name: str, geometry: Geometry, dtype: str) -> zarr.Array[Any]:
    """Create an array with one value per token and the row addresses of `features`: one chunk, one object, per unit."""
    return group.create_array(
        name,
        shape=(geometry.units * geometry.unit_rows,),
        chunks=(geometry.unit_rows,),
        dtype=dtype,
        compressors=_codecs(np.dtype(dtype).itemsize, geometry.unit_rows * np.dtype(dtype).itemsize),
        fill_value=0,
    )


def create_whole_array(
    group: zarr.Group, name: str, values: np.ndarray[Any, Any], *, attributes: dict[str, Any] | None = None
) -> None:
    """Create `name` with `values`, in shards of at most 64 MiB along the first axis; replaces an existing array."""
    row_bytes = max(1, values[:1].nbytes)
    rows = max(1, len(values))
    chunk = min(rows, max(1, CHUNK_BYTES // row_bytes))
    shard = max(chunk, min(-(-rows // chunk) * chunk, SHARD_BYTES // row_bytes // chunk * chunk))
    array = group.create_array(
        name,
        shape=values.shape,
        shards=(shard, *values.shape[1:]),
        chunks=(chunk, *values.shape[1:]),
        dtype=values.dtype,
        compressors=_codecs(values.dtype.itemsize, chunk * row_bytes),
        fill_value=0,
        attributes=attributes or {},
        overwrite=True,
    )
    _write_whole(array, values)


def _write_whole(array: zarr.Array[Any], values: np.ndarray[Any, Any]) -> None:
    """Write all values; on all cores if the array lies in a folder."""
    store = array.store_path.store
    if not isinstance(store, LocalStore):
        array[...] = values
        return
    codec = ObjectCodec.of(array)
    folder = Path(store.root, array.path)
    for position, start in enumerate(range(0, len(values), codec.rows)):
        part = values[start : start + codec.rows]
        if part.any():  # an object of zeros is not stored
            write_bytes_atomically(object_path(folder, position, dimensions=values.ndim), codec.encode(part))
