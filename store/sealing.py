"""Seal: when every unit is there, list every object with its hash; the list is the proof of completeness."""

import shutil
import warnings
from typing import Any

import zarr

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store.card import data_card
from agiqa.store.checks import check_object_path
from agiqa.store.files import canonical_json, describe_object, read_json, write_text_atomically
from agiqa.store.layout import FORMAT, VERSION
from agiqa.store.reading import Store, open_store
from agiqa.store.upkeep import upkeep_lock


def seal(store: Store) -> Store:
    """Check that all parts are there in their recorded sizes, then write MANIFEST.json; idempotent.

    Returns the store, opened as complete. Raises IncompleteStore naming the missing units, and DamagedStore
    naming the objects that are missing or of another size.
    """
    with upkeep_lock(store.layout):
        if not store.is_complete:
            _seal(store)
        shutil.rmtree(store.layout.locks, ignore_errors=True)
    return open_store(store.path)


def _seal(store: Store) -> None:
    objects = recorded_objects(store)
    damaged = [problem for entry in objects if (problem := size_problem(store, entry))]
    if damaged:
        message = f"{store.path} cannot be sealed:\n" + "\n".join(f"  {line}" for line in damaged)
        raise DamagedStore(message)
    # writes of killed runs that were never renamed
    for left_over in (*store.layout.zarr.rglob("*.partial"), *store.layout.commits.glob(".*")):
        left_over.unlink()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(store.layout.zarr)
    write_text_atomically(store.layout.card, data_card(store))
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "id": store.id,
        "state": "complete",
        "objects": [*objects, describe_object(store.path, store.layout.zarr / "zarr.json")],
        "labels": describe_object(store.path, store.layout.items),
    }
    write_text_atomically(store.layout.manifest, canonical_json(manifest))


def recorded_objects(store: Store) -> list[dict[str, Any]]:
    """Every object that the commit records name, in the order plan, model, units.

    Raises IncompleteStore when the record of a unit or of the model's arrays is missing.
    """
    layout = store.layout
    missing = sorted(set(range(store.geometry.units)) - set(store.committed_units()))
    if missing or not layout.model_commit.exists():
        what = f"units {', '.join(map(str, missing[:10]))}" if missing else "the model's arrays"
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        message = f"{store.path}: {what}{more} not finished. {store.remedy}"
        raise IncompleteStore(message)
    records = [layout.plan_commit, layout.model_commit, *map(layout.commit, range(store.geometry.units))]
    return [entry for record in records for entry in read_json(record)["objects"]]


def size_problem(store: Store, entry: dict[str, Any]) -> str | None:
    """What is wrong with the presence and size of a recorded object, or None."""
    path = store.path / check_object_path(store.path, entry["path"])
    if not path.is_file():
        return f"{entry['path']} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{entry['path']} has {path.stat().st_size} bytes, recorded {entry['bytes']}"
    return None
