"""Garbage collection: what kills left is removed, and nothing that is listed, in use or of others."""

import contextlib
import os
import random
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from agiqa.errors import DamagedStore
from agiqa.store import open_store, seal, verify
from agiqa.store.care import garbage
from agiqa.store.care.garbage import collect_garbage
from agiqa.store.care.repairing import repair
from agiqa.store.disk.locks import exclusive_lock
from agiqa.store.sharing.pulling import pull
from agiqa.store.writing import creating
from tests.store.conftest import make_content, make_store
from tests.store.crash_points import REPOSITORY
from tests.store.damage import contents, everything, refill

KILLED_FILL = """
    import os, signal, sys
    from pathlib import Path
    from tests.store.conftest import make_content, plan_of, unit_features, write_model
    from agiqa.store import UnitWriter, create_store
    content = make_content([37] * 60)
    store = create_store(Path(sys.argv[1]), plan_of(content))
    writer = UnitWriter(store)
    write_model(writer, content)
    def watch(event, arguments):  # the record of unit 2 is about to be linked to its name
        if event == "os.link" and str(arguments[1]).endswith("00000002.json"):
            if sys.argv[2] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            print("held", flush=True)
            sys.stdin.readline()
    sys.addaudithook(watch)
    for unit in writer.pending():
        with writer.claim(unit):
            writer.write_unit(unit, unit_features(store, content, unit), seconds=0.0)
"""


def start_fill(path, how):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(KILLED_FILL), str(path), how],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def names(report, root):
    return {os.path.relpath(found.path, root) for found in report.garbage}


def test_what_a_killed_fill_left_is_removed(tmp_path):
    path = tmp_path / "s.agiqa"
    start_fill(path, "kill").communicate()
    store = open_store(path, allow_partial=True)
    partial = store.layout.zarr / "features" / "c" / "4" / "0.0123.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    before = everything(tmp_path)
    planned = collect_garbage(store, dry_run=True)
    assert everything(tmp_path) == before
    report = collect_garbage(store)
    assert planned.garbage == report.garbage
    left_record = next(name for name in before if "/commits/." in name)
    locks = {f"locks/{name}" for name in ("plan", "model", "00000000", "00000001")}
    expected = {"store.zarr/features/c/2/0", "store.zarr/features/c/4/0.0123.partial", *locks}
    assert names(report, path) == expected | {os.path.relpath(left_record, "s.agiqa")}
    assert report.bytes == sum(len(before[f"s.agiqa/{name}"]) for name in names(report, path))
    assert not partial.parent.exists()
    assert verify(store, "full").damage == ()
    content = make_content([37] * 60)
    assert contents(refill(store, content)) == contents(make_store(tmp_path / "w" / "s.agiqa", content))


def test_what_a_run_is_at_work_on_stays(tmp_path):
    path = tmp_path / "s.agiqa"
    run = start_fill(path, "wait")
    assert run.stdout is not None
    assert run.stdout.readline() == b"held\n"
    store = open_store(path, allow_partial=True)
    for dry_run in (True, False):
        report = collect_garbage(store, dry_run=dry_run)
        assert names(report, path) == {f"locks/{name}" for name in ("plan", "model", "00000000", "00000001")}
        left = {os.path.relpath(name, path) for name in report.in_use}
        assert "store.zarr/features/c/2/0" in left
        assert any(name.startswith("commits/.") for name in left)
    run.communicate(b"\n")
    assert run.returncode == 0
    assert verify(seal(store), "full").sound


def test_strays_and_left_overs_of_a_finished_store_are_removed_and_nothing_else(stored):
    before = everything(stored.path)
    strays = {
        "store.zarr/features/c/99/0": b"stray",
        "store.zarr/notes/zarr.json": b"{}",
        "store.zarr/features/c/1/0.0123.partial": b"half",
        "commits/.00000001.json.x1y2": b"half",
        ".MANIFEST.json.x1y2": b"half",
        ".PULLING.json.x1y2": b"half",
        ".items.parquet.next": b"half",
        "locks/00000007": b"",
    }
    for name, raw in strays.items():
        (stored.path / name).parent.mkdir(parents=True, exist_ok=True)
        (stored.path / name).write_bytes(raw)
    (stored.path / "notes.txt").write_text("mine")
    assert repair(stored).strays == tuple(sorted(name for name in strays if name.startswith("store.zarr")))
    report = collect_garbage(stored)
    assert names(report, stored.path) == set(strays)
    assert everything(stored.path) == {**before, "notes.txt": b"mine"}
    assert not stored.layout.locks.exists()
    assert not (stored.layout.zarr / "notes").exists()
    assert verify(stored, "full").sound
    assert collect_garbage(stored).garbage == ()


