"""Whether a store may hold rows that were kept while the model described: decided once for a store, which records it.

Such rows come from prompts and single tokens over a cache, and round otherwise than passes over whole conversations.
"""

from pathlib import Path

from agiqa.progress import say
from agiqa.store import is_planned, open_store

KEPT = "kept_while_describing"
"""Of the provenance: true if rows may come from a describing pass, omitted otherwise."""


def takes_kept_rows(path: Path, *, offered: bool) -> bool:
    """Whether the store at `path` takes rows of a describing pass, which are `offered` or not.

    An existing store goes on as it was begun.
    """
    if not is_planned(path):
        return offered
    recorded = bool(open_store(path, allow_partial=True).provenance.get(KEPT, False))
    if offered and not recorded:
        say(
            f"{path} was begun by `agiqa extract`, and is finished so: the model reads the conversations again. Rows "
            "that are kept while it describes are for new stores"
        )
    return recorded
