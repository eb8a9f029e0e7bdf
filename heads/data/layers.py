"""Which features of a store a head reads: one layer or several joined, and of a store of pooled rows all or one.

A `Store` has layers, and pooled rows instead of tokens where it was extracted so (store/FORMAT.md). Other sources have
one layer, `last`, and tokens.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSource, ItemColumns, Joined, RowBlock, SketchBasis, content_of, location_of
from agiqa.store.disk.files import canonical_json

LAST = "last"
JOINER = "+"
MOST_SIDE_BY_SIDE = 5
"""Layers that a closed form reads by default."""


@runtime_checkable
class Layered(Protocol):
    """A FeatureSource with several layers to choose from, as stores have."""

    @property
    def layers(self) -> tuple[str, ...]: ...
    def layer(self, name: str, /) -> FeatureSource: ...


@runtime_checkable
class View(Protocol):
    """A FeatureSource that shows a part of another one."""

    @property
    def store(self) -> FeatureSource: ...


def base_of(source: FeatureSource) -> FeatureSource:
    """The store that `source` shows a layer or a pooled row of; `source` itself where it is no view."""
    return base_of(source.store) if isinstance(source, View) else source


def joined_stores(source: FeatureSource) -> Joined | None:
    """The stores that `source` reads as one; None for a single store."""
    base = base_of(source)
    return base if isinstance(base, Joined) else None


def provenance_of(source: FeatureSource) -> Mapping[str, Any]:
    """What made the features; empty for a source that does not record it."""
    provenance: Mapping[str, Any] = getattr(base_of(source), "provenance", {})
    return provenance


def layer_of(source: FeatureSource) -> str:
    """The name of the layer that `source` holds, such as `8`, or of those that it joins, as in `8+16+last`."""
    name: str = getattr(source, "layer_name", LAST)
    return name


def stored_layers(source: FeatureSource) -> tuple[str, ...]:
    """The names of all layers that `source` has, ascending."""
    return source.layers if isinstance(source, Layered) else (layer_of(source),)


def spread_layers(*stored: Sequence[str]) -> str:
    """Up to MOST_SIDE_BY_SIDE layers that are in all `stored`, evenly spaced up to the last one, as in `8+16+last`."""
    shared = [name for name in stored[0] if all(name in names for names in stored)]
    count = min(MOST_SIDE_BY_SIDE, len(shared))
    places = (
        [round((len(shared) - 1) * k / count) for k in range(1, count + 1)] if len(shared) > count else range(count)
    )
    return JOINER.join(shared[place] for place in places)


def tap_of(source: FeatureSource) -> str | None:
    """Where in the model the features were taken, such as `vision:12`; None for states of the language model."""
    tap: str | None = getattr(base_of(source), "tap", None)
    return tap


def pooled_rows(source: FeatureSource) -> tuple[str, ...]:
    """The poolings of the rows of every item, such as `mean@answer`; empty where rows are tokens."""
    pooled: Sequence[str] = getattr(source, "pooled", ())
    return tuple(pooled)


def read_layer(source: FeatureSource, layer: str | None) -> FeatureSource:
    """`source` with the rows of `layer`, or of several as in `8+16+last`; None is the layer that it shows by itself.

    Raises UnknownName for a layer that it lacks, and HeadError for a view of another layer.
    """
    if layer is None:
        return source
    if isinstance(source, PooledRow):
        inner = read_layer(source.store, layer)
        return source if inner is source.store else PooledRow(store=inner, pooling=source.pooling, number=source.number)
    if isinstance(source, View):
        wanted = layer_of(read_layer(source.store, layer))
        if wanted != layer_of(source):
            message = (
                f"Layer {wanted} of {location_of(source)} is asked for, and the source is its layer {layer_of(source)}."
            )
            raise HeadError(message)
        return source
    if isinstance(source, Layered):
        return source.layer(layer)
    if layer not in (LAST, "-1"):
        message = f"{location_of(source)} has the last layer only, and layer {layer!r} is asked for."
        raise HeadError(message)
    return source


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """One row per item."""

    rows: NDArray[Any]
    roles: NDArray[np.uint8]
    offsets: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PooledRow:
    """One of the pooled rows of each item of a store, as items of a single token."""

    store: FeatureSource
    """A store of pooled rows, or one of its layers."""
    pooling: str
    number: int
    """Of the row in each item."""

    @classmethod
    def of(cls, source: FeatureSource, pooling: str) -> "PooledRow":
        """The row of this name, which is among `pooled_rows(source)`."""
        if isinstance(source, PooledRow):
            return source
        return cls(store=source, pooling=pooling, number=pooled_rows(source).index(pooling))

    @property
    def id(self) -> str:
        """sha256 of the canonical JSON of the id of the store, or layer, and the pooling."""
        return self._hash(self.store.id)

    @property
    def content(self) -> str:
        """As `id`, of the hash of the bytes."""
        return self._hash(content_of(self.store))

    def _hash(self, of_store: str) -> str:
        return hashlib.sha256(canonical_json([of_store, self.pooling]).encode()).hexdigest()

    @property
    def encoding(self) -> str:
        """That of the store, as are those below."""
        return self.store.encoding

    @property
    def logical_dtype(self) -> str:
        """Of the rows."""
        return self.store.logical_dtype

    @property
    def width(self) -> int:
        """Channels."""
        return self.store.width

    @property
    def items(self) -> ItemColumns:
        """All items."""
        return self.store.items

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """1 for each item, (items,)."""
        return np.ones_like(self.store.n_tokens)

    @property
    def layer_name(self) -> str:
        """That of the store, or layer."""
        return layer_of(self.store)

    @property
    def pooled(self) -> tuple[str, ...]:
        """The name of the row alone."""
        return (self.pooling,)

    @property
    def lm_head_sha256(self) -> str:
        """Of the store."""
        return self.store.lm_head_sha256

    @property
    def location(self) -> str:
        """Of the store."""
        return location_of(self.store)

    def lm_head(self) -> NDArray[np.float32]:
        """W_lm of the store. Raises ViewRefused without one."""
        return self.store.lm_head()

    def basis(self) -> SketchBasis:
        """The basis of a sketch. Raises ViewRefused for other encodings."""
        return self.store.basis()

    def read(self, items: Sequence[int] | NDArray[Any], /) -> RowBlock:
        """The row of each of `items`, in their order. Raises as the store."""
        block = self.store.read(items)
        places = block.offsets[:-1] + self.number
        return _Rows(rows=block.rows[places], roles=block.roles[places], offsets=np.arange(len(places) + 1))
