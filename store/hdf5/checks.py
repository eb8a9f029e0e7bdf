"""What an HDF5 file must be before a store is made of it: whole, of this version, and true to itself."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from h5py import h5l  # pyright: ignore[reportAttributeAccessIssue]  # a compiled module without stubs
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, SchemaError
from agiqa.store.format.arrays import STORAGE_DTYPES, Geometry, storage_dtype
from agiqa.store.format.items import Items
from agiqa.store.format.layout import ITEM_STATUS, LM_HEAD_NAMED_IN, TOKEN_ROLES
from agiqa.store.format.metadata import array_forms, check_attributes, damaged, form_problem
from agiqa.store.hdf5.common import (
    METADATA_SHA256,
    metadata_sha256,
    read_attributes,
    read_items,
    require_filters,
)
from agiqa.store.hdf5.files import reading
from agiqa.store.hdf5.limits import REMEDY, check_size


@dataclass(frozen=True, kw_only=True)
class StoreFile:
    """An HDF5 file that passed all checks but those of its rows, and what was read of it."""

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


def check_store_file(path: Path, file: h5py.File) -> StoreFile:
    """Read and check all of `file`, at `path`, but the rows of units.

    Raises SchemaError for datasets and groups that lie elsewhere (links, external storage, virtual datasets) before any
    value is read, for a foreign version, missing, unknown or wrongly shaped arrays, and filters that are not here;
    DamagedStore for damaged bytes and for parts that contradict each other.
    """
    with reading(path, "its structure"):
        _refuse_what_leads_elsewhere(path, file)
    with reading(path, "its attributes"):
        attributes = read_attributes(file)
    geometry = check_attributes(path, attributes, remedy=REMEDY)
    with reading(path, "its attributes"):
        if attributes.get(METADATA_SHA256) != metadata_sha256(file):
            raise _damaged(path, "its attributes are not those that metadata_sha256 names")
        arrays = _arrays(file)
    source = _read(path, file, attributes, geometry, arrays)
    _check_items(source)
    _check_model(source)
    return source


def _refuse_what_leads_elsewhere(path: Path, file: h5py.File) -> None:
    """Raise SchemaError, naming it, for what has its values from another file or from another place of this one.

    HDF5 would follow it into any file that this user may read, and these values would become those of a store.
    """
    links: list[tuple[bytes, int]] = []
    file.id.links.visit(lambda name, link: links.append((name, link.type)), info=True)
    for name, kind in links:
        if problem := _elsewhere(file, name, kind):
            shown = "/" + name.decode(errors="replace")
            message = (
                f"{path}: {shown!r} {problem}, so its values lie elsewhere; nothing of it was read. "
                "A store is imported only from a file that holds all of it: export it again."
            )
            raise SchemaError(message)


def _elsewhere(file: h5py.File, name: bytes, kind: int) -> str | None:
    """In what way the link `name` of this `kind` does not lead to values in their own place; None where it does."""
    if kind != h5l.TYPE_HARD:
        soft, external = h5l.TYPE_SOFT, h5l.TYPE_EXTERNAL
        return {soft: "is a soft link", external: "is an external link"}.get(kind, "is a link of an unknown kind")
    node = file[name]
    if isinstance(node, h5py.Dataset) and node.is_virtual:
        return "is a virtual dataset"
    return "has external storage" if isinstance(node, h5py.Dataset) and node.external else None


def _arrays(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Every array of the store in `file`, by name; the item table is none."""
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, node: h5py.Group | h5py.Dataset) -> None:
        if isinstance(node, h5py.Dataset) and not name.startswith("items/"):
            found[name] = node

    file.visititems(visit)
    return dict(sorted(found.items()))


def _damaged(path: Path, problem: str) -> DamagedStore:
    return damaged(path, problem, remedy=REMEDY)


def _read(
    path: Path, file: h5py.File, attributes: dict[str, Any], geometry: Geometry, arrays: dict[str, h5py.Dataset]
) -> StoreFile:
    _check_arrays(path, attributes, geometry, arrays)
    with reading(path, "its index"):
        index = {name: np.asarray(array[...]) for name, array in arrays.items() if name.startswith("index/")}
    with reading(path, "its item table"):
        table = _item_table(path, file, rows=len(index["index/n_tokens"]))
    return StoreFile(
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
    )


