"""Seal: when every unit is finished, list all objects with their hashes; MANIFEST.json proves that a store is complete.

Sealing, relabelling, repair and garbage collection hold the seal lock, so that one of them works at a time.
"""

import contextlib
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import zarr

from agiqa.errors import DamagedStore, IncompleteStore, listed
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    sync_file,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.disk.locks import is_held, waiting_lock
from agiqa.store.format.layout import FORMAT, SEAL_LOCK, StoreLayout
from agiqa.store.format.manifest import read_record, table_problem
from agiqa.store.format.metadata import require_no_pull
from agiqa.store.reading.store import Store, open_local_store
from agiqa.store.reading.summary import data_card
from agiqa.store.writing.records import content_problem, killed_records, size_problem


@contextmanager
def seal_lock(layout: StoreLayout, *, doing: str = "working on", kept: str = "nothing is lost") -> Generator[None]:
    """Wait for the lock `seal` of the store at `layout`, and hold it inside the `with` block.

    Adds a note with `doing` and `kept` to an OSError from inside. A finished store has no `locks` folder, so the holder
    removes the lock file and the folder.
    """
    lock = layout.locks / SEAL_LOCK
    try:
        with telling_disk_errors(f"{doing} {layout.root}", kept), waiting_lock(lock):
            try:
                yield
            finally:
                if layout.manifest.exists():
                    lock.unlink(missing_ok=True)
    finally:  # after the lock file is closed: FUSE file systems keep the names of open files
        if layout.manifest.exists():
            _remove_empty_locks(layout)


def remove_locks(layout: StoreLayout, *, mine: str) -> None:
    """Remove lock files that no process holds, and `mine`, which the caller holds; then their folder if it is empty."""
    for lock in layout.lock_files():
        if lock.name == mine or not is_held(lock):
            lock.unlink(missing_ok=True)
    _remove_empty_locks(layout)


def _remove_empty_locks(layout: StoreLayout) -> None:
    with contextlib.suppress(OSError):  # the folder holds other files, or is a link
        layout.locks.rmdir()


def require_no_cut_off_pull(layout: StoreLayout) -> None:
    """Raise IncompleteStore if a pull was killed while it installed the store. The caller holds the seal lock."""
    if not layout.manifest.exists():
        require_no_pull(layout)


def seal(store: Store) -> Store:
    """Check all files against their records, then write MANIFEST.json. Does nothing for a sealed store.

    Of a unit's objects it checks only the sizes: the writer has read their bytes back. Returns the sealed store, opened
    again. Raises IncompleteStore for missing units or an interrupted pull, and DamagedStore for objects that are
    missing, or have another size or other bytes.
    """
    with seal_lock(store.layout, doing="sealing", kept="all its units are kept"):
        require_no_cut_off_pull(store.layout)
        if not store.layout.manifest.exists():
            _seal(open_local_store(store.path, allow_partial=True))
        remove_locks(store.layout, mine=SEAL_LOCK)
    return open_local_store(store.path)


def _seal(store: Store) -> None:
    layout = store.layout
    objects = _recorded_objects(store)
    shared = [entry for record in (layout.plan_commit, layout.model_commit) for entry in read_record(record)]
    damaged = [problem for entry in objects if (problem := size_problem(store, entry))]
    damaged = damaged or [problem for entry in shared if (problem := content_problem(store, entry))]
    damaged += [problem] if (problem := table_problem(layout)) else []
    if damaged:
        lines = "\n".join(f"  {line}" for line in damaged)
        message = (
            f"{store.path} cannot be sealed:\n{lines}\n"
            f"`agiqa store repair {store.path}` removes what can be computed again. {store.remedy}"
        )
        raise DamagedStore(message)
    # temporary files of killed runs
    names = (layout.manifest.name, layout.card.name, layout.items.name)
    left_over = [path for name in names for path in layout.root.glob(f".{name}.*")]
    for path in (*left_over, *layout.zarr.rglob("*.partial"), *killed_records(layout)):
        path.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(layout.zarr)
    sync_file(layout.zarr / "zarr.json")
    sync_file(layout.zarr)
    write_text_atomically(layout.card, data_card(store))
    manifest = {
        "format": FORMAT,
        "version": store.attributes["version"],
        "id": store.id,
        "state": "complete",
        "objects": [*objects, describe_object(store.path, layout.zarr / "zarr.json")],
        "labels": describe_object(store.path, layout.items),
    }
    write_text_atomically(layout.manifest, canonical_json(manifest))


def _recorded_objects(store: Store) -> list[dict[str, Any]]:
    """The entries of all commit records, in the order plan, model, units.

    Raises IncompleteStore without the record of a unit or of the model's arrays, and DamagedStore without the record of
    the plan.
    """
    layout = store.layout
    if not layout.plan_commit.exists():
        message = f"{layout.plan_commit} is missing, so the content of the store is unknown. Copy the store again."
        raise DamagedStore(message)
    missing = sorted(set(range(store.geometry.units)) - set(store.committed_units()))
    if missing or not layout.model_commit.exists():
        what = f"units {listed([str(unit) for unit in missing], 10)}" if missing else "the model's arrays"
        message = f"{store.path}: {what} not finished. {store.remedy}"
        raise IncompleteStore(message)
    records = [layout.plan_commit, layout.model_commit, *map(layout.commit, range(store.geometry.units))]
    return [entry for record in records for entry in read_record(record)]
