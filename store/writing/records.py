"""Which commit record an object of a store belongs to, and records written anew from MANIFEST.json."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal

from agiqa.errors import DamagedStore
from agiqa.store.disk.files import canonical_json, files_below, read_json, write_text_atomically
from agiqa.store.format.arrays import object_rows
from agiqa.store.format.layout import MODEL_GROUPS, PLANNED_ROW_ARRAYS, ROOT_METADATA, ROW_ARRAYS
from agiqa.store.format.listings import LABEL_KEYS, attributes_entry, read_record
from agiqa.store.format.recorded_items import recorded_labels
from agiqa.store.reading.store import Store

_NUMBER: Final = re.compile(r"[0-9]{1,12}")

Owner = int | Literal["plan", "model"]
"""Who writes an object: a unit, the plan (or the seal), or the model."""


def owner_of(store: Store, path: str) -> Owner:
    """Who writes the object `path` (relative to the store); the temporary files of a write belong to its object."""
    array, unit = _place(store, path)
    if unit is not None and array not in PLANNED_ROW_ARRAYS:
        return unit
    return "model" if array in MODEL_GROUPS else "plan"


def unit_of(store: Store, path: str) -> int | None:
    """The unit whose rows the object `path` holds; None where it holds none."""
    return _place(store, path)[1]


def _place(store: Store, path: str) -> tuple[str, int | None]:
    """The array with a row per token and the unit that an object belongs to; its group and None for all others."""
    inside = _inside(store, path)
    for name in ROW_ARRAYS:
        depth = len(PurePosixPath(name).parts)
        if "/".join(inside[:depth]) == name and len(inside) > depth + 1 and inside[depth] == "c":
            number = inside[depth + 1].partition(".")[0]
            if _NUMBER.fullmatch(number):
                return name, int(number) * object_rows(store.array(name)) // store.geometry.unit_rows
    return inside[0], None


def _inside(store: Store, path: str, *, listed_in: Path | None = None) -> tuple[str, ...]:
    """Parts of `path` below store.zarr. Raises DamagedStore where it lies elsewhere: what is listed may be deleted."""
    folder, *inside = PurePosixPath(path).parts or ("",)
    if folder != store.layout.zarr.name or not inside or ".." in inside:
        where = listed_in or store.path
        message = f"{where} lists {path!r}, which is no object of a store. Do not use it; copy the store again."
        raise DamagedStore(message)
    return tuple(inside)


def record_path(store: Store, owner: Owner) -> Path:
    """Where the record of `owner` lies."""
    if isinstance(owner, int):
        return store.layout.commit(owner)
    return store.layout.plan_commit if owner == "plan" else store.layout.model_commit


def owners(store: Store) -> list[Owner]:
    """All that have a record in a finished store."""
    return ["plan", "model", *range(store.geometry.units)]


def recorded_objects_of(store: Store, owner: Owner) -> list[dict[str, Any]] | None:
    """The objects in the record of `owner`; None when it is absent. Raises DamagedStore when it is unreadable."""
    path = record_path(store, owner)
    if not path.exists():
        return None
    objects = read_record(path)
    for entry in objects:
        _inside(store, entry["path"], listed_in=path)
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
        if entry["path"] == ROOT_METADATA:
            continue
        _inside(store, entry["path"], listed_in=store.layout.manifest)
        owner = owner_of(store, entry["path"])
        if owner not in found:
            where = store.layout.manifest
            message = f"{where} lists {entry['path']}, of a unit that the store does not have. Copy the store again."
            raise DamagedStore(message)
        found[owner].append(entry)
    return found


def unlisted_files(store: Store, listed: Collection[str]) -> list[str]:
    """Paths, relative to the store, of the files below store.zarr that are not in `listed`."""
    names = (path.relative_to(store.path).as_posix() for path in files_below(store.layout.zarr))
    return sorted(name for name in names if name not in listed)


def restore_records(store: Store, objects: Mapping[Owner, Sequence[Mapping[str, Any]]]) -> None:
    """Write the records of a finished store that are absent, unreadable, or not what its manifest lists.

    `objects` are those of `objects_by_owner`, for the records that there shall be.
    """
    store.layout.commits.mkdir(exist_ok=True)
    for owner, entries in objects.items():
        record = _record(store, owner, entries)
        if not is_readable(store, owner) or _differs(record_path(store, owner), record):
            write_text_atomically(record_path(store, owner), canonical_json(record))


def record_problems(store: Store, manifest: dict[str, Any] | None) -> Iterator[tuple[Owner, str]]:
    """What is wrong with the records that are there: they cannot be read, or do not list what `manifest` does.

    A finished store may lack records, since they serve resumption only; an unfinished one has no manifest.
    """
    listed = {} if manifest is None else objects_by_owner(store, manifest)
    for owner in owners(store):
        try:
            found = recorded_objects_of(store, owner)
        except DamagedStore as error:
            yield owner, str(error)
            continue
        if found is not None and found != listed.get(owner, found):
            name = record_path(store, owner).relative_to(store.path).as_posix()
            yield owner, f"{name} and {store.layout.manifest.name} do not list the same objects"


def unreadable_records(store: Store) -> Iterator[Owner]:
    """Whose records are there and cannot be read."""
    return (owner for owner in owners(store) if not is_readable(store, owner))


def _differs(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the record at `path` is absent or lists other things than `record`; who wrote it when does not count."""
    if not path.exists():
        return True
    found = read_json(path)
    return any(found.get(key) != record.get(key) for key in ("objects", *LABEL_KEYS, "attributes"))


def _record(store: Store, owner: Owner, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if owner == "plan":
        labels = recorded_labels(store.layout)
        return {"objects": list(entries), "labels": labels, "attributes": attributes_entry(store.attributes)}
    if owner == "model":
        return {"objects": list(entries)}
    work = {"worker": "restored from MANIFEST.json", "seconds": 0.0}
    items, rows = len(store.items_of(owner)), store.rows_used(owner)
    return {"unit": owner, "objects": list(entries), "items": items, "rows": rows, **work}
