"""`agiqa extract --ray` with actors on the CPU, one of them killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agiqa.errors import ConfigError
from agiqa.extract.filling.engines import striped
from agiqa.extract.filling.ray_driver import News
from agiqa.store import UnitWriter, open_store, verify
from tests.extract.jobs import extract
from tests.extract.small_sets import write_set, write_talks

ROOT = Path(__file__).resolve().parents[3]


def test_units_of_a_dead_worker_are_handed_out_again():
    assert [striped([0, 1, 2], actor, 2) for actor in range(2)] == [[0, 2, 1], [1, 2, 0]]
    left = [0, 2]  # when the first actor died
    assert striped(left, 2 % 2, 2) == [0, 2]
    assert striped([], 0, 2) == []


def test_the_driver_collects_what_actors_report():
    news = News()
    news.add(3)
    news.add(4)
    news.say("hello")
    assert news.collect() == (7, ["hello"])
    assert news.collect() == (7, [])


def test_a_killed_actor_costs_no_unit(tiny_text_checkpoint, tmp_path):
    pytest.importorskip("ray", reason="needs the extra ray")
    folder = write_set(tmp_path / "set", 120)
    write_talks(folder)
    path = tmp_path / "s.agiqa"
    run = start(folder, path, tiny_text_checkpoint)
    killed = kill_a_worker(run, path)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 0, err
    assert json.loads(out)["state"] == "complete"
    assert killed
    assert "its units are handed out again" in err
    whole = open_store(path)
    assert verify(whole, "full").sound
    alone = extract(folder, tiny_text_checkpoint, tmp_path / "alone.agiqa", batch_size=1).store
    assert hashes_of(whole.path) == hashes_of(alone.path)


def test_units_that_a_dead_actor_seems_to_hold_are_reported(tiny_text_checkpoint, tmp_path):
    """Such as on a file system that frees the locks of a dead machine late: here the test holds one."""
    pytest.importorskip("ray", reason="needs the extra ray")
    folder, path = write_set(tmp_path / "set", 60), tmp_path / "s.agiqa"
    write_talks(folder)
    store = extract(folder, tiny_text_checkpoint, path, plan_only=True, batch_size=1).store
    with UnitWriter(store).claim(store.geometry.units - 1):
        run = start(folder, path, tiny_text_checkpoint)
        assert kill_a_worker(run, path)
        _, err = run.communicate(timeout=600)
    assert run.returncode == 1, err
    assert "1 Ray actors died (actor" in err
    assert "1 units are left" in err
    assert extract(folder, tiny_text_checkpoint, path, batch_size=1).store.is_sealed


def start(folder, path, checkpoint):
    """Start `agiqa extract` on two actors in another process."""
    arguments = [
        *(sys.executable, "-m", "agiqa", "extract", str(folder), str(path), "--model", str(checkpoint)),
        *("--conversations", str(folder / "talks.json"), "--device", "cpu", "--batch-size", "1"),
        *("--ray", "--devices", "2", "--json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": "local"}
    return subprocess.Popen(
        arguments, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def kill_a_worker(run, path):
    """Kill the process that wrote the first unit, as soon as there is one; its process id."""
    while run.poll() is None:
        for record in (path / "commits").glob("[0-9]*.json"):
            killed = int(json.loads(record.read_text())["worker"].split(":")[1])
            os.kill(killed, signal.SIGKILL)
            return killed
        time.sleep(0.001)
    return 0


def hashes_of(path):
    manifest = json.loads((path / "MANIFEST.json").read_text())
    return {entry["path"]: entry["sha256"] for entry in manifest["objects"]}


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_a_missing_cluster_is_reported_at_once(tiny_text_checkpoint, tmp_path, address):
    pytest.importorskip("ray", reason="needs the extra ray")
    folder = write_set(tmp_path / "set", 6)
    write_talks(folder)
    with pytest.raises(ConfigError, match=rf"--ray {address}: no such cluster \(.*refused.*ray start --head"):
        extract(folder, tiny_text_checkpoint, tmp_path / "s.agiqa", ray=address)
