"""Commit records: which objects each one lists, whether these are sound, and records restored from MANIFEST.json."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from agiqa.errors import DamagedStore
from agiqa.store.disk.files import canonical_json, files_below, read_json, sha256_of_file, write_text_atomically
from agiqa.store.format.arrays import object_rows
from agiqa.store.format.layout import MODEL_GROUPS, PLANNED_ROW_ARRAYS, ROOT_METADATA, StoreLayout, array_of, row_object
from agiqa.store.format.manifest import (
    LABEL_KEYS,
    attributes_sha256,
    check_object,
    read_record,
    recorded_labels,
    require_object_path,
)
from agiqa.store.reading.store import Store

_RECORD = re.compile(r"(?:[0-9]{8,}|model|plan)\.json")
_KILLED_RECORD = re.compile(r"\.(?:[0-9]{8,}|model|plan)\.json\..+|\.zarr\.json\.new")

Owner = int | Literal["plan", "model"]
"""The record that lists an object: that of a unit, of the plan, or of the model's arrays."""


def owner_of(store: Store, path: str) -> Owner:
    """The record for the object `path` (relative to the store); a temporary file of a write counts as its object."""
    unit = unit_of(store, path)
    if unit is not None and array_of(path) not in PLANNED_ROW_ARRAYS:
        return unit
    return "model" if path.split("/")[1] in MODEL_GROUPS else "plan"


def unit_of(store: Store, path: str) -> int | None:
    """The unit of the rows in the object `path`; None if it has no rows."""
    if (found := row_object(path)) is None:
        return None
    array, position = found
    return position * object_rows(store.array(array)) // store.geometry.unit_rows


def record_path(store: Store, owner: Owner) -> Path:
    """The file of a record."""
    if isinstance(owner, int):
        return store.layout.commit(owner)
    return store.layout.plan_commit if owner == "plan" else store.layout.model_commit


def owners(store: Store) -> list[Owner]:
    """All records of a finished store."""
    return ["plan", "model", *range(store.geometry.units)]


def recorded_objects_of(store: Store, owner: Owner) -> list[dict[str, Any]] | None:
    """The entries in the record of `owner`; None if it does not exist. Raises DamagedStore if it is invalid."""
    path = record_path(store, owner)
    if not path.exists():
        return None
    objects = read_record(path)
    for entry in objects:
        require_object_path(path, entry["path"])
    return objects


def is_readable(store: Store, owner: Owner) -> bool:
    """Whether the record of `owner` does not exist or is valid."""
    try:
        recorded_objects_of(store, owner)
    except DamagedStore:
        return False
    return True


def objects_by_owner(store: Store, manifest: dict[str, Any]) -> dict[Owner, list[dict[str, Any]]]:
    """The entries in `manifest` by record, without the root metadata, which no record lists.

    Raises DamagedStore for an entry that is no object of the store.
    """
    found: dict[Owner, list[dict[str, Any]]] = {owner: [] for owner in owners(store)}
    where = store.layout.manifest
    for entry in manifest["objects"]:
        if entry["path"] == ROOT_METADATA:
            continue
        require_object_path(where, entry["path"])
        owner = owner_of(store, entry["path"])
        if owner not in found:
            message = f"{where} lists {entry['path']}, of a unit that the store does not have. Copy the store again."
            raise DamagedStore(message)
        found[owner].append(entry)
    return found


def size_problem(store: Store, entry: dict[str, Any]) -> str | None:
    """What is wrong with the presence or the size of a listed object, or None."""
    path = check_object(store.path, entry["path"], listed_in=f"{store.path}, {_listing_of(store)}")
    if not path.is_file():
        return f"{entry['path']} is missing"
    if path.stat().st_size != entry["bytes"]:
        return f"{entry['path']} has {path.stat().st_size} bytes, recorded {entry['bytes']}"
    return None


def content_problem(store: Store, entry: dict[str, Any]) -> str | None:
    """What is wrong with any byte of a listed object, or None."""
    problem = size_problem(store, entry)
    if problem is None and sha256_of_file(store.path / entry["path"]) != entry["sha256"]:
        problem = f"{entry['path']} does not have the sha256 that {_listing_of(store)} lists"
    return problem


def _listing_of(store: Store) -> str:
    return store.layout.manifest.name if store.is_sealed else "its commit record"


def unlisted_files(store: Store, listed: Collection[str]) -> list[str]:
    """Paths, relative to the store, of the files below store.zarr that are not in `listed`."""
    names = (path.relative_to(store.path).as_posix() for path in files_below(store.layout.zarr))
    return sorted(name for name in names if name not in listed)


def restore_records(store: Store, objects: Mapping[Owner, Sequence[Mapping[str, Any]]]) -> None:
    """Write the records in `objects` (as `objects_by_owner`) that are missing, invalid, or differ from the manifest."""
    store.layout.commits.mkdir(exist_ok=True)
    for owner, entries in objects.items():
        record = _record(store, owner, entries)
        if not is_readable(store, owner) or _differs(record_path(store, owner), record):
            write_text_atomically(record_path(store, owner), canonical_json(record))


def _record(store: Store, owner: Owner, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    if owner == "plan":
        labels = recorded_labels(store.layout)
        return {"objects": list(entries), "labels": labels, "attributes": attributes_sha256(store.attributes)}
    if owner == "model":
        return {"objects": list(entries)}
    work = {"worker": "restored from MANIFEST.json", "seconds": 0.0}
    items, rows = len(store.items_of(owner)), store.rows_used(owner)
    return {"unit": owner, "objects": list(entries), "items": items, "rows": rows, **work}


def _differs(path: Path, record: Mapping[str, Any]) -> bool:
    """Whether the record at `path` is missing or has other objects, labels or attributes than `record`."""
    if not path.exists():
        return True
    found = read_json(path)
    return any(found.get(key) != record.get(key) for key in ("objects", *LABEL_KEYS, "attributes"))


def record_problems(store: Store, manifest: dict[str, Any] | None) -> Iterator[tuple[Owner, str]]:
    """What is wrong with each existing record: it is invalid, or lists other objects than `manifest`.

    Records serve to resume a run, so a finished store may lack some. An unfinished store has no manifest.
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
    """The records that exist and are invalid."""
    return (owner for owner in owners(store) if not is_readable(store, owner))


def killed_records(layout: StoreLayout) -> list[Path]:
    """Temporary files of records, of killed runs and of runs at work.

    `commits` may be a link to a folder with other files, which are left out.
    """
    found = (path for path in layout.commits.glob(".*") if _KILLED_RECORD.fullmatch(path.name))
    return sorted(path for path in found if path.is_symlink() or path.is_file())


def remove_records(layout: StoreLayout) -> None:
    """Remove all records, their temporary files, and their folder if it is empty then.

    If `commits` is a link, remove only the link: its files may be those of another store.
    """
    if layout.commits.is_symlink():
        layout.commits.unlink()
        return
    records = [path for path in layout.commits.glob("*") if _RECORD.fullmatch(path.name)]
    for path in (*records, *killed_records(layout)):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it holds other files
        layout.commits.rmdir()