def _item_table(path: Path, file: h5py.File, *, rows: int) -> Items:
    group = file["items"]
    if not isinstance(group, h5py.Group):
        message = "'items' is no group"
        raise KeyError(message)
    return read_items(path, group, rows=rows)


def _wanted(attributes: dict[str, Any]) -> set[str]:
    """Names of the arrays that a finished store with these attributes has."""
    of_encoding = {
        "hidden": {"lm_head/weight"},
        "int8": {"lm_head/weight", "tokens/scale", "scale/mean", "scale/rms"},
        "sketch": {"basis/map", "basis/q", "basis/mean", "basis/energy"},
        "logits": set[str](),
    }
    wanted = {"features", "tokens/ids", "tokens/roles", "probe/rows", "probe/logits"}
    wanted |= {f"index/{name}" for name in ("row_start", "n_tokens", "unit", "item_key", "status")}
    kept = {"logits"} if "kept_logits" in attributes["provenance"] else set[str]()
    return wanted | of_encoding[attributes["encoding"]] | kept


def _check_arrays(path: Path, attributes: dict[str, Any], geometry: Geometry, arrays: dict[str, h5py.Dataset]) -> None:
    wanted = _wanted(attributes)
    missing, unknown = sorted(wanted - set(arrays)), sorted(set(arrays) - wanted)
    if missing or unknown:
        what = (
            f"no array {', '.join(missing)}" if missing else f"arrays that this agiqa knows not: {', '.join(unknown)}"
        )
        message = f"{path} has {what}."
        raise SchemaError(message)
    items = arrays["index/n_tokens"].shape or (0,)
    forms = array_forms(geometry, attributes, items=items[0])
    for name, found in arrays.items():
        if problem := form_problem(name, found.shape or (), found.dtype, forms[name]):
            message = f"{path}: {problem}."
            raise SchemaError(message)
        require_filters(path, found)
        check_size(path, found)


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
    if not np.isin(source.status, list(ITEM_STATUS.values())).all():
        raise _damaged(source.path, "its index has a status that is neither whole nor truncated")
    with reading(source.path, "'tokens/roles'"):
        roles = source.arrays["tokens/roles"]
        for unit in range(source.geometry.units):
            first = unit * source.geometry.unit_rows
            if roles[first : first + source.geometry.unit_rows].max() > max(TOKEN_ROLES.values()):
                raise _damaged(source.path, f"a token of unit {unit} has an unknown role")


def _check_model(source: StoreFile) -> None:
    """The model's arrays must be what their own attributes say, and the probe rows must be tokens."""
    with reading(source.path, "its probe"):
        rows = np.asarray(source.arrays["probe/rows"][...])
    items = np.searchsorted(source.row_starts, rows, side="right") - 1
    ends = source.row_starts + source.n_tokens
    if len(rows) != len(source.arrays["probe/logits"]) or (items < 0).any() or (rows >= ends[items]).any():
        raise _damaged(source.path, "its probe rows are not tokens, or not as many as its probe logits")
    for name in ("probe/logits", "lm_head/weight"):
        if name in source.arrays:
            _check_bits(source.path, name, source.arrays[name])
    holder = LM_HEAD_NAMED_IN[source.encoding]
    with reading(source.path, f"{holder!r}"):
        stated = read_attributes(source.arrays[holder]).get("lm_head_sha256")
        found = _sha256(source.arrays[holder]) if holder == "lm_head/weight" else stated
    if stated is None or found != stated:
        raise _damaged(source.path, f"{holder!r} does not name its language-model head, or is not the one it names")


def _check_bits(path: Path, name: str, array: h5py.Dataset) -> None:
    with reading(path, f"{name!r}"):
        stated = read_attributes(array).get("logical_dtype")
    if stated not in STORAGE_DTYPES or storage_dtype(stated) != array.dtype:
        raise _damaged(path, f"{name!r} is {array.dtype} and says to hold {stated!r}")


def _sha256(dataset: h5py.Dataset) -> str:
    """Hex sha256 of the bits in row-major order, read a chunk of rows at a time."""
    digest = hashlib.sha256()
    step = dataset.chunks[0] if dataset.chunks else 1
    for start in range(0, len(dataset), step):
        digest.update(np.ascontiguousarray(dataset[start : start + step]).data)
    return digest.hexdigest()
