"""What HDF5 files of a store have in common on the way out and back: filters, attributes, the item table.

One file holds every array of the Zarr group under its name, with its attributes, and the item table as the columns
`items/name`, `items/prompt`, ... A text column in which something is unknown has `items/missing/COLUMN` beside it,
uint8, 1 where there is no value (HDF5 has no null); an unknown MOS is NaN. Texts are fixed-length UTF-8. An attribute
that HDF5 cannot hold natively is JSON text, and `json_attributes` beside it names it.

Nothing in such a file is without a checksum: chunks have Fletcher-32 (gzip has none), the HDF5 1.10 format has one on
all metadata but the texts of attributes, and `metadata_sha256` of the root group covers those.
"""

import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, SchemaError, UnknownName
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.items import LABEL_PREFIX, MOS_RANGE, TEXT_AUTHOR, Items
from agiqa.store.format.labels import range_record, read_range
from agiqa.store.hdf5.limits import check_column, read_texts

COMPRESSIONS = ("auto", "zstd", "gzip", "none")
JSON_ATTRIBUTES = "json_attributes"
METADATA_SHA256 = "metadata_sha256"
INSTALL = "pip install 'agiqa[hdf5]'"
_CHUNK_BYTES = 1 << 20
_ZSTD_FILTER = 32015
"""The number that the HDF Group registered for zstd."""


def chosen_compression(name: str) -> str:
    """`name`, with `auto` settled: zstd if its plugin is here, else gzip.

    Raises UnknownName for another name, ConfigError for zstd without the plugin.
    """
    if name not in COMPRESSIONS:
        raise UnknownName.of(kind="HDF5 compression", name=name, known=COMPRESSIONS)
    if name == "auto":
        return "zstd" if _zstd_is_here() else "gzip"
    if name == "zstd" and not _zstd_is_here():
        message = f"HDF5 writes zstd through the plugin hdf5plugin: {INSTALL}, or choose gzip."
        raise ConfigError(message)
    return name


def _zstd_is_here() -> bool:
    with suppress(ImportError):
        import_module("hdf5plugin")  # registers its filters with the HDF5 library
    return bool(h5py.h5z.filter_avail(_ZSTD_FILTER))


def require_filters(path: Path, dataset: h5py.Dataset) -> None:
    """Raise SchemaError, with the remedy, where `dataset` cannot be decompressed here."""
    creation = dataset.id.get_create_plist()
    for position in range(creation.get_nfilters()):
        code, _, _, description = creation.get_filter(position)
        if not (_zstd_is_here() if code == _ZSTD_FILTER else h5py.h5z.filter_avail(code)):
            name = description.decode(errors="replace") or f"number {code}"
            message = f"{path}: {dataset.name} needs the HDF5 filter {name!r}, which is not here. {INSTALL}"
            raise SchemaError(message)


def create_dataset(
    group: h5py.Group, name: str, *, shape: tuple[int, ...], dtype: Any, chunks: tuple[int, ...], compression: str
) -> h5py.Dataset:
    """Create the dataset `name`, zeros until written: byte shuffle, `compression` and Fletcher-32 per chunk."""
    if 0 in shape or not shape:  # HDF5 cannot cut these into chunks
        return group.create_dataset(name, shape=shape, dtype=dtype)
    filters: dict[str, dict[str, Any]] = {
        "zstd": {"compression": _ZSTD_FILTER, "compression_opts": (1,), "shuffle": True},
        "gzip": {"compression": "gzip", "compression_opts": 1, "shuffle": True},
        "none": {},
    }
    fitting = tuple(min(chunk, length) for chunk, length in zip(chunks, shape, strict=True))
    return group.create_dataset(name, shape=shape, dtype=dtype, chunks=fitting, fletcher32=True, **filters[compression])


def dataset_of(group: h5py.Group, name: str) -> h5py.Dataset:
    """The dataset `name` of `group`. Raises KeyError where there is none."""
    found = group[name]
    if not isinstance(found, h5py.Dataset):
        message = f"{name!r} is no dataset"
        raise KeyError(message)
    return found


def write_attributes(node: h5py.Group | h5py.Dataset, attributes: Mapping[str, Any]) -> None:
    """Write `attributes` (JSON values) to `node`: texts, numbers and truth values natively, the rest as JSON text."""
    as_json = sorted(name for name, value in attributes.items() if not _is_native(value))
    for name, value in attributes.items():
        node.attrs[name] = canonical_json(value) if name in as_json else value
    if as_json:
        node.attrs[JSON_ATTRIBUTES] = canonical_json(as_json)


