"""What a copy of a store consists of, and whether it is the same store."""

import json

from agiqa.store import open_store, verify
from agiqa.store.disk.files import sha256_of_file


def objects_of(path):
    """sha256 of every file that the manifest of the store at `path` lists."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {entry["path"]: sha256_of_file(path / entry["path"]) for entry in [*manifest["objects"], manifest["labels"]]}


def files_below(path):
    return {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}


def assert_equal_stores(copy, original):
    assert verify(open_store(copy), "full").sound
    assert objects_of(copy) == objects_of(original)
    assert (copy / "MANIFEST.json").read_text() == (original / "MANIFEST.json").read_text()
    assert [path for path in copy.rglob("*") if ".partial" in path.name or path.name == "PULLING.json"] == []
    assert not (copy / "locks").exists()


def largest_object(store):
    return max(
        (f"store.zarr/features/c/{unit}/0" for unit in range(store.geometry.units)),
        key=lambda name: (store.path / name).stat().st_size,
    )
