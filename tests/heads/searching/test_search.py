"""Searches with real trainings: what they read, what they choose, and how they go on after a kill."""

import json
import multiprocessing
import os
import signal
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from agiqa.errors import BusyStore, ConfigError, DataError, HeadError
from agiqa.heads import load_settings, train_head
from agiqa.heads.data.splits import make_partition
from agiqa.heads.model.encoders import ENCODERS, Encoder
from agiqa.heads.searching.search import run_search
from agiqa.heads.searching.trials import TrialTask
from agiqa.store.disk.locks import exclusive_lock
from tests.heads.searching.conftest import TRAIN

SEARCH_FILES = {"about.json", "best.yaml", "lock", "study.log", "trials.jsonl"}


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """A store that gives no row of some items."""

    of: Any
    closed: frozenset[int]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "of"), name)

    def read(self, items: Any) -> Any:
        assert not self.closed & set(np.asarray(items).tolist()), "a test item was read"
        return self.of.read(items)


def trials_of(out: Path) -> list[dict[str, Any]]:
    """trials.jsonl without numbers and times, which interruptions change."""
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("number", "seconds")} for line in lines]


class Own(Encoder):
    """An encoder that needs a setting of its own."""

    own_settings: ClassVar = {"factor": 2.0}

    def __init__(self, config):
        super().__init__(config.width)
        self.factor = config.own_settings["factor"]

    def forward(self, tokens, mask):
        return (self.factor * tokens).masked_fill(~mask[..., None], 0.0)


def test_an_encoder_with_settings_of_its_own_is_searched(make_store, settings_for, tmp_path, monkeypatch):
    monkeypatch.setattr(ENCODERS, "_parts", {**ENCODERS._parts, "own": Own})
    settings = settings_for(make_store(120), space="encoder: [own]\nwidth: [4, 8]\n", trials=2)
    assert run_search(make_store(120), tmp_path / "out", settings).count("complete") == 2


@pytest.fixture
def store(make_store):
    return make_store(120)


@pytest.mark.parametrize("split", ["grouped", "published"])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_search_never_reads_a_test_item(make_store, settings_for, tmp_path: Path, split, workers):
    """The rows of test items cannot be read, and their labels are missing."""
    train = TRAIN.model_copy(update={"split": split})
    whole = make_store(120, published=True)
    test = make_partition(whole, train).test
    labels = whole.items.labels["quality"].copy()
    labels[test] = np.nan
    items = replace(whole.items, labels={"quality": labels})
    guarded = Guarded(of=replace(whole, items=items), closed=frozenset(test.tolist()))
    settings = settings_for(guarded, train=train, trials=3, workers=workers)
    found = run_search(guarded, tmp_path / "out", settings)
    assert found.count("complete") == 3, found.lines
    assert len(test) >= 20
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["counts"]["test, not read"] == len(test)


def test_the_best_trial_is_what_training_with_its_settings_gives(store, settings_for, tmp_path: Path):
    found = run_search(store, tmp_path / "out", settings_for(store, trials=6))
    assert {path.name for path in (tmp_path / "out").iterdir()} == SEARCH_FILES
    assert found.best["validation_srcc"] == max(line["validation_srcc"] for line in found.lines)
    assert all(line["validation_srcc"] == max(line["curve"]) and line["epochs"] == 3 for line in found.lines)
    assert found.lines[0]["settings"] == {"encoder": "none", "pooling": "mean", "width": 4, "lr": 0.01}
    head, train = load_settings(tmp_path / "out" / "best.yaml")
    assert (head, train) == (found.head, found.train)
    run = train_head(store, tmp_path / "run", head=head, train=train)
    assert run.metrics["validation"]["srcc"] == pytest.approx(found.best["validation_srcc"], abs=1e-12)