def _is_native(value: Any) -> bool:
    if isinstance(value, int) and not isinstance(value, bool):
        return -(1 << 63) <= value < 1 << 63
    return isinstance(value, str | bool | float)


def read_attributes(node: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """What `write_attributes` wrote to `node`, as it was."""
    found = {name: value.item() if isinstance(value, np.generic) else value for name, value in node.attrs.items()}
    for name in json.loads(found.pop(JSON_ATTRIBUTES, "[]")):
        found[name] = json.loads(found[name])
    return found


def metadata_sha256(file: h5py.File) -> str:
    """Hex sha256 of the attributes of all groups and datasets, but the one that holds this hash."""
    found = {"": {name: value for name, value in read_attributes(file).items() if name != METADATA_SHA256}}
    file.visititems(lambda name, node: found.update({name: read_attributes(node)}))
    return hashlib.sha256(canonical_json(found).encode()).hexdigest()


def write_items(group: h5py.Group, items: Items, compression: str) -> None:
    """Write the columns of `items` into `group`.

    Raises SchemaError for a text with a NUL at its end, which HDF5 would drop.
    """
    for name, column in items.table().to_pydict().items():
        if name.startswith(LABEL_PREFIX):
            _write_column(group, name, np.array(column, np.float64), compression)  # None becomes NaN
            scale = items.mos_ranges.get(name.removeprefix(LABEL_PREFIX))
            if scale is not None:
                group[name].attrs[MOS_RANGE] = range_record(scale)
            continue
        _write_column(group, name, _text_bits(name, column), compression)
        missing = np.array([text is None for text in column], np.uint8)
        if missing.any():
            _write_column(group, f"missing/{name}", missing, compression)


def _text_bits(name: str, column: list[str | None]) -> NDArray[np.bytes_]:
    texts = [(text or "").encode() for text in column]
    if any(text.endswith(b"\0") for text in texts):
        message = f"Column {name!r} of the items has a text that ends in a NUL character, which HDF5 cannot hold."
        raise SchemaError(message)
    return np.array(texts, h5py.string_dtype("utf-8", max(1, *map(len, texts))))


def _write_column(group: h5py.Group, name: str, values: NDArray[Any], compression: str) -> None:
    chunks = (max(1, _CHUNK_BYTES // values.dtype.itemsize),)
    dataset = create_dataset(
        group, name, shape=values.shape, dtype=values.dtype, chunks=chunks, compression=compression
    )
    dataset[...] = values


def read_items(path: Path, group: h5py.Group, *, rows: int) -> Items:
    """The items that `write_items` wrote into `group` of the file `path`, which has so many `rows` in its index.

    Raises DamagedStore where a column has other values, or too many bytes (see hdf5_limits.py), and HDF5's own errors
    where one is missing or damaged.
    """

    def column(name: str, kind: str) -> h5py.Dataset:
        dataset = dataset_of(group, name)
        require_filters(path, dataset)
        check_column(path, dataset, kind, rows=rows)
        return dataset

    def texts(name: str) -> list[str | None]:
        values = read_texts(path, column(name, "S"))
        if f"missing/{name}" not in group:
            return list(values)
        missing = column(f"missing/{name}", "u")[...].tolist()
        return [None if gone else text for text, gone in zip(values, missing, strict=True)]

    aspects = [name.removeprefix(LABEL_PREFIX) for name in sorted(group) if name.startswith(LABEL_PREFIX)]
    return Items(
        names=[text or "" for text in texts("name")],
        prompts=[text or "" for text in texts("prompt")],
        splits=texts("split"),
        generators=texts("generator"),
        descriptions=texts("description"),
        labels={aspect: np.asarray(column(LABEL_PREFIX + aspect, "f")[...], np.float64) for aspect in aspects},
        text_authors=texts(TEXT_AUTHOR) if TEXT_AUTHOR in group else [],
        mos_ranges={
            aspect: read_range(str(group[LABEL_PREFIX + aspect].attrs[MOS_RANGE]))
            for aspect in aspects
            if MOS_RANGE in group[LABEL_PREFIX + aspect].attrs
        },
    )
