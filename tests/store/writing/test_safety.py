"""Kills and races: the finished store has the same bytes as one that a single run makes."""

import json
import random
import time
from itertools import count

import pytest

from agiqa.store import create_store, open_store, seal, verify
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.crash_points import states_after_kills

KILLS = 20
LENGTHS = [37] * 60


def everything(folder):
    """Every file of a store by name; of commit records only what they list, since they say who wrote and when."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    records = {name for name in files if name.startswith("commits/")}
    whole = {name: path.read_bytes() for name, path in files.items() if name not in records}
    return {**whole, **{name: json.loads(files[name].read_text())["objects"] for name in records}}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The files of the store that a single run makes in peace."""
    return everything(make_store(tmp_path_factory.mktemp("whole") / "s.agiqa", make_content(LENGTHS)).path)


def test_three_workers_killed_at_twenty_random_moments(tmp_path, workers, undisturbed):
    """Each worker waits before every step on disk, so that kills come between any two of them."""
    path, moments, seeds = tmp_path / "s.agiqa", random.Random(5), count()
    create_store(path, plan_of(make_content(LENGTHS)))

    def start():
        return workers.start("make", path, LENGTHS, next(seeds), 0.1)

    team, phases = [start() for _ in range(3)], []
    for number in range(KILLS):
        job = team[number % 3]
        job.wait_for("fill")
        time.sleep(moments.uniform(0.0, 0.1))
        phases.append(job.phase)
        job.kill()
        phases[-1] += str(job.ended().code)
        team[number % 3] = start()
    assert phases.count("fill-9") >= 15
    for job in team:
        job.kill()
        job.ended()
    assert not verify(open_store(path, allow_partial=True), "full").damage
    team = [workers.start("make", path, LENGTHS, next(seeds), 0.001) for _ in range(3)]
    assert [job.ended().code for job in team] == [0] * 3
    seal(open_store(path, allow_partial=True))
    assert everything(path) == undisturbed
    assert verify(open_store(path), "numeric").sound


@pytest.mark.parametrize("seed", range(3))
def test_runs_that_race_to_plan_and_fill_make_one_store(tmp_path, workers, undisturbed, seed):
    path = tmp_path / "s.agiqa"
    killed = tmp_path / ".s.agiqa.plan-killed" / "locks" / "plan"
    killed.parent.mkdir(parents=True)
    killed.touch()
    team = [workers.start("make", path, LENGTHS, seed + 10 * number, 0.002, "a", "plan") for number in range(3)]
    outcomes = [job.ended() for job in team]
    assert [(outcome.code, outcome.message) for outcome in outcomes] == [(0, "")] * 3
    seal(open_store(path, allow_partial=True))
    assert everything(path) == undisturbed
    assert [left.name for left in tmp_path.iterdir()] == ["s.agiqa"]


def test_runs_with_other_settings_that_race_are_told(tmp_path, workers, undisturbed):
    path = tmp_path / "s.agiqa"
    team = [workers.start("make", path, LENGTHS, seed, 0.002, "ab"[seed % 2], "plan") for seed in range(4)]
    outcomes = [job.ended() for job in team]
    told = [outcome for outcome in outcomes if outcome.code]
    assert len(told) == 2
    for outcome in told:
        assert outcome.error == "SettingsConflict"
        assert "model.revision: stored" in outcome.message
    seal(open_store(path, allow_partial=True))
    assert verify(open_store(path), "full").sound


def test_labels_set_while_another_run_seals_are_refused_and_harm_nothing(tmp_path, workers, undisturbed):
    path, content = tmp_path / "s.agiqa", make_content(LENGTHS)
    fill(create_store(path, plan_of(content)), content)
    sealing = workers.start("seal_and_pause", path)
    sealing.wait_for("listing")
    outcome = workers.run("relabel", path, LENGTHS)
    assert sealing.ended().code == 0
    assert (outcome.error, "is finished and its labels" in outcome.message) == ("SettingsConflict", True)
    assert everything(path) == undisturbed


def test_killed_before_any_change_on_disk_a_seal_is_repeated(tmp_path):
    content = make_content([5] * 3)
    whole = everything(make_store(tmp_path / "whole" / "s.agiqa", content).path)
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content)
    imports = "from agiqa.store import open_store, seal"
    states = states_after_kills(
        store.path, tmp_path / "states", imports=imports, job="seal(open_store(path, allow_partial=True))"
    )
    complete = [open_store(state, allow_partial=True).is_sealed for state in states]
    assert complete == sorted(complete)
    assert len(set(complete)) == 2
    for state in states:
        assert everything(seal(open_store(state, allow_partial=True)).path) == whole


def test_killed_before_any_change_on_disk_a_fill_is_repeated(tmp_path):
    content = make_content([5] * 2)
    whole = everything(make_store(tmp_path / "whole" / "s.agiqa", content).path)
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    states = states_after_kills(
        store.path,
        tmp_path / "states",
        imports="from agiqa.store import open_store\nfrom tests.store.conftest import fill, make_content",
        job="fill(open_store(path, allow_partial=True), make_content([5] * 2))",
    )
    for state in states[::3]:
        store = open_store(state, allow_partial=True)
        assert not verify(store, "full").damage
        fill(store, content)
        assert everything(seal(store).path) == whole


def test_a_killed_plan_leaves_no_store_and_the_next_run_clears_it_away(tmp_path, workers, undisturbed):
    path, moments = tmp_path / "s.agiqa", random.Random(1)
    phases = []
    for seed in range(8):
        job = workers.start("make", path, LENGTHS, seed, 0.02, "a", "plan")
        job.wait_for("plan")
        time.sleep(moments.uniform(0.0, 0.3))
        phases.append(job.phase)
        job.kill()
        assert job.ended().code == -9
        assert phases[-1] == "fill" or not path.exists()
    assert phases.count("plan") >= 6
    assert workers.run("make", path, LENGTHS, 0, 0.0).result
    assert everything(path) == undisturbed
    assert [left for left in tmp_path.iterdir() if (left / "locks" / "plan").exists()] == []
