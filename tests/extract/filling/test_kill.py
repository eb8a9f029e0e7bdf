"""`agiqa extract` killed at random moments of every phase, and run again until it is done."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from agiqa.store import open_store, verify
from tests.extract.small_sets import write_set, write_talks

ITEMS = 300


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("killed") / "set", ITEMS)
    write_talks(folder)
    return folder


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory):
    """Half a minute of work, of which no test waits for the end: worker processes start meanwhile."""
    folder = write_set(tmp_path_factory.mktemp("long") / "set", 15 * ITEMS)
    write_talks(folder)
    return folder


def command(folder, store, checkpoint, *options):
    talks = folder / "talks.json"
    return (
        *("extract", folder, store, "--model", checkpoint, "--conversations", talks),
        *("--batch-size", 1, "--device", "cpu", *options),
    )


def objects_of(path):
    """Path -> (bytes, sha256) of every object that the finished store lists."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {entry["path"]: (entry["bytes"], entry["sha256"]) for entry in [*manifest["objects"], manifest["labels"]]}


def files_of(path):
    return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}


class Moments:
    """Conditions, checked from outside, that are True once a phase of the run has begun."""

    def __init__(self, path, units):
        self.path = path
        self.units = units

    def planning(self):
        return any(self.path.parent.glob(f".{self.path.name}.plan-*"))

    def model(self):
        return self.path.exists() and (self.path / "store.zarr" / "probe").exists()

    def commits(self):
        return len(list((self.path / "commits").glob("[0-9]*.json")))

    def filling(self):
        before = self.commits()
        return lambda: self.commits() > before

    def sealing(self):
        return self.commits() == self.units


@pytest.mark.parametrize("encoding", ["hidden", "sketch"])
def test_killed_in_every_phase_and_resumed_equals_an_uninterrupted_store(
    agiqa, folder, tiny_text_checkpoint, tmp_path, encoding
):
    options = ("--encoding", "sketch", "--rank", 8) if encoding == "sketch" else ()
    whole, path = tmp_path / "whole" / "s.agiqa", tmp_path / "killed" / "s.agiqa"
    done = agiqa(*command(folder, whole, tiny_text_checkpoint, "--json", *options)).json
    assert done["units"] >= 8
    path.parent.mkdir()
    moments, seeded = Moments(path, done["units"]), random.Random(0 if encoding == "hidden" else 1)
    phases = [
        *[(moments.planning, 0.03)] * 2,
        *[(moments.model, 0.02)] * 2,
        *[(moments.filling, 0.05)] * 3,
        (moments.sealing, 0.002),
    ]
    arguments = command(folder, path, tiny_text_checkpoint, *options)
    codes = []
    for begun, longest in phases:
        when = begun() if begun == moments.filling else begun
        outcome = agiqa.killed(*arguments, when=when, delay=seeded.uniform(0.0, longest))
        codes.append(outcome.code)
        assert outcome.code in (-9, 0), outcome.err
    assert codes.count(-9) >= 5
    if codes[-1] == -9 and not (path / "MANIFEST.json").exists():
        assert agiqa("train", path, tmp_path / "run").code == 1
    last = agiqa(*arguments, "--json").json
    assert last["state"] == "complete"
    assert agiqa("store", "verify", path, "--level", "full", "--json").json["sound"]
    assert verify(open_store(path), "numeric").sound
    assert objects_of(path) == objects_of(whole)
    assert [file for file in files_of(path) if file.startswith("store.zarr/") and file not in objects_of(path)] == []
    assert [left.name for left in path.parent.iterdir()] == ["s.agiqa"]
    assert not [file for file in files_of(path) if file.endswith(".partial") or file.startswith("locks")]
    assert open_store(path).id == open_store(whole).id


def test_kills_at_blind_moments_never_cost_a_finished_unit(agiqa, folder, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    arguments = command(folder, path, tiny_text_checkpoint)
    seeded, committed = random.Random(7), {}
    for _ in range(5):
        agiqa.killed(*arguments, when=lambda: True, delay=seeded.uniform(0.2, 1.2))
        records = {file.name: file.read_bytes() for file in (path / "commits").glob("[0-9]*.json")}
        assert records.items() >= committed.items()
        committed = records
    last = agiqa(*arguments, "--json")
    assert last.json["state"] == "complete"
    assert "extract: " not in last.err or f"extract: {ITEMS}/{ITEMS} items in" in last.err
    records = {file.name: file.read_bytes() for file in (path / "commits").glob("[0-9]*.json")}
    assert records.items() >= committed.items()
    assert agiqa("store", "verify", path, "--level", "numeric", "--json").json["sound"]


def descendants(process):
    """The process ids of the children of `process`, their children and so on, each with its name and command line."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            name, line = (entry / "comm").read_text(), (entry / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        parents.setdefault(parent, {})[int(entry.name)] = name + line
    found, left = {}, [process]
    while left:
        children = parents.get(left.pop(), {})
        found |= children
        left += children
    return found


def is_there(process):
    """Whether the process is running; a zombie is not."""
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class StopsOne:
    """True once it has found and stopped a descendant of the command whose own name or command line holds `kind`."""

    def __init__(self, agiqa, kind, when):
        self._server, self._kind, self._when = agiqa.server_id, kind, when
        self.all, self.stopped = {}, None

    def __call__(self):
        if self._when():
            time.sleep(0.02)  # looking through all processes at once again would take the time of the command
            self.all = descendants(self._server)
            kind = [process for process, line in self.all.items() if self._kind in line]
            if len(kind) > 1:  # the first of forks is the process that they are forks of
                self.stopped = max(kind)
                os.kill(self.stopped, signal.SIGSTOP)
        return self.stopped is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("elsewhere", ["prepare-workers", "devices"])
def test_ctrl_c_ends_processes_that_are_stopped(request, agiqa, tiny_text_checkpoint, tmp_path, elsewhere, number):
    """Processes that are filling, and workers, for which the command does not wait while they start."""
    fills, path, kind = elsewhere == "devices", tmp_path / "s.agiqa", "forkserver"
    data = request.getfixturevalue("folder" if fills else "long_folder")
    stops = StopsOne(agiqa, kind, Moments(path, 0).commits if fills else lambda: True)
    arguments = command(data, path, tiny_text_checkpoint, f"--{elsewhere}", 2)
    outcome = agiqa.interrupted(*arguments, when=stops, number=number)
    assert outcome.code == 128 + number
    assert "Traceback" not in outcome.err
    started = [process for process, line in stops.all.items() if kind in line]
    until = time.monotonic() + 20  # the process that workers are forks of ends by itself
    while any(map(is_there, started)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(is_there, started))
    filled = agiqa(*command(data, path, tiny_text_checkpoint, "--json", "--part", "1/9")).json["filled"]
    assert filled["busy_units"] == 0
