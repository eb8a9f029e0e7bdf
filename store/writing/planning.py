"""Plan: everything of a store but what the model computes, written before the first unit is computed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    files_below,
    read_json,
    sync_file,
    write_text_atomically,
)
from agiqa.store.format.arrays import (
    Geometry,
    WritableArrays,
    choose_geometry,
    create_features,
    create_kept_logits,
    create_token_array,
    create_whole_array,
    rows_dtype,
)
from agiqa.store.format.items import Items, write_items
from agiqa.store.format.layout import FORMAT, ITEM_STATUS, VERSION, StoreLayout
from agiqa.store.format.manifest import attributes_sha256
from agiqa.store.format.metadata import store_id

_SHAPE = ("encoding", "logical_dtype", "width", "kept_logits")
"""The settings of a plan that decide the shape of the features."""


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """The content of a store that is known before any feature is computed."""

    encoding: str
    """One of ENCODINGS."""
    logical_dtype: str
    """The dtype of rows as they are read; `int8` rows are stored as int8."""
    width: int
    """Values per token, see `Geometry.width`."""
    provenance: Mapping[str, Any]
    items: Items
    token_ids: Sequence[NDArray[np.int32]]
    """Per item, (tokens,)."""
    roles: Sequence[NDArray[np.uint8]]
    """Per item, (tokens,), values of TOKEN_ROLES."""
    item_keys: Sequence[bytes]
    """Per item, the 32 bytes of FORMAT.md, section 6."""
    truncated: Sequence[bool]
    kept_logits: int | None = None
    """Vocabulary V, if the raw logits are kept beside hidden states."""
    label_table: Path | None = None
    """The file of the labels, for messages."""
    breaks: Sequence[int] = ()
    """Positions of items that begin a unit: the first of those that a finished store did not have yet."""

    def __post_init__(self) -> None:
        """Raises DataError without items, and ConfigError for raw logits beside another encoding than `hidden`."""
        if not len(self.items):
            message = "There are no items, so there is nothing to store."
            raise DataError(message)
        if self.kept_logits is not None and self.encoding != "hidden":
            message = f"Raw logits are kept beside hidden states only, not beside {self.encoding!r}."
            raise ConfigError(message)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored rows."""
        return rows_dtype(self.encoding, self.logical_dtype)

    def full_provenance(self) -> dict[str, Any]:
        """The provenance of the store, with the shape of the features; its hash is the store id."""
        shape = {name: getattr(self, name) for name in _SHAPE}
        return {**self.provenance, **{name: value for name, value in shape.items() if value is not None}}


def without_shape(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The `provenance` of a plan whose `full_provenance` this is."""
    return {name: value for name, value in provenance.items() if name not in _SHAPE}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Unit and first row of each item, both (items,)."""

    geometry: Geometry
    units: NDArray[np.int32]
    row_starts: NDArray[np.int64]


def place_items(n_tokens: NDArray[np.int32], geometry: Geometry, breaks: Collection[int] = ()) -> Placement:
    """Place items into units in their own order; no item crosses a unit. Sets the number of units.

    The items at the positions `breaks` begin a unit, unless all before them are empty.
    """
    units = np.zeros(len(n_tokens), np.int32)
    starts = np.zeros(len(n_tokens), np.int64)
    unit, used = 0, 0
    for position, length in enumerate(n_tokens.tolist()):
        if used + length > geometry.unit_rows or (used and position in breaks):
            unit, used = unit + 1, 0
        units[position] = unit
        starts[position] = unit * geometry.unit_rows + used
        used += length
    return Placement(geometry=replace(geometry, units=unit + 1), units=units, row_starts=starts)


def write_plan(layout: StoreLayout, plan: StorePlan) -> None:
    """Write the store of `plan` to the new folder of `layout`, and its commit record last."""
    n_tokens = np.array([len(ids) for ids in plan.token_ids], np.int32)
    total, longest = int(n_tokens.sum()), int(n_tokens.max(initial=0))
    unit = choose_geometry(total_rows=total, longest=longest, width=plan.width, itemsize=plan.dtype.itemsize)
    placement = place_items(n_tokens, unit, frozenset(plan.breaks))
    geometry = placement.geometry
    group = zarr.create_group(store=WritableArrays(layout.zarr), attributes=_attributes(plan, geometry))
    create_features(group, geometry, dtype=plan.dtype, logical_dtype=plan.logical_dtype)
    if plan.kept_logits is not None:
        create_kept_logits(group, geometry, vocabulary=plan.kept_logits, logical_dtype=plan.logical_dtype)
    if plan.encoding == "int8":
        create_token_array(group, "tokens/scale", geometry, "float32")
    _write_tokens(group, plan, placement)
    index: dict[str, np.ndarray[Any, Any]] = {
        "row_start": placement.row_starts,
        "n_tokens": n_tokens,
        "unit": placement.units,
        "item_key": np.frombuffer(b"".join(plan.item_keys), np.uint8).reshape(len(n_tokens), -1),
        "status": np.array([ITEM_STATUS["truncated" if cut else "whole"] for cut in plan.truncated], np.uint8),
    }
    for name, values in index.items():
        create_whole_array(group, f"index/{name}", values)
    write_items(layout.items, plan.items)
    layout.commits.mkdir()
    root_metadata = layout.zarr / "zarr.json"  # the seal rewrites it, so the record has only its attributes
    files = files_below(layout.zarr)
    for path in files:
        sync_file(path)
    objects = [describe_object(layout.root, path) for path in files if path != root_metadata]
    attributes = attributes_sha256(read_json(root_metadata)["attributes"])
    record = {"objects": objects, "labels": describe_object(layout.root, layout.items), "attributes": attributes}
    write_text_atomically(layout.plan_commit, canonical_json(record))


def _attributes(plan: StorePlan, geometry: Geometry) -> dict[str, Any]:
    provenance = plan.full_provenance()
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": store_id(provenance),
        "encoding": plan.encoding,
        "logical_dtype": plan.logical_dtype,
        "units": geometry.units,
        "unit_rows": geometry.unit_rows,
        "chunk_rows": geometry.chunk_rows,
        "width": geometry.width,
        "provenance": provenance,
    }


def _write_tokens(group: zarr.Group, plan: StorePlan, placement: Placement) -> None:
    geometry = placement.geometry
    per_token: dict[str, tuple[Sequence[NDArray[Any]], str]] = {
        "ids": (plan.token_ids, "int32"),
        "roles": (plan.roles, "uint8"),
    }
    for name, (per_item, dtype) in per_token.items():
        array = create_token_array(group, f"tokens/{name}", geometry, dtype)
        for unit in range(geometry.units):
            block = np.zeros(geometry.unit_rows, dtype)
            for position in np.flatnonzero(placement.units == unit).tolist():
                start = int(placement.row_starts[position]) - unit * geometry.unit_rows
                values = per_item[position]
                block[start : start + len(values)] = values
            first = unit * geometry.unit_rows
            array[first : first + geometry.unit_rows] = block
