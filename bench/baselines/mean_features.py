"""The mean feature row of each item, over all its tokens and over those of the answer, for closed-form regressions."""

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.heads.data.features import FeatureSource, ItemRows, location_of, read_checked
from agiqa.store import TOKEN_ROLES

Array = NDArray[np.float64]
Positions = NDArray[np.int64]

ALL, ANSWER = "all", "answer"


class MeanFeatures:
    """The mean feature rows of the items of a store, computed in one pass when first asked for, and then kept."""

    def __init__(self, source: FeatureSource) -> None:
        """Of the items of `source`; an item takes up to 16 bytes per channel."""
        self.source = source
        self._all: dict[int, Array] = {}
        self._answer: dict[int, Array] = {}
        """Without the items that have no token of an answer."""
        self._has_others: set[int] = set()
        """The items with tokens that are not of an answer."""

    @property
    def reads(self) -> str:
        """What the rows are, in words."""
        names = {"hidden": "hidden states", "int8": "hidden states in int8"}
        return names.get(self.source.encoding, f"{self.source.encoding} of rank {self.source.width}")

    def refuse_logits(self) -> None:
        """Raise DataError where the rows are raw logits."""
        if self.source.encoding == "logits":
            message = (
                f"a regression on the {self.source.width} raw logits of {location_of(self.source)} is not tried; "
                "`agiqa store sketch` makes fewer of them"
            )
            raise DataError(message)

    def of(self, items: Positions) -> dict[str, Array]:
        """(items, width) float64 by the tokens that they are means of: ALL, and ANSWER where every item has such.

        ANSWER is left out where all tokens of all items are of an answer. Raises DataError for raw logits, and for
        items without tokens or with NaN.
        """
        self.refuse_logits()
        self._read(items)
        places = items.tolist()
        found = {ALL: np.stack([self._all[item] for item in places])}
        if all(item in self._answer for item in places) and not self._has_others.isdisjoint(places):
            found[ANSWER] = np.stack([self._answer[item] for item in places])
        return found

    def places_of(self, other: FeatureSource) -> Positions:
        """Where each item of `other` stands in the store that is read here, known by its name and prompt.

        Raises DataError for an item that is not there, and for one that is there more than once.
        """
        if other is self.source:
            return np.arange(len(other.items.names))
        there: dict[tuple[str, str], list[int]] = {}
        for place, known_by in enumerate(zip(self.source.items.names, self.source.items.prompts, strict=True)):
            there.setdefault(known_by, []).append(place)
        wanted = list(zip(other.items.names, other.items.prompts, strict=True))
        problems = [
            f"{name!r} with the prompt {prompt!r} is {f'there {len(found)} times' if found else 'not there'}"
            for name, prompt in wanted
            if len(found := there.get((name, prompt), [])) != 1
        ]
        if problems:
            where = f"{location_of(self.source)}, which the baselines of {location_of(other)} are to read"
            raise DataError.from_problems(where, problems)
        return np.array([there[known_by][0] for known_by in wanted], dtype=np.int64)

    def _read(self, items: Positions) -> None:
        """Keep the means of the items that were not read before."""
        missing = np.array([item for item in np.unique(items).tolist() if item not in self._all], dtype=np.int64)
        empty = missing[np.asarray(self.source.n_tokens)[missing] == 0]
        if len(empty):
            message = f"{self.source.items.names[empty[0]]!r} has no tokens"
            raise DataError(message)
        read: dict[int, tuple[Array, Array | None, bool]] = {}
        for place, tokens in read_checked(self.source, missing):
            read[int(missing[place])] = _means(tokens)
        for item, (over_all, over_answer, has_others) in read.items():
            self._all[item] = over_all
            if over_answer is not None:
                self._answer[item] = over_answer
            if has_others:
                self._has_others.add(item)


def _means(item: ItemRows) -> tuple[Array, Array | None, bool]:
    """The mean of all rows, that of the answer's if there are some, and whether there are others."""
    rows, chosen = item.rows.double(), item.roles == TOKEN_ROLES[ANSWER]
    count = int(chosen.sum())
    answer = rows[chosen].mean(0).numpy() if count else None
    return rows.mean(0).numpy(), answer, count < len(rows)
