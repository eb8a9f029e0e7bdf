"""A store read as a variant whose conversations are the beginnings of its own; nothing is copied or computed."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import UnknownName, ViewRefused
from agiqa.store.disk.files import canonical_json
from agiqa.store.format.artefacts import Basis
from agiqa.store.format.items import Items
from agiqa.store.format.metadata import damaged
from agiqa.store.format.prefixes import KEYS, PREFIXES, VARIANT_KINDS, Prefixes, author_names
from agiqa.store.reading.by_name import ByName
from agiqa.store.reading.layers import LayerSource, layer_of
from agiqa.store.reading.token_rows import TokenRows

if TYPE_CHECKING:
    from agiqa.store.reading.store import Store


_SHORTEST = ("no_id", "question")
"""Conversations that begin with no other one."""


class VariantView(ByName):
    """The first rows of every item of a store: those of a shorter conversation.

    Has the members of a store that training and scoring use. It counts as the store of that conversation: heads that
    were trained on the one read the other.
    """

    def __init__(self, base: "Store", name: str, prefixes: Prefixes) -> None:
        """`name` is one of those of `prefixes`."""
        self.base = base
        self.name = name
        self._prefixes = prefixes
        self._place = prefixes.names.index(name)
        self.encoding = base.encoding
        self.logical_dtype = base.logical_dtype
        self.width = base.width
        self.id = _hash([base.id, f"variant:{name}"])
        """sha256 of the canonical JSON of [id of the store, "variant:NAME"]."""
        self.layers, self.layer_count, self.layer_name = base.layers, base.layer_count, base.layer_name
        self.pooled, self.tap = base.pooled, base.tap

    def variant(self, name: str) -> "Store | VariantView":
        """The view `name` of the same store, see `variant_of`."""
        return self if name == self.name else variant_of(self.base, name)

    @property
    def path(self) -> Path:
        """The path of the store."""
        return self.base.path

    @property
    def location(self) -> str:
        """The path or URL of the store."""
        return self.base.location

    @property
    def is_sealed(self) -> bool:
        """Whether the store is finished."""
        return self.base.is_sealed

    @property
    def content(self) -> str:
        """Hex sha256 of the `content` of the store and the variant."""
        return _hash([self.base.content, f"variant:{self.name}"])

    @property
    def provenance(self) -> dict[str, Any]:
        """That of the store, with this variant, and in `view` the id and the variant of the store."""
        return self._provenance  # pyright finds no cached_property that satisfies the property of a protocol

    @cached_property
    def _provenance(self) -> dict[str, Any]:
        whole = self.base.provenance
        conversation = {**whole["conversation"], "variant": self.name}
        shorter = list(self._prefixes.names[: self._place])
        view = {"store": self.base.id, "variant": whole["conversation"]["variant"]}
        return {**whole, "conversation": conversation, PREFIXES: shorter, "view": view}

    @property
    def items(self) -> Items:
        """The items of the store. Authors are those of the texts in the shorter conversation."""
        return self._items

    @cached_property
    def _items(self) -> Items:
        items, asks_only = self.base.items, self.name == "question"
        return replace(
            items,
            text_authors=author_names(self._prefixes.authors[:, self._place]),
            descriptions=[None] * len(items) if asks_only else items.descriptions,
        )

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Rows per item, (items,)."""
        return self._prefixes.rows[:, self._place]

    @property
    def item_keys(self) -> NDArray[np.uint8]:
        """sha256 of each item's image and shorter conversation, (items, 32); of early stores the whole conversation."""
        keys = self._prefixes.keys_of(self.name)
        return self.base.item_keys if keys is None else keys

    @property
    def lm_head_sha256(self) -> str:
        """The language-model head of the features."""
        return self.base.lm_head_sha256

    def lm_head(self) -> NDArray[np.float32]:
        """As `Store.lm_head`."""
        return self.base.lm_head()

    def basis(self) -> Basis:
        """As `Store.basis`."""
        return self.base.basis()

    def layer(self, name: str) -> LayerSource:
        """As `Store.layer`, of this variant."""
        return layer_of(self, name)

    def layer_shape(self, layer: str) -> tuple[int, str]:
        """As `Store.layer_shape`."""
        return self.base.layer_shape(layer)

    def layer_basis(self, layer: str) -> Basis:
        """As `Store.layer_basis`."""
        return self.base.layer_basis(layer)

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """The rows of `items` (positions), in that order. Raises as `Store.read`."""
        return self.read_layer(items, self.layer_name)

    def tokens(self, items: Sequence[int] | NDArray[Any]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """The token ids and the roles of each of `items` (positions). Raises as `Store.tokens`."""
        whole = self.base.tokens(items)
        kept = self.n_tokens[np.asarray(items, np.int64)].tolist()
        return [(ids[:rows], roles[:rows]) for (ids, roles), rows in zip(whole, kept, strict=True)]

    def read_layer(self, items: Sequence[int] | NDArray[Any], layer: str) -> TokenRows:
        """As `read`, of a stored layer."""
        whole = self.base.read_layer(items, layer)
        kept = self.n_tokens[np.asarray(items, np.int64)].astype(np.int64)
        starts = whole.offsets[:-1]
        offsets = np.concatenate([[0], np.cumsum(kept)])
        chosen = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], kept)
        return replace(whole, rows=whole.rows[chosen], roles=whole.roles[chosen], offsets=offsets)


