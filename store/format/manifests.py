"""What a MANIFEST.json lists, read without trusting it, and which of its objects belong to which unit."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store.disk.files import canonical_json, read_json
from agiqa.store.format.checks import check_version
from agiqa.store.format.layout import ITEM_TABLE, ROOT_METADATA, StoreLayout
from agiqa.store.format.listings import is_entry, is_object_path, is_sha256
from agiqa.store.format.provenance import content_hash

_ROWS_OBJECT = re.compile(r"store\.zarr/(?P<array>features|logits|tokens/[^/]+)/c/(?P<position>\d+)(/0)*")

MANIFEST_BYTES = 128 << 20
"""The longest manifest that is read at a URL: 890,000 objects, as of two million items of 1,000 tokens in 18 TiB."""
CARD_BYTES = 16 << 20
_LARGEST_OBJECT = 64 << 30
"""Bytes of an object above which a manifest counts as damaged, see `agiqa.store.format.checks`."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One object of a store, as its manifest records it."""

    path: str
    """Relative to the store, with slashes; never leads out of it."""
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A manifest, checked: every path lies inside the store, every hash is a hash."""

    text: str
    id: str
    objects: tuple[Entry, ...]
    labels: Entry
    """The entry of items.parquet."""
    state: str = "complete"
    """`complete`, or `partial` for some units of a store."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All objects, the item table among them."""
        return (self.labels, *self.objects)

    @property
    def content(self) -> str:
        """What the store consists of but for its labels, see `content_hash`."""
        return content_hash((entry.path, entry.sha256) for entry in self.objects)

    @property
    def metadata(self) -> list[Entry]:
        """What is needed to know the items and where they lie: metadata, index and item table."""
        return [entry for entry in self.entries if _is_metadata(entry.path)]

    def part(self, units: Iterable[int], unit_of: Mapping[str, int]) -> "Manifest":
        """The manifest of the part of this store that holds `units`; state `partial`."""
        kept = set(units)
        objects = [entry for entry in self.objects if entry.path not in unit_of or unit_of[entry.path] in kept]
        whole = json.loads(self.text)
        listed = {entry.path for entry in objects}
        text = canonical_json(
            {
                **whole,
                "state": "partial",
                "units": sorted(kept),
                "objects": [entry for entry in whole["objects"] if entry["path"] in listed],
            }
        )
        return Manifest(text=text, id=self.id, objects=tuple(objects), labels=self.labels, state="partial")


def parse_manifest(text: str, where: str) -> Manifest:
    """The manifest in `text`, found at `where` (a URL or a path, for messages).

    Raises SchemaError for another format or version, IncompleteStore for a store that is there in part only, and
    DamagedStore where the text is no manifest or names a path outside the store.
    """
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_manifest(where, f"it is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise _not_a_manifest(where, "it is no JSON object")
    check_version(where, found)
    if found.get("state") != "complete":
        message = (
            f"{where}: state {found.get('state')!r}; only a complete store can be shared. Complete that one first."
        )
        raise IncompleteStore(message)
    if "labels_next" in found:
        message = f"{where}: its labels are being replaced, or that was cut off. Run `agiqa store labels` again first."
        raise IncompleteStore(message)
    objects = found.get("objects")
    if not isinstance(objects, list) or not all(map(is_entry, [found.get("labels"), *objects])):
        raise _not_a_manifest(where, "it does not list objects and item table with path, bytes and sha256")
    labels, *listed = (_entry(entry) for entry in [found["labels"], *objects])
    manifest = Manifest(text=text, id=str(found.get("id")), objects=tuple(listed), labels=labels)
    _check(manifest, where)
    return manifest


def units_of_objects(folder: Path, manifest: Manifest) -> dict[str, int]:
    """The unit of every object that holds rows, by path; `folder` must have the metadata of the store already."""
    zarr = StoreLayout(folder).zarr
    unit_rows = int(read_json(zarr / "zarr.json")["attributes"]["unit_rows"])
    rows: dict[str, int] = {}
    units: dict[str, int] = {}
    for entry in manifest.objects:
        if found := _ROWS_OBJECT.fullmatch(entry.path):
            array = found["array"]
            if array not in rows:
                grid = read_json(zarr / array / "zarr.json")["chunk_grid"]
                rows[array] = int(grid["configuration"]["chunk_shape"][0])
            units[entry.path] = int(found["position"]) * rows[array] // unit_rows
    return units


def array_of(path: str) -> str | None:
    """The array with row addresses that the object at `path` belongs to, or None for all other objects."""
    found = _ROWS_OBJECT.fullmatch(path)
    return found["array"] if found else None


def _is_metadata(path: str) -> bool:
    return path == ITEM_TABLE or path.endswith("/zarr.json") or path.startswith("store.zarr/index/")


def _entry(found: dict[str, Any]) -> Entry:
    return Entry(path=found["path"], bytes=found["bytes"], sha256=found["sha256"])


def _check(manifest: Manifest, where: str) -> None:
    paths = [entry.path for entry in manifest.objects]
    stray = [path for path in paths if not is_object_path(path)]
    if manifest.labels.path != ITEM_TABLE:
        stray.append(manifest.labels.path)
    if stray:
        raise _not_a_manifest(where, f"it names {stray[0]!r}, which is no place for an object of a store")
    if len(set(paths)) != len(paths) or ROOT_METADATA not in paths:
        raise _not_a_manifest(where, f"it names an object twice, or not {ROOT_METADATA}")
    for entry in manifest.entries:
        most = MANIFEST_BYTES if entry.path.endswith("/zarr.json") else _LARGEST_OBJECT
        if entry.bytes > most:
            raise _not_a_manifest(where, f"it says that {entry.path} has {entry.bytes} bytes; {most} are plausible")
    if not is_sha256(manifest.id):
        raise _not_a_manifest(where, f"its id is {manifest.id!r}")


def _not_a_manifest(where: str, reason: str) -> DamagedStore:
    return DamagedStore(f"{where} is no manifest of a feature store ({reason}). Nothing was written; push it again.")
