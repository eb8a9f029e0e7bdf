"""Stores read where they are: the rows of the local one, each object fetched once, and never a wrong or missing byte."""

import json
import shutil
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from agiqa.errors import DamagedStore, IncompleteStore, RemoteError, SettingsConflict
from agiqa.store import basis_from, open_store, sketch_store, store_summary
from agiqa.store.disk.files import sha256_of_file
from agiqa.store.sharing.in_place import RemoteStore, open_remote
from agiqa.store.sharing.pulling import pull
from tests.store.conftest import make_store
from tests.store.sharing.copies import largest_object
from tests.store.sharing_servers import REPOSITORY, web_server


def test_a_remote_store_reads_as_the_local_one(stored, served, cache):
    remote = open_remote(served.url)
    assert isinstance(remote, RemoteStore)
    assert served.behaviour.asked_for(largest_object(stored)) == []
    assert served.behaviour.asked_for("store.zarr/lm_head/weight/c/0/0") == []
    for items in ([3], [0, 39, 17, 0], range(40)):
        expected, found = stored.read(list(items)), remote.read(list(items))
        np.testing.assert_array_equal(found.rows, expected.rows)
        np.testing.assert_array_equal(found.roles, expected.roles)
        np.testing.assert_array_equal(found.offsets, expected.offsets)
    np.testing.assert_array_equal(remote.lm_head(), stored.lm_head())
    assert (remote.id, remote.lm_head_sha256) == (stored.id, stored.lm_head_sha256)
    assert remote.items.same_as(stored.items)
    assert remote.committed_units() == stored.committed_units()
    assert remote.path.parent == cache / "stores"
    expected, found = store_summary(stored), store_summary(remote)
    assert found["path"] == served.url
    assert found["bytes_features"] == expected["bytes_features"]


def test_only_units_that_are_read_are_fetched_and_only_once(stored, served):
    remote = open_remote(served.url)
    item = int(stored.items_of(3)[0])
    remote.read([item])
    remote.read([item])
    fetched = {name for name, _ in served.behaviour.asked if "/features/c/" in name}
    assert fetched == {"store.zarr/features/c/3/0"}
    again = open_remote(served.url)
    before = len(served.behaviour.asked)
    again.read([item])
    assert len(served.behaviour.asked) == before


def test_rows_read_past_the_store_are_fetched_too(stored, served):
    """Whoever indexes the Zarr array itself never meets zeros that stand for what was not fetched."""
    expected = np.asarray(stored.array("features")[:])
    found = np.asarray(open_remote(served.url).array("features")[:])
    np.testing.assert_array_equal(found, expected)


def test_units_in_order_are_fetched_ahead(stored, served):
    remote = open_remote(served.url)
    served.behaviour.pause = 0.02
    for unit in range(stored.geometry.units):
        np.testing.assert_array_equal(remote.read_unit(unit), stored.read_unit(unit))
    names = [name for name, _ in served.behaviour.asked if "/features/c/" in name]
    assert sorted(names) == sorted({f"store.zarr/features/c/{unit}/0" for unit in range(stored.geometry.units)})


def test_a_sketch_is_read_in_place(stored, tmp_path):
    sketch = sketch_store(stored, tmp_path / "sketch.agiqa", basis=basis_from(stored, 4)).store
    with web_server(sketch.path) as server:
        remote = open_remote(server.url)
        assert [name for name, _ in server.behaviour.asked if "/basis/q/c/" in name] == []
        np.testing.assert_array_equal(remote.basis().q, sketch.basis().q)
        np.testing.assert_array_equal(remote.read([5, 6]).rows, sketch.read([5, 6]).rows)


def test_many_readers_of_one_cache_fetch_each_unit_once(stored, served):
    stores = [open_remote(served.url) for _ in range(2)]
    served.behaviour.pause = 0.01
    failures = []

    def read(store):
        try:
            np.testing.assert_array_equal(store.read(range(40)).rows, stored.read(range(40)).rows)
        except AssertionError as error:
            failures.append(error)

    readers = [threading.Thread(target=read, args=(store,)) for store in stores * 2]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert failures == []
    names = [name for name, _ in served.behaviour.asked if "/c/" in name]
    assert len(names) == len(set(names))


def test_wrong_bytes_are_never_read_in_place(stored, served, cache):
    name = largest_object(stored)
    unit = int(name.split("/")[3])
    remote = open_remote(served.url)
    served.behaviour.wrong = {name}
    with pytest.raises(DamagedStore, match=f"{served.url}/{name} is damaged") as caught:
        remote.read(stored.items_of(unit))
    assert str(cache) in "".join(caught.value.__notes__)
    served.behaviour.wrong = set()
    np.testing.assert_array_equal(remote.read(stored.items_of(unit)).rows, stored.read(stored.items_of(unit)).rows)


def test_a_server_that_went_away_is_not_called_damage(stored, served, impatient):
    remote = open_remote(served.url)
    served.behaviour.down = True
    with pytest.raises(RemoteError, match="503"):
        remote.read([0])


def test_an_object_that_was_pushed_damaged_is_told_as_such(stored, served):
    path = stored.layout.features_object(0)
    raw = bytearray(path.read_bytes())
    raw[40] ^= 4
    path.write_bytes(raw)
    manifest = json.loads(stored.layout.manifest.read_text())
    entry = next(entry for entry in manifest["objects"] if stored.path / entry["path"] == path)
    entry["sha256"] = sha256_of_file(path)
    stored.layout.manifest.write_text(json.dumps(manifest))
    with pytest.raises(DamagedStore, match=f"{served.url}: .*damaged before it was pushed"):
        open_remote(served.url).read([0])


def test_a_cache_does_not_pass_for_a_store(served, tmp_path):
    """What was not fetched would read as zeros."""
    remote = open_remote(served.url)
    with pytest.raises(IncompleteStore):
        open_store(remote.path)
    with pytest.raises(SettingsConflict):
        pull(served.url, remote.path)


def test_labels_replaced_at_the_remote_are_seen_when_it_is_opened_again(stored, served, content, tmp_path):
    open_remote(served.url).read(range(40))
    content.items.labels["quality"][0] = 1.25
    relabelled = make_store(tmp_path / "relabelled.agiqa", content)
    for name in ("items.parquet", "MANIFEST.json"):
        shutil.copy(relabelled.path / name, stored.path / name)
    served.behaviour.asked.clear()
    again = open_remote(served.url)
    assert again.items.labels["quality"][0] == 1.25
    again.read(range(40))
    assert {name for name, _ in served.behaviour.asked} == {"MANIFEST.json", "items.parquet"}


FORKED = """
    import os, sys, warnings
    from agiqa.store import open_store
    from agiqa.store.sharing.in_place import open_remote
    warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
    remote = open_remote(sys.argv[2])
    remote.read([0])
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            same = remote.read(range(40)).rows.tobytes() == open_store(sys.argv[1]).read(range(40)).rows.tobytes()
            os._exit(0 if same else 1)
        children.append(child)
    sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


def test_forked_workers_read_in_place(stored, served):
    script = [sys.executable, "-c", textwrap.dedent(FORKED), stored.path, served.url]
    outcome = subprocess.run(script, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)
    assert outcome.returncode == 0, outcome.stderr


def test_a_file_url_is_opened_where_it_is(stored, cache):
    assert open_remote(stored.path.as_uri()).path == stored.path
    assert not cache.exists()