def variant_of(store: "Store", name: str) -> "Store | VariantView":
    """`store` read as the variant `name`: the store itself if that is its own, else the first rows of its items.

    Raises UnknownName for a name that is none of a variant, ViewRefused for a variant with which the conversations of
    the store do not begin, and DamagedStore for numbers of rows that cannot be.
    """
    conversation = store.provenance.get("conversation", {})
    whole = conversation.get("variant")
    if name == whole:
        return store
    prefixes = stored_prefixes(store)
    if prefixes is None or name not in prefixes.names:
        raise _refusal(store, name, whole, () if prefixes is None else prefixes.names)
    return VariantView(store, name, prefixes)


def stored_prefixes(store: "Store") -> Prefixes | None:
    """The beginnings of the conversations of `store`; None if it records none.

    Raises DamagedStore for numbers that contradict the store.
    """
    arrays = [KEYS] if store.has_array(KEYS) else []
    found = Prefixes.recorded(store.provenance, store.whole, arrays)
    if found is not None and (problem := found.problem(store.n_tokens)):
        raise damaged(store.path, problem)
    return found


def _refusal(store: "Store", name: str, whole: str | None, names: Sequence[str]) -> UnknownName | ViewRefused:
    """Why `store`, whose conversations are `whole` and begin with `names`, cannot be read as `name`, and the remedy."""
    kind = name.partition(":")[0]
    if kind not in VARIANT_KINDS:
        return UnknownName.of("conversation variant", name, [*names, *([] if whole is None else [whole])])
    again = f"Extract with --variant {name} to another store."
    if whole is None:
        return ViewRefused(f"{store.location} does not record which conversations it holds. {again}")
    holds = f"{store.location} holds conversations of the variant {whole!r}"
    if kind == "no_id":
        why = f"{holds}, and `no_id` asks one question in other words, so none of them begins with it."
    elif not names and whole not in _SHORTEST:
        why = f"{holds}, and was extracted by an agiqa, or for a model, without views of shorter conversations."
    else:
        shown = f"only with {', '.join(names)}" if names else "with no shorter one"
        why = f"{holds}, which do not begin with those of {name!r}, {shown}."
        if name == "id" and ":" in whole:
            why += " After the first description, `id` has the rating question, and these have another description."
    return ViewRefused(f"{why} {again}")


def _hash(value: object) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()
