"""The arrays of a store: geometry, codecs and how each is created. Sizes were chosen by measurement, see FORMAT.md."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from agiqa.store.disk.files import write_bytes_atomically
from agiqa.store.format.bits import storage_dtype
from agiqa.store.format.layout import object_path
from agiqa.store.format.objects import ObjectCodec

CHUNK_BYTES = 1 << 20
SHARD_BYTES = 64 << 20
FEWEST_UNITS = 16


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """How the rows of a store are laid out; a row is one token."""

    units: int
    unit_rows: int
    """Rows that one unit (one shard) has room for; a multiple of `chunk_rows`."""
    chunk_rows: int
    width: int
    """Values per row: hidden size D, or sketch rank r."""

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the features array."""
        return (self.units * self.unit_rows, self.width)


def chunk_rows_for(*, total_rows: int, row_bytes: int) -> int:
    """Rows of a chunk: a power of two, about 1 MiB, less where that would leave the store under 16 chunks."""
    rows = max(1, min(CHUNK_BYTES // row_bytes, -(-total_rows // FEWEST_UNITS)))
    return 1 << (rows - 1).bit_length()


def choose_geometry(*, total_rows: int, longest: int, width: int, itemsize: int) -> Geometry:
    """The geometry for items of `total_rows` tokens in all, before they are binned (so with one unit).

    A unit has 64 MiB, less where the store would have under 16 units, and never under the longest item: a unit
    is what a killed run loses.
    """
    row_bytes = width * itemsize
    chunk = chunk_rows_for(total_rows=total_rows, row_bytes=row_bytes)
    wanted = max(1, longest, min(SHARD_BYTES // row_bytes, -(-total_rows // FEWEST_UNITS)))
    return Geometry(units=1, unit_rows=-(-wanted // chunk) * chunk, chunk_rows=chunk, width=width)


def _codecs(itemsize: int, chunk_bytes: int) -> list[Any]:
    """One Blosc block per chunk: smaller ones find less of what repeats."""
    blosc = BloscCodec(cname="zstd", clevel=1, shuffle="shuffle", typesize=itemsize, blocksize=chunk_bytes)
    return [blosc, Crc32cCodec()]


def create_features(group: zarr.Group, geometry: Geometry, *, dtype: np.dtype[Any], logical_dtype: str) -> None:
    """Create `features`: one shard per unit, chunks of about 1 MiB, byte shuffle + zstd + crc32c."""
    _create_rows(group, "features", geometry, shard_rows=geometry.unit_rows, dtype=dtype, logical_dtype=logical_dtype)


def create_kept_logits(group: zarr.Group, geometry: Geometry, *, vocabulary: int, logical_dtype: str) -> None:
    """Create `logits` beside hidden states: same row addresses, several shards of about 64 MiB per unit."""
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
    """The folder of a Zarr group, to write to by one process at a time; zarr's own class needs hard links there."""

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write `value` unless there is a value of that name."""
        if not await self.exists(key):
            await self.set(key, value)


def object_rows(array: zarr.Array[Any]) -> int:
    """Rows of one object (shard, or chunk where there are no shards) of `array`."""
    return int((array.shards or array.chunks)[0])


def _largest_divisor(number: int, at_most: int) -> int:
    return next(divisor for divisor in range(min(number, at_most), 0, -1) if number % divisor == 0)


def create_token_array(group: zarr.Group, name: str, geometry: Geometry, dtype: str) -> zarr.Array[Any]:
    """Create a per-token array with the row addresses of `features`: one chunk, one object, per unit."""
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
    """Create `name` with `values`, in shards of at most 64 MiB along the first axis; replaces what is there."""
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
    """Write all values, on all cores where the array lies in a folder."""
    store = array.store_path.store
    if not isinstance(store, LocalStore):
        array[...] = values
        return
    codec = ObjectCodec.of(array)
    folder = Path(store.root, array.path)
    for position, start in enumerate(range(0, len(values), codec.rows)):
        part = values[start : start + codec.rows]
        if part.any():  # zeros only are not stored at all
            write_bytes_atomically(object_path(folder, position, dimensions=values.ndim), codec.encode(part))
