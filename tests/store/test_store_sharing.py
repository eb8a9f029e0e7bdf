"""Push, pull and reading in place, against real servers on loopback: whole stores or none, whatever breaks."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

from agiqa.errors import (
    BusyStore,
    ConfigError,
    DamagedStore,
    DataError,
    IncompleteStore,
    RemoteError,
    SchemaError,
    SettingsConflict,
    UnknownName,
)
from agiqa.store import UnitWriter, basis_from, create_store, open_store, repair, sketch_store, store_summary, verify
from agiqa.store import remotes as remotes_module
from agiqa.store.cached import RemoteStore, cache_folder, open_remote
from agiqa.store.files import exclusive_lock, sha256_of_file
from agiqa.store.pulling import plan_pull, pull, run_pull
from agiqa.store.pushing import push, push_bytes
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.sharing_servers import CREDENTIALS, REPOSITORY, hub_server, s3_server, web_server


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    lengths = np.random.default_rng(7).integers(1, 60, 40).tolist()  # as the fixture `content`
    return make_store(tmp_path_factory.mktemp("original") / "small.agiqa", make_content(lengths))


@pytest.fixture
def stored(original, tmp_path):
    """A copy of one store, which costs less than making it."""
    return open_store(shutil.copytree(original.path, tmp_path / "small.agiqa"))


@pytest.fixture
def served(stored):
    with web_server(stored.path) as server:
        yield server


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1 KB, so that the objects of the small store take several requests each."""
    monkeypatch.setattr(remotes_module, "BLOCK", 1000)


@pytest.fixture
def impatient(monkeypatch):
    """Tries again at once, so that failures cost the tests no time."""
    monkeypatch.setattr(remotes_module, "FIRST_WAIT", 0.01)


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


# push


def test_a_store_pushed_and_pulled_is_the_same_store(stored, tmp_path):
    moved = []
    there = (tmp_path / "there").as_uri()
    done = push(stored, there, advance=moved.append)
    assert sum(moved) == push_bytes(stored)
    assert done.skipped == 0
    assert done.objects == len(files_below(stored.path))
    assert_equal_stores(tmp_path / "there", stored.path)
    assert files_below(tmp_path / "there") == files_below(stored.path)
    moved.clear()
    done = pull(there, tmp_path / "back.agiqa", advance=moved.append)
    assert sum(moved) == push_bytes(stored)
    assert done.objects == len(objects_of(stored.path))
    assert_equal_stores(tmp_path / "back.agiqa", stored.path)
    assert (tmp_path / "back.agiqa" / "README.md").read_text() == (stored.path / "README.md").read_text()


def test_pushing_again_sends_nothing_but_what_was_damaged_there(stored, tmp_path):
    there = tmp_path / "there"
    push(stored, there.as_uri())
    assert push(stored, there.as_uri()).objects == 0
    name = largest_object(stored)
    raw = bytearray((there / name).read_bytes())
    raw[7] ^= 1
    (there / name).write_bytes(raw)
    assert push(stored, there.as_uri()).objects == 1
    assert_equal_stores(there, stored.path)


def test_new_labels_are_pushed_over_the_old_ones(stored, tmp_path, content):
    push(stored, (tmp_path / "there").as_uri())
    content.items.labels["quality"][0] = 1.25
    relabelled = make_store(tmp_path / "relabelled.agiqa", content)
    assert relabelled.id == stored.id
    done = push(relabelled, (tmp_path / "there").as_uri())
    assert done.objects <= 20  # labels, manifest, and the records with their times; no features
    assert open_store(tmp_path / "there").items.labels["quality"][0] == 1.25
    assert_equal_stores(tmp_path / "there", relabelled.path)


