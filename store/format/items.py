"""The items of a store, one row each: names, prompts, labels, splits, and the authors of their texts.

Labels are no part of the features. A teacher that knew the MOS wrote it into its text in other words, so scores of test
items with such texts are too high.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from agiqa.errors import DamagedStore
from agiqa.notebooks import one_line
from agiqa.store.disk.files import sync_file
from agiqa.store.format.labels import MosRange, range_record, read_range
from agiqa.store.format.parquet_pages import bytes_of_pages

LABEL_PREFIX, DEVIATION_PREFIX, COUNT_PREFIX = "mos_", "std_", "count_"
"""Beginnings of column names: MOS, and of the single ratings their standard deviation and how many each level got."""
MOS_RANGE = "mos_range"
"""Metadata key of a MOS column: its scale, as `range_record`."""
_NAMES_PER_BYTE = 16
"""Most rows of an item table per byte of its file. Names are unique: a million numbered ones take 0.7 bytes each."""
_ROOM, _EXPANSION = 64 << 20, 4096
"""Most bytes of the values of a table: `_ROOM`, and `_EXPANSION` per byte of its file. The numbered names of a million
items alone take 0.7 MB, so every item may have texts of 2,900 bytes in common with all others."""

TEACHER, TEACHER_BLIND, MODEL = "teacher", "teacher-blind", "model"
TEXT_AUTHORS = (TEACHER, TEACHER_BLIND, MODEL)
"""Authors of texts: an online model that knew the MOS, one that did not, and the model that made the features."""
TEXT_AUTHOR = "text_author"
"""The name of the column in item tables, and of the field in conversations."""

_BY_WEIGHT = (TEACHER, None, TEACHER_BLIND, MODEL)


@dataclass(frozen=True, kw_only=True)
class Items:
    """The columns of items.parquet; entry i of each belongs to item i of the store."""

    names: list[str]
    prompts: list[str]
    splits: list[str | None]
    generators: list[str | None]
    descriptions: list[str | None]
    labels: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    """Aspect (quality, correspondence, authenticity) to MOS per item, (items,), NaN for missing ones."""
    text_authors: list[str | None] = field(default_factory=list[str | None])
    """Author of each item's text, one of TEXT_AUTHORS or None; empty if all are unknown."""
    mos_ranges: Mapping[str, MosRange] = field(default_factory=dict[str, MosRange])
    """Aspect to the scale of its MOS, lowest and highest; missing if unknown."""
    deviations: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    """Aspect to the standard deviation of its single ratings per item, (items,), on the scale of the MOS; NaN for
    missing ones."""
    counts: Mapping[str, NDArray[np.float64]] = field(default_factory=dict[str, NDArray[np.float64]])
    """Aspect and level, `quality_1` to `quality_5`, to the number of ratings of that level per item, (items,), level 1
    the lowest; NaN for missing ones. The levels are evenly spaced over the scale of the MOS."""

    def __len__(self) -> int:
        """Number of items."""
        return len(self.names)

    def __repr__(self) -> str:
        """What the table holds, in one line."""
        return one_line("Items", {"items": len(self), "MOS": " and ".join(sorted(self.labels)) or "none"})

    def in_split(self, split: str) -> list[int]:
        """Positions of the items whose split is `split`."""
        return [position for position, name in enumerate(self.splits) if name == split]

    def first(self, count: int) -> "Items":
        """The first `count` items; a column of numbers that has none of theirs is left out."""
        head = [*range(count)]

        def numbers(columns: Mapping[str, NDArray[np.float64]]) -> dict[str, NDArray[np.float64]]:
            cut = {aspect: np.asarray(values[head], np.float64) for aspect, values in columns.items()}
            return {aspect: values for aspect, values in cut.items() if np.isfinite(values).any()}

        labels = numbers(self.labels)
        return Items(
            names=self.names[:count],
            prompts=self.prompts[:count],
            splits=self.splits[:count],
            generators=self.generators[:count],
            descriptions=self.descriptions[:count],
            labels=labels,
            text_authors=self.text_authors[:count],
            mos_ranges={aspect: scale for aspect, scale in self.mos_ranges.items() if aspect in labels},
            deviations=numbers(self.deviations),
            counts=numbers(self.counts),
        )

    def same_as(self, other: "Items") -> bool:
        """Whether every column has the same values, missing ones included, and no two known scales of MOS differ."""
        scales, others = self.mos_ranges, other.mos_ranges
        agree = all(scales[aspect] == others[aspect] for aspect in scales.keys() & others.keys())
        return agree and bool(self.table().equals(other.table()))

    def table(self) -> pa.Table:
        """The rows as an Arrow table: null for a missing label, the scale of MOS as metadata of their column."""
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
        for aspect in sorted(self.deviations):
            columns[DEVIATION_PREFIX + aspect] = pa.array(self.deviations[aspect], pa.float64(), from_pandas=True)
        for level in sorted(self.counts):
            columns[COUNT_PREFIX + level] = pa.array(self.counts[level], pa.float64(), from_pandas=True)
        scales = {LABEL_PREFIX + aspect: {MOS_RANGE: range_record(scale)} for aspect, scale in self.mos_ranges.items()}
        fields = [pa.field(name, column.type, metadata=scales.get(name)) for name, column in columns.items()]
        return pa.table(columns, schema=pa.schema(fields))


