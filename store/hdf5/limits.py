"""How much memory an HDF5 file may take: a few bytes of it can state an array, a chunk or a text of any size.

HDF5 gives zeros for what a file states and does not hold, and unpacks a chunk whole for a single row of it. So the size
of every dataset is compared with the bytes that the file holds of it, before any value is read.
"""

import math
from pathlib import Path

import h5py

from agiqa.store.format.layout import MODEL_GROUPS
from agiqa.store.format.metadata import damaged

REMEDY = "Copy or export it again."
_ROOM, _OF_ROWS, _OF_OTHERS = 64 << 20, 256, 4096
"""Bytes that a dataset may take: so many, and so many more for each byte that is stored of it. Features and the model's
arrays are noise to a compressor; tokens, index and items repeat themselves."""
_BLOCK = 16 << 20
"""Bytes of texts that are read at a time: they are as long as the longest one until they are cut."""


def check_size(path: Path, dataset: h5py.Dataset) -> None:
    """Raise DamagedStore where `dataset` takes more than what the file at `path` holds of it allows, or one chunk more
    than all of it."""
    _check_chunks(path, dataset)
    _check(path, dataset, math.prod(dataset.shape or ()) * dataset.dtype.itemsize)


def check_column(path: Path, dataset: h5py.Dataset, kind: str, *, rows: int) -> None:
    """Raise DamagedStore where a column of the item table has other values than of `kind`, or not as many as `rows`.

    `kind` is that of the dtype: `S` texts, `f` MOS, `u` marks. Texts are bounded as they are read, see `read_texts`.
    """
    if dataset.dtype.kind != kind or dataset.shape != (rows,):
        what = f"{dataset.name} of its item table is {dataset.dtype} {dataset.shape}, its index has {rows} items"
        raise damaged(path, what, remedy=REMEDY)
    if kind == "S" and dataset.chunks is not None:
        _check_chunks(path, dataset)
        _check(path, dataset, dataset.chunks[0] * dataset.dtype.itemsize)
    else:
        check_size(path, dataset)


def read_texts(path: Path, dataset: h5py.Dataset) -> list[str]:
    """The texts of a column that `check_column` has passed. Raises DamagedStore where they are too many bytes."""
    texts: list[str] = []
    taken, step = 0, max(1, _BLOCK // dataset.dtype.itemsize, (dataset.chunks or (1,))[0])
    for start in range(0, len(dataset), step):
        block = [text.decode() for text in dataset[start : start + step].tolist()]
        taken += sum(map(len, block))
        _check(path, dataset, taken)
        texts += block
    return texts


def _check_chunks(path: Path, dataset: h5py.Dataset) -> None:
    if math.prod(dataset.chunks or ()) > math.prod(dataset.shape or ()):
        what = f"{dataset.name} has the shape {dataset.shape}, in chunks of {dataset.chunks}"
        raise damaged(path, what, remedy=REMEDY)


def _check(path: Path, dataset: h5py.Dataset, size: int) -> None:
    stored = min(dataset.id.get_storage_size(), path.stat().st_size)  # a header can state any size of what is stored
    group = str(dataset.name).strip("/").partition("/")[0]
    allowed = _ROOM + (_OF_ROWS if group in (*MODEL_GROUPS, "features", "logits") else _OF_OTHERS) * stored
    if size > allowed:
        what = f"{dataset.name} takes {size} bytes, and the file holds {stored} of it"
        raise damaged(path, what, remedy=REMEDY)
