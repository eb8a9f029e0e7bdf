"""Many heads at once give the run folders of one at a time, and a fault of one of them leaves the others alone."""

import csv
import json
import multiprocessing
import os
import pickle
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, DataError, HeadError
from agiqa.heads import HeadConfig, HeadJob, TrainConfig, load_run, train_head, train_heads
from agiqa.heads.data import keeping
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.keeping import PackedFeatures, share_features
from agiqa.heads.data.reopening import SourceAddress
from agiqa.heads.data.splits import make_partition
from agiqa.heads.sweeps.sweeping import default_workers
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

CPU = torch.device("cpu")
GRU = HeadConfig(projection="hidden", encoder="gru", width=8, dropout=0.1)
NONE = HeadConfig(projection="vocabulary", encoder="none", width=8, pooling="max@answer")
QUICK = TrainConfig(split="grouped", epochs=2, lr=1e-2, batch_size=8, device="cpu")
FIELDS = {
    "plain": (GRU, {}),
    "again": (GRU, {"seed": 3, "refit": True}),
    "other label": (NONE, {"label": "alignment"}),
    "other split": (NONE, {"split_seed": 4, "test_share": 0.4, "validation": 0.3}),
    "no validation": (GRU, {"validation": 0.0, "ema": 0.9, "loss": "mse+0.5*plcc"}),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A real store of 60 items in many units, with two labels; one of them is missing on the last item."""
    random = np.random.default_rng(5)
    content = make_content(random.integers(30, 60, 60).tolist())
    labels = {name: random.uniform(0, 5, 60) for name in ("quality", "alignment", "rare")}
    labels["rare"][-1] = np.nan
    content = replace(content, items=replace(content.items, labels=labels))
    return write_store(tmp_path_factory.mktemp("sweep") / "small.agiqa", content)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))


def job(run: Path, head: HeadConfig = GRU, **changes) -> HeadJob:
    return HeadJob(run=run, head=head, train=QUICK.model_copy(update=changes))


def jobs_in(folder: Path, **changes) -> list[HeadJob]:
    return [job(folder / name, head, **update, **changes) for name, (head, update) in FIELDS.items()]


def numbers(run: Path) -> dict[str, object]:
    """All of a run folder but for the time that it took and where its features were."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["seconds"], metrics["trained_at"], metrics["features"]
    with (run / "curves.csv").open(newline="") as file:
        curves = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    config = json.loads((run / "config.json").read_text())
    del config["train"]["keep"], config["train"]["memory"]
    files = [(run / name).read_bytes() for name in ("head.safetensors", "predictions.csv", "parts.json")]
    return {"files": files, "metrics": metrics, "curves": curves, "config": config}


@pytest.fixture(scope="module")
def alone(stored, tmp_path_factory):
    """The numbers of each job when it is trained by `train_head`."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    found = {j.run.name: numbers(train_head(stored, j.run, head=j.head, train=j.train).path) for j in jobs_in(folder)}
    torch.set_num_threads(before)
    return found


class Counted:
    """A source that counts how often each item is read."""

    def __init__(self, of) -> None:
        self.of = of
        self.asked: list[int] = []

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "of"), name)

    def read(self, items):
        self.asked += np.asarray(items).tolist()
        return self.of.read(items)


@pytest.mark.parametrize(
    ("workers", "changes"),
    [(1, {}), (1, {"keep": "memmap"}), (1, {"keep": "stream", "memory": 60_000}), (2, {}), (2, {"keep": "memmap"})],
    ids=["1 worker", "1 worker, mapped", "1 worker, streamed", "2 workers", "2 workers, mapped"],
)
def test_a_sweep_gives_the_numbers_of_single_trainings(stored, alone, tmp_path: Path, workers, changes):
    outcomes = list(train_heads(stored, jobs_in(tmp_path, **changes), workers=workers))
    assert [outcome.error for outcome in outcomes] == [None] * 5
    assert {outcome.job.run.name for outcome in outcomes} == set(FIELDS)
    assert {outcome.job.run.name: numbers(outcome.load().path) for outcome in outcomes} == alone
    assert multiprocessing.active_children() == []


def test_every_item_is_decoded_once_for_all_jobs_together(stored, tmp_path: Path):
    source = Counted(stored)
    assert {outcome.status for outcome in train_heads(source, jobs_in(tmp_path), workers=1)} == {"trained"}
    assert sorted(source.asked) == list(range(60))


def test_rows_that_only_the_test_needs_are_left_out_where_there_is_no_room(stored, alone, tmp_path: Path):
    jobs = [one for one in jobs_in(tmp_path) if one.run.name in ("plain", "again")]
    partition = make_partition(stored, jobs[0].train)
    learned = np.concatenate([partition.train, partition.validation])
    memory = int(stored.n_tokens[learned].sum()) * stored.width * 2
    jobs = [replace(one, train=one.train.model_copy(update={"keep": "ram", "memory": memory})) for one in jobs]
    for outcome in train_heads(stored, jobs, workers=1):
        assert numbers(outcome.load().path) == alone[outcome.job.run.name]
        assert outcome.load().metrics["features"]["kept_bytes"] == memory


def test_jobs_that_cannot_succeed_fail_alone(stored, alone, tmp_path: Path):
    bad = {
        "encoder": job(tmp_path / "encoder", HeadConfig(projection="hidden", encoder="grru")),
        "label": job(tmp_path / "label", label="rare"),
        "unlabelled": job(tmp_path / "unlabelled", label="authenticity"),
        "projection": job(tmp_path / "projection", HeadConfig(projection="sketch")),
        "taken": job(tmp_path / "taken"),
    }
    bad["taken"].run.mkdir()
    (bad["taken"].run / "letter.txt").write_text("mine")
    good = [one for one in jobs_in(tmp_path) if one.run.name in ("plain", "other label")]
    found = {one.job.run.name: one for one in train_heads(stored, [*bad.values(), *good], workers=1)}
    for one in good:
        assert numbers(found[one.run.name].load().path) == alone[one.run.name]
    messages = {name: found[name].error for name in bad}
    assert "Did you mean 'gru'?" in messages["encoder"]
    assert "has no rare MOS" in messages["label"]
    assert "No label of" in messages["unlabelled"]
    assert "a sketch" in messages["projection"]
    assert "is no run folder of a trained head" in messages["taken"]
    with pytest.raises(HeadError, match="was not trained: No encoder"):
        found["encoder"].load()


def test_an_item_that_cannot_be_read_fails_only_the_jobs_that_need_it(make_store, tmp_path: Path, capsys):
    source = make_store(40, encoding="hidden")
    jobs = [job(tmp_path / str(seed), split_seed=seed, test_share=0.5, validation=0.0) for seed in range(3)]
    source.features[7][0, 0] = np.nan
    source.items.splits[:] = ["train" if k != 7 else None for k in range(40)]
    source.items.splits[1] = "test"
    without = job(tmp_path / "without", split="published")
    found = {one.job.run.name: one for one in train_heads(source, [*jobs, without], workers=1)}
    assert [one.status for one in found.values()] == ["failed"] * 3 + ["trained"]
    assert "'0007.png' holds NaN" in found["0"].error
    assert "Every training reads its own features" in capsys.readouterr().err


def test_heads_that_are_there_are_not_trained_again_and_others_are_refused(stored, tmp_path: Path):
    source = Counted(stored)
    first = job(tmp_path / "a")
    assert [one.status for one in train_heads(source, [first])] == ["trained"]
    before = (tmp_path / "a" / "head.safetensors").stat().st_mtime_ns
    source.asked.clear()
    assert [one.status for one in train_heads(source, [job(tmp_path / "a", save_seconds=9.0)])] == ["there"]
    assert source.asked == []
    (other,) = train_heads(source, [job(tmp_path / "a", seed=1)])
    assert other.status == "failed"
    assert "seed: there 0, asked for 1" in other.error
    labels = {**stored.items.labels, "quality": stored.items.labels["quality"][::-1].copy()}
    source.items = replace(stored.items, labels=labels)
    (other,) = train_heads(source, [first])
    assert "labels of train are not those that it was trained with" in other.error
    assert (tmp_path / "a" / "head.safetensors").stat().st_mtime_ns == before


def test_workers_that_are_killed_take_their_jobs_along_and_no_others(stored, alone, tmp_path: Path):
    """Two heads are under way when both workers get SIGKILL; the others are trained by new ones, or fail there."""
    stream = {"keep": "stream"}
    long = [job(tmp_path / f"long {seed}", seed=seed, epochs=100_000, **stream) for seed in range(2)]
    bad = job(tmp_path / "encoder", HeadConfig(projection="hidden", encoder="grru"), **stream)
    rest = jobs_in(tmp_path, **stream)
    under_way = set()

    def kill_both(of: HeadJob, line: str) -> None:
        if line.startswith("epoch") and of in long:
            under_way.add(of.run)
        if len(under_way) == 2:
            for process in multiprocessing.active_children():
                os.kill(process.pid, signal.SIGKILL)
            under_way.clear()

    outcomes = {
        one.job.run.name: one for one in train_heads(stored, [*long, bad, *rest], workers=2, progress=kill_both)
    }
    for one in long:
        error = outcomes[one.run.name].error
        assert error == (
            "The worker that trained it was ended by SIGKILL (exit code -9), as the system does when memory runs out"
        )
        assert not one.run.exists()
    assert "Did you mean 'gru'?" in outcomes["encoder"].error
    assert {one.run.name: numbers(outcomes[one.run.name].load().path) for one in rest} == alone
    assert multiprocessing.active_children() == []


def test_a_store_that_was_replaced_is_told_to_a_worker(make_store, stored):
    address = SourceAddress.of(stored)
    assert address.open().id == stored.id
    with pytest.raises(HeadError, match="it was replaced meanwhile"):
        replace(address, reopen=lambda: make_store(60)).open()


def test_what_cannot_be_swept_is_refused_at_once(stored, tmp_path: Path):
    with pytest.raises(ConfigError, match="a job or more"):
        train_heads(stored, [])
    with pytest.raises(ConfigError, match="Two jobs have the run folder"):
        train_heads(stored, [job(tmp_path / "a"), job(tmp_path / "a", seed=1)])
    with pytest.raises(ConfigError, match=r"`keep` must be the same: .*'auto', .*'ram'"):
        train_heads(stored, [job(tmp_path / "a"), job(tmp_path / "b", keep="ram")])
    with pytest.raises(ConfigError, match="1 worker or more, and `workers` is 0"):
        train_heads(stored, [job(tmp_path / "a")], workers=0)
    assert list(tmp_path.iterdir()) == []


def test_as_many_workers_as_the_threads_of_a_head_leave_room_for(tmp_path: Path):
    cores = len(os.sched_getaffinity(0))
    jobs = [job(tmp_path / str(k), threads=1) for k in range(1000)]
    assert default_workers(jobs) == cores
    assert default_workers(jobs[:1]) == 1
    assert default_workers([job(tmp_path / "a", threads=cores), *jobs]) == 1


def test_shared_features_hold_no_row_twice_and_each_training_has_its_own_labels(stored, monkeypatch):
    config = QUICK.model_copy(update={"label": "rare", "validation": 0.0})
    rare = replace(make_partition(stored, config), train=np.arange(1, 30), test=np.arange(30, 40))
    other = replace(rare, train=np.arange(20, 60), test=np.arange(5))
    for processes, copied, keep in ((1, 0, "ram"), (2, 1 << 20, "ram"), (2, 0, "memmap")):
        monkeypatch.setattr(keeping, "_COPIED_BYTES", copied)
        shared = share_features(stored, [rare, other], config, device=CPU, processes=processes).kept
        features = shared.features
        learned = LabelledItems.at(features, features.positions_of(rare.train), "rare")
        assert learned.labels.numpy().tolist() == stored.items.labels["rare"][1:30, None].tolist()
        assert features.subset(learned.positions).rows.data_ptr() == features.rows.data_ptr()
        assert features.items[features.positions_of(rare.test)].tolist() == list(range(30, 40))
        with pytest.raises(DataError, match="has no rare MOS"):
            LabelledItems.at(features, features.positions_of(other.train), "rare")
        assert (shared.keep, shared.copy is not None) == (keep, keep == "memmap")


@pytest.mark.parametrize("keep", ["auto", "ram", "device", "memmap"])
@pytest.mark.parametrize("copied", [0, 1 << 20])
def test_small_rows_are_copied_to_other_processes_and_larger_ones_mapped(stored, monkeypatch, keep, copied):
    monkeypatch.setattr(keeping, "_COPIED_BYTES", copied)
    config = QUICK.model_copy(update={"keep": keep})
    shared = share_features(stored, [make_partition(stored, config)], config, device=CPU, processes=2)
    mapped = not copied or keep == "memmap"
    assert shared.kept.keep == ("memmap" if mapped else "ram")
    assert (PackedFeatures.of(shared).rows is None) == mapped
    packed = pickle.dumps(PackedFeatures.of(shared))
    assert len(packed) < (5000 if mapped else 5000 + 2 * shared.kept.features.row_bytes)
    opened = pickle.loads(packed).open(stored).kept
    for name in ("rows", "roles", "offsets"):
        assert torch.equal(getattr(opened.features, name), getattr(shared.kept.features, name))
    assert np.array_equal(opened.features.starts, shared.kept.features.starts)
    assert opened.record() == shared.kept.record()


def test_copies_for_all_processes_count_against_the_memory(stored):
    partition, row = make_partition(stored, QUICK), stored.width * 2
    learned = np.concatenate([partition.train, partition.validation])
    everything, without_test = (int(stored.n_tokens[items].sum()) * row for items in (np.arange(60), learned))
    for memory, expected in (
        (3 * everything, ("ram", everything)),
        (3 * everything - 1, ("ram", without_test)),
        (3 * without_test - 1, ("memmap", everything)),
    ):
        config = QUICK.model_copy(update={"memory": memory})
        kept = share_features(stored, [partition], config, device=CPU, processes=2).kept
        assert (kept.keep, kept.kept_bytes) == expected


def test_workers_read_for_themselves_where_no_copy_can_be_written(stored, alone, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(keeping, "_COPIED_BYTES", 0)
    (tmp_path / "cache").write_text("a file where the folder should be")
    jobs = [one for one in jobs_in(tmp_path) if one.run.name in ("plain", "other label")]
    for outcome in train_heads(stored, jobs, workers=2):
        assert numbers(outcome.load().path) == alone[outcome.job.run.name]
        assert outcome.load().metrics["features"]["keep"] == "ram"
    said = capsys.readouterr().err
    assert "cannot be written" in said
    assert "Every training reads its own features" in said


def test_runs_made_before_the_data_was_recorded_are_taken_by_their_settings(stored, tmp_path: Path):
    one = job(tmp_path / "a")
    run = train_head(stored, one.run, head=one.head, train=one.train)
    config = json.loads((run.path / "config.json").read_text())
    assert set(config.pop("data")) == {"items", "labels"}
    (run.path / "config.json").write_text(json.dumps(config))
    assert [found.status for found in train_heads(stored, [one])] == ["there"]
    assert load_run(run.path).metrics == run.metrics
