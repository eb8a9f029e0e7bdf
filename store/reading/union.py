"""Several stores read as one, such as the data sets of a joint training. Nothing is copied."""

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError, HeadError, SchemaError
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.artefacts import Basis
from agiqa.store.format.items import Items
from agiqa.store.format.labels import JoinedColumn, MosRange, ScaledColumn, convert_deviations, join_columns
from agiqa.store.format.metadata import differing
from agiqa.store.reading.by_name import ByName
from agiqa.store.reading.store import Store, TokenRows, item_positions

_SAME_MAKING = ("model", "conversation")


class StoreUnion(ByName):
    """The items of several stores, one store after the other; see `union`.

    Has the members of a store that training and scoring use.
    """

    def __init__(self, stores: Sequence[Store]) -> None:
        """Check that `stores` can be read as one. Raises as `union`."""
        if not stores:
            message = "A union needs at least one store."
            raise ConfigError(message)
        self.stores = tuple(stores)
        first = self.stores[0]
        for other in self.stores[1:]:
            _require_same_meaning(first, other)
        _require_no_item_twice(self.stores)
        self._scaled = _on_one_scale(self.stores)
        self.id = hashlib.sha256(canonical_json([store.id for store in stores]).encode()).hexdigest()
        """sha256 of the canonical JSON of the list of the stores' ids, in their order."""
        self.encoding = first.encoding
        self.logical_dtype = first.logical_dtype
        self.width = first.width
        self._first_items = np.cumsum([0, *(len(store.n_tokens) for store in self.stores)])

    @property
    def path(self) -> Path:
        """A path for messages, which does not exist: the stores' names joined by `+`, beside the first store."""
        return self.stores[0].path.with_name("+".join(store.path.name for store in self.stores))

    @property
    def location(self) -> str:
        """The path or URL of each store, joined by plus signs."""
        return " + ".join(store.location for store in self.stores)

    @cached_property
    def content(self) -> str:
        """Hex sha256 of the `content` of all stores, in their order."""
        return hashlib.sha256(canonical_json([store.content for store in self.stores]).encode()).hexdigest()

    @cached_property
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
            if (found := _differing(first.provenance, other.provenance))
        )

    @property
    def scale_notes(self) -> tuple[str, ...]:
        """Notes on MOS that are converted to another scale, and on unknown scales."""
        return tuple(note for column in self._scaled.values() for note in column.notes)

    @property
    def parts(self) -> tuple[tuple[Store, NDArray[np.int64]], ...]:
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

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions in the union), in that order. Raises as `Store.read`."""
        wanted = item_positions(items, count=int(self._first_items[-1]), where=self.location)
        owners = np.searchsorted(self._first_items, wanted, side="right") - 1
        asked = np.unique(owners).tolist()
        if len(asked) <= 1:
            owner = asked[0] if asked else 0
            return self.stores[owner].read(wanted - self._first_items[owner])
        offsets = np.concatenate([[0], np.cumsum(self.n_tokens[wanted], dtype=np.int64)])
        rows: NDArray[Any] = np.empty(0)
        roles = np.empty(int(offsets[-1]), np.uint8)
        for turn, owner in enumerate(asked):
            places = np.flatnonzero(owners == owner)
            block = self.stores[owner].read(wanted[places] - self._first_items[owner])
            if turn == 0:
                rows = np.empty((int(offsets[-1]), self.width), block.rows.dtype)
            for number, place in enumerate(places.tolist()):
                source = slice(int(block.offsets[number]), int(block.offsets[number + 1]))
                target = slice(int(offsets[place]), int(offsets[place + 1]))
                rows[target], roles[target] = block.rows[source], block.roles[source]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=self.logical_dtype)


def union(stores: Sequence[Store]) -> StoreUnion:
    """Read `stores` as one, their items one store after the other.

    Raises SchemaError if encoding, dtype or width differ; HeadError if W_lm or the basis of sketches differ; DataError
    for items that occur in two stores, and for MOS on unknown scales that cannot be the same; ConfigError without a
    store.
    """
    return StoreUnion(stores)


def _require_same_meaning(first: Store, other: Store) -> None:
    heads = (first.lm_head_sha256, other.lm_head_sha256)
    if heads[0] != heads[1]:
        message = (
            f"{first.path} belongs to the language-model head {heads[0][:12]}, {other.path} to {heads[1][:12]}: their "
            "rows live in different spaces. Extract both with one model."
        )
        raise HeadError(message)
    _require_same("encoding", first, other, first.encoding, other.encoding)
    if first.encoding == "sketch" and first.basis().id != other.basis().id:
        message = (
            f"{first.path} is a sketch in the basis {first.basis().id[:12]}, {other.path} in {other.basis().id[:12]}. "
            f"Make the second anew, from the store of hidden states: "
            f"`agiqa store sketch HIDDEN_STORE OUT --basis {first.path}`."
        )
        raise HeadError(message)
    _require_same("logical dtype", first, other, first.logical_dtype, other.logical_dtype)
    _require_same("width", first, other, first.width, other.width)


def _require_same(what: str, first: Store, other: Store, here: object, there: object) -> None:
    if here == there:
        return
    message = f"{first.path} has the {what} {here}, {other.path} has {there}. {_remedy(first, other)}"
    raise SchemaError(message)


def _remedy(first: Store, other: Store) -> str:
    sketch, hidden = (first, other) if first.encoding == "sketch" else (other, first)
    if (sketch.encoding, hidden.encoding) == ("sketch", "hidden"):
        return f"Sketch the hidden states in that basis: `agiqa store sketch {hidden.path} OUT --basis {sketch.path}`."
    return "Extract or convert one of them anew, with the settings of the other."


def _require_no_item_twice(stores: Sequence[Store]) -> None:
    seen: dict[bytes, tuple[Store, str]] = {}
    problems: list[str] = []
    for store in stores:
        names = dict(zip((key.tobytes() for key in store.item_keys), store.items.names, strict=True))
        for key, name in names.items():
            if key in seen:
                before, called = seen[key]
                problems.append(f"{called!r} of {before.path} is {name!r} of {store.path}")
        seen.update({key: (store, name) for key, name in names.items()})
    if problems:
        error = DataError.from_problems("The stores hold the same image and conversation", problems)
        error.add_note("An item must not be read twice: leave out one of the stores, or extract without these items.")
        raise error


def _differing(first: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Dotted names of the differences between two provenances in model and conversation."""
    return [name for key in _SAME_MAKING for name, _, _ in differing(first.get(key), other.get(key), key)]


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


def _on_one_scale(stores: Sequence[Store]) -> dict[str, JoinedColumn]:
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
