"""Objects (files) of arrays, encoded and decoded on all cores.

The bytes are those of the Zarr v3 codecs `bytes`, `blosc`, `crc32c` and `sharding_indexed` (index at the end):
zarr-python can read these files, and this module the files of zarr-python. zarr-python itself decodes the chunks of a
shard one after the other, with an extra copy, and its event loop does not survive a fork. This module decodes only the
chunks that hold an item, and works in forked processes.
"""

import math
import os
import stat
import struct
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import zarr
from numcodecs import blosc  # pyright: ignore[reportAttributeAccessIssue]  # has no stub
from numpy.typing import NDArray

_ABSENT = 2**64 - 1
"""Offset and length, in a shard's index, of a chunk of zeros."""
_CRC_BYTES = 4
_BLOSC_HEADER = 16
_SLACK = 64
"""Most bytes of a compressed chunk beyond those of its values: zstd copies what it cannot compress."""
_Answer = TypeVar("_Answer")

# numcodecs makes its semaphore when it is first used. If that is in a worker process, the system keeps the semaphore
# until the worker ends by itself: of a worker that Ctrl-C ends, Python then reports a leaked semaphore. This import is
# earlier, in the main process or in the server that forks workers, and there the system keeps nothing.
blosc.get_mutex()


@dataclass(frozen=True, kw_only=True)
class ObjectCodec:
    """How the objects of an array are written to their files; the same for all objects of an array."""

    rows: int
    """Rows of the object."""
    chunk_rows: int
    """Rows of one compressed chunk; equal to `rows` in an array without shards."""
    row_shape: tuple[int, ...]
    """(width,), or () for an array with one value per token."""
    dtype: np.dtype[Any]
    sharded: bool

    @classmethod
    def of(cls, array: zarr.Array[Any]) -> "ObjectCodec":
        """The codec of an array that `arrays.py` created."""
        return cls(
            rows=int((array.shards or array.chunks)[0]),
            chunk_rows=int(array.chunks[0]),
            row_shape=tuple(array.shape[1:]),
            dtype=np.dtype(array.dtype),
            sharded=array.shards is not None,
        )

    def encode(self, values: NDArray[Any]) -> Iterator[bytes]:
        """The file of `values` (at most `rows` rows, the rest is 0) in pieces, each as soon as it is compressed.

        Do not write an object of zeros: FORMAT.md leaves it out.
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
        """Rows `start` to `stop` of the object in the file `path`, (stop - start, *row_shape); in `out` if given.

        Without `out`, takes only memory that the file's index accounts for. Raises FileNotFoundError without a file,
        and ValueError or RuntimeError for damaged bytes.
        """
        with self._opened(path) as (descriptor, index):
            fresh = out is None
            rows = np.zeros((stop - start, *self.row_shape), self.dtype) if out is None else out
            wanted = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
            for _ in self._each(
                lambda chunk: self._read_chunk(descriptor, index, chunk, start, rows, fresh=fresh), wanted
            ):
                pass
        return rows

    def holds(self, path: Path, values: NDArray[Any]) -> bool:
        """Whether the first rows of the object in the file `path` are `values`; one chunk at a time per core.

        Raises as `read`.
        """
        with self._opened(path) as (descriptor, index):

            def same(chunk: int) -> bool:
                expected = values[chunk * self.chunk_rows : (chunk + 1) * self.chunk_rows]
                found = np.empty(expected.shape, self.dtype)
                self._read_chunk(descriptor, index, chunk, chunk * self.chunk_rows, found, fresh=False)
                return np.array_equal(found, expected)

            return all(self._each(same, range(-(-len(values) // self.chunk_rows))))

    @contextmanager
    def _opened(self, path: Path) -> Generator[tuple[int, NDArray[np.uint64]]]:
        """The descriptor of the file `path`, and the index of the object in it."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # without O_NONBLOCK, opening a pipe would wait
        try:
            yield descriptor, self._index(descriptor)
        finally:
            os.close(descriptor)

    @property
    def _chunks(self) -> int:
        return self.rows // self.chunk_rows

    def _each(self, work: Callable[[int], _Answer], chunks: range) -> Iterator[_Answer]:
        """`work` on every chunk, on all cores. The threads end with the call, so no fork loses them."""
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
            message = "it is not a regular file"
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
        """Write the rows of `chunk` to their place in `out`, whose first row is `start`; a `fresh` one is zero."""
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
    """`data` without the crc32c at its end. Raises ValueError if it does not match, or bytes are missing."""
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