def test_a_pull_that_begins_after_the_listing_keeps_its_objects_and_its_lock(stored, monkeypatch):
    stray, lock = stored.layout.zarr / "features" / "c" / "999", stored.layout.locks / "pull"
    stray.write_bytes(b"fetched")
    lock.parent.mkdir()
    lock.touch()
    find = garbage._find
    with contextlib.ExitStack() as pull_at_work:

        def then_a_pull_begins(store):
            yield from list(find(store))
            assert pull_at_work.enter_context(exclusive_lock(lock))

        monkeypatch.setattr(garbage, "_find", then_a_pull_begins)
        assert names(collect_garbage(stored), stored.path) == set()
        assert stray.read_bytes() == b"fetched"
        assert lock.exists()
    monkeypatch.undo()
    assert names(collect_garbage(stored), stored.path) == {"store.zarr/features/c/999", "locks/pull"}


def test_killed_plans_are_removed_and_living_ones_stay(stored, tmp_path):
    killed, living, other = (tmp_path / name for name in (".small.agiqa.plan-a", ".small.agiqa.plan-b", ".x.plan-c"))
    for plan in (killed, living, other):
        (plan / "locks").mkdir(parents=True)
        (plan / "locks" / "plan").touch()
        (plan / "data").write_bytes(b"12345")
    with exclusive_lock(living / "locks" / "plan"):
        report = collect_garbage(stored)
    assert (names(report, tmp_path), report.bytes) == ({killed.name}, 5)
    assert report.in_use == (str(living),)
    assert not killed.exists()
    assert living.exists()
    assert other.exists()


def test_killed_plans_of_a_store_with_brackets_in_its_name_are_removed(tmp_path):
    killed = tmp_path / ".a[1].agiqa.plan-x"
    (killed / "locks").mkdir(parents=True)
    (killed / "locks" / "plan").touch()
    make_store(tmp_path / "a[1].agiqa", make_content([3]))
    assert [path.name for path in tmp_path.iterdir()] == ["a[1].agiqa"]


def test_plans_killed_before_their_lock_are_removed(stored, tmp_path, monkeypatch):
    """By the next run that creates the store, and by a collection."""
    monkeypatch.setattr(creating, "_SECONDS_TO_LOCK", 0.05)
    (tmp_path / ".new.agiqa.plan-0").mkdir()
    (tmp_path / ".new.agiqa.plan-1" / "locks").mkdir(parents=True)
    (tmp_path / ".new.agiqa.plan-1" / "locks" / ".plan.new").touch()
    make_store(tmp_path / "new.agiqa", make_content([3]))
    assert not list(tmp_path.glob(".new.agiqa.plan-*"))
    (tmp_path / ".small.agiqa.plan-0").mkdir()
    assert names(collect_garbage(stored), tmp_path) == {".small.agiqa.plan-0"}
    assert not list(tmp_path.glob(".small.agiqa.plan-*"))


def test_collecting_at_any_time_costs_no_unit(tmp_path):
    """A fill, kills, and collections beside it and between: the store comes out whole."""
    path, moments = tmp_path / "s.agiqa", random.Random(0)
    content = make_content([37] * 60)
    for _ in range(3):
        run = start_fill(path, moments.choice(["kill", "wait"]))
        while run.poll() is None and not (path / "commits").exists():
            pass
        if path.exists():
            collect_garbage(open_store(path, allow_partial=True))
        run.communicate(b"\n")
        collect_garbage(open_store(path, allow_partial=True))
    whole = refill(open_store(path, allow_partial=True), content)
    assert verify(whole, "numeric").sound
    np.testing.assert_array_equal(whole.read(range(60)).rows, np.concatenate(content.hidden))


