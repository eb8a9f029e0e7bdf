"""The memory that a Parquet file would take, by the headers of its pages, before a library unpacks them.

The footer of a file has totals per column, but a reader allocates what the header of each page states, and nothing
requires the two to agree. Headers are Thrift structures in the compact protocol.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow.parquet as pq

_ENCODINGS = (0, 2, 3, 4, 8)
"""PLAIN, PLAIN_DICTIONARY, RLE, BIT_PACKED, RLE_DICTIONARY: no text is longer than its bytes in the unpacked page."""
_UNPACKED, _PACKED, _DATA, _DICTIONARY, _DATA_V2 = 2, 3, 5, 7, 8
"""Fields of the header of a page: its size unpacked and in the file, and the headers of the kinds of pages."""
_ENCODING = {_DATA: 2, _DICTIONARY: 2, _DATA_V2: 4}
"""By kind, the field of its header with the encoding of the values."""
_DEEPEST, _MOST_FIELDS = 8, 64


def bytes_of_pages(file: BinaryIO, metadata: pq.FileMetaData) -> int:
    """Bytes of all unpacked pages of the open `file`, as their headers state.

    Raises ValueError for an invalid header, and for a page that ends beyond its column or has another encoding.
    """
    total = 0
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for group in range(metadata.num_row_groups):
            columns = metadata.row_group(group)
            for column in range(columns.num_columns):
                total += sum(_pages(content, columns.column(column)))
    return total


def _pages(content: mmap.mmap, column: pq.ColumnChunkMetaData) -> Iterator[int]:
    """Unpacked bytes of each page of `column`."""
    starts = [column.data_page_offset]
    if column.has_dictionary_page and column.dictionary_page_offset:
        starts.append(column.dictionary_page_offset)
    start = min(starts)
    end = start + column.total_compressed_size
    if start < 0 or end > len(content):
        message = f"column {column.path_in_schema} lies outside of the file"
        raise ValueError(message)
    header = _Thrift(content, start, end)
    while header.position < end:
        found = header.struct()
        encodings = [found[kind].get(_ENCODING[kind]) for kind in _ENCODING if isinstance(found.get(kind), dict)]
        if not set(encodings) <= set(_ENCODINGS):
            message = f"a page of {column.path_in_schema} has values in the encodings {encodings}"
            raise ValueError(message)
        header.skip(_size(found, _PACKED))
        yield _size(found, _UNPACKED)


def _size(found: dict[int, Any], field: int) -> int:
    size = found.get(field)
    if not isinstance(size, int) or size < 0:
        message = f"a page has the size {size}"
        raise ValueError(message)
    return size


@dataclass
class _Thrift:
    """A reader of Thrift's compact protocol; raises ValueError for invalid bytes."""

    content: mmap.mmap
    position: int
    end: int

    def struct(self, depth: int = 0) -> dict[int, Any]:
        """The fields of a structure by number; skips texts."""
        found: dict[int, Any] = {}
        number = 0
        while (head := self._byte()) & 15:
            number = number + (head >> 4) if head >> 4 else self._integer()
            if number in found or not 0 < number < _MOST_FIELDS:
                message = f"the header of a page has the field {number} twice, or no such field"
                raise ValueError(message)
            found[number] = self._value(head & 15, depth)
        return found

    def skip(self, count: int) -> None:
        """Skip `count` bytes."""
        self.position += count
        if self.position > self.end:
            message = "a page ends beyond its column"
            raise ValueError(message)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):  # true and false, which have no bytes of their own
            return kind == 1
        if kind in (3, 4, 5, 6):
            return self._byte() if kind == 3 else self._integer()
        if kind == 7:
            return self.skip(8)
        if kind == 8:
            return self.skip(self._unsigned())
        if kind == 12 and depth < _DEEPEST:
            return self.struct(depth + 1)
        message = f"the header of a page has a field of the kind {kind}, {depth} deep"
        raise ValueError(message)

    def _byte(self) -> int:
        self.skip(1)
        return self.content[self.position - 1]

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                message = "the header of a page has a number of more than 64 bits"
                raise ValueError(message)

    def _integer(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