@pytest.mark.parametrize("begun", ["whole", "MANIFEST.json", "store.zarr/zarr.json"])
def test_a_folder_with_another_store_is_refused(stored, tmp_path, content, begun):
    other = make_store(tmp_path / "other.agiqa", content, dataset="another")
    there = tmp_path / "there"
    push(other, there.as_uri())
    if begun != "whole":
        for path in files_below(there) - {begun}:
            (there / path).unlink()
    before = files_below(there)
    with pytest.raises(SettingsConflict, match=f"{other.id[:12]}.*{stored.id[:12]}.*nothing was sent"):
        push(stored, there.as_uri())
    assert files_below(there) == before


def test_a_damaged_store_is_not_pushed(stored, tmp_path):
    name = largest_object(stored)
    raw = bytearray((stored.path / name).read_bytes())
    raw[7] ^= 1
    (stored.path / name).write_bytes(raw)
    with pytest.raises(DamagedStore, match=name):
        push(stored, (tmp_path / "there").as_uri())
    assert not (tmp_path / "there").exists()


def test_an_unfinished_store_is_not_pushed(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0, 1])
    with pytest.raises(IncompleteStore, match="not finished"):
        push(store, (tmp_path / "there").as_uri())


def test_the_card_of_a_repository_stays(stored, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "README.md").write_text("my own words")
    push(stored, there.as_uri())
    assert (there / "README.md").read_text() == "my own words"
    assert verify(open_store(there), "full").sound


def test_urls_that_cannot_be_pushed_to_are_refused(stored, served, monkeypatch):
    with pytest.raises(ConfigError, match="can only be read"):
        push(stored, served.url)
    with pytest.raises(UnknownName, match=r"'s4'.*'s3'"):
        push(stored, "s4://bucket/folder")
    with pytest.raises(ConfigError, match=r"not a URL.*file://"):
        push(stored, "some/folder")
    with pytest.raises(ConfigError, match=r"with \?"):
        push(stored, "s3://bucket/folder?token=1")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gcsfs.*pip install 'agiqa\[remote\]'"):
        push(stored, "gs://bucket/folder")


# pull


@pytest.mark.parametrize("ranges", [True, False])
def test_a_web_server_with_or_without_ranges_is_pulled_from(stored, served, tmp_path, ranges, small_blocks):
    served.behaviour.ranges = ranges
    done = pull(served.url, tmp_path / "copy.agiqa")
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)
    assert done.skipped == 0
    assert done.bytes == push_bytes(stored)


@pytest.mark.parametrize("ranges", [True, False])
def test_cut_connections_are_taken_up_where_they_broke(stored, served, tmp_path, ranges, small_blocks, impatient):
    served.behaviour.ranges = ranges
    served.behaviour.cuts, served.behaviour.cut_after = 3, 300
    plan = plan_pull(served.url, tmp_path / "copy.agiqa")
    served.behaviour.cuts = 8
    run_pull(plan, jobs=4)
    assert served.behaviour.cuts == 0
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)


def test_half_an_object_is_completed_by_a_range(stored, served, tmp_path):
    name = largest_object(stored)
    pull(served.url, tmp_path / "copy.agiqa")
    copy = tmp_path / "copy.agiqa" / name
    raw = copy.read_bytes()
    half = len(raw) // 2
    copy.unlink()
    copy.with_name(f".{copy.name}.partial").write_bytes(raw[:half])
    served.behaviour.asked.clear()
    done = pull(served.url, tmp_path / "copy.agiqa")
    assert (done.objects, done.bytes) == (1, len(raw) - half)
    assert served.behaviour.asked_for(name) == [half]
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)


def test_half_an_object_of_wrong_bytes_is_fetched_anew(stored, served, tmp_path):
    name = largest_object(stored)
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    size = (copy / name).stat().st_size
    (copy / name).unlink()
    (copy / name).with_name(".0.partial").write_bytes(b"x" * (size - 1))
    moved = []
    pull(served.url, copy, advance=moved.append)
    assert sum(moved) == push_bytes(stored)
    assert_equal_stores(copy, stored.path)


