"""An HDF5 file that is to become a store, read and checked before anything is written.

Before any value is read, the size that each dataset states is compared with the bytes that the file holds of it: HDF5
gives zeros for what a file states and does not hold, and unpacks a whole chunk for one row, so a file of a few bytes
can take any amount of memory.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5l  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module without stubs
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, SchemaError
from agiqa.store.format.arrays import STORAGE_DTYPES, Geometry, storage_dtype
from agiqa.store.format.items import COUNT_PREFIX, DEVIATION_PREFIX, LABEL_PREFIX, MOS_RANGE, TEXT_AUTHOR, Items
from agiqa.store.format.labels import read_range
from agiqa.store.format.layers import RowContent, basis_group, layer_array, probe_array, scale_group, token_scale_array
from agiqa.store.format.layout import (
    ITEM_STATUS,
    LM_HEAD_NAMED_IN,
    MODEL_GROUPS,
    PROBE_LOGITS,
    PROBE_ROWS,
    TOKEN_ROLES,
)
from agiqa.store.format.metadata import array_forms, check_attributes, damaged, form_problem
from agiqa.store.format.prefixes import AUTHORS, KEYS, PREFIXES, ROWS, Prefixes
from agiqa.store.hdf5.files import METADATA_SHA256, metadata_sha256, read_attributes, reading, require_filters

_REMEDY = "Copy or export it again."
_BASE_BYTES, _PER_BYTE_OF_ROWS, _PER_BYTE_OF_OTHERS = 64 << 20, 256, 4096
"""A dataset may take `_BASE_BYTES`, plus this many per stored byte. Features and the model's arrays are noise to a
compressor; tokens, index and items repeat themselves."""
_TEXT_BLOCK = 16 << 20
"""Bytes of texts read at a time: each is padded to the longest one until it is cut."""


@dataclass(frozen=True, kw_only=True)
class StoreFile:
    """An HDF5 file whose content, all but the rows of units, was read and checked."""

    path: Path
    arrays: dict[str, h5py.Dataset]
    """Every array of the store, by name."""
    encoding: str
    logical_dtype: str
    provenance: dict[str, Any]
    geometry: Geometry
    row_starts: NDArray[np.int64]
    n_tokens: NDArray[np.int32]
    units: NDArray[np.int32]
    item_keys: NDArray[np.uint8]
    """(items, 32)"""
    status: NDArray[np.uint8]
    items: Items
    prefixes: Prefixes | None


def check_store_file(path: Path, file: h5py.File) -> StoreFile:
    """Read and check all of `file`, at `path`, but the rows of units.

    Raises SchemaError where values lie elsewhere (links, external storage, virtual datasets), before any is read, for a
    foreign version, missing, unknown or wrongly shaped arrays, and filters that are not installed; DamagedStore for
    damaged bytes and for parts that contradict each other.
    """
    with reading(path, "its structure"):
        _refuse_links(path, file)
    with reading(path, "its attributes"):
        attributes = read_attributes(file)
    geometry = check_attributes(path, attributes, remedy=_REMEDY)
    with reading(path, "its attributes"):
        if attributes.get(METADATA_SHA256) != metadata_sha256(file):
            raise _damaged(path, "its attributes are not those that metadata_sha256 names")
        nodes: dict[str, h5py.Group | h5py.Dataset] = {}
        file.visititems(nodes.__setitem__)
        arrays = {
            name: node
            for name, node in sorted(nodes.items())
            if isinstance(node, h5py.Dataset) and not name.startswith("items/")
        }
    _check_arrays(path, attributes, geometry, arrays)
    with reading(path, "its index"):
        index = {name: np.asarray(array[...]) for name, array in arrays.items() if name.startswith("index/")}
    with reading(path, "its item table"):
        table = _read_items(path, file, rows=len(index["index/n_tokens"]))
    source = StoreFile(
        path=path,
        arrays=arrays,
        encoding=attributes["encoding"],
        logical_dtype=attributes["logical_dtype"],
        provenance=attributes["provenance"],
        geometry=geometry,
        row_starts=index["index/row_start"],
        n_tokens=index["index/n_tokens"],
        units=index["index/unit"],
        item_keys=index["index/item_key"],
        status=index["index/status"],
        items=table,
        prefixes=Prefixes.recorded(attributes["provenance"], index.__getitem__, index),
    )
    _check_items(source)
    _check_model(source)
    return source


def _refuse_links(path: Path, file: h5py.File) -> None:
    """Raise SchemaError, naming it, for anything whose values lie in another file or at another place of this one.

    HDF5 would follow it into any file that this user may read, and these values would become those of a store.
    """
    links: list[tuple[bytes, int]] = []
    file.id.links.visit(lambda name, link: links.append((name, link.type)), info=True)
    for name, kind in links:
        if problem := _link_problem(file, name, kind):
            shown = "/" + name.decode(errors="replace")
            message = (
                f"{path}: {shown!r} {problem}, so its values lie elsewhere; nothing of it was read. "
                "A store is imported only from a file that holds all of it: export it again."
            )
            raise SchemaError(message)


def _link_problem(file: h5py.File, name: bytes, kind: int) -> str | None:
    """How the link `name` of this `kind` leads away from values in their own place; None where it does not."""
    if kind != h5l.TYPE_HARD:
        soft, external = h5l.TYPE_SOFT, h5l.TYPE_EXTERNAL
        return {soft: "is a soft link", external: "is an external link"}.get(kind, "is a link of an unknown kind")
    node = file[name]
    if isinstance(node, h5py.Dataset) and node.is_virtual:
        return "is a virtual dataset"
    return "has external storage" if isinstance(node, h5py.Dataset) and node.external else None


def _damaged(path: Path, problem: str) -> DamagedStore:
    return damaged(path, problem, remedy=_REMEDY)


def _wanted(attributes: dict[str, Any]) -> set[str]:
    """Names of the arrays that a finished store with these attributes has."""
    content, encoding = RowContent.of(attributes), attributes["encoding"]
    wanted = {"features", "tokens/ids", "tokens/roles"}
    wanted |= {f"index/{name}" for name in ("row_start", "n_tokens", "unit", "item_key", "status")}
    wanted |= {"logits"} if "kept_logits" in attributes["provenance"] else set[str]()
    wanted |= {ROWS, AUTHORS} if PREFIXES in attributes["provenance"] else set[str]()
    wanted |= {layer_array(layer) for layer in content.others}
    if content.has_lm_head:
        wanted |= {PROBE_ROWS, PROBE_LOGITS}
        wanted |= {"basis/q"} if encoding == "sketch" else set[str]()
        wanted |= {"lm_head/weight"} if encoding in ("hidden", "int8") else set[str]()
    for layer in (None, *content.others):
        if encoding == "int8":
            wanted |= {token_scale_array(layer), *(f"{scale_group(layer)}/{name}" for name in ("mean", "rms"))}
        if encoding == "sketch":
            wanted |= {f"{basis_group(layer)}/{name}" for name in ("map", "energy", "mean")}
    return wanted


def _allowed(attributes: dict[str, Any]) -> set[str]:
    """Names of the arrays that such a store may have or not."""
    content = RowContent.of(attributes)
    allowed = {PROBE_ROWS, *map(probe_array, content.layers)} if content.version > 1 else set[str]()
    return allowed | ({KEYS} if PREFIXES in attributes["provenance"] else set[str]())


def _check_arrays(path: Path, attributes: dict[str, Any], geometry: Geometry, arrays: dict[str, h5py.Dataset]) -> None:
    wanted = _wanted(attributes)
    missing, unknown = sorted(wanted - set(arrays)), sorted(set(arrays) - wanted - _allowed(attributes))
    if missing or unknown:
        what = f"no array {', '.join(missing)}" if missing else f"unknown arrays: {', '.join(unknown)}"
        message = f"{path} has {what}."
        raise SchemaError(message)
    items = arrays["index/n_tokens"].shape or (0,)
    forms = array_forms(geometry, attributes, items=items[0])
    for name, found in arrays.items():
        if problem := form_problem(name, found.shape or (), found.dtype, forms[name]):
            message = f"{path}: {problem}."
            raise SchemaError(message)
        require_filters(path, found)
        _check_chunks(path, found)
        _check_bytes(path, found, math.prod(found.shape or ()) * found.dtype.itemsize)


def _check_chunks(path: Path, dataset: h5py.Dataset) -> None:
    if math.prod(dataset.chunks or ()) > math.prod(dataset.shape or ()):
        raise _damaged(path, f"{dataset.name} has the shape {dataset.shape}, in chunks of {dataset.chunks}")


def _check_bytes(path: Path, dataset: h5py.Dataset, size: int) -> None:
    """Raise DamagedStore where `size` bytes of values are more than the stored bytes of `dataset` can hold."""
    stored = min(dataset.id.get_storage_size(), path.stat().st_size)  # a header can state any size of what is stored
    noise = str(dataset.name).strip("/").partition("/")[0] in (*MODEL_GROUPS, "features", "logits", "layers")
    if size > _BASE_BYTES + (_PER_BYTE_OF_ROWS if noise else _PER_BYTE_OF_OTHERS) * stored:
        raise _damaged(path, f"{dataset.name} takes {size} bytes, and the file holds {stored} of it")


def _read_items(path: Path, file: h5py.File, *, rows: int) -> Items:
    """The item table of the file at `path`, whose index has `rows` items.

    Raises DamagedStore where a column has other values, or too many bytes, and HDF5's own errors where one is missing
    or damaged.
    """
    group = file.require_group("items")

    def column(name: str, kind: str) -> h5py.Dataset:
        """The checked column `name`; `kind` of its dtype is `S` for texts, `f` for MOS and `u` for marks."""
        dataset = file[f"items/{name}"]
        if not isinstance(dataset, h5py.Dataset):
            message = f"{name!r} is no dataset"
            raise KeyError(message)
        require_filters(path, dataset)
        if dataset.dtype.kind != kind or dataset.shape != (rows,):
            what = f"{dataset.name} of its item table is {dataset.dtype} {dataset.shape}, its index has {rows} items"
            raise _damaged(path, what)
        _check_chunks(path, dataset)
        at_once = dataset.chunks[0] if kind == "S" and dataset.chunks is not None else rows  # see _read_texts
        _check_bytes(path, dataset, at_once * dataset.dtype.itemsize)
        return dataset

    def texts(name: str) -> list[str | None]:
        values: list[str | None] = list(_read_texts(path, column(name, "S")))
        if f"missing/{name}" not in group:
            return values
        missing = column(f"missing/{name}", "u")[...].tolist()
        return [None if gone else text for text, gone in zip(values, missing, strict=True)]

    def numbers(prefix: str) -> dict[str, NDArray[np.float64]]:
        names = [name for name in sorted(group) if name.startswith(prefix)]
        return {name.removeprefix(prefix): np.asarray(column(name, "f")[...], np.float64) for name in names}

    labels = numbers(LABEL_PREFIX)
    return Items(
        names=[text or "" for text in texts("name")],
        prompts=[text or "" for text in texts("prompt")],
        splits=texts("split"),
        generators=texts("generator"),
        descriptions=texts("description"),
        labels=labels,
        deviations=numbers(DEVIATION_PREFIX),
        counts=numbers(COUNT_PREFIX),
        text_authors=texts(TEXT_AUTHOR) if TEXT_AUTHOR in group else [],
        mos_ranges={
            aspect: read_range(str(group[LABEL_PREFIX + aspect].attrs[MOS_RANGE]))
            for aspect in labels
            if MOS_RANGE in group[LABEL_PREFIX + aspect].attrs
        },
    )


def _read_texts(path: Path, dataset: h5py.Dataset) -> list[str]:
    """The texts of a checked column. Raises DamagedStore where they are too many bytes."""
    texts: list[str] = []
    taken, step = 0, max(1, _TEXT_BLOCK // dataset.dtype.itemsize, (dataset.chunks or (1,))[0])
    for start in range(0, len(dataset), step):
        block = [text.decode() for text in dataset[start : start + step].tolist()]
        taken += sum(map(len, block))
        _check_bytes(path, dataset, taken)
        texts += block
    return texts


def _check_items(source: StoreFile) -> None:
    """The index must lead into the arrays, and the items must be those of the index."""
    starts, lengths, units = source.row_starts, source.n_tokens.astype(np.int64), source.units.astype(np.int64)
    ends, firsts = starts + lengths, units * source.geometry.unit_rows
    names = source.items.names
    if not names:
        raise _damaged(source.path, "it has no items")
    if len(set(names)) != len(names):
        raise _damaged(source.path, "an item name occurs twice in its item table")
    wrong = (lengths < 0) | (units < 0) | (units >= source.geometry.units)
    wrong |= (starts < firsts) | (ends > firsts + source.geometry.unit_rows)
    wrong[1:] |= (starts[1:] < ends[:-1]) | (units[1:] < units[:-1])
    if wrong.any():
        name = names[int(np.argmax(wrong))]
        raise _damaged(source.path, f"the index of item {name!r} leads out of its unit, or into another item's rows")
    pooled = RowContent.of(source.provenance).pooled
    if pooled and (lengths != len(pooled)).any():
        name = names[int(np.argmax(lengths != len(pooled)))]
        raise _damaged(source.path, f"item {name!r} does not have one row for each of {len(pooled)} poolings")
    if not np.isin(source.status, list(ITEM_STATUS.values())).all():
        raise _damaged(source.path, "its index has a status that is neither whole nor truncated")
    if source.prefixes is not None and (problem := source.prefixes.problem(source.n_tokens)):
        raise _damaged(source.path, problem)
    with reading(source.path, "'tokens/roles'"):
        roles = source.arrays["tokens/roles"]
        for unit in range(source.geometry.units):
            first = unit * source.geometry.unit_rows
            if roles[first : first + source.geometry.unit_rows].max() > max(TOKEN_ROLES.values()):
                raise _damaged(source.path, f"a token of unit {unit} has an unknown role")


def _check_model(source: StoreFile) -> None:
    """The model's arrays must be what their own attributes say, and the probe rows must be tokens."""
    _check_probe_rows(source)
    with_dtype = [name for name in source.arrays if name in ("lm_head/weight", PROBE_LOGITS) or "probe/layers/" in name]
    for name in with_dtype:
        array = source.arrays[name]
        with reading(source.path, f"{name!r}"):
            stated = read_attributes(array).get("logical_dtype")
        if stated not in STORAGE_DTYPES or storage_dtype(stated) != array.dtype:
            raise _damaged(source.path, f"{name!r} is {array.dtype} and says to hold {stated!r}")
    if not RowContent.of(source.provenance).has_lm_head:
        return
    holder = LM_HEAD_NAMED_IN[source.encoding]
    with reading(source.path, f"{holder!r}"):
        head = read_attributes(source.arrays[holder]).get("lm_head_sha256")
        found = _sha256(source.arrays[holder]) if holder == "lm_head/weight" else head
    if head is None or found != head:
        raise _damaged(source.path, f"{holder!r} does not name its language-model head, or is not the one it names")


def _check_probe_rows(source: StoreFile) -> None:
    probed = [name for name in source.arrays if name.startswith("probe/") and name != PROBE_ROWS]
    if PROBE_ROWS not in source.arrays:
        if probed:
            raise _damaged(source.path, f"it has {probed[0]} and no {PROBE_ROWS}")
        return
    with reading(source.path, "its probe"):
        rows = np.asarray(source.arrays[PROBE_ROWS][...])
    items = np.searchsorted(source.row_starts, rows, side="right") - 1
    ends = source.row_starts + source.n_tokens
    lengths = {len(source.arrays[name]) for name in probed}
    if lengths - {len(rows)} or (items < 0).any() or (rows >= ends[items]).any():
        raise _damaged(source.path, "its probe rows are not tokens, or not as many as its probe logits")


def _sha256(dataset: h5py.Dataset) -> str:
    digest = hashlib.sha256()
    step = dataset.chunks[0] if dataset.chunks else 1
    for start in range(0, len(dataset), step):
        digest.update(np.ascontiguousarray(dataset[start : start + step]).data)
    return digest.hexdigest()
