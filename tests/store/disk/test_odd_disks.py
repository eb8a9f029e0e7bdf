"""File systems without hard links, without locks, or with locks that do not exclude others: usable, or refused."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from agiqa.store import create_store, open_store, seal, verify
from agiqa.store.disk.files import canonical_json, put_text_if_absent
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.crash_points import states_after_kills
from tests.store.damage import contents
from tests.store.workers import Workers

LENGTHS = [37] * 60


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """`odd_disks.c`, compiled."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc, which compiles the library that makes a disk odd, is not installed")
    built = tmp_path_factory.mktemp("library") / "odd_disks.so"
    source = Path(__file__).with_name("odd_disks.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", built, source, "-ldl"], check=True)
    return built


@pytest.fixture(scope="module")
def workers(library):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(library))
        started = Workers()
    yield started
    started.close()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return contents(make_store(tmp_path_factory.mktemp("whole") / "s.agiqa", make_content(LENGTHS)))


NO_LINKS = [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK]


def test_without_hard_links_runs_that_race_make_the_same_store(tmp_path, workers, undisturbed):
    """exFAT, SMB and some FUSE file systems, which cannot flush folders to the disk either."""
    path = tmp_path / "s.agiqa"
    odd = {"ODD_LINK": str(errno.EPERM), "ODD_FSYNC": str(errno.EINVAL)}
    team = [workers.start("on_odd_disk", odd, "make", str(path), LENGTHS, seed, 0.001) for seed in range(3)]
    outcomes = [job.ended() for job in team]
    assert [(outcome.code, outcome.message) for outcome in outcomes] == [(0, "")] * 3
    store = seal(open_store(path, allow_partial=True))
    assert contents(store) == undisturbed
    assert sorted(left.name for left in store.layout.commits.iterdir()) == sorted(
        ["plan.json", "model.json", *[f"{unit:08d}.json" for unit in range(store.geometry.units)]]
    )
    assert [left.name for left in tmp_path.iterdir()] == ["s.agiqa"]


def test_without_hard_links_a_record_is_whole_or_absent_wherever_a_fill_is_killed(tmp_path, library, monkeypatch):
    content = make_content([5] * 2)
    whole = contents(make_store(tmp_path / "whole" / "s.agiqa", content))
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[])
    monkeypatch.setenv("LD_PRELOAD", str(library))
    monkeypatch.setenv("ODD_LINK", str(errno.EPERM))
    states = states_after_kills(
        store.path,
        tmp_path / "states",
        imports="from agiqa.store import open_store\nfrom tests.store.conftest import fill, make_content",
        job="fill(open_store(path, allow_partial=True), make_content([5] * 2))",
    )
    monkeypatch.undo()
    records = set()
    for state in states:
        store = open_store(state, allow_partial=True)
        for record in store.layout.commits.glob("0*.json"):
            assert json.loads(record.read_text())["objects"]
        records.add(len(store.committed_units()))
        assert not verify(store, "full").damage
    assert records == set(range(store.geometry.units + 1))
    for state in states[::4]:
        fill(open_store(state, allow_partial=True), content)
        assert contents(seal(open_store(state, allow_partial=True))) == whole


@pytest.mark.parametrize("number", NO_LINKS, ids=[errno.errorcode[number] for number in NO_LINKS])
def test_without_hard_links_the_first_record_stays(tmp_path, workers, number):
    place, lock = tmp_path / "00000000.json", tmp_path / "locks" / "records"
    odd = {"ODD_LINK": str(number)}
    puts = [workers.start("on_odd_disk", odd, "put", str(place), f"{worker}", str(lock)) for worker in range(4)]
    first = [job.ended().result for job in puts]
    assert sorted(first) == [False, False, False, True]
    assert place.read_text() == str(first.index(True))
    assert not put_text_if_absent(place, canonical_json({}), lock=lock)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [place.name]


WITHOUT_LOCKS = [*map(str, (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)), "always"]