def test_wrong_bytes_are_named_and_never_kept(stored, served, tmp_path):
    name = largest_object(stored)
    served.behaviour.wrong = {name}
    copy = tmp_path / "copy.agiqa"
    with pytest.raises(DamagedStore, match=f"{served.url}/{name} is damaged"):
        pull(served.url, copy)
    assert len(served.behaviour.asked_for(name)) == 2
    assert not (copy / name).exists()
    with pytest.raises(IncompleteStore):
        open_store(copy)
    served.behaviour.wrong = set()
    pull(served.url, copy)
    assert_equal_stores(copy, stored.path)


def test_a_missing_object_is_named(stored, served, tmp_path):
    name = largest_object(stored)
    (stored.path / name).unlink()
    with pytest.raises(DamagedStore, match=f"{served.url}/{name} is missing"):
        pull(served.url, tmp_path / "copy.agiqa")


def test_a_remote_that_is_not_there_says_so(served, tmp_path, impatient):
    with pytest.raises(SchemaError, match=r"no MANIFEST\.json"):
        pull(f"{served.url}/elsewhere", tmp_path / "copy.agiqa")
    with pytest.raises(RemoteError, match=r"http://127\.0\.0\.1:1/MANIFEST\.json"):
        pull("http://127.0.0.1:1", tmp_path / "copy.agiqa")
    plan = plan_pull(served.url, tmp_path / "copy.agiqa")
    served.behaviour.down = True
    with pytest.raises(RemoteError, match=f"{served.url}.*503"):
        plan_pull(served.url, tmp_path / "copy.agiqa")
    served.behaviour.down = False
    assert plan.bytes > 0


@pytest.mark.parametrize("where", ["objects", "labels"])
def test_a_manifest_that_leads_out_of_the_store_is_refused_before_anything_is_written(stored, served, tmp_path, where):
    manifest = json.loads(stored.layout.manifest.read_text())
    entry = manifest["labels"] if where == "labels" else manifest["objects"][0]
    before = files_below(tmp_path)
    for path in HOSTILE_PATHS:
        entry["path"] = path
        stored.layout.manifest.write_text(json.dumps(manifest))
        with pytest.raises(DamagedStore, match="no place for an object"):
            pull(served.url, tmp_path / "copy.agiqa")
        with pytest.raises(DamagedStore, match="no place for an object"):
            open_remote(served.url)
    assert files_below(tmp_path) == before
    assert not (tmp_path / "copy.agiqa").exists()


HOSTILE_PATHS = (
    "../outside",
    "/etc/agiqa",
    "store.zarr/../../outside",
    "store.zarr\\..\\outside",
    "store.zarr//outside",
    "store.zarr/./outside",
    "store.zarr/.hidden",
    "commits/plan.json",
    "MANIFEST.json",
    "",
)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"version": 7}, SchemaError, "v7; this agiqa reads"),
        ({"state": "partial"}, IncompleteStore, "'partial'"),
        ({"id": "../../x"}, DamagedStore, "its id is"),
        ({"objects": None}, DamagedStore, "no manifest"),
        ({"labels_next": {}}, IncompleteStore, "labels"),
    ],
)
def test_manifests_of_other_kinds_are_refused(stored, served, tmp_path, change, error, words):
    manifest = json.loads(stored.layout.manifest.read_text())
    stored.layout.manifest.write_text(json.dumps({**manifest, **change}))
    with pytest.raises(error, match=words):
        pull(served.url, tmp_path / "copy.agiqa")
    assert not (tmp_path / "copy.agiqa").exists()


def test_folders_with_other_things_are_not_touched(stored, served, tmp_path, content):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    other = make_store(tmp_path / "other.agiqa", content, dataset="another")
    unfinished = create_store(tmp_path / "unfinished.agiqa", plan_of(content, dataset="another"))
    for path in (tmp_path / "mine", other.path, unfinished.path):
        before = {name: (path / name).read_bytes() for name in files_below(path)}
        with pytest.raises(SettingsConflict, match="another path"):
            pull(served.url, path)
        assert {name: (path / name).read_bytes() for name in files_below(path)} == before


