"""Pull, from a server that may break in any way: the whole store comes or none, and nothing else on disk is touched."""

import json
import random

import pytest

from agiqa.errors import BusyStore, DamagedStore, IncompleteStore, RemoteError, SchemaError, SettingsConflict
from agiqa.store import UnitWriter, create_store, open_store, repair
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.sharing.in_place import open_remote
from agiqa.store.sharing.pulling import plan_pull, pull, run_pull
from agiqa.store.sharing.pushing import push, push_bytes
from tests.store.conftest import fill, make_store, plan_of
from tests.store.sharing.copies import assert_equal_stores, files_below, largest_object
from tests.store.sharing.movers import kill_after, start_mover


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


@pytest.mark.parametrize(
    ("where", "says"), [("objects", "no object of a store"), ("labels", "does not list items.parquet")]
)
def test_a_manifest_that_leads_out_is_refused_before_anything_is_written(stored, served, tmp_path, where, says):
    manifest = json.loads(stored.layout.manifest.read_text())
    entry = manifest["labels"] if where == "labels" else manifest["objects"][0]
    before = files_below(tmp_path)
    for path in HOSTILE_PATHS:
        entry["path"] = path
        stored.layout.manifest.write_text(json.dumps(manifest))
        with pytest.raises(DamagedStore, match=says):
            pull(served.url, tmp_path / "copy.agiqa")
        with pytest.raises(DamagedStore, match=says):
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
        ({"objects": None}, DamagedStore, "does not list objects"),
        ({"labels_next": {}}, IncompleteStore, "labels"),
    ],
)
def test_manifests_of_other_kinds_are_refused(stored, served, tmp_path, change, error, words):
    manifest = json.loads(stored.layout.manifest.read_text())
    stored.layout.manifest.write_text(json.dumps({**manifest, **change}))
    with pytest.raises(error, match=words):
        pull(served.url, tmp_path / "copy.agiqa")
    assert not (tmp_path / "copy.agiqa").exists()


@pytest.mark.parametrize("text", ["[]", "{", '{"format": "agiqa.features", "version": 1, "objects": 3}'])
def test_a_local_manifest_that_is_none_is_named_and_kept(served, tmp_path, text):
    path = tmp_path / "copy.agiqa"
    pull(served.url, path)
    (path / "MANIFEST.json").write_text(text)
    with pytest.raises(DamagedStore, match=r"MANIFEST\.json is damaged"):
        pull(served.url, path)
    assert (path / "MANIFEST.json").read_text() == text


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
    pull(served.url, copy)
    with exclusive_lock(copy / "locks" / "pull") as held:
        assert held
        with pytest.raises(BusyStore, match="Another pull"):
            pull(served.url, copy)


@pytest.mark.parametrize("items", [None, ["image_0.png"]])
@pytest.mark.parametrize("there", ["nothing", "part", "unfinished", "store"])
def test_a_plan_changes_nothing(stored, served, tmp_path, content, cache, items, there):
    copy = tmp_path / "copy.agiqa"
    if there == "unfinished":
        fill(create_store(copy, plan_of(content)), content, units=[0])
    elif there != "nothing":
        pull(served.url, copy, items=stored.items.names[-1:] if there == "part" else None)
    before = {name: (copy / name).read_bytes() for name in files_below(copy)}
    if items and there == "unfinished":
        with pytest.raises(SettingsConflict):
            plan_pull(served.url, copy, items=items)
    else:
        plan = plan_pull(served.url, copy, items=items)
        assert plan.state == ("partial" if items and there != "store" else "complete")
        assert 0 < plan.bytes <= push_bytes(stored)
    assert {name: (copy / name).read_bytes() for name in files_below(copy)} == before
    assert copy.exists() == (there != "nothing")
    assert not cache.exists()


def test_a_pull_killed_while_it_wrote_its_first_file_is_taken_up(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    copy.mkdir()
    (copy / ".PULLING.json.0123abcd").write_text("{")
    pull(served.url, copy)
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
