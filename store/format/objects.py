"""Objects of arrays with a row per token, encoded and decoded on all cores.

The bytes are those of the Zarr v3 codecs `bytes`, `blosc`, `crc32c` and `sharding_indexed` (index at the end), so
zarr-python reads what is written here and the other way round. It is done here since zarr-python works through the
chunks of a shard one after the other, decodes a whole shard's chunks with an extra copy, and its event loop does not
survive a fork: here one item costs the chunks that it lies in, and a reader works in worker processes.
"""

import math
import os
import stat
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]  # has no stub
from numpy.typing import NDArray

_ABSENT = 2**64 - 1
"""What a shard's index holds for a chunk that is all fill value."""
_CRC_BYTES = 4
_BLOSC_HEADER = 16
_SLACK = 64
"""Bytes that a chunk of noise may take more than its values; zstd falls back to a copy."""
_Answer = TypeVar("_Answer")


@dataclass(frozen=True, kw_only=True)
class ObjectCodec:
    """How one object of an array lies in its file; all values of one array have the same codec."""

    rows: int
    """Rows of the object."""
    chunk_rows: int
    """Rows of one compressed chunk; as many as `rows` in an array without shards."""
    row_shape: tuple[int, ...]
    """(width,), or () for an array with one value per token."""
    dtype: np.dtype[Any]
    sharded: bool

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> "ObjectCodec":
        """The codec of an array that `store.arrays` created."""
        return cls(
            rows=int((array.shards or array.chunks)[0]),
            chunk_rows=int(array.chunks[0]),
            row_shape=tuple(array.shape[1:]),
            dtype=np.dtype(array.dtype),
            sharded=array.shards is not None,
        )

    def encode(self, values: NDArray[Any]) -> Iterator[bytes]:
        """The file of `values` (up to `rows` rows, the rest is 0) in pieces, each as soon as it is compressed.

        An object whose values are all 0 is to be left out: it would be an index, or a chunk, of nothing.
        """
        index = np.full((self._chunks, 2), _ABSENT, "<u8")
        position = 0
        for chunk, piece in enumerate(self._each(lambda at: self._encode_chunk(values, at), range(self._chunks))):
            if piece:
                index[chunk] = (position, len(piece))
                position += len(piece)
                yield piece
        if self.sharded:
            yield _with_crc(index.tobytes())

    def read(self, path: Path, start: int, stop: int, *, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Rows `start` to `stop` of the object in the file `path`, (stop - start, *row_shape), in `out` where given.

        Without it no memory is taken that the file's own index does not account for. Raises FileNotFoundError where
        there is no file, and ValueError or RuntimeError where its bytes are damaged.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe in its place would be waited for
        try:
            index = self._index(descriptor)
            fresh = out is None
            rows = np.zeros((stop - start, *self.row_shape), self.dtype) if out is None else out
            wanted = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
            for _ in self._each(
                lambda chunk: self._read_chunk(descriptor, index, chunk, start, rows, fresh=fresh), wanted
            ):
                pass
        finally:
            os.close(descriptor)
        return rows

    def holds(self, path: Path, values: NDArray[Any]) -> bool:
        """Whether the object in the file `path` gives back `values`, its first rows; a chunk at a time on each core.

        Raises as `read`.
        """
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            index = self._index(descriptor)

            def same(chunk: int) -> bool:
                expected = values[chunk * self.chunk_rows : (chunk + 1) * self.chunk_rows]
                found = np.empty(expected.shape, self.dtype)
                self._read_chunk(descriptor, index, chunk, chunk * self.chunk_rows, found, fresh=False)
                return np.array_equal(found, expected)

            return all(self._each(same, range(-(-len(values) // self.chunk_rows))))
        finally:
            os.close(descriptor)

    @property
    def _chunks(self) -> int:
        return self.rows // self.chunk_rows

    def _each(self, work: Callable[[int], _Answer], chunks: range) -> Iterator[_Answer]:
        """`work` on every chunk, on all cores where there are several; threads of one call, so none outlives a fork."""
        threads = min(len(chunks), len(os.sched_getaffinity(0)))
        if threads <= 1:
            yield from map(work, chunks)
            return
        with ThreadPoolExecutor(threads) as pool:
            yield from pool.map(work, chunks)

    def _encode_chunk(self, values: NDArray[Any], chunk: int) -> bytes:
        part = np.ascontiguousarray(values[chunk * self.chunk_rows : (chunk + 1) * self.chunk_rows])
        if not part.any():
            return b""
        if len(part) < self.chunk_rows:
            whole = np.zeros((self.chunk_rows, *self.row_shape), self.dtype)
            whole[: len(part)] = part
            part = whole
        return _with_crc(blosc.compress(part, b"zstd", 1, blosc.SHUFFLE, part.nbytes))

    def _index(self, descriptor: int) -> NDArray[np.uint64]:
        """Offset and length of every chunk, (chunks, 2)."""
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            message = "it is no file"
            raise ValueError(message)
        size = status.st_size
        if not self.sharded:
            return np.array([[0, size]], np.uint64)
        length = 16 * self._chunks + _CRC_BYTES
        if size < length:
            message = f"{size} bytes found, its index alone has {length}"
            raise ValueError(message)
        index = np.frombuffer(_checked(os.pread(descriptor, length, size - length), length), "<u8")
        index = index.reshape(-1, 2)
        offsets, lengths = index[index[:, 1] != _ABSENT].T
        room = np.uint64(size - length)
        if (offsets > room).any() or (lengths > room - np.minimum(offsets, room)).any():
            message = "its index points outside of the object"
            raise ValueError(message)
        return index

    def _read_chunk(
        self,
        descriptor: int,
        index: NDArray[np.uint64],
        chunk: int,
        start: int,
        out: NDArray[Any],
        *,
        fresh: bool,
    ) -> None:
        """Put the rows of `chunk` where they belong in `out`, which is zero if it is `fresh`."""
        first = chunk * self.chunk_rows
        low, high = max(start, first), min(start + len(out), first + self.chunk_rows)
        target = out[low - start : high - start]
        offset, length = index[chunk].tolist()
        if length == _ABSENT:
            if not fresh:
                target[...] = 0
            return
        size = self.chunk_rows * math.prod(self.row_shape) * self.dtype.itemsize
        if length > size + _SLACK:
            message = f"chunk {chunk} has {length} bytes, compressed, of {size}"
            raise ValueError(message)
        compressed = _checked(os.pread(descriptor, length, offset), length)
        if len(compressed) < _BLOSC_HEADER or struct.unpack_from("<I", compressed, 4)[0] != size:
            message = f"chunk {chunk} does not hold {size} bytes"
            raise ValueError(message)
        if high - low == self.chunk_rows:
            blosc.decompress(compressed, target)
            return
        whole = np.empty((self.chunk_rows, *self.row_shape), self.dtype)
        blosc.decompress(compressed, whole)
        target[...] = whole[low - first : high - first]


def _with_crc(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(data))


def _checked(data: bytes, length: int) -> bytes:
    """`data` without the crc32c at its end. Raises ValueError where it does not fit, or bytes are missing."""
    if len(data) != length or length < _CRC_BYTES:
        message = f"{length} bytes expected, {len(data)} found"
        raise ValueError(message)
    body = data[:-_CRC_BYTES]
    stored = struct.unpack("<I", data[-_CRC_BYTES:])[0]
    computed = google_crc32c.value(body)
    if stored != computed:
        message = f"checksum {computed:#010x} of the bytes, {stored:#010x} stored"
        raise ValueError(message)
    return body
