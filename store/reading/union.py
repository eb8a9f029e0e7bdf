"""Several stores read as one, such as the data sets of a joint training. Nothing is copied."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.artefacts import Basis
from agiqa.store.format.items import Items
from agiqa.store.format.labels import JoinedColumn, MosRange, ScaledColumn, convert_deviations, join_columns
from agiqa.store.reading.by_name import ByName
from agiqa.store.reading.joining import (
    differences_in_making,
    require_no_item_twice,
    require_same_layer,
    require_same_meaning,
)
from agiqa.store.reading.layers import JoinedLayers, LayerSource, StoredLayer, known_layers
from agiqa.store.reading.store import AnyStore
from agiqa.store.reading.token_rows import TokenRows, item_positions


class StoreUnion(ByName):
    """The items of several stores, one store after the other; see `union`.

    Has the members of a store that training and scoring use.
    """

    def __init__(self, stores: Sequence[AnyStore]) -> None:
        """Check that `stores` can be read as one. Raises as `union`."""
        if not stores:
            message = "A union needs at least one store."
            raise ConfigError(message)
        self.stores = tuple(stores)
        first = self.stores[0]
        for other in self.stores[1:]:
            require_same_meaning(first, other)
        require_no_item_twice(self.stores)
        self._scaled = _on_one_scale(self.stores)
        self.id = hashlib.sha256(canonical_json([store.id for store in stores]).encode()).hexdigest()
        """sha256 of the canonical JSON of the list of the stores' ids, in their order."""
        self.encoding = first.encoding
        self.logical_dtype = first.logical_dtype
        self.width = first.width
        self._first_items = np.cumsum([0, *(len(store.n_tokens) for store in self.stores)])

    def variant(self, name: str) -> "StoreUnion":
        """The union of all stores read as the variant `name`, see `Store.variant`."""
        return StoreUnion([store.variant(name) for store in self.stores])

    @property
    def path(self) -> Path:
        """A path for messages, which does not exist: the stores' names joined by `+`, beside the first store."""
        return self.stores[0].path.with_name("+".join(store.path.name for store in self.stores))

    @property
    def location(self) -> str:
        """The path or URL of each store, joined by plus signs."""
        return " + ".join(store.location for store in self.stores)

    @property
    def content(self) -> str:
        """Hex sha256 of the `content` of all stores, in their order."""
        return hashlib.sha256(canonical_json([store.content for store in self.stores]).encode()).hexdigest()

    @property
    def provenance(self) -> dict[str, Any]:
        """The top-level entries that all stores share, and `union`, the list of their ids."""
        first, *others = (store.provenance for store in self.stores)
        shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
        return {**shared, "union": [store.id for store in self.stores]}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """Notes on stores that were made with another model or conversation than the first."""
        first, *others = self.stores
        return tuple(
            f"{first.path} and {other.path} differ in {', '.join(found)}"
            for other in others
            if (found := differences_in_making(first.provenance, other.provenance))
        )

    @property
    def scale_notes(self) -> tuple[str, ...]:
        """Notes on MOS that are converted to another scale, and on unknown scales."""
        return tuple(note for column in self._scaled.values() for note in column.notes)

    @property
    def parts(self) -> tuple[tuple[AnyStore, NDArray[np.int64]], ...]:
        """Each store, and the positions of its items in the union."""
        bounds = zip(self._first_items[:-1].tolist(), self._first_items[1:].tolist(), strict=True)
        return tuple((store, np.arange(*ends)) for store, ends in zip(self.stores, bounds, strict=True))

    @property
    def items(self) -> Items:
        """The items of all stores. Two stores may have the same name.

        The MOS of an aspect are on the scale of the first store that records one, and NaN in a store without them.
        """
        return self._items  # pyright finds no cached_property that satisfies the property of a protocol

    @cached_property
    def _items(self) -> Items:
        tables = [store.items for store in self.stores]
        return Items(
            names=[name for table in tables for name in table.names],
            prompts=[prompt for table in tables for prompt in table.prompts],
            splits=[split for table in tables for split in table.splits],
            generators=[generator for table in tables for generator in table.generators],
            descriptions=[description for table in tables for description in table.descriptions],
            text_authors=[author for table in tables for author in table.text_authors or [None] * len(table)],
            labels={aspect: column.values for aspect, column in self._scaled.items()},
            mos_ranges={aspect: column.scale for aspect, column in self._scaled.items() if column.scale is not None},
            deviations=_joined_deviations(tables, {aspect: column.scale for aspect, column in self._scaled.items()}),
            counts=_joined_counts(tables),
        )

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Tokens per item, (items,)."""
        return self._n_tokens

    @cached_property
    def _n_tokens(self) -> NDArray[np.int32]:
        return np.concatenate([store.n_tokens for store in self.stores])

    @property
    def lm_head_sha256(self) -> str:
        """The language-model head of the features, the same in all stores."""
        return self.stores[0].lm_head_sha256

    def lm_head(self) -> NDArray[np.float32]:
        """The language-model head W_lm, (V, D) float32. Raises ViewRefused if the stores have none."""
        return self.stores[0].lm_head()

    def basis(self) -> Basis:
        """The basis of sketches, the same in all stores. Raises ViewRefused for other encodings."""
        return self.stores[0].basis()

    def layer_basis(self, layer: str) -> Basis:
        """The basis of a layer of sketches, the same in all stores. Raises ViewRefused for other encodings."""
        return self.stores[0].layer_basis(layer)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that all stores have, ascending."""
        shared = set(self.stores[0].layers).intersection(*(store.layers for store in self.stores))
        return tuple(layer for layer in self.stores[0].layers if layer in shared)

    @property
    def layer_name(self) -> str:
        """The layer that `read` gives."""
        return self.stores[0].layer_name

    @property
    def layer_count(self) -> int | None:
        """Number of blocks of the model, where the first store records it."""
        return self.stores[0].layer_count

    @property
    def pooled(self) -> tuple[str, ...]:
        """The pooling of each row of an item, the same in all stores; `()` where rows are tokens."""
        return self.stores[0].pooled

    @property
    def tap(self) -> str | None:
        """Where in the model the rows come from, the same in all stores; None for the language model."""
        return self.stores[0].tap

    def layer_shape(self, layer: str) -> tuple[int, str]:
        """Values per row and logical dtype of a layer that all stores have."""
        return self.stores[0].layer_shape(layer)

    def layer(self, name: str) -> LayerSource:
        """A layer of all stores, or several joined, as `Store.layer`.

        Raises also SchemaError and HeadError where its width, dtype or basis differ between the stores.
        """
        names = known_layers(self, name)
        for other in self.stores[1:]:
            for layer in names:
                require_same_layer(self.stores[0], other, layer)
        if names == [self.layer_name]:
            return self
        return _UnionJoinedLayers(self, names) if len(names) > 1 else _UnionLayer(self, names[0])

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions in the union), in that order. Raises as `Store.read`."""
        return self.read_layer(items, self.layer_name)

    def read_layer(self, items: Sequence[int] | NDArray[Any], layer: str) -> TokenRows:
        """As `read`, of a layer that all stores have."""
        wanted = item_positions(items, count=int(self._first_items[-1]), where=self.location)
        owners = np.searchsorted(self._first_items, wanted, side="right") - 1
        asked = np.unique(owners).tolist()
        if len(asked) <= 1:
            owner = asked[0] if asked else 0
            return self.stores[owner].read_layer(wanted - self._first_items[owner], layer)
        offsets = np.concatenate([[0], np.cumsum(self.n_tokens[wanted], dtype=np.int64)])
        rows: NDArray[Any] = np.empty(0)
        roles = np.empty(int(offsets[-1]), np.uint8)
        for turn, owner in enumerate(asked):
            places = np.flatnonzero(owners == owner)
            block = self.stores[owner].read_layer(wanted[places] - self._first_items[owner], layer)
            if turn == 0:
                rows = np.empty((int(offsets[-1]), *block.rows.shape[1:]), block.rows.dtype)
            for number, place in enumerate(places.tolist()):
                source = slice(int(block.offsets[number]), int(block.offsets[number + 1]))
                target = slice(int(offsets[place]), int(offsets[place + 1]))
                rows[target], roles[target] = block.rows[source], block.roles[source]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=self.layer_shape(layer)[1])

    def tokens(self, items: Sequence[int] | NDArray[Any]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """The token ids and the roles of each of `items` (positions in the union). Raises as `Store.read`."""
        wanted = item_positions(items, count=int(self._first_items[-1]), where=self.location)
        owners = np.searchsorted(self._first_items, wanted, side="right") - 1
        found: dict[int, tuple[NDArray[np.int32], NDArray[np.uint8]]] = {}
        for owner in np.unique(owners).tolist():
            of_store = wanted[owners == owner]
            tokens = self.stores[owner].tokens(of_store - self._first_items[owner])
            found |= dict(zip(of_store.tolist(), tokens, strict=True))
        return [found[item] for item in wanted.tolist()]


class _OfUnion:
    """What training and reports ask of several stores read as one, for some of their layers."""

    union: StoreUnion
    layer: str

    @property
    def notes(self) -> tuple[str, ...]:
        """Those of the union."""
        return self.union.notes

    @property
    def scale_notes(self) -> tuple[str, ...]:
        """Those of the union."""
        return self.union.scale_notes

    @property
    def parts(self) -> tuple[tuple[LayerSource, NDArray[np.int64]], ...]:
        """The layer of each store, and the positions of its items in the union."""
        return tuple((store.layer(self.layer), items) for store, items in self.union.parts)


class _UnionLayer(StoredLayer, _OfUnion):
    """A layer of several stores read as one."""

    def __init__(self, union: StoreUnion, layer: str) -> None:
        super().__init__(union, layer)
        self.union = union


class _UnionJoinedLayers(JoinedLayers, _OfUnion):
    """Several layers of several stores read as one."""

    def __init__(self, union: StoreUnion, layers: Sequence[str]) -> None:
        super().__init__(union, layers)
        self.union = union


def union(stores: Sequence[AnyStore]) -> StoreUnion:
    """Read `stores` as one, their items one store after the other.

    Raises SchemaError if encoding, dtype or width differ; HeadError if W_lm or the basis of sketches differ; DataError
    for items that occur in two stores, and for MOS on unknown scales that cannot be the same; ConfigError without a
    store.
    """
    return StoreUnion(stores)


def _joined_deviations(
    tables: Sequence[Items], scales: Mapping[str, MosRange | None]
) -> dict[str, NDArray[np.float64]]:
    """The standard deviations of each aspect of all `tables`, on the scale that the MOS have in the union."""
    found: dict[str, NDArray[np.float64]] = {}
    for aspect in sorted({aspect for table in tables for aspect in table.deviations}):
        columns: list[NDArray[np.float64]] = []
        for table in tables:
            own, scale = table.mos_ranges.get(aspect), scales.get(aspect)
            values = np.asarray(table.deviations.get(aspect, np.full(len(table), np.nan)), np.float64)
            columns.append(values if own is None or scale is None else convert_deviations(values, own, scale))
        found[aspect] = np.concatenate(columns)
    return found


def _joined_counts(tables: Sequence[Items]) -> dict[str, NDArray[np.float64]]:
    """The counts of each level of all `tables`."""
    return {
        level: np.concatenate([table.counts.get(level, np.full(len(table), np.nan)) for table in tables])
        for level in sorted({level for table in tables for level in table.counts})
    }


def _on_one_scale(stores: Sequence[AnyStore]) -> dict[str, JoinedColumn]:
    """The MOS of each aspect of all stores. Raises as `join_columns`."""
    aspects = sorted({aspect for store in stores for aspect in store.items.labels})
    return {
        aspect: join_columns(
            aspect,
            [
                ScaledColumn(
                    where=store.location,
                    values=np.asarray(store.items.labels.get(aspect, np.full(len(store.items), np.nan)), np.float64),
                    scale=store.items.mos_ranges.get(aspect),
                )
                for store in stores
            ],
        )
        for aspect in aspects
    }
