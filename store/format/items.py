"""The items of a store, one row each: names, prompts, labels, splits. Labels are no part of the features."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, DataError
from agiqa.store.disk.files import sync_file
from agiqa.store.format.parquet_pages import bytes_of_pages
from agiqa.store.format.scales import MosRange, range_record, read_range
from agiqa.store.format.text_authors import TEXT_AUTHOR

LABEL_PREFIX = "mos_"
MOS_RANGE = "mos_range"
"""Metadata of a column of MOS: their scale, as `range_record`."""
_NAMES_PER_BYTE = 16
"""Rows of an item table per byte of its file, at most: the names differ, and a million counted ones take 0.7 bytes."""
_ROOM, _EXPANSION = 64 << 20, 4096
"""Bytes that the values of a table may take: so many, and so many more for each byte of its file. The counted names of
a million items alone take 0.7 MB, so each item may share texts of 2,900 bytes with all the others."""


@dataclass(frozen=True, kw_only=True)
class Items:
    """The columns of items.parquet; entry i of every column belongs to item i of the store."""

    names: list[str]
    prompts: list[str]
    splits: list[str | None]
    generators: list[str | None]
    descriptions: list[str | None]
    labels: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    """Aspect (quality, correspondence, authenticity) to MOS per item, (items,), NaN where there is none."""
    text_authors: list[str | None] = field(default_factory=list[str | None])
    """Who wrote the text that each item reads (see text_authors.py); empty where that is known of no item."""
    mos_ranges: Mapping[str, MosRange] = field(default_factory=dict[str, MosRange])
    """Aspect to the scale of its MOS, lowest and highest; an aspect that is not here has an unknown scale."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.names)

    def in_split(self, split: str) -> list[int]:
        """Positions of the items whose split is `split`."""
        return [position for position, name in enumerate(self.splits) if name == split]

    def same_as(self, other: "Items") -> bool:
        """Whether every column holds the same values, missing labels included, and no scale of MOS is another."""
        scales, others = self.mos_ranges, other.mos_ranges
        agree = all(scales[aspect] == others[aspect] for aspect in scales.keys() & others.keys())
        return agree and bool(self.table().equals(other.table()))

    def table(self) -> pa.Table:
        """The rows as an Arrow table; a missing label is null, and the scale of MOS is metadata of their column."""
        text = pa.string()
        columns = {
            "name": pa.array(self.names, text),
            "prompt": pa.array(self.prompts, text),
            "split": pa.array(self.splits, text),
            "generator": pa.array(self.generators, text),
            "description": pa.array(self.descriptions, text),
        }
        if any(self.text_authors):
            columns[TEXT_AUTHOR] = pa.array(self.text_authors, text)
        for aspect in sorted(self.labels):
            columns[LABEL_PREFIX + aspect] = pa.array(self.labels[aspect], pa.float64(), from_pandas=True)
        scales = {LABEL_PREFIX + aspect: {MOS_RANGE: range_record(scale)} for aspect, scale in self.mos_ranges.items()}
        fields = [pa.field(name, column.type, metadata=scales.get(name)) for name, column in columns.items()]
        return pa.table(columns, schema=pa.schema(fields))


def item_positions(items: Sequence[int] | NDArray[Any], *, count: int, where: str) -> NDArray[np.int64]:
    """`items` as positions in a table of `count` rows, (items,). Raises DataError, naming `where`, if they are none."""
    wanted = np.asarray(items)
    if wanted.size == 0:
        return np.zeros(0, np.int64)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= count:
        message = (
            f"{where} has {count} items, read by their positions, whole numbers from 0 to {count - 1}; got "
            f"{np.array2string(wanted, threshold=5)}. `items.names` of the store has their names, in that order."
        )
        raise DataError(message)
    return wanted.astype(np.int64)


def write_items(path: Path, items: Items) -> None:
    """Write `items` to the parquet file `path`, replacing it in one step."""
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(items.table(), temporary, compression="zstd")
    sync_file(temporary)
    temporary.replace(path)


def count_items(path: Path) -> int:
    """Rows of the item table, from its footer alone. Raises DamagedStore as `read_items`."""
    try:
        count, size = int(pq.read_metadata(path).num_rows), path.stat().st_size
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    if count > _NAMES_PER_BYTE * size:
        raise _damaged(path, f"says that it has {count} rows, in {size} bytes")
    return count


def read_items(path: Path) -> Items:
    """The items in `path`.

    Raises DamagedStore, naming the file, when it is missing or unreadable, has values of another kind, or would take
    more memory than a table of its size may: see `_ROOM`.
    """
    count_items(path)
    try:
        table = _bounded_table(path)
        columns = {name: table.column(name) for name in table.column_names}
        return Items(
            names=columns["name"].to_pylist(),
            prompts=columns["prompt"].to_pylist(),
            splits=columns["split"].to_pylist(),
            generators=columns["generator"].to_pylist(),
            descriptions=columns["description"].to_pylist(),
            labels={
                name.removeprefix(LABEL_PREFIX): np.array(column.to_numpy(), np.float64)  # null becomes NaN
                for name, column in columns.items()
                if name.startswith(LABEL_PREFIX)
            },
            text_authors=columns[TEXT_AUTHOR].to_pylist() if TEXT_AUTHOR in columns else [],
            mos_ranges={
                column.name.removeprefix(LABEL_PREFIX): read_range(column.metadata[MOS_RANGE.encode()])
                for column in table.schema
                if column.name.startswith(LABEL_PREFIX) and MOS_RANGE.encode() in (column.metadata or {})
            },
        )
    except DamagedStore:
        raise
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"has values of another kind ({error})") from error


def _bounded_table(path: Path) -> pa.Table:
    """The table in `path`, its texts as dictionaries: a text that many rows share is there once.

    Raises DamagedStore where its values, one by one, would take more than `_ROOM` and `_EXPANSION` allow.
    """
    with path.open("rb") as opened:  # once: another process may be replacing the file
        file = pq.ParquetFile(opened)  # pq.read_table would import pandas where it is installed
        room = _ROOM + _EXPANSION * os.fstat(opened.fileno()).st_size
        try:
            stored = bytes_of_pages(opened, file.metadata)
        except ValueError as error:
            raise _unreadable(path, error) from error
        names = file.schema_arrow.names
        if max(stored, 8 * file.metadata.num_rows * len(names)) > room:
            raise _damaged(path, f"holds {stored} bytes in {len(names)} columns")
        table = pq.ParquetFile(opened, read_dictionary=names).read()
    table.validate(full=True)  # damaged pages can give references beyond a dictionary, which nothing else checks
    texts = sum(_bytes_of_texts(chunk) for column in table.columns for chunk in column.chunks)
    if texts > room:
        raise _damaged(path, f"holds texts of {texts} bytes, where a table of its size may hold {room}")
    return table


def _bytes_of_texts(chunk: pa.Array) -> int:
    if not pa.types.is_dictionary(chunk.type):
        return 0
    lengths = np.array([len(text) for text in chunk.dictionary.to_pylist()], np.int64)
    return int(lengths[chunk.indices.drop_null().to_numpy()].sum())


def _damaged(path: Path, what: str) -> DamagedStore:
    return DamagedStore(f"{path} is damaged: {path.name} {what}. Copy the store again, or extract it again.")


def _unreadable(path: Path, error: Exception) -> DamagedStore:
    return DamagedStore(f"{path}: the item table cannot be read ({error}). Copy the store again, or extract it again.")
