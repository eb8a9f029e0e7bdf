"""Garbage collection: what kills left is removed, and nothing that is listed, in use or of others."""

import os
import random
import subprocess
import sys
import textwrap

import numpy as np

from agiqa.store import open_store, seal, verify
from agiqa.store.files import exclusive_lock
from agiqa.store.garbage import collect_garbage
from agiqa.store.repairing import repair
from tests.store.conftest import make_content, make_store
from tests.store.crash_points import REPOSITORY
from tests.store.upkeep import contents, everything, refill

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
