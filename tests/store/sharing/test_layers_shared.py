"""Stores with layers are pushed, pulled whole and in part, and read in place."""

import numpy as np
import pytest

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store import convert_store, open_store, verify
from agiqa.store.sharing.in_place import open_remote
from agiqa.store.sharing.pulling import pull
from agiqa.store.sharing.pushing import push
from tests.store.damage import contents
from tests.store.layered import make_layered, make_store
from tests.store.sharing_servers import web_server

LENGTHS = (3, 9, 0, 5, 1, 30)


@pytest.fixture(scope="module")
def content():
    return make_layered(LENGTHS)


@pytest.fixture
def layered(tmp_path, content):
    return make_store(tmp_path / "s.agiqa", content)


def test_a_copy_has_every_layer(layered, tmp_path):
    push(layered, f"file://{tmp_path / 'there'}")
    pull(f"file://{tmp_path / 'there'}", tmp_path / "copy.agiqa")
    copy = open_store(tmp_path / "copy.agiqa")
    assert contents(copy) == contents(layered)
    assert verify(copy, "numeric").sound


def test_a_part_has_every_layer_of_its_items(layered, content, tmp_path):
    pull(f"file://{layered.path}", tmp_path / "part.agiqa", items=[content.names[1]])
    part = open_store(tmp_path / "part.agiqa")
    (unit,) = part.committed_units()
    assert verify(part, "numeric").sound
    np.testing.assert_array_equal(part.layer("0").read([1]).rows, content.states["0"][1])
    missing = next(item for item in range(len(LENGTHS)) if part.units[item] != unit)
    with pytest.raises(IncompleteStore):
        part.layer("0").read([missing])


@pytest.mark.parametrize("encoding", ["hidden", "int8"])
def test_layers_are_read_in_place_and_fetched_only_if_they_are_read(layered, tmp_path, encoding):
    store = layered if encoding == "hidden" else convert_store(layered, tmp_path / "i.agiqa", encoding)
    with web_server(store.path) as served:
        remote = open_remote(served.url)
        found, expected = remote.layer("3").read([5, 1]), store.layer("3").read([5, 1])
        np.testing.assert_array_equal(found.rows, expected.rows)
        fetched = {name.split("/c/")[0] for name, _ in served.behaviour.asked if "/c/" in name}
        assert "store.zarr/layers/3" in fetched
        assert not {"store.zarr/features", "store.zarr/layers/0"} & fetched
        np.testing.assert_array_equal(remote.layer("0+3+last").read([1]).rows, store.layer("0+3+last").read([1]).rows)
        assert remote.layer("3").content == store.layer("3").content
        assert remote.layer("3").location == f"{served.url} (layer 3)"


def test_wrong_bytes_of_a_layer_are_never_read_in_place(layered):
    path = layered.layout.object_of("layers/3", int(layered.units[1]), dimensions=2)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)
    with web_server(layered.path) as served:
        remote = open_remote(served.url)
        with pytest.raises(DamagedStore, match="layers/3"):
            remote.layer("3").read([1])
