"""The item table of a store and its entry in a listing, which change together or not at all.

MANIFEST.json lists the table of a finished store, commits/plan.json that of an unfinished one. Two files cannot be
replaced in one step, so a new table is announced first:

1. The listing gets `labels_next`, the entry of the new table, beside `labels`.
2. items.parquet is replaced.
3. The listing gets the new entry as `labels`, and loses `labels_next`.

At every moment items.parquet is what one of the two entries names, and a reader accepts either. Records of plans that
were made before there was such an entry list no table; the first replacement enters it.
"""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from agiqa.errors import DamagedStore
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    read_json,
    sha256_of_file,
    sync_file,
    write_text_atomically,
)
from agiqa.store.format.items import Items, read_items
from agiqa.store.format.layout import StoreLayout
from agiqa.store.format.listings import LABEL_KEYS, read_labels

_NOW, _NEXT = LABEL_KEYS


def recorded_labels(layout: StoreLayout) -> dict[str, Any] | None:
    """The entry that items.parquet has to agree with; None where an old record of a plan lists no table.

    That is `labels_next` where the table is the announced one, else `labels`.
    """
    return _agreeing(layout, _listing(layout)[1])


def read_recorded_items(layout: StoreLayout) -> Items:
    """The items of the store at `layout`, while another process may be replacing them.

    Raises DamagedStore when items.parquet is not what the listing names.
    """
    while True:
        found = _sha256(layout)
        _require_listed(layout)
        items = read_items(layout.items)
        if _sha256(layout) == found:
            return items


def table_problem(layout: StoreLayout) -> str | None:
    """What is wrong with items.parquet, every byte of it, or None; another process may be replacing it."""
    while True:
        path, listing = _listing(layout)
        found = _sha256(layout)
        listed = [entry["sha256"] for entry in listing.values()]
        if found in listed or (found is not None and not listed):
            return None
        if _listing(layout) == (path, listing):  # else the table was replaced between the two looks: look again
            what = "missing" if found is None else f"not the item table that {path.name} lists"
            return f"{layout.items.name} is {what}"


def replace_recorded_items(layout: StoreLayout, items: Items) -> None:
    """Give the store at `layout` the table `items`; a kill leaves the old table or the new one, listed.

    The caller holds the upkeep lock.
    """
    temporary = layout.items.with_name(f".{layout.items.name}.next")
    pq.write_table(items.table(), temporary, compression="zstd")
    sync_file(temporary)
    described = describe_object(layout.root, temporary)
    entry = {**described, "path": layout.items.relative_to(layout.root).as_posix()}
    path, entries = _listing(layout)
    now = _agreeing(layout, entries) or describe_object(layout.root, layout.items)
    listing = read_json(path)
    write_text_atomically(path, canonical_json({**listing, _NOW: now, _NEXT: entry}))
    temporary.replace(layout.items)
    sync_file(layout.root)
    _settle(path, listing, entry)


def settle_labels(layout: StoreLayout) -> None:
    """Finish what a killed replacement began: the listing names the table that is there, and announces none.

    Raises DamagedStore when items.parquet is neither the old table nor the announced one. The caller holds the
    upkeep lock.
    """
    path, entries = _listing(layout)
    if _NEXT not in entries:
        return
    _require_listed(layout)
    _settle(path, read_json(path), _agreeing(layout, entries))


def _settle(path: Path, listing: dict[str, Any], entry: dict[str, Any] | None) -> None:
    settled = {key: value for key, value in listing.items() if key != _NEXT}
    write_text_atomically(path, canonical_json({**settled, _NOW: entry}))


def _listing(layout: StoreLayout) -> tuple[Path, dict[str, Any]]:
    """The file that lists the item table, and its entries: `labels`, `labels_next`, or none of them."""
    try:
        return layout.manifest, read_labels(layout.manifest)
    except FileNotFoundError:
        return layout.plan_commit, read_labels(layout.plan_commit) if layout.plan_commit.exists() else {}


def _agreeing(layout: StoreLayout, entries: dict[str, Any]) -> dict[str, Any] | None:
    announced = entries.get(_NEXT)
    agreed = announced if announced and _sha256(layout) == announced["sha256"] else entries.get(_NOW)
    return None if agreed is None else {str(key): value for key, value in agreed.items()}


def _require_listed(layout: StoreLayout) -> None:
    if (problem := table_problem(layout)) is None:
        return
    remedy = "Copy the store again."
    if not layout.manifest.exists():
        remedy = "Run the command that began the store again: it writes its table anew."
    message = f"{layout.root}/{problem}. {remedy}"
    raise DamagedStore(message)


def _sha256(layout: StoreLayout) -> str | None:
    return sha256_of_file(layout.items) if layout.items.is_file() else None