def test_a_repaired_store_is_made_whole_by_a_pull(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    unit = open_store(copy).layout.features_object(1)
    unit.write_bytes(unit.read_bytes()[::-1])
    assert repair(open_store(copy)).units == (1,)
    done = pull(served.url, copy)
    assert done.skipped > 0
    assert_equal_stores(copy, stored.path)


def test_a_pull_keeps_out_of_a_run_at_work(stored, served, tmp_path, content):
    started = create_store(tmp_path / "started.agiqa", plan_of(content))
    assert started.id == stored.id
    fill(started, content, units=[0])
    before = files_below(started.path)
    with UnitWriter(started).claim(1), pytest.raises(BusyStore, match="Another run"):
        pull(served.url, started.path)
    assert files_below(started.path) == before | {"locks/00000001"}
    pull(served.url, started.path)
    assert_equal_stores(started.path, stored.path)


def test_two_pulls_into_one_folder_do_not_meet(served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    plan_pull(served.url, copy)
    with exclusive_lock(copy / "locks" / "pull") as held:
        assert held
        with pytest.raises(BusyStore, match="Another pull"):
            pull(served.url, copy)


# parts


def names_in(store, units):
    return [store.items.names[int(item)] for unit in units for item in store.items_of(unit)[:1]]


def manifest_of(path):
    return json.loads((path / "MANIFEST.json").read_text())


def test_some_items_cost_some_bytes_and_further_pulls_add_theirs(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    first = pull(served.url, copy, items=names_in(stored, [2]))
    assert manifest_of(copy)["state"] == "partial"
    assert manifest_of(copy)["units"] == [2]
    part = served.behaviour.bytes_sent
    assert part < push_bytes(stored) * 0.7
    assert files_below(copy / "store.zarr" / "features" / "c") == {"2/0"}
    assert {f"store.zarr/{name}" for name in files_below(copy / "store.zarr")} | {"items.parquet"} == set(
        objects_of(copy)
    )
    features = served.behaviour.asked_for("store.zarr/features/c/5/0")
    second = pull(served.url, copy, items=names_in(stored, [5, 2]))
    assert manifest_of(copy)["units"] == [2, 5]
    assert features == []
    assert served.behaviour.asked_for("store.zarr/features/c/2/0") == [0]
    assert second.objects == 3  # features, token ids and roles of one unit
    assert first.objects + second.objects < pull(served.url, copy).objects + first.objects + second.objects
    assert_equal_stores(copy, stored.path)


def test_rows_of_a_part_are_those_of_the_store(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy, items=names_in(stored, [1, 4]))
    part = open_store(copy, allow_partial=True)
    for unit in (1, 4):
        np.testing.assert_array_equal(part.unit_rows(unit), stored.unit_rows(unit))
        np.testing.assert_array_equal(part.unit_rows(unit, "tokens/roles"), stored.unit_rows(unit, "tokens/roles"))
    np.testing.assert_array_equal(part.lm_head(), stored.lm_head())
    assert part.items.same_as(stored.items)


def test_a_part_of_all_units_is_the_store(stored, served, tmp_path):
    pull(served.url, tmp_path / "copy.agiqa", items=stored.items.names)
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)


def test_unknown_items_are_named_with_the_nearest(served, tmp_path):
    with pytest.raises(DataError, match=r"'image_7\.pgn'; did you mean 'image_7\.png'"):
        pull(served.url, tmp_path / "copy.agiqa", items=["image_7.pgn", "image_0.png"])
    with pytest.raises(ConfigError, match="No items are named"):
        pull(served.url, tmp_path / "copy.agiqa", items=[])


def test_a_part_is_not_pushed(served, stored, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy, items=names_in(stored, [2]))
    with pytest.raises(IncompleteStore, match="'partial'"):
        push(open_store(copy, allow_partial=True), (tmp_path / "there").as_uri())


def test_items_asked_of_a_complete_copy_leave_it_complete(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    pull(served.url, copy, items=names_in(stored, [2]))
    assert_equal_stores(copy, stored.path)


def test_new_labels_at_the_remote_reach_the_copy(stored, tmp_path, content):
    copy, there = tmp_path / "copy.agiqa", tmp_path / "there"
    push(stored, there.as_uri())
    pull(there.as_uri(), copy)
    content.items.labels["quality"][0] = 1.25
    push(make_store(tmp_path / "relabelled.agiqa", content), there.as_uri())
    before = (copy / "items.parquet").read_bytes()
    assert pull(there.as_uri(), copy).objects == 1
    assert open_store(copy).items.labels["quality"][0] == 1.25
    assert (copy / "items.before-pull.parquet").read_bytes() == before


# kills

MOVER = """
    import sys, time
    from pathlib import Path
    import agiqa.store.remotes as remotes
    from agiqa.store import open_store
    from agiqa.store.pulling import pull
    from agiqa.store.pushing import push
    remotes.BLOCK = 1000
    def advance(count):
        print(count, flush=True)
        time.sleep(0.002)
    if sys.argv[1] == "push":
        push(open_store(sys.argv[2]), sys.argv[3], advance=advance, jobs=3)
    else:
        pull(sys.argv[2], Path(sys.argv[3]), advance=advance, jobs=3)
"""


def start_mover(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(MOVER), *map(str, arguments)],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_after(process, lines):
    """Kill the process once it has moved something `lines` times; False when it had ended by itself."""
    for _ in range(lines):
        if not process.stdout.readline():
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.returncode == -signal.SIGKILL


def test_a_killed_push_shows_no_store_and_is_taken_up(stored, tmp_path):
    there = tmp_path / "there"
    moments = random.Random(3)
    for turn in range(3):
        assert kill_after(start_mover("push", stored.path, there.as_uri()), 15 * turn + moments.randrange(5, 15))
        assert not (there / "MANIFEST.json").exists()
        with pytest.raises(SchemaError, match="not a finished feature store"):
            pull(there.as_uri(), tmp_path / "copy.agiqa")
    before = len(files_below(there) & set(objects_of(stored.path)))
    done = push(stored, there.as_uri())
    assert before >= 3
    assert done.skipped >= before
    assert_equal_stores(there, stored.path)


def test_a_killed_pull_shows_no_store_and_is_taken_up(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    moments = random.Random(4)
    for turn in range(3):
        assert kill_after(start_mover("pull", served.url, copy), 8 * turn + moments.randrange(5, 12))
        assert not (copy / "MANIFEST.json").exists()
        with pytest.raises(IncompleteStore, match="run the same `agiqa store pull` again"):
            open_store(copy)
    done = pull(served.url, copy)
    assert done.skipped > 0
    assert done.bytes < push_bytes(stored)
    assert_equal_stores(copy, stored.path)


# reading in place


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
    assert remote.path == cache / "stores" / stored.id == cache_folder(stored.id)
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
        np.testing.assert_array_equal(remote.unit_rows(unit), stored.unit_rows(unit))
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


def test_damage_in_the_cache_names_the_folder_to_delete(stored, served):
    remote = open_remote(served.url)
    remote.read([0])
    path = remote.layout.features_object(0)
    raw = bytearray(path.read_bytes())
    raw[40] ^= 4
    path.write_bytes(raw)
    with pytest.raises(DamagedStore, match=f"Delete {remote.path}"):
        remote.read([0])
    shutil.rmtree(remote.path)
    np.testing.assert_array_equal(open_remote(served.url).read([0]).rows, stored.read([0]).rows)


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
    from agiqa.store.cached import open_remote
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


# S3 and the Hub


@pytest.fixture(scope="module")
def s3():
    pytest.importorskip("s3fs", reason="s3fs and moto are in the extras remote and dev: pip install -e '.[dev,remote]'")
    pytest.importorskip("moto", reason="moto is in the extra dev: pip install -e '.[dev]'")
    with s3_server() as url:
        yield url


@pytest.fixture
def bucket(s3, monkeypatch, request):
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": s3}.items():
        monkeypatch.setenv(name, value)
    import boto3

    name = f"bucket-{abs(hash(request.node.name)) % 10**8}"
    boto3.client("s3").create_bucket(Bucket=name)
    return f"s3://{name}/stores/small.agiqa"


def test_s3_takes_and_gives_a_store(stored, bucket, tmp_path):
    assert push(stored, bucket).skipped == 0
    assert push(stored, bucket).objects == 0
    pull(bucket, tmp_path / "copy.agiqa")
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)
    np.testing.assert_array_equal(open_remote(bucket).read([3, 30]).rows, stored.read([3, 30]).rows)


def test_a_push_to_s3_is_killed_and_taken_up(stored, bucket, tmp_path):
    assert kill_after(start_mover("push", stored.path, bucket), 8)
    with pytest.raises(SchemaError, match="not a finished"):
        open_remote(bucket)
    assert push(stored, bucket).skipped > 0
    pull(bucket, tmp_path / "copy.agiqa")
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)


def test_an_object_changed_in_s3_is_found_by_its_etag(stored, bucket):
    push(stored, bucket)
    import boto3

    place, _, key = bucket.removeprefix("s3://").partition("/")
    name = largest_object(stored)
    raw = bytearray((stored.path / name).read_bytes())
    raw[7] ^= 1
    boto3.client("s3").put_object(Bucket=place, Key=f"{key}/{name}", Body=bytes(raw))
    assert push(stored, bucket).objects == 1


def test_a_bucket_that_is_not_there_is_named(stored, bucket):
    with pytest.raises(RemoteError, match="s3://no-such-bucket-here/x"):
        push(stored, "s3://no-such-bucket-here/x")


HUB = """
    import json, sys
    from pathlib import Path
    from agiqa.store import open_store
    from agiqa.store.cached import open_remote
    from agiqa.store.pulling import pull
    from agiqa.store.pushing import push
    source, repository, folder, copy = sys.argv[1:]
    url = repository + folder
    sent = [push(open_store(source), url).as_dict() for _ in range(2)]
    part = pull(url, Path(copy) / "part", items=[open_store(source).items.names[0]]).as_dict()
    pulled = pull(url, Path(copy) / "whole").as_dict()
    rows = open_remote(repository + "@main" + folder).read([3, 30]).rows
    (Path(copy) / "rows").write_bytes(rows.tobytes())
    print(json.dumps({"sent": sent, "part": part, "pulled": pulled}))
"""


@pytest.mark.parametrize("folder", ["", "/stores/small.agiqa"])
def test_the_hub_takes_and_gives_a_store_in_few_commits(stored, tmp_path, folder):
    (tmp_path / "hub" / "someone" / "features").mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "features" / "README.md").write_text("---\nlicense: mit\n---\nmine")
    (tmp_path / "copy").mkdir()
    with hub_server(tmp_path / "hub") as hub:
        outcome = subprocess.run(
            [
                *(sys.executable, "-c", textwrap.dedent(HUB)),
                *(stored.path, "hf://datasets/someone/features", folder, tmp_path / "copy"),
            ],
            cwd=REPOSITORY,
            env={**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert outcome.returncode == 0, outcome.stderr
        assert hub.commits <= 4
    done = json.loads(outcome.stdout.splitlines()[-1])
    assert done["sent"][0]["skipped"] == 0
    assert done["sent"][1]["objects"] == 0
    assert done["part"]["bytes"] < done["pulled"]["bytes"]
    assert_equal_stores(tmp_path / "copy" / "whole", stored.path)
    assert (tmp_path / "copy" / "rows").read_bytes() == stored.read([3, 30]).rows.tobytes()
    assert (tmp_path / "hub" / "someone" / "features" / "README.md").read_text().endswith("mine")
