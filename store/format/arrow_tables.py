"""Tables that Arrow reads: parquet files, and data sets saved by Hugging Face `datasets` as folders of Arrow files.

Images in such tables are dicts {bytes, path}. Only their paths are read as cells; `embedded_images` reads the bytes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agiqa.errors import DataError, first_line
from agiqa.store.disk.files import read_text, refuse_lfs_pointers

_SPLITS = {"validation": "val"}
"""Our names of splits, where `datasets` has others."""
_ROWS = 64
"""Rows of images in memory at the same time."""

Batch = Any
"""A `pyarrow.RecordBatch`."""


def is_saved_data_set(folder: Path) -> bool:
    """Whether `datasets` saved a data set, or one per split, in `folder`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def arrow_records(path: Path) -> Iterator[tuple[int, list[Any]]]:
    """The header, numbered 0, and the rows of a parquet file or a saved data set, with their number from 1.

    A data set with splits gets the column `split`. Raises DataError for files that cannot be read.
    """
    header, number = None, 0
    for split, batch in _batches(path, contents=False):
        names = [*batch.schema.names, *([] if split is None or "split" in batch.schema.names else ["split"])]
        if header is None:
            header = names
            yield 0, list(names)
        if names != header:
            message = f"{path}: its parts have other columns ({', '.join(names)} and {', '.join(header)})."
            raise DataError(message)
        columns = [_values(batch, name, split, number) for name in batch.schema.names]
        for cells in zip(*columns, strict=True):
            number += 1
            yield number, [*cells, *([split] if len(cells) < len(names) else [])]
    if header is None:
        message = f"{path}: a header but no rows."
        raise DataError(message)


def embedded_images(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and content of each image whose bytes are in the table `path`. Raises as `arrow_records`."""
    number = 0
    for split, batch in _batches(path, contents=True):
        for name in batch.schema.names:
            if _is_image(batch.schema.field(name).type):
                contents = batch.column(name).field("bytes").to_pylist()
                written = _names(batch.column(name), split, number)
                yield from ((one, content) for one, content in zip(written, contents, strict=True) if content)
        number += batch.num_rows


def _batches(path: Path, *, contents: bool) -> Iterator[tuple[str | None, Batch]]:
    """The rows in batches, with the split of each; without `contents`, parquet is read without image bytes."""
    import pyarrow as pa

    try:
        if path.is_dir():
            yield from _saved_batches(path)
        else:
            refuse_lfs_pointers([path], DataError)
            yield from ((None, batch) for batch in _parquet_batches(path, contents=contents))
    except (pa.ArrowException, OSError) as error:
        kind = "Arrow" if path.is_dir() else "parquet"
        message = f"{path}: cannot be read as {kind} ({first_line(error)})."
        raise DataError(message) from error


def _parquet_batches(path: Path, *, contents: bool) -> Iterator[Batch]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        if contents:
            yield from file.iter_batches(batch_size=_ROWS)
            return
        fields = list(file.schema_arrow)
        yield from file.iter_batches(
            columns=[f"{field.name}.path" if _is_image(field.type) else field.name for field in fields]
        )


def _saved_batches(folder: Path) -> Iterator[tuple[str | None, Batch]]:
    import pyarrow as pa

    if (folder / "dataset_dict.json").is_file():
        for split in _json(folder / "dataset_dict.json").get("splits", ()):
            for _, batch in _saved_batches(folder / split):
                yield _SPLITS.get(split, split), batch
        return
    for file in _json(folder / "state.json").get("_data_files", ()):
        path = folder / file["filename"]
        refuse_lfs_pointers([path], DataError)
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            for batch in stream:
                yield from ((None, batch.slice(start, _ROWS)) for start in range(0, batch.num_rows, _ROWS))


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path))
    except ValueError as error:
        message = f"{path}: not JSON ({error})."
        raise DataError(message) from error
    return found if isinstance(found, dict) else {}


def _is_image(kind: Any) -> bool:
    """Whether values of this type are dicts with bytes and path."""
    import pyarrow as pa

    return pa.types.is_struct(kind) and {kind.field(k).name for k in range(kind.num_fields)} >= {"bytes", "path"}


def _values(batch: Batch, name: str, split: str | None, before: int) -> list[Any]:
    """The values of a column; for images, their names."""
    import pyarrow as pa

    kind = batch.schema.field(name).type
    if pa.types.is_struct(kind) and "path" in {kind.field(k).name for k in range(kind.num_fields)}:
        return _names(batch.column(name), split, before)
    values: list[Any] = batch.column(name).to_pylist()
    return values


def _names(images: Any, split: str | None, before: int) -> list[str]:
    """The names of images: their paths, or `image_N` for the Nth row, below a folder for the split."""
    folder = "" if split is None else f"{split}/"
    paths = images.field("path").to_pylist()
    names = [path or f"image_{number}" for number, path in enumerate(paths, start=before + 1)]
    return [folder + name.replace("\\", "/").lstrip("/") for name in names]