def write_items(path: Path, items: Items) -> None:
    """Write `items` to the parquet file `path`, not in one step, and flush it to the disk."""
    pq.write_table(items.table(), path, compression="zstd")
    sync_file(path)


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

    Raises DamagedStore if the file is missing or unreadable, its names are not unique, an item has no prompt, values
    are of the wrong kind, or take more memory than `_ROOM` and `_EXPANSION` allow.
    """
    count_items(path)
    try:
        table = _bounded_table(path)
        columns = {name: table.column(name) for name in table.column_names}
        items = Items(
            names=columns["name"].to_pylist(),
            prompts=columns["prompt"].to_pylist(),
            splits=columns["split"].to_pylist(),
            generators=columns["generator"].to_pylist(),
            descriptions=columns["description"].to_pylist(),
            labels=_numbers(columns, LABEL_PREFIX),
            deviations=_numbers(columns, DEVIATION_PREFIX),
            counts=_numbers(columns, COUNT_PREFIX),
            text_authors=columns[TEXT_AUTHOR].to_pylist() if TEXT_AUTHOR in columns else [],
            mos_ranges={
                column.name.removeprefix(LABEL_PREFIX): read_range(column.metadata[MOS_RANGE.encode()])
                for column in table.schema
                if column.name.startswith(LABEL_PREFIX) and MOS_RANGE.encode() in (column.metadata or {})
            },
        )
        _check_texts(path, items)
        return items
    except DamagedStore:
        raise
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    except (TypeError, ValueError) as error:
        raise _damaged(path, f"has values of another kind ({error})") from error


def _numbers(columns: Mapping[str, pa.ChunkedArray], prefix: str) -> dict[str, NDArray[np.float64]]:
    """The columns whose names begin with `prefix`, by what follows; null becomes NaN."""
    return {
        name.removeprefix(prefix): np.array(column.to_numpy(), np.float64)
        for name, column in columns.items()
        if name.startswith(prefix)
    }


def _check_texts(path: Path, items: Items) -> None:
    columns: dict[str, list[object]] = {"name": [*items.names], "prompt": [*items.prompts]}
    for column, values in columns.items():
        if not all(isinstance(value, str) for value in values):
            raise _damaged(path, f"has rows without a {column}, or one that is no text")
    if len(set(items.names)) < len(items):
        raise _damaged(path, "has two rows of one name")


def _bounded_table(path: Path) -> pa.Table:
    """The table in `path`, its texts as dictionaries, which hold a text of many rows once.

    Raises DamagedStore if its values, one by one, would take more than `_ROOM` and `_EXPANSION` allow.
    """
    with path.open("rb") as opened:  # opened once: another process may be replacing the file
        file = pq.ParquetFile(opened)  # pq.read_table would import pandas if that is installed
        room = _ROOM + _EXPANSION * os.fstat(opened.fileno()).st_size
        try:
            stored = bytes_of_pages(opened, file.metadata)
        except ValueError as error:
            raise _unreadable(path, error) from error
        names = file.schema_arrow.names
        if max(stored, 8 * file.metadata.num_rows * len(names)) > room:
            raise _damaged(path, f"holds {stored} bytes in {len(names)} columns")
        table = pq.ParquetFile(opened, read_dictionary=names).read()
    table.validate(full=True)  # finds indices beyond a dictionary, as damaged pages have; nothing else does
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


def author_of(writers: Iterable[str | None]) -> str | None:
    """The author to record for texts of several `writers`: the one that may reveal most of the MOS.

    The order is the teacher that knew the MOS, None for an unknown writer, the blind teacher, the model. Without
    writers the author is None.
    """
    return min(writers, key=_BY_WEIGHT.index, default=None)


def count_authors(authors: Iterable[str | None]) -> dict[str, int]:
    """Number of items by author, `unknown` for None, sorted by name."""
    return dict(sorted(Counter(author or "unknown" for author in authors).items()))


def teacher_warning(part: str, count: int, total: int, *, rating_words: bool) -> str:
    """The warning that `count` of the `total` items of `part` have a teacher's text.

    `rating_words` says whether the conversations contain the rating word, too.
    """
    told = f"{count} of {total} {part} items read the text of a teacher that knew their MOS"
    remedy = "Use the model's own answers: `agiqa describe` makes them, `response_0` and `response_1` hold them."
    if rating_words:
        return f"{told}, its rating word included: the features hold the answer, and scores are too high. {remedy}"
    return f"{told}, without its rating word; a model that does not know the MOS may describe otherwise. {remedy}"
