"""Seal: when every unit is there, list every object with its hash; the list is the proof of completeness."""

import warnings
from typing import Any

import zarr

from agiqa.errors import DamagedStore, IncompleteStore, listed
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    sha256_of_file,
    sync_file,
    write_text_atomically,
)
from agiqa.store.format.layout import FORMAT, VERSION
from agiqa.store.format.listings import check_object_path, read_record
from agiqa.store.format.recorded_items import table_problem
from agiqa.store.reading.card import data_card
from agiqa.store.reading.store import Store, open_store
from agiqa.store.writing.upkeep import UPKEEP_LOCK, killed_records, remove_locks, require_not_pulling, upkeep_lock


def seal(store: Store) -> Store:
    """Check that all parts are there as they were recorded, then write MANIFEST.json; idempotent.

    Units were read back when they were written, so of their objects only the sizes are looked at. Returns the store,
    opened as complete. Raises IncompleteStore naming the missing units, or a pull that was cut off, and DamagedStore
    naming the objects that are missing, of another size or of other bytes.
    """
    with upkeep_lock(store.layout, doing="sealing", kept="all its units are kept"):
        require_not_pulling(store.layout)
        if not store.layout.manifest.exists():
            _seal(open_store(store.path, allow_partial=True))
        remove_locks(store.layout, mine=UPKEEP_LOCK)
    return open_store(store.path)


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
            f"`agiqa store repair {store.path}` drops what can be made anew. {store.remedy}"
        )
        raise DamagedStore(message)
    # writes of killed runs that were never renamed
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
        "version": VERSION,
        "id": store.id,
        "state": "complete",
        "objects": [*objects, describe_object(store.path, layout.zarr / "zarr.json")],
        "labels": describe_object(store.path, layout.items),
    }
    write_text_atomically(layout.manifest, canonical_json(manifest))


def _recorded_objects(store: Store) -> list[dict[str, Any]]:
    """Every object that the commit records name, in the order plan, model, units.

    Raises IncompleteStore when the record of a unit or of the model's arrays is missing, DamagedStore when that of the
    plan is.
    """
    layout = store.layout
    if not layout.plan_commit.exists():
        message = f"{layout.plan_commit} is missing, so nothing tells what the store should hold. Copy the store again."
        raise DamagedStore(message)
    missing = sorted(set(range(store.geometry.units)) - set(store.committed_units()))
    if missing or not layout.model_commit.exists():
        what = f"units {listed([str(unit) for unit in missing], 10)}" if missing else "the model's arrays"
        message = f"{store.path}: {what} not finished. {store.remedy}"
        raise IncompleteStore(message)
    records = [layout.plan_commit, layout.model_commit, *map(layout.commit, range(store.geometry.units))]
    return [entry for record in records for entry in read_record(record)]


def size_problem(store: Store, entry: dict[str, Any]) -> str | None:
    """What is wrong with the presence and size of a recorded object, or None."""
    path = store.path / check_object_path(store.path, entry["path"], listed_in=_listed_in(store))
    if not path.is_file():
        return f"{entry['path']} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{entry['path']} has {path.stat().st_size} bytes, recorded {entry['bytes']}"
    return None


def content_problem(store: Store, entry: dict[str, Any]) -> str | None:
    """What is wrong with a recorded object, every byte of it, or None."""
    problem = size_problem(store, entry)
    if problem is None and sha256_of_file(store.path / entry["path"]) != entry["sha256"]:
        problem = f"{entry['path']} does not have the sha256 that {_listed_in(store)} lists"
    return problem


def _listed_in(store: Store) -> str:
    return store.layout.manifest.name if store.is_complete else "its commit record"
