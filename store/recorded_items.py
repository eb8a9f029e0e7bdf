"""The item table of a finished store and its entry in MANIFEST.json, which change together or not at all.

Two files cannot be replaced in one step, so the new table is announced first:

1. MANIFEST.json gets `labels_next`, the entry of the new table, beside `labels`.
2. items.parquet is replaced.
3. MANIFEST.json gets the new entry as `labels`, and loses `labels_next`.

At every moment items.parquet is what one of the two entries names, and a reader accepts either.
"""

from typing import Any

import pyarrow.parquet as pq

from agiqa.errors import DamagedStore
from agiqa.store.files import (
    canonical_json,
    describe_object,
    read_json,
    sha256_of_file,
    sync_file,
    write_text_atomically,
)
from agiqa.store.items import Items, read_items
from agiqa.store.layout import StoreLayout

_NOW, _NEXT = "labels", "labels_next"


def recorded_labels(layout: StoreLayout, manifest: dict[str, Any]) -> dict[str, Any]:
    """The entry of `manifest` that items.parquet has to agree with.

    That is `labels_next` where the table is the announced one, else `labels`.
    """
    announced = manifest.get(_NEXT)
    agreed = announced if announced and _sha256(layout) == announced["sha256"] else manifest[_NOW]
    return {str(key): value for key, value in agreed.items()}


def read_recorded_items(layout: StoreLayout) -> Items:
    """The items of the finished store at `layout`, while another process may be replacing them.

    Raises DamagedStore when items.parquet is not what MANIFEST.json lists.
    """
    while True:
        manifest = read_json(layout.manifest)
        found = _sha256(layout)
        if found is not None and found in {manifest[key]["sha256"] for key in (_NOW, _NEXT) if key in manifest}:
            items = read_items(layout.items)
            if _sha256(layout) == found:
                return items
        elif read_json(layout.manifest) == manifest:  # else it was replaced between the two looks: look again
            message = f"{layout.items} is not the item table that the manifest lists. Copy the store again."
            raise DamagedStore(message)


def replace_recorded_items(layout: StoreLayout, items: Items) -> None:
    """Give the finished store at `layout` the table `items`; a kill leaves the old table or the new one, listed.

    The caller holds the upkeep lock and has called `settle_labels`.
    """
    temporary = layout.items.with_name(f".{layout.items.name}.next")
    pq.write_table(items.table(), temporary, compression="zstd")
    sync_file(temporary)
    described = describe_object(layout.root, temporary)
    entry = {**described, "path": layout.items.relative_to(layout.root).as_posix()}
    manifest = read_json(layout.manifest)
    write_text_atomically(layout.manifest, canonical_json({**manifest, _NEXT: entry}))
    temporary.replace(layout.items)
    sync_file(layout.root)
    write_text_atomically(layout.manifest, canonical_json({**manifest, _NOW: entry}))


def settle_labels(layout: StoreLayout) -> None:
    """Finish what a killed replacement began: MANIFEST.json lists the table that is there, and announces none.

    Raises DamagedStore when items.parquet is neither the old table nor the announced one. The caller holds the
    upkeep lock.
    """
    manifest = read_json(layout.manifest)
    if _NEXT not in manifest:
        return
    entry = recorded_labels(layout, manifest)
    if _sha256(layout) != entry["sha256"]:
        message = f"{layout.items} is not the item table that the manifest lists. Copy the store again."
        raise DamagedStore(message)
    settled = {key: value for key, value in manifest.items() if key != _NEXT}
    write_text_atomically(layout.manifest, canonical_json({**settled, _NOW: entry}))


def _sha256(layout: StoreLayout) -> str | None:
    return sha256_of_file(layout.items) if layout.items.is_file() else None
