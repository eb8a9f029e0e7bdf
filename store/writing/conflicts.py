"""Differences between the settings that a store was made with and those of a plan."""

from collections.abc import Collection
from typing import Any

from agiqa.errors import SettingsConflict, listed
from agiqa.store.format.metadata import differences, differing
from agiqa.store.reading.store import Store
from agiqa.store.writing.planning import StorePlan


def require_same_settings(store: Store, plan: StorePlan, *, unknown: Collection[str] = (), extends: bool) -> None:
    """Raise SettingsConflict, with all differences, if `store` was made with other settings than those of `plan`.

    The entries `unknown` of the provenance are not compared: `plan` may be made before they are known. With `extends`
    `plan` may have more items. Labels are not compared.
    """
    there, asked = (
        {name: value for name, value in provenance.items() if name not in unknown}
        for provenance in (store.provenance, plan.full_provenance())
    )
    if any(not (extends and _belongs_to_items(name)) for name, _, _ in differing(there, asked)):
        raise other_settings(store, plan, there, asked)


def _belongs_to_items(name: str) -> bool:
    """Whether an entry of the provenance changes when a store gets more items."""
    return name.startswith("data_set.") or name == "tokens.truncated"


def other_settings(store: Store, plan: StorePlan, there: Any, asked: Any) -> SettingsConflict:
    """The differences between two provenances, and the items that differ."""
    lines = "\n".join(f"  {line}" for line in (*differences(there, asked), *_changed_items(store, plan)))
    return SettingsConflict(
        f"{store.path} exists and was made with other settings:\n{lines}\n"
        "Give the settings that it was made with, or another path."
    )


def _changed_items(store: Store, plan: StorePlan) -> list[str]:
    """The items that differ in image, conversation or presence, five of each kind by name."""
    there = {name: key.tobytes() for name, key in zip(store.items.names, store.item_keys, strict=True)}
    here = dict(zip(plan.items.names, plan.item_keys, strict=True))
    kinds = {
        "changed items": [name for name in here if name in there and here[name] != there[name]],
        "items only asked": [name for name in here if name not in there],
        "items only stored": [name for name in there if name not in here],
    }
    return [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]