OTHERS = {".gitignore": b"mine", "notes.json": b"mine", "0000.json": b"mine", ".bashrc.bak": b"mine", "seal.txt": b"x"}


def linked_elsewhere(store, folder, *names):
    """The folders `names` of `store`, moved to a folder each that also holds files and folders of others."""
    for name in names:
        elsewhere = folder / f"{name} elsewhere"
        elsewhere.mkdir()
        for path in (store.path / name).iterdir() if (store.path / name).exists() else ():
            path.rename(elsewhere / path.name)
        for other, raw in OTHERS.items():
            (elsewhere / other).write_bytes(raw)
        (elsewhere / "00009003").mkdir()
        (elsewhere / "00009003" / "thesis.tex").write_bytes(b"mine")
        (elsewhere / "00009004").write_bytes(b"a file with this name that is not empty")
        shutil.rmtree(store.path / name, ignore_errors=True)
        (store.path / name).symlink_to(elsewhere)


def of_others(folder):
    kinds = (*OTHERS.values(), b"a file with this name that is not empty")
    return {name: raw for name, raw in everything(folder).items() if raw in kinds and not (folder / name).is_symlink()}


@pytest.mark.parametrize("state", ["unfinished", "finished"])
def test_folders_linked_elsewhere_lose_only_what_is_ours(tmp_path, state):
    """`locks` and `commits` on another disk, for a share without flock: collected, repaired, filled and sealed."""
    path = tmp_path / "s.agiqa"
    start_fill(path, "kill").communicate()
    content = make_content([37] * 60)
    if state == "finished":
        refill(open_store(path, allow_partial=True), content)
    store = open_store(path, allow_partial=True)
    linked_elsewhere(store, tmp_path, "locks", "commits")
    (store.layout.commits / ".00000001.json.x1y2").write_bytes(b"half")
    (store.layout.commits / ".00000002.json.x1y2").symlink_to(tmp_path / "commits elsewhere" / "notes.json")
    (store.layout.locks / "00000007").touch()
    mine = of_others(tmp_path)
    collect_garbage(store)
    assert of_others(tmp_path) == mine
    for name in (".00000001.json.x1y2", ".00000002.json.x1y2"):
        assert not os.path.lexists(store.layout.commits / name)
    assert (store.layout.locks / "00000007").exists() == (state == "unfinished")
    if state == "unfinished":
        (store.layout.commits / ".model.json.x1y2").write_bytes(b"half")
        assert verify(refill(store, content), "numeric").sound
        assert not (store.layout.commits / ".model.json.x1y2").exists()
        assert not (store.layout.locks / "00000007").exists()
    assert of_others(tmp_path) == mine
    assert store.layout.locks.is_symlink()
    assert store.layout.commits.is_symlink()
    assert collect_garbage(open_store(path)).garbage == ()


def test_a_link_that_is_called_like_a_killed_plan_leads_nowhere(stored, tmp_path):
    other = tmp_path / "other"
    (other / "locks").mkdir(parents=True)
    (other / "locks" / "plan").touch()
    (tmp_path / ".small.agiqa.plan-x").symlink_to(other)
    assert collect_garbage(stored).garbage == ()
    assert (other / "locks" / "plan").exists()


@pytest.mark.parametrize("name", ["store.zarr", "store.zarr/features"])
def test_arrays_linked_out_of_the_store_are_not_collected(stored, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    (stored.path / name).rename(elsewhere)
    (elsewhere / "thesis.tex").write_bytes(b"mine")
    (stored.path / name).symlink_to(elsewhere)
    before = everything(elsewhere)
    with contextlib.suppress(DamagedStore):
        collect_garbage(stored)
    assert everything(elsewhere) == before


def test_a_pull_into_a_store_whose_locks_are_linked_elsewhere_leaves_what_is_not_ours(stored, tmp_path):
    copy, elsewhere = tmp_path / "copy.agiqa", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "thesis.tex").write_bytes(b"mine")
    pull(stored.path.as_uri(), copy)
    (copy / "locks").symlink_to(elsewhere)
    pull(stored.path.as_uri(), copy)
    assert everything(elsewhere) == {"thesis.tex": b"mine"}
    assert open_store(copy).id == stored.id
