"""What commit records and MANIFEST.json list, read without trusting it: objects by path, bytes and sha256."""

import hashlib
import re
from pathlib import Path
from typing import Any

from agiqa.errors import DamagedStore
from agiqa.store.disk.files import canonical_json, read_json, sha256_of_file
from agiqa.store.format.checks import REMEDY, check_inside, check_version, damaged
from agiqa.store.format.layout import ITEM_TABLE, StoreLayout

_OBJECT_PATH = re.compile(r"store\.zarr(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254})+")
_LONGEST_PATH = 1000
_SHA256 = re.compile(r"[0-9a-f]{64}")
LABEL_KEYS = ("labels", "labels_next")
"""Where a listing has the entry of items.parquet, and that of the table that it is being replaced by."""


def read_record(path: Path) -> list[dict[str, Any]]:
    """The objects that the commit record, or the manifest, at `path` lists. Raises DamagedStore where it is none."""
    remedy = REMEDY
    if path.stem.isdigit() or path.stem == "model":
        remedy = (
            f"`agiqa store repair {path.parent.parent}` drops it; what it stood for is computed anew by the next run."
        )
    record = read_json(path, remedy=remedy)
    objects = record.get("objects") if isinstance(record, dict) else None
    if not isinstance(objects, list) or not all(map(is_entry, objects)):
        message = f"{path} is damaged: it is no record of objects. {remedy}"
        raise DamagedStore(message)
    return objects


def is_entry(entry: Any) -> bool:
    """Whether `entry` describes an object as manifests and records do: path, bytes and sha256, the path any text."""
    if not isinstance(entry, dict):
        return False
    size = entry.get("bytes")
    return isinstance(entry.get("path"), str) and type(size) is int and size >= 0 and is_sha256(entry.get("sha256"))


def is_sha256(value: Any) -> bool:
    """Whether `value` is a sha256 in lower-case hex."""
    return isinstance(value, str) and _SHA256.fullmatch(value) is not None


def is_object_path(text: str) -> bool:
    """Whether `text` can be the path of an object of store.zarr: it leads nowhere else by itself."""
    return len(text) <= _LONGEST_PATH and _OBJECT_PATH.fullmatch(text) is not None


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest at `path`, its entries whole.

    Raises SchemaError for a foreign format or version, and DamagedStore where it is anything else.
    """
    manifest = read_json(path)
    if not isinstance(manifest, dict):
        raise damaged(path, "it is no manifest")
    check_version(path, manifest)
    if not isinstance(manifest.get("objects"), list) or not all(map(is_entry, manifest["objects"])):
        raise damaged(path, "it does not list objects as it should")
    if LABEL_KEYS[0] not in _labels_in(path, manifest):
        raise damaged(path, f"it does not list {ITEM_TABLE}")
    state, units = manifest.get("state"), manifest.get("units", [])
    if state not in ("complete", "partial") or not isinstance(units, list) or (state == "partial") != bool(units):
        raise damaged(path, f"its state is {state!r}, of units {units!r}"[:200])
    if not all(type(unit) is int for unit in units):
        raise damaged(path, "its units are no numbers")
    return manifest


def read_labels(path: Path) -> dict[str, Any]:
    """What the manifest, or the record of the plan, at `path` has under LABEL_KEYS.

    Raises DamagedStore where that is no entry of the item table.
    """
    listing = read_json(path)
    if not isinstance(listing, dict):
        raise damaged(path, "it lists nothing")
    return _labels_in(path, listing)


def _labels_in(path: Path, listing: dict[str, Any]) -> dict[str, Any]:
    labels = {key: listing[key] for key in LABEL_KEYS if key in listing}
    if not all(is_entry(entry) and entry["path"] == ITEM_TABLE for entry in labels.values()):
        raise damaged(path, f"it does not list {ITEM_TABLE} as it should")
    return labels


def attributes_entry(attributes: dict[str, Any]) -> str:
    """The sha256 by which the record of the plan knows the attributes of the root; the seal rewrites the file itself.

    Raises ValueError where they have no canonical JSON.
    """
    return hashlib.sha256(canonical_json(attributes).encode()).hexdigest()


def are_attributes_of(layout: StoreLayout, attributes: dict[str, Any]) -> bool:
    """Whether the root's attributes are those that the plan recorded, if it did: records were made without them."""
    record = read_json(layout.plan_commit) if layout.plan_commit.exists() else {}
    recorded = record.get("attributes") if isinstance(record, dict) else None
    try:
        return recorded is None or recorded == attributes_entry(attributes)
    except ValueError:
        return False


def is_root_metadata_of(layout: StoreLayout, manifest: dict[str, Any]) -> bool:
    """Whether the metadata of all arrays, which the seal gathered, are what the manifest lists."""
    path = layout.zarr / "zarr.json"
    listed = [entry["sha256"] for entry in manifest["objects"] if layout.root / entry["path"] == path]
    return listed == [sha256_of_file(path)]


def check_object_path(path: Path, listed: Any, *, listed_in: str) -> str:
    """The path of an object as `listed_in`, the manifest or a record of the store at `path`, lists it.

    Raises DamagedStore where it leads out of the store, by itself or through a link.
    """
    text = str(listed)
    if text != ITEM_TABLE and not is_object_path(text):
        raise damaged(path, f"{listed_in} lists {text[:200]!r}, which is no object of a store")
    check_inside(path, path / text)
    return text
