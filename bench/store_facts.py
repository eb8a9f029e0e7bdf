"""What a reader of results must know of the stores behind them, for about.json."""

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
        "model": store.provenance.get("model", {}).get("name"),
        "variant": store.provenance.get("conversation", {}).get("variant"),
    }
    if store.encoding == "sketch":
        facts["energy"] = [float(value) for value in store.basis().energy]
    return facts
