"""The conversations with which every conversation of a store begins: how many rows of each item belong to them.

A causal model computes the states of a token from this token and those before it. So the first rows of an item are the
rows of the shorter conversation. FORMAT.md, section 6, has the arrays.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.store.format.items import TEXT_AUTHORS

PREFIXES = "prefixes"
"""The entry of the provenance with the names of the shorter conversations, the shortest first."""
ROWS, AUTHORS, KEYS = "index/prefixes", "index/prefix_authors", "index/prefix_keys"
"""The arrays. Early stores have no KEYS."""
KEY_BYTES = 32
VARIANT_KINDS = ("no_id", "question", "described", "id", "full")
"""Names of conversations, as far as a colon."""

_AUTHORS: tuple[str | None, ...] = (None, *TEXT_AUTHORS)
"""An author's number in AUTHORS is its place here."""


@dataclass(frozen=True, kw_only=True)
class Prefixes:
    """The beginnings of the conversations of a store."""

    names: tuple[str, ...]
    """Their variants, the shortest first."""
    rows: NDArray[np.int32]
    """(items, names): rows of the item that belong to the shorter conversation."""
    authors: NDArray[np.uint8]
    """(items, names): the author of its texts by number, see `author_numbers`."""
    keys: NDArray[np.uint8] | None = None
    """(items, names * 32): the item keys of the shorter conversations, one after the other; None if unknown."""

    @classmethod
    def recorded(
        cls, provenance: Mapping[str, Any], read: Callable[[str], NDArray[Any]], arrays: Collection[str]
    ) -> "Prefixes | None":
        """Those of the store with this `provenance`, whose `arrays` `read` gives by name; None if it records none."""
        if PREFIXES not in provenance:
            return None
        return cls(
            names=tuple(map(str, provenance[PREFIXES])),
            rows=read(ROWS),
            authors=read(AUTHORS),
            keys=read(KEYS) if KEYS in arrays else None,
        )

    def arrays(self) -> dict[str, NDArray[np.int32] | NDArray[np.uint8]]:
        """The arrays of the store by name."""
        return {ROWS: self.rows, AUTHORS: self.authors, **({} if self.keys is None else {KEYS: self.keys})}

    def keys_of(self, name: str) -> NDArray[np.uint8] | None:
        """The keys of the items as the shorter conversation `name`, (items, 32); None if unknown."""
        first = self.names.index(name) * KEY_BYTES
        return None if self.keys is None else self.keys[:, first : first + KEY_BYTES]

    def problem(self, n_tokens: NDArray[np.int32]) -> str | None:
        """What contradicts the `n_tokens` (items,) of the store; None if nothing does."""
        shape = (len(n_tokens), len(self.names))
        if self.rows.shape != shape or self.authors.shape != shape:
            return f"{ROWS} is {self.rows.shape} and {AUTHORS} {self.authors.shape}, its provenance says {shape}"
        if self.keys is not None and self.keys.shape != (shape[0], shape[1] * KEY_BYTES):
            return f"{KEYS} is {self.keys.shape}, its provenance says {(shape[0], shape[1] * KEY_BYTES)}"
        bounds = np.column_stack([np.zeros(len(n_tokens), np.int64), self.rows, n_tokens])
        wrong = np.flatnonzero((np.diff(bounds, axis=1) < 0).any(axis=1))
        if len(wrong):
            rows = self.rows[wrong[0]].tolist()
            return f"{ROWS} says {rows} of item {wrong[0]}, which has {n_tokens[wrong[0]]} rows"
        if self.authors.size and self.authors.max() >= len(_AUTHORS):
            return f"{AUTHORS} has the number {self.authors.max()}, and there are {len(_AUTHORS)} authors"
        return None


def author_numbers(by_item: Sequence[Mapping[str, str | None]], names: Sequence[str]) -> NDArray[np.uint8]:
    """The authors of each item's beginnings `names` as numbers, (items, names)."""
    numbers = [[_AUTHORS.index(authors.get(name)) for name in names] for authors in by_item]
    return np.array(numbers, np.uint8).reshape(len(by_item), len(names))


def author_names(numbers: NDArray[np.uint8]) -> list[str | None]:
    """The authors with these `numbers`; empty if all are unknown, as in an item table."""
    return [_AUTHORS[number] for number in numbers.tolist()] if numbers.any() else []
