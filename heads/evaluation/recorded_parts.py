"""Which items trained a head, chose its epoch, and were tested on: what parts.json records, and who is among them.

An item of a store that the run read is known by the id of the store and its number there: one store, or several read
as one, may hold a name with the same prompt twice. An item of any other store is the same when its name and prompt are.
Labels and splits of a store do not change its id or the order of its items.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSource, Joined

PART_NAMES = ("train", "validation", "test")
_NUMBERS, _STORE = "items", "store"

_Numbers = Mapping[str, frozenset[int]]
"""The numbers of the items of each part in one store."""


@dataclass(frozen=True, kw_only=True)
class RecordedParts:
    """The items of each part of a run, by the name of the part."""

    pairs: Mapping[str, frozenset[tuple[str, str]]]
    """Name and prompt."""
    stores: tuple[tuple[str, _Numbers], ...]
    """The id of each store, and the numbers of its items; empty in runs of an agiqa that recorded only `pairs`."""

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "RecordedParts":
        """What `record_parts` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            pairs={part: frozenset((name, prompt) for name, prompt in record[part]) for part in PART_NAMES},
            stores=tuple(
                (entry[_STORE], {part: frozenset(map(_whole, entry[part])) for part in PART_NAMES})
                for entry in record.get(_NUMBERS, [])
            ),
        )

    def hold(self, source: FeatureSource, items: NDArray[np.int64], *parts: str) -> NDArray[np.bool_]:
        """Which of `items` of `source` are in any of `parts`, (items,)."""
        names, prompts = source.items.names, source.items.prompts
        pairs = frozenset[tuple[str, str]]().union(*(self.pairs[part] for part in parts))
        found = np.zeros(len(items), dtype=bool)
        stores = _stores_of(source)
        for (_, places), numbers in zip(stores, self._numbers([store for store, _ in stores]), strict=True):
            here = np.flatnonzero(np.isin(items, places))
            if numbers is None:
                found[here] = [(names[item], prompts[item]) in pairs for item in items[here]]
            else:
                wanted = frozenset[int]().union(*(numbers[part] for part in parts))
                found[here] = np.isin(items[here] - places[:1], sorted(wanted))
        return found

    def _numbers(self, stores: Sequence[str]) -> list[_Numbers | None]:
        """What is recorded of each of these stores; None of one that was not read, or of which two had the id."""
        ids = [store for store, _ in self.stores]
        if ids == list(stores):
            return [numbers for _, numbers in self.stores]
        once = {store: numbers for store, numbers in self.stores if ids.count(store) == 1}
        return [once.get(store) for store in stores]


def record_parts(source: FeatureSource, parts: Mapping[str, NDArray[np.int64]]) -> dict[str, Any]:
    """What parts.json says: name and prompt of the items of each part, and under `items` their numbers by store."""
    names, prompts = source.items.names, source.items.prompts
    pairs = {part: [(names[item], prompts[item]) for item in items] for part, items in parts.items()}
    numbers = [
        {_STORE: store, **{part: (one[np.isin(one, places)] - places[:1]).tolist() for part, one in parts.items()}}
        for store, places in _stores_of(source)
    ]
    return {**pairs, _NUMBERS: numbers}


def _stores_of(source: FeatureSource) -> list[tuple[str, NDArray[np.int64]]]:
    """The id of each store behind `source`, and where its items are in `source`, one after the other."""
    if isinstance(source, Joined):
        return [(store.id, places) for store, places in source.parts]
    return [(source.id, np.arange(len(source.items.names)))]


def _whole(number: Any) -> int:
    """The number of an item as it was written. Raises TypeError for anything else."""
    if type(number) is not int:
        message = f"{number!r} is no number of an item"
        raise TypeError(message)
    return number
