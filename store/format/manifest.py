"""The listings of a store, MANIFEST.json and the commit records, read without trusting them.

A listing has entries: path, bytes and sha256 of a file. MANIFEST.json lists a sealed store, commits/*.json an
unfinished one. The item table changes together with its entry in MANIFEST.json, or, of an unfinished store, in
commits/plan.json. Two files cannot be replaced in one step, so a new table is announced first:

1. The listing gets `labels_next`, the entry of the new table, beside `labels`.
2. items.parquet is replaced.
3. The listing gets the new entry as `labels`, and loses `labels_next`.

At every moment one of the two entries is that of items.parquet, and readers accept either. Records of old plans have no
such entry; the first replacement of labels adds it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store.disk.files import (
    canonical_json,
    describe_object,
    read_json,
    sha256_of_file,
    sync_file,
    write_text_atomically,
)
from agiqa.store.format.items import Items, read_items, write_items
from agiqa.store.format.layout import ITEM_TABLE, ROOT_METADATA, StoreLayout, is_object_path, row_object
from agiqa.store.format.metadata import LARGEST, REMEDY, check_version, damaged

MANIFEST_BYTES = 128 << 20
"""Longest manifest that is read at a URL: 890,000 objects, as of two million items of 1,000 tokens in 18 TiB."""
CARD_BYTES = 16 << 20
LABEL_KEYS = ("labels", "labels_next")
"""Keys of a listing: the entry of items.parquet, and that of its announced successor."""
_NOW, _NEXT = LABEL_KEYS
_SHA256 = re.compile(r"[0-9a-f]{64}")


def require_object_path(where: Path | str, listed: str) -> None:
    """Raise DamagedStore unless `listed`, in the listing `where`, is the path of an object by FORMAT.md."""
    if not is_object_path(listed):
        raise damaged(where, f"it lists {listed[:200]!r}, which is no object of a store")


def check_object(root: Path, listed: str, *, listed_in: Path | str) -> Path:
    """The file of an object of the store at `root` that `listed_in` lists.

    Raises DamagedStore if it lies outside of the store, by its path or through a link.
    """
    require_object_path(listed_in, listed)
    check_inside(root, root / listed)
    return root / listed


def check_inside(root: Path, path: Path) -> None:
    """Raise DamagedStore if `path` is outside of the store at `root` once links are followed."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError) as error:  # links in a circle
        raise damaged(root, f"{path.relative_to(root)} is a link that leads nowhere ({error})") from error
    if not real.is_relative_to(root.resolve()):
        message = (
            f"{root}: {path.relative_to(root)} is a link out of the store, to {real}. Nothing is written or removed "
            "there. Copy the store with its links followed (`cp -RL`)."
        )
        raise DamagedStore(message)


def read_record(path: Path) -> list[dict[str, Any]]:
    """The entries of the objects in the commit record, or the manifest, at `path`. Raises DamagedStore if invalid."""
    remedy = REMEDY
    if path.stem.isdigit() or path.stem == "model":
        remedy = f"`agiqa store repair {path.parent.parent}` removes it; the next run computes its objects again."
    record = read_json(path, remedy=remedy)
    objects: Any = record.get("objects") if isinstance(record, dict) else None
    if not _are_entries(objects):
        raise damaged(path, "it is no record of objects", remedy=remedy)
    return list(objects)


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at `path`, with valid entries. Raises as `check_manifest`."""
    return check_manifest(read_json(path), path)


def check_manifest(found: Any, where: Path | str, *, remedy: str = REMEDY) -> dict[str, Any]:
    """`found`, the JSON value of a manifest at `where`. Its entries are valid, their paths may be any text.

    Raises SchemaError for an unknown format or version, and DamagedStore, with `remedy`, for anything else.
    """
    if not isinstance(found, dict):
        raise damaged(where, "it is no manifest", remedy=remedy)
    check_version(where, found)
    if not _are_entries(found.get("objects")):
        raise damaged(where, "it does not list objects with path, bytes and sha256", remedy=remedy)
    if _NOW not in _label_entries(where, found, remedy=remedy):
        raise damaged(where, f"it does not list {ITEM_TABLE}", remedy=remedy)
    state, units = found.get("state"), found.get("units", [])
    if state not in ("complete", "partial") or not isinstance(units, list) or (state == "partial") != bool(units):
        raise damaged(where, f"its state is {state!r}, of units {units!r}"[:200], remedy=remedy)
    if not all(type(unit) is int for unit in units):
        raise damaged(where, "its units are no numbers", remedy=remedy)
    return found


def _are_entries(objects: Any) -> bool:
    return isinstance(objects, list) and all(map(_is_entry, objects))


def _is_entry(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    size = entry.get("bytes")
    return isinstance(entry.get("path"), str) and type(size) is int and size >= 0 and _is_sha256(entry.get("sha256"))


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def _label_entries(where: Path | str, listing: dict[str, Any], *, remedy: str = REMEDY) -> dict[str, Any]:
    """The entries under LABEL_KEYS. Raises DamagedStore if one is not that of the item table."""
    labels = {key: listing[key] for key in LABEL_KEYS if key in listing}
    if not all(_is_entry(entry) and entry["path"] == ITEM_TABLE for entry in labels.values()):
        raise damaged(where, f"it does not list {ITEM_TABLE} as it should", remedy=remedy)
    return labels


def content_hash(objects: Iterable[tuple[str, str]]) -> str:
    """Hex sha256 of the path and sha256 of all `objects`, in any order: of all bytes of a store but its labels.

    Stores of one id may differ in it: the same settings can give other last bits.
    """
    return hashlib.sha256(canonical_json(sorted(objects)).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a store, as a manifest lists it."""

    path: str
    """Relative to the store, with slashes; never leads out of it."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The manifest of a store to be shared. Its paths lie inside the store."""

    text: str
    id: str
    objects: tuple[Entry, ...]
    labels: Entry
    """The entry of items.parquet."""
    state: str = "complete"
    """`complete`, or `partial` for some units of a store."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All objects, and the item table."""
        return (self.labels, *self.objects)

    @property
    def content(self) -> str:
        """`content_hash` of the objects."""
        return content_hash((entry.path, entry.sha256) for entry in self.objects)

    @property
    def metadata(self) -> list[Entry]:
        """Metadata, index and item table: enough to know the items and their rows."""
        return [entry for entry in self.entries if _is_metadata(entry.path)]

    def part(self, units: Iterable[int], unit_of: Mapping[str, int]) -> "Manifest":
        """The manifest of the part of this store that holds `units`; `unit_of` is that of `units_of_objects`."""
        kept = set(units)
        objects = [entry for entry in self.objects if entry.path not in unit_of or unit_of[entry.path] in kept]
        whole, listed = json.loads(self.text), {entry.path for entry in objects}
        whole["objects"] = [entry for entry in whole["objects"] if entry["path"] in listed]
        text = canonical_json({**whole, "state": "partial", "units": sorted(kept)})
        return Manifest(text=text, id=self.id, objects=tuple(objects), labels=self.labels, state="partial")


