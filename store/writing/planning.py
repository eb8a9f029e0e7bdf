"""Plan: everything of a store but what the model computes, written before the first unit is computed."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from agiqa.store.format.layers import LAST, RECORDED, RowContent, layer_array, token_scale_array
from agiqa.store.format.layout import FORMAT, ITEM_STATUS, StoreLayout
from agiqa.store.format.manifest import attributes_sha256
from agiqa.store.format.metadata import store_id
from agiqa.store.format.prefixes import PREFIXES, Prefixes

_SHAPE = ("encoding", "logical_dtype", "width", "kept_logits")
"""The settings of a plan that decide the shape of the features, beside what `RowContent` records."""


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
    layers: Sequence[str] = (LAST,)
    """Names, ascending, `last` at the end; `features` holds the last of them."""
    layer_widths: Mapping[str, int] = field(default_factory=dict[str, int])
    """Values per row of other layers; those left out have `width`."""
    layer_dtypes: Mapping[str, str] = field(default_factory=dict[str, str])
    """Logical dtypes of other layers; those left out have `logical_dtype`."""
    layer_count: int | None = None
    """Number of blocks of the model, so that readers find layer `-2`; recorded with layers, pooled rows or a tap."""
    pooled: Sequence[str] = ()
    """POOLING or POOLING@ROLE of each row of an item; empty where rows are tokens."""
    tap: str | None = None
    """Where in the model the rows come from, if not from the language model: `vision:12`, `projector`, `timm`."""
    prefixes: Prefixes | None = None
    """The shorter conversations as which the store can be read."""

    def __post_init__(self) -> None:
        """Raises DataError without items, and for an item whose rows are not one per pooling.

        Raises ConfigError for wrong names, and for raw logits beside another encoding than `hidden`, of pooled rows, or
        without W_lm.
        """
        if not len(self.items):
            message = "There are no items, so there is nothing to store."
            raise DataError(message)
        if self.kept_logits is not None and self.encoding != "hidden":
            message = f"Raw logits are kept beside hidden states only, not beside {self.encoding!r}."
            raise ConfigError(message)
        self._check_content()

    def _check_content(self) -> None:
        content = self.content
        if problem := content.problem():
            message = f"No store can be planned so: {problem}."
            raise ConfigError(message)
        if not content.has_lm_head and (self.encoding == "logits" or self.kept_logits is not None):
            message = f"Logits are those of the layer {LAST!r} of a language model, and {_told(content)}."
            raise ConfigError(message)
        if content.pooled and self.kept_logits is not None:
            message = "Raw logits are kept per token, and this store has pooled rows. Leave out one of the two."
            raise ConfigError(message)
        if self.prefixes is not None and (content.pooled or content.tap is not None):
            message = "Shorter conversations are the first rows of items, and this store's rows are not tokens."
            raise ConfigError(message)
        for name, ids in zip(self.items.names, self.token_ids, strict=False):  # `require_extended` asks for fewer items
            if content.pooled and len(ids) != len(content.pooled):
                message = (
                    f"item {name!r} has {len(ids)} rows, and one per pooling was expected: {', '.join(content.pooled)}."
                )
                raise DataError(message)

    @property
    def content(self) -> RowContent:
        """What the rows are."""
        others = self.layers[:-1]
        widths = {name: width for name, width in self.layer_widths.items() if width != self.width or name not in others}
        dtypes = {
            name: dtype
            for name, dtype in self.layer_dtypes.items()
            if dtype != self.logical_dtype or name not in others
        }
        return RowContent(
            layers=tuple(self.layers),
            layer_widths=widths,
            layer_dtypes=dtypes,
            layer_count=self.layer_count,
            pooled=tuple(self.pooled),
            tap=self.tap,
        )

    def layer_shape(self, layer: str) -> tuple[int, str]:
        """Values per row and logical dtype of another layer."""
        return self.layer_widths.get(layer, self.width), self.layer_dtypes.get(layer, self.logical_dtype)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored rows."""
        return rows_dtype(self.encoding, self.logical_dtype)

    def full_provenance(self) -> dict[str, Any]:
        """The provenance of the store, with the shape of the features and the views; its hash is the store id."""
        shape = {name: getattr(self, name) for name in _SHAPE} | self.content.recorded()
        views = {} if self.prefixes is None else {PREFIXES: list(self.prefixes.names)}
        return {**self.provenance, **views, **{name: value for name, value in shape.items() if value is not None}}


def without_shape(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The `provenance` of a plan whose `full_provenance` this is."""
    return {name: value for name, value in provenance.items() if name not in (*_SHAPE, *RECORDED)}


def content_fields(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a plan that tell what rows are, as `provenance` records them."""
    content = RowContent.of(provenance)
    return {name: getattr(content, name) for name in RECORDED}


def _told(content: RowContent) -> str:
    return f"this one holds {content.tap}" if content.tap is not None else f"its last layer is {content.layers[-1]}"


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
    unit = choose_geometry(
        total_rows=total,
        longest=longest,
        width=plan.width,
        itemsize=plan.dtype.itemsize,
        other_bytes=sum(width * dtype.itemsize for width, dtype in _other_layers(plan).values()),
    )
    placement = place_items(n_tokens, unit, frozenset(plan.breaks))
    geometry = placement.geometry
    group = zarr.create_group(store=WritableArrays(layout.zarr), attributes=_attributes(plan, geometry))
    create_features(group, geometry, dtype=plan.dtype, logical_dtype=plan.logical_dtype)
    if plan.kept_logits is not None:
        create_kept_logits(group, geometry, vocabulary=plan.kept_logits, logical_dtype=plan.logical_dtype)
    if plan.encoding == "int8":
        create_token_array(group, token_scale_array(None), geometry, "float32")
    _create_layers(group, plan, geometry)
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
    for name, values in ({} if plan.prefixes is None else plan.prefixes.arrays()).items():
        create_whole_array(group, name, values)
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


def _other_layers(plan: StorePlan) -> dict[str, tuple[int, np.dtype[Any]]]:
    """Values per row and NumPy dtype of the other layers."""
    shapes = {layer: plan.layer_shape(layer) for layer in plan.content.others}
    return {layer: (width, rows_dtype(plan.encoding, dtype)) for layer, (width, dtype) in shapes.items()}


def _create_layers(group: zarr.Group, plan: StorePlan, geometry: Geometry) -> None:
    for layer, (width, dtype) in _other_layers(plan).items():
        _, logical_dtype = plan.layer_shape(layer)
        shape, name = replace(geometry, width=width), layer_array(layer)
        create_features(group, shape, dtype=dtype, logical_dtype=logical_dtype, name=name)
        if plan.encoding == "int8":
            create_token_array(group, token_scale_array(layer), geometry, "float32")


def _attributes(plan: StorePlan, geometry: Geometry) -> dict[str, Any]:
    provenance = plan.full_provenance()
    return {
        "format": FORMAT,
        "version": plan.content.version,
        "id": store_id(provenance),
        "encoding": plan.encoding,
        "logical_dtype": plan.logical_dtype,
        "units": geometry.units,
        "unit_rows": geometry.unit_rows,
        "chunk_rows": geometry.chunk_rows,
        "width": geometry.width,
        **plan.content.recorded(),
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
