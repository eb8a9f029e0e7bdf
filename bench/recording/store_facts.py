"""What a reader of results must know of the stores behind them, for about.json."""

import json
from pathlib import Path
from typing import Any

from agiqa.store import Store


def facts_of(store: Store) -> dict[str, Any]:
    """Identity, place, data, model and conversation of a store, ready for JSON.

    `energy` of a sketch are the eigenvalues of its basis, descending: what a rank keeps is their cumulative share.
    """
    facts: dict[str, Any] = {
        "id": store.id,
        "path": store.location,
        "data": store.provenance.get("data_set", {}),
        "encoding": store.encoding,
        "width": store.width,
        "items": len(store.n_tokens),
        "tokens": int(store.n_tokens.sum()),
        "mos_ranges": {aspect: store.items.mos_ranges.get(aspect) for aspect in store.items.labels},
        "model": store.provenance.get("model", {}).get("name"),
        "variant": store.provenance.get("conversation", {}).get("variant"),
    }
    if store.encoding == "sketch":
        facts["energy"] = [float(value) for value in store.basis().energy]
    return facts


def spelled(identity: str, place: str | None) -> str:
    """A store in a message: where it is, as far as that is known, and the beginning of its id."""
    return f"{place} ({identity[:12]})" if place else identity[:12]


def place_of(about: Path, identity: str) -> str | None:
    """Where the about.json of some results says that the store of this id is; None where it does not."""
    try:
        stores = json.loads(about.read_bytes())["stores"].values()
        return next((str(store["path"]) for store in stores if store["id"] == identity), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
