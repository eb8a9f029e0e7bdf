"""Which commit record an object of a store belongs to, and records written anew from MANIFEST.json."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from agiqa.errors import DamagedStore
from agiqa.store.arrays import object_rows
from agiqa.store.files import canonical_json, read_json, write_text_atomically
from agiqa.store.layout import MODEL_GROUPS
from agiqa.store.reading import Store

UNIT_ARRAYS: Final = ("features", "logits", "tokens/scale")
"""Arrays that are filled unit by unit."""

Owner = int | Literal["plan", "model"]
"""Who writes an object: a unit, the plan (or the seal), or the model."""


def owner_of(store: Store, path: str) -> Owner:
    """Who writes the object `path` (relative to the store); the temporary files of a write belong to its object."""
    inside = _inside(store, path)
    for name in UNIT_ARRAYS:
        depth = len(PurePosixPath(name).parts)
        if "/".join(inside[:depth]) == name and len(inside) > depth + 1 and inside[depth] == "c":
            number = inside[depth + 1].partition(".")[0]
            if number.isdigit():
                return int(number) * object_rows(store.array(name)) // store.geometry.unit_rows
    return "model" if inside[0] in MODEL_GROUPS else "plan"


def _inside(store: Store, path: str) -> tuple[str, ...]:
    """Parts of `path` below store.zarr. Raises DamagedStore where it lies elsewhere: what is listed may be deleted."""
    folder, *inside = PurePosixPath(path).parts or ("",)
    if folder != store.layout.zarr.name or not inside or ".." in inside:
        message = f"{store.path} lists {path!r}, which is no object of a store. Do not use it; copy the store again."
        raise DamagedStore(message)
    return tuple(inside)


def record_path(store: Store, owner: Owner) -> Path:
    """Where the record of `owner` lies."""
    if isinstance(owner, int):
        return store.layout.commit(owner)
    return store.layout.plan_commit if owner == "plan" else store.layout.model_commit


def root_metadata(store: Store) -> str:
    """Path of the root group's metadata, which the seal writes last and no record lists."""
    return f"{store.layout.zarr.name}/zarr.json"


def owners(store: Store) -> list[Owner]:
    """All that have a record in a finished store."""
    return ["plan", "model", *range(store.geometry.units)]


def recorded_objects_of(store: Store, owner: Owner) -> list[dict[str, Any]] | None:
    """The objects in the record of `owner`; None when it is absent. Raises DamagedStore when it is unreadable."""
    path = record_path(store, owner)
    if not path.exists():
        return None
    record = read_json(path)
    if not isinstance(record, dict) or not isinstance(objects := record.get("objects"), list):
        message = f"{path} is damaged: it is no record of objects."
        raise DamagedStore(message)
    for entry in objects:
        _inside(store, entry["path"])
    return objects


def is_readable(store: Store, owner: Owner) -> bool:
    """Whether the record of `owner` is absent or can be read."""
    try:
        recorded_objects_of(store, owner)
    except DamagedStore:
        return False
    return True


def objects_by_owner(store: Store, manifest: dict[str, Any]) -> dict[Owner, list[dict[str, Any]]]:
    """The objects of `manifest` by who wrote them; the metadata of the root belong to the seal and are left out."""
    found: dict[Owner, list[dict[str, Any]]] = {owner: [] for owner in owners(store)}
    for entry in manifest["objects"]:
        if entry["path"] == root_metadata(store):
            continue
        owner = owner_of(store, entry["path"])
        if owner not in found:
            message = f"{store.path} lists {entry['path']}, of a unit that it does not have. Copy the store again."
            raise DamagedStore(message)
        found[owner].append(entry)
    return found


def restore_records(store: Store, objects: Mapping[Owner, Sequence[Mapping[str, Any]]]) -> None:
    """Write the records of a finished store that are absent, unreadable, or not what its manifest lists.

    `objects` are those of `objects_by_owner`, for the records that there shall be.
    """
    store.layout.commits.mkdir(exist_ok=True)
    for owner, entries in objects.items():
        if not is_readable(store, owner) or recorded_objects_of(store, owner) != list(entries):
            write_text_atomically(record_path(store, owner), canonical_json(_record(store, owner, entries)))


def unreadable_records(store: Store) -> Iterator[Owner]:
    """Whose records are there and cannot be read."""
    return (owner for owner in owners(store) if not is_readable(store, owner))


def _record(store: Store, owner: Owner, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if not isinstance(owner, int):
        return {"objects": entries}
    work = {"worker": "restored from MANIFEST.json", "seconds": 0.0}
    items, rows = len(store.items_of(owner)), store.rows_used(owner)
    return {"unit": owner, "objects": entries, "items": items, "rows": rows, **work}
