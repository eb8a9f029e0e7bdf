"""Growing data sets: the items in the order of the store that has them already, and those that it lacks."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from agiqa.errors import DamagedStore, SettingsConflict, listed
from agiqa.extract.data.items import Item
from agiqa.extract.filling.plan import TokenisedItems
from agiqa.store import Store, is_planned, open_store
from agiqa.store.format.layout import StoreLayout

GROWN = "grown"
"""Of the provenance of a data set: how many items the store had each time when it got more."""


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """The items of a data set, those that a store has first."""

    tokenised: TokenisedItems
    """In the order of the store, then the new ones in the order of the data set."""
    grown: tuple[int, ...] = ()
    """See GROWN."""
    old: Store | None = None
    """The finished store, if it lacks the last items."""
    finished: bool = False
    """Whether a finished store has the first items."""

    @property
    def original(self) -> TokenisedItems:
        """The items that the store was begun with: those that a basis or scale is calibrated on."""
        return replace(self.tokenised, tokenised=self.tokenised.tokenised[: self.grown[0] if self.grown else None])


def lacks_items(path: Path, items: Sequence[Item]) -> bool:
    """Whether there is no finished store at `path`, or it lacks some of `items`, by their names."""
    if not StoreLayout(path).manifest.exists():
        return True
    known = set(open_store(path, allow_partial=True).items.names)
    return any(item.name not in known for item in items)


def aligned(path: Path, tokenised: TokenisedItems) -> Alignment:
    """The items in the order of the store at `path`, if it has only such items, with the same images and texts.

    Otherwise, or without a store, they stay in their own order. Raises SettingsConflict for new items of an unfinished
    store.
    """
    if not is_planned(path):
        return Alignment(tokenised=tokenised)
    store = open_store(path, allow_partial=True)
    grown = tuple(store.provenance.get("data_set", {}).get(GROWN, ()))
    try:
        there = [(name, key.tobytes()) for name, key in zip(store.items.names, store.item_keys, strict=True)]
    except DamagedStore:
        if store.is_sealed:
            raise
        return Alignment(tokenised=tokenised, grown=grown)  # the plan writes the table again
    asked = {(one.item.name, one.key): one for one in tokenised.tokenised}
    if not all(item in asked for item in there):
        return Alignment(tokenised=tokenised, grown=grown)
    known = set(there)
    new = [one for item, one in asked.items() if item not in known]
    ordered = replace(tokenised, tokenised=[*(asked[item] for item in there), *new])
    if not new:
        return Alignment(tokenised=ordered, grown=grown, finished=store.is_sealed)
    if not store.is_sealed:
        names = listed([one.item.name for one in new])
        message = (
            f"{path} is unfinished, and the data set has {len(new)} items more than it was begun with: {names}. "
            "Finish it with the earlier data first; then the same command adds the new items. Or give another path."
        )
        raise SettingsConflict(message)
    return Alignment(tokenised=ordered, grown=(*grown, len(there)), old=store, finished=True)