def killed_search(store, out: Path, settings, *, after: int) -> None:
    """Search in a child process, and kill it while the trial after so many is under way."""
    child = os.fork()
    if child == 0:
        try:
            real = TrialTask.run

            def run(self, *given):
                if self.number == after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(self, *given)

            TrialTask.run = run
            run_search(store, out, settings)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_search_goes_on_to_the_same_trials(store, settings_for, tmp_path: Path):
    settings = settings_for(store, trials=14)
    whole = run_search(store, tmp_path / "whole", settings)
    out = tmp_path / "killed"
    killed_search(store, out, settings, after=2)
    assert len(trials_of(out)) == 2
    with (out / "study.log").open("ab") as file:
        file.write(b'{"op_code": 4, "torn')
    (out / "trials.jsonl").write_text("")  # as if the kill had come before it was written
    killed_search(store, out, settings, after=12)
    assert trials_of(out) == trials_of(tmp_path / "whole")[:11]
    found = run_search(store, out, settings)
    assert trials_of(out) == trials_of(tmp_path / "whole")
    assert (found.head, found.train) == (whole.head, whole.train)
    more = run_search(store, out, replace(settings, trials=16))
    assert len(more.lines) == 16
    before = (out / "trials.jsonl").read_bytes()
    assert run_search(store, out, settings).lines == more.lines
    assert (out / "trials.jsonl").read_bytes() == before


def test_several_workers_share_the_trials_and_a_dead_one_takes_one_along(store, settings_for, tmp_path: Path, capsys):
    settings = settings_for(store, trials=6, workers=2, train=TRAIN.model_copy(update={"epochs": 2}))
    shot = []

    class Shooting(type(settings.space)):
        def suggest(self, trial, head):
            if trial.number == 4:
                victim = multiprocessing.active_children()[0]
                shot.append(victim.pid)
                os.kill(victim.pid, signal.SIGKILL)
            return super().suggest(trial, head)

    found = run_search(store, tmp_path / "out", replace(settings, space=Shooting(settings=settings.space.settings)))
    assert len(shot) == 1
    assert len(found.lines) == 6
    assert found.count("failed") <= 1  # none, if the killed worker had no trial
    for line in found.lines:
        assert line["state"] == "complete" or "was ended by SIGKILL" in line["error"]
    assert multiprocessing.active_children() == []
    assert "search: 6/6 trials in" in capsys.readouterr().err


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_weak_trials_are_stopped_by_their_curves(store, settings_for, tmp_path: Path, pruner):
    train = TRAIN.model_copy(update={"epochs": 9, "schedule": "constant"})
    space = "lr: [1.0e-9, 1.0e-2]\npooling: [mean, max]"
    found = run_search(store, tmp_path / "out", settings_for(store, space=space, train=train, trials=16, pruner=pruner))
    pruned = [line for line in found.lines if line["state"] == "pruned"]
    assert pruned
    assert all(line["epochs"] == len(line["curve"]) < 9 for line in pruned)
    assert all(line["epochs"] == 9 for line in found.lines if line["state"] == "complete")
    assert found.best["state"] == "complete"
    mean = {
        state: np.mean([one["validation_srcc"] for one in found.lines if one["state"] == state])
        for state in ("pruned", "complete")
    }
    assert mean["pruned"] < mean["complete"]


def test_importance_needs_trials_and_finds_the_setting_that_matters(store, settings_for, tmp_path: Path):
    space = "lr: [1.0e-9, 1.0e-2]\nregressor_hidden: [4, 5, 6]"
    settings = settings_for(store, space=space, trials=9)
    assert run_search(store, tmp_path / "out", settings).importance == {}
    shares = run_search(store, tmp_path / "out", replace(settings, trials=24)).importance
    assert set(shares) == {"lr", "regressor_hidden"}
    assert sum(shares.values()) == pytest.approx(1.0, abs=1e-3)


def test_the_time_ends_a_search_between_trials(store, settings_for, tmp_path: Path, capsys):
    seconds = count(0.0, 10.0)
    settings = settings_for(store, trials=50, timeout=35.0)
    found = run_search(store, tmp_path / "out", settings, clock=lambda: next(seconds))
    assert found.timed_out
    assert len(found.lines) == 3
    found = run_search(store, tmp_path / "out", replace(settings, trials=4, timeout=None))
    assert (found.timed_out, len(found.lines)) == (False, 4)
    assert "3 of 4 trials exist already" in capsys.readouterr().err