def parse_manifest(text: str, where: str) -> Manifest:
    """The manifest of a store to be shared, in `text` of `where` (a URL or a path).

    Raises SchemaError for an unknown format or version, IncompleteStore for a partial or unsettled store, and
    DamagedStore if the text is no manifest, or lists a path outside the store.
    """
    remedy = "Nothing was written; push it again."
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise damaged(where, f"it is not JSON: {error}", remedy=remedy) from error
    if isinstance(found, dict):
        check_version(where, found)
        _require_settled(found, where)
    check_manifest(found, where, remedy=remedy)
    labels, *objects = (
        Entry(path=entry["path"], bytes=entry["bytes"], sha256=entry["sha256"])
        for entry in [found[_NOW], *found["objects"]]
    )
    manifest = Manifest(text=text, id=str(found.get("id")), objects=tuple(objects), labels=labels)
    if problem := _sharing_problem(manifest):
        raise damaged(where, problem, remedy=remedy)
    return manifest


def _require_settled(found: dict[str, Any], where: str) -> None:
    if found.get("state") != "complete":
        message = f"{where}: state {found.get('state')!r}; only a complete store can be shared. Complete it first."
        raise IncompleteStore(message)
    if _NEXT in found:
        message = f"{where}: its labels are being replaced, or that was cut off. Run `agiqa store labels` again first."
        raise IncompleteStore(message)


def _sharing_problem(manifest: Manifest) -> str | None:
    paths = [entry.path for entry in manifest.objects]
    if strays := [path for path in paths if not is_object_path(path)]:
        return f"it lists {strays[0][:200]!r}, which is no object of a store"
    if len(set(paths)) != len(paths) or ROOT_METADATA not in paths:
        return f"it lists an object twice, or not {ROOT_METADATA}"
    for entry in manifest.entries:
        most = MANIFEST_BYTES if entry.path.endswith("/zarr.json") else LARGEST
        if entry.bytes > most:
            return f"it says that {entry.path} has {entry.bytes} bytes; {most} are plausible"
    return None if _is_sha256(manifest.id) else f"its id is {manifest.id!r}"


def units_of_objects(folder: Path, manifest: Manifest) -> dict[str, int]:
    """The unit of every object that holds rows, by path; `folder` must have the metadata of the store already."""
    zarr = StoreLayout(folder).zarr
    unit_rows = int(read_json(zarr / "zarr.json")["attributes"]["unit_rows"])
    rows: dict[str, int] = {}
    units: dict[str, int] = {}
    for entry in manifest.objects:
        if found := row_object(entry.path):
            array, position = found
            if array not in rows:
                grid = read_json(zarr / array / "zarr.json")["chunk_grid"]
                rows[array] = int(grid["configuration"]["chunk_shape"][0])
            units[entry.path] = position * rows[array] // unit_rows
    return units