@pytest.mark.parametrize("how", WITHOUT_LOCKS)
def test_without_working_locks_planning_is_refused_in_one_sentence(tmp_path, workers, how):
    outcome = workers.run("on_odd_disk", {"ODD_FLOCK": how}, "make", str(tmp_path / "s.agiqa"), LENGTHS, 0, 0.0)
    why = "two can hold one lock at the same time" if how == "always" else os.strerror(int(how))
    assert outcome.error == "ConfigError"
    assert f"Locks do not work on the file system of {tmp_path}/" in outcome.message
    assert f"({why})" in outcome.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", WITHOUT_LOCKS)
def test_without_working_locks_a_store_is_read_and_not_written(tmp_path, workers, how):
    """A store that was copied there, finished or not."""
    content = make_content([9, 30, 22])
    unfinished, finished = tmp_path / "unfinished.agiqa", make_store(tmp_path / "finished.agiqa", content).path
    fill(create_store(unfinished, plan_of(content)), content, units=[0])
    (tmp_path / "labels.csv").write_text(f"name,mos_quality\n{content.items.names[0]},1.5\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "locks"}
    odd = {"ODD_FLOCK": how}
    steps = [("fill", unfinished, [9, 30, 22]), ("upkeep", unfinished, "seal")]
    steps += [("upkeep", finished, what) for what in ("label", "repair", "collect")]
    for job, path, argument in steps:
        outcome = workers.run("on_odd_disk", odd, job, str(path), argument)
        assert (outcome.error, "Locks do not work" in outcome.message) == ("ConfigError", True), (job, outcome)
    read = workers.run("on_odd_disk", odd, "read_everything", str(finished)).result
    assert {name: step for name, step in read.items() if step[0]} == {}
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "locks"}
    assert after == before


def test_locks_of_nfs_need_a_file_that_is_open_for_writing(tmp_path, workers, undisturbed):
    """Runs that race, with a plan and locks of runs that were killed; then labels, repair and garbage."""
    path, content, odd = tmp_path / "s.agiqa", make_content(LENGTHS), {"ODD_FLOCK": "nfs"}
    killed = tmp_path / ".s.agiqa.plan-0" / "locks"
    killed.mkdir(parents=True)
    (killed / "plan").touch()
    team = [workers.start("on_odd_disk", odd, "make", str(path), LENGTHS, seed, 0.001) for seed in range(2)]
    assert [(job.code, job.message) for job in [one.ended() for one in team]] == [(0, "")] * 2
    assert contents(open_store(path)) == undisturbed
    (path / "locks").mkdir(exist_ok=True)
    for name in ("pull", "00000001"):
        (path / "locks" / name).touch()
    (tmp_path / "labels.csv").write_text(f"name,mos_quality\n{content.items.names[0]},1.5\n")
    for what in ("seal", "label", "repair", "collect"):
        outcome = workers.run("on_odd_disk", odd, "upkeep", str(path), what)
        assert (outcome.code, outcome.message) == (0, ""), what
    assert verify(open_store(path), "full").sound
    assert sorted(left.name for left in tmp_path.iterdir()) == ["labels.csv", "s.agiqa"]
    assert not (path / "locks").exists()


def test_a_lock_of_another_user_on_nfs_is_told(workers):
    if os.getuid():
        pytest.skip("becoming another user needs root")
    with tempfile.TemporaryDirectory() as folder:  # unlike those of pytest, other users can get to it
        Path(folder).chmod(0o755)
        lock = Path(folder) / "seal"
        lock.touch(0o444)
        assert workers.run("on_odd_disk", {}, "lock_as_nobody", str(lock)).result
        outcome = workers.run("on_odd_disk", {"ODD_FLOCK": "nfs"}, "lock_as_nobody", str(lock))
    assert outcome.error == "PermissionError"
    assert f"{lock}" in outcome.message
    assert "must be writable" in outcome.message