def test_trials_that_cannot_be_trained_fail_by_name_and_the_others_go_on(make_store, settings_for, tmp_path: Path):
    store = make_store(120, encoding="hidden")
    space = "encoder: [none, xlstm]\nwidth: [8, 6]\nblocks: [1]"
    found = run_search(
        store,
        tmp_path / "a",
        settings_for(store, space=space, trials=8, seed=1, head=settings_head(projection="hidden")),
    )
    failed = [line for line in found.lines if line["state"] == "failed"]
    assert failed
    assert all(line["settings"]["encoder"] == "xlstm" and line["settings"]["width"] == 6 for line in failed)
    assert all("cannot have 4 heads" in line["error"] for line in failed)
    hopeless = settings_for(
        store, space="encoder: [xlstm]\nwidth: [5, 6]", trials=40, head=settings_head(projection="hidden")
    )
    with pytest.raises(HeadError, match=r"None of 10 trials gave a head\. The first: .*cannot have 4 heads"):
        run_search(store, tmp_path / "b", hopeless)


def settings_head(**changes):
    from tests.heads.searching.conftest import HEAD

    return HEAD.model_copy(update=changes)


def test_a_folder_of_another_search_is_refused_with_what_differs(store, settings_for, make_store, tmp_path: Path):
    out, settings = tmp_path / "out", settings_for(store, trials=2)
    run_search(store, out, settings)
    before = (out / "trials.jsonl").read_bytes()
    other = replace(settings, train=settings.train.model_copy(update={"batch_size": 16}))
    with pytest.raises(DataError, match="batch_size: there 32, asked for 16"):
        run_search(store, out, other)
    with pytest.raises(DataError, match=r"space of width: there \[4, 8\], asked for \[4\]"):
        run_search(store, out, settings_for(store, space="width: [4]\nlr: [0.1, 0.2]", trials=2))
    with pytest.raises(DataError, match="pruner: there 'none', asked for 'median'"):
        run_search(store, out, replace(settings, pruner="median"))
    with pytest.raises(DataError, match="id: there 'memory', asked for 'other'"):
        run_search(replace(store, id="other"), out, settings)
    labels = {"quality": store.items.labels["quality"][::-1].copy()}
    with pytest.raises(DataError, match="labels of train are not those"):
        run_search(replace(store, items=replace(store.items, labels=labels)), out, settings)
    with exclusive_lock(out / "lock") as held:
        assert held
        with pytest.raises(BusyStore, match="Another search is at work"):
            in_a_child(lambda: run_search(store, out, settings))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(DataError, match="holds files that are not of a search"):
        run_search(store, tmp_path / "run", settings)
    (out / "about.json").write_text("{}")
    with pytest.raises(DataError, match="is not of a search"):
        run_search(store, out, settings)
    assert (out / "trials.jsonl").read_bytes() == before


def in_a_child(work) -> None:
    """Call `work` in another process, which has locks of its own, and raise the BusyStore that it raised."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BusyStore as error:
            os._exit(7 if "Another search" in str(error) else 8)
        finally:
            os._exit(9)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7:
        message = "Another search is at work"
        raise BusyStore(message)


def test_a_search_that_cannot_compare_trials_is_refused(store, settings_for, tmp_path: Path):
    few = TRAIN.model_copy(update={"validation": 0.1})
    with pytest.raises(ConfigError, match=r"There are 10, and it needs 30\. Raise `validation`"):
        run_search(store, tmp_path / "out", settings_for(store, train=few))
    with pytest.raises(ConfigError, match="1 or more of each: trials 0"):
        run_search(store, tmp_path / "out", replace(settings_for(store), trials=0))
    with pytest.raises(ConfigError, match="--devices 2 needs as many GPUs, and torch finds 0"):
        run_search(store, tmp_path / "out", replace(settings_for(store), devices=2))
    assert not (tmp_path / "out").exists()
    run_search(store, tmp_path / "out", settings_for(store, trials=1))
    (tmp_path / "out" / "study.log").write_text('{"op_code": "no such operation"}\n')
    with pytest.raises(DataError, match=r"study\.log is no journal of a search"):
        run_search(store, tmp_path / "out", settings_for(store))