def _is_metadata(path: str) -> bool:
    return path == ITEM_TABLE or path.endswith("/zarr.json") or path.startswith("store.zarr/index/")


def attributes_sha256(attributes: dict[str, Any]) -> str:
    """The sha256 of the root attributes in the plan's record. The seal rewrites the file itself.

    Raises ValueError for attributes without canonical JSON.
    """
    return hashlib.sha256(canonical_json(attributes).encode()).hexdigest()


def has_planned_attributes(layout: StoreLayout, attributes: dict[str, Any]) -> bool:
    """Whether `attributes` are those that the plan recorded; True for old records, which have none."""
    record = read_json(layout.plan_commit) if layout.plan_commit.exists() else {}
    recorded = record.get("attributes") if isinstance(record, dict) else None
    try:
        return recorded is None or recorded == attributes_sha256(attributes)
    except ValueError:
        return False


def has_listed_metadata(layout: StoreLayout, manifest: dict[str, Any]) -> bool:
    """Whether the root metadata, which contain those of all arrays, are the file that the manifest lists."""
    listed = [entry["sha256"] for entry in manifest["objects"] if entry["path"] == ROOT_METADATA]
    return listed == [sha256_of_file(layout.root / ROOT_METADATA)]


def recorded_labels(layout: StoreLayout) -> dict[str, Any] | None:
    """The entry of the current item table: `labels_next` if the table is the announced one, else `labels`.

    None if an old record of a plan lists no table.
    """
    return _current_labels(layout, _labels_listing(layout)[1])


def read_recorded_items(layout: StoreLayout) -> Items:
    """The items of the store at `layout`; another process may be replacing them.

    Raises DamagedStore if items.parquet is not the listed table.
    """
    while True:
        found = _table_sha256(layout)
        _require_listed(layout)
        items = read_items(layout.items)
        if _table_sha256(layout) == found:
            return items


def table_problem(layout: StoreLayout) -> str | None:
    """What is wrong with the bytes of items.parquet, or None; another process may be replacing it."""
    while True:
        path, listing = _labels_listing(layout)
        found = _table_sha256(layout)
        listed = [entry["sha256"] for entry in listing.values()]
        if found in listed or (found is not None and not listed):
            return None
        if _labels_listing(layout) == (path, listing):  # else the table was replaced in between: look again
            what = "missing" if found is None else f"not the item table that {path.name} lists"
            return f"{layout.items.name} is {what}"


def replace_recorded_items(layout: StoreLayout, items: Items) -> None:
    """Replace the item table of the store by `items`. A kill leaves the old table or the new one, listed.

    The caller holds the seal lock.
    """
    temporary = layout.items.with_name(f".{layout.items.name}.next")
    write_items(temporary, items)
    entry = {**describe_object(layout.root, temporary), "path": ITEM_TABLE}
    path, entries = _labels_listing(layout)
    now = _current_labels(layout, entries) or describe_object(layout.root, layout.items)
    listing = read_json(path)
    write_text_atomically(path, canonical_json({**listing, _NOW: now, _NEXT: entry}))
    temporary.replace(layout.items)
    sync_file(layout.root)
    _settle(path, listing, entry)


def settle_labels(layout: StoreLayout) -> None:
    """Finish a replacement that was killed: the listing then has the entry of the current table, and no other.

    Raises DamagedStore if items.parquet is neither the old table nor the announced one. The caller holds the seal lock.
    """
    path, entries = _labels_listing(layout)
    if _NEXT not in entries:
        return
    _require_listed(layout)
    _settle(path, read_json(path), _current_labels(layout, entries))


def _settle(path: Path, listing: dict[str, Any], entry: dict[str, Any] | None) -> None:
    settled = {key: value for key, value in listing.items() if key != _NEXT}
    write_text_atomically(path, canonical_json({**settled, _NOW: entry}))


def _labels_listing(layout: StoreLayout) -> tuple[Path, dict[str, Any]]:
    """The file that lists the item table, and its entries under LABEL_KEYS."""
    for path in (layout.manifest, layout.plan_commit):
        try:
            listing = read_json(path)
        except FileNotFoundError:
            continue
        if not isinstance(listing, dict):
            raise damaged(path, "it lists nothing")
        return path, _label_entries(path, listing)
    return layout.plan_commit, {}


def _current_labels(layout: StoreLayout, entries: dict[str, Any]) -> dict[str, Any] | None:
    announced = entries.get(_NEXT)
    current = announced if announced and _table_sha256(layout) == announced["sha256"] else entries.get(_NOW)
    return None if current is None else {str(key): value for key, value in current.items()}


def _require_listed(layout: StoreLayout) -> None:
    if problem := table_problem(layout):
        remedy = "Copy the store again."
        if not layout.manifest.exists():
            remedy = "Run the command that began the store again: it writes its table anew."
        message = f"{layout.root}/{problem}. {remedy}"
        raise DamagedStore(message)


def _table_sha256(layout: StoreLayout) -> str | None:
    return sha256_of_file(layout.items) if layout.items.is_file() else None
