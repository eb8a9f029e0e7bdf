"""The items of the training, validation and test part of a run, as parts.json records them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.layers import base_of, joined_stores

PART_NAMES = ("train", "validation", "test")
_NUMBERS, _STORE = "items", "store"

_Numbers = Mapping[str, frozenset[int]]
"""The numbers of the items of each part in one store."""


@dataclass(frozen=True, kw_only=True)
class RecordedParts:
    """The items of each part of a run, by the name of the part: train, validation, test.

    An item of a store that the run read is identified by the store's id and its number there, since several stores, or
    one, may hold a name with the same prompt twice. Labels and splits do not change id or order of a store. An item of
    any other store is the same where name and prompt are equal.
    """

    pairs: Mapping[str, frozenset[tuple[str, str]]]
    """Name and prompt."""
    stores: tuple[tuple[str, _Numbers], ...]
    """The id of each store, and the numbers of its items; empty in old runs, which recorded only `pairs`."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RecordedParts":
        """Parse parts.json. Raises KeyError, TypeError or ValueError for other content than `record_parts` makes."""
        return cls(
            pairs={part: frozenset((name, prompt) for name, prompt in record[part]) for part in PART_NAMES},
            stores=tuple(
                (entry[_STORE], {part: frozenset(map(_whole, entry[part])) for part in PART_NAMES})
                for entry in record.get(_NUMBERS, [])
            ),
        )

    def contain(self, source: FeatureSource, items: NDArray[np.int64], *parts: str) -> NDArray[np.bool_]:
        """Whether each of `items` of `source` is in any of `parts`, (items,)."""
        names, prompts = source.items.names, source.items.prompts
        pairs = frozenset[tuple[str, str]]().union(*(self.pairs[part] for part in parts))
        found = np.zeros(len(items), dtype=bool)
        stores = _stores_of(source)
        for (_, positions), numbers in zip(stores, self._numbers_in([store for store, _ in stores]), strict=True):
            here = np.flatnonzero(np.isin(items, positions))
            if numbers is None:
                found[here] = [(names[item], prompts[item]) in pairs for item in items[here]]
            else:
                wanted = frozenset[int]().union(*(numbers[part] for part in parts))
                found[here] = np.isin(items[here] - positions[:1], sorted(wanted))
        return found

    def _numbers_in(self, stores: Sequence[str]) -> list[_Numbers | None]:
        """The recorded numbers for each of these stores; None for one that the run did not read, or an ambiguous id."""
        ids = [store for store, _ in self.stores]
        if ids == list(stores):
            return [numbers for _, numbers in self.stores]
        once = {store: numbers for store, numbers in self.stores if ids.count(store) == 1}
        return [once.get(store) for store in stores]


def record_parts(source: FeatureSource, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """The content of parts.json for the items of each part."""
    names, prompts = source.items.names, source.items.prompts
    pairs = {part: [(names[item], prompts[item]) for item in items] for part, items in parts.items()}
    numbers = [
        {
            _STORE: store,
            **{part: (items[np.isin(items, positions)] - positions[:1]).tolist() for part, items in parts.items()},
        }
        for store, positions in _stores_of(source)
    ]
    return {**pairs, _NUMBERS: numbers}


def _stores_of(source: FeatureSource) -> list[tuple[str, NDArray[np.int64]]]:
    """The id of each store in `source`, and the positions of its items there, which are consecutive."""
    joined = joined_stores(source)
    if joined is not None:
        return [(store.id, positions) for store, positions in joined.parts]
    return [(base_of(source).id, np.arange(len(source.items.names)))]


def _whole(number: Any) -> int:
    """An item's number from JSON. Raises TypeError for anything but an int."""
    if type(number) is not int:
        message = f"{number!r} is no number of an item"
        raise TypeError(message)
    return number
