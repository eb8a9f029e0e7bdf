"""Servers that send without end, pack a bomb, or lie about sizes: no more is read, written or unpacked than is listed."""

import gzip
import json
import shutil

import pytest

from agiqa.errors import ConfigError, DamagedStore, RemoteError
from agiqa.store import open_store
from agiqa.store.sharing import fetching, pulling
from agiqa.store.sharing.in_place import open_remote
from agiqa.store.sharing.pulling import pull
from tests.store.sharing.copies import assert_equal_stores, largest_object
from tests.store.sharing_servers import ENDLESS


def bytes_on_disk(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def pull_to(tmp_path, url):
    pull(url, tmp_path / "copy.agiqa")


def read_all(tmp_path, url):
    open_remote(url).read(range(40))


@pytest.mark.parametrize("reading", [pull_to, read_all])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_object_without_end_is_read_to_its_listed_size(stored, served, tmp_path, reading, ranges):
    name = largest_object(stored)
    served.behaviour.ranges, served.behaviour.endless = ranges, {name}
    listed = bytes_on_disk(stored.path)
    with pytest.raises(DamagedStore, match=f"{served.url}/{name} is damaged: more than"):
        reading(tmp_path, served.url)
    assert served.behaviour.bytes_sent < ENDLESS
    assert bytes_on_disk(tmp_path) - listed < 2 * listed
    served.behaviour.endless = set()
    reading(tmp_path, served.url)


def test_the_rest_of_an_object_without_end_is_read_to_its_listed_size(stored, served, tmp_path, small_blocks):
    """The answer to a range may be without end too."""
    name = largest_object(stored)
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    raw = (copy / name).read_bytes()
    (copy / name).unlink()
    (copy / name).with_name(".0.partial").write_bytes(raw[:-10])
    served.behaviour.endless = {name}
    with pytest.raises(DamagedStore, match="more than"):
        pull(served.url, copy)
    assert served.behaviour.asked_for(name)[-2] == len(raw) - 10
    served.behaviour.endless = set()
    pull(served.url, copy)
    assert_equal_stores(copy, stored.path)


@pytest.mark.parametrize("reading", [pull_to, read_all])
def test_a_manifest_without_end_is_refused_at_a_limit(served, tmp_path, reading, monkeypatch):
    monkeypatch.setattr(fetching, "MANIFEST_BYTES", 1 << 20)
    served.behaviour.endless = {"MANIFEST.json"}
    with pytest.raises(DamagedStore, match=r"MANIFEST\.json has more than 1,048,576 bytes"):
        reading(tmp_path, served.url)
    assert served.behaviour.bytes_sent < ENDLESS
    assert not (tmp_path / "copy.agiqa").exists()


def test_a_card_without_end_is_refused_at_a_limit(served, tmp_path, monkeypatch):
    monkeypatch.setattr(pulling, "CARD_BYTES", 1 << 20)
    served.behaviour.endless = {"README.md"}
    with pytest.raises(DamagedStore, match=r"README\.md has more than"):
        pull(served.url, tmp_path / "copy.agiqa")
    assert served.behaviour.bytes_sent < ENDLESS


@pytest.mark.parametrize("name", ["MANIFEST.json", "store.zarr/features/c/0/0"])
def test_a_body_that_unpacks_to_any_size_is_not_unpacked(served, tmp_path, name):
    served.behaviour.compressed = {name: gzip.compress(bytes(ENDLESS))}
    with pytest.raises(RemoteError, match=f"{name}: the server sends it compressed") as caught:
        pull(served.url, tmp_path / "copy.agiqa")
    assert caught.value.refused
    assert served.behaviour.asked_for(name) == [0]


@pytest.mark.parametrize(
    ("path", "size"), [("store.zarr/features/c/0/0", 1 << 50), ("store.zarr/features/zarr.json", 1 << 31)]
)
def test_sizes_that_no_object_has_are_refused(stored, served, tmp_path, path, size):
    manifest = json.loads(stored.layout.manifest.read_text())
    next(entry for entry in manifest["objects"] if entry["path"] == path)["bytes"] = size
    stored.layout.manifest.write_text(json.dumps(manifest))
    with pytest.raises(DamagedStore, match=f"{path} has {size} bytes"):
        pull(served.url, tmp_path / "copy.agiqa")
    with pytest.raises(DamagedStore, match=f"{path} has {size} bytes"):
        open_remote(served.url)
    assert not (tmp_path / "copy.agiqa").exists()


def test_more_than_the_disk_has_room_for_is_refused_before_anything_is_fetched(stored, served, tmp_path):
    free = shutil.disk_usage(tmp_path).free
    manifest = json.loads(stored.layout.manifest.read_text())
    rows = [entry for entry in manifest["objects"] if "/features/c/" in entry["path"]]
    if free > len(rows) * (64 << 30):
        pytest.skip("this disk has room for all that a manifest may list")
    for entry in rows:
        entry["bytes"] = 64 << 30
    stored.layout.manifest.write_text(json.dumps(manifest))
    with pytest.raises(ConfigError, match="bytes free"):
        pull(served.url, tmp_path / "copy.agiqa")
    assert {name for name, _ in served.behaviour.asked} == {"MANIFEST.json"}


def test_objects_that_are_shorter_or_longer_than_listed_are_damaged(stored, served, tmp_path):
    name = largest_object(stored)
    whole = (stored.path / name).read_bytes()
    for body in (whole[:-1], whole + b"x", b""):
        (stored.path / name).write_bytes(body)
        with pytest.raises(DamagedStore, match=f"{name} is damaged"):
            pull(served.url, tmp_path / "copy.agiqa")
    (stored.path / name).write_bytes(whole)
    pull(served.url, tmp_path / "copy.agiqa")
    assert open_store(tmp_path / "copy.agiqa").id == stored.id
