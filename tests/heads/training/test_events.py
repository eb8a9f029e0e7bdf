"""TensorBoard event files, read back with TensorBoard's own reader."""

import csv
import importlib.util
import math
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from agiqa.errors import ConfigError
from agiqa.heads import HeadConfig, TrainConfig, train_head
from tests.heads.training.test_resuming import BreakingProgress, Broken

GRU = HeadConfig(projection="sketch", encoder="gru", width=8)
LOGGED = TrainConfig(split="grouped", epochs=3, batch_size=8, lr=1e-2, save_seconds=0, tensorboard=True)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every point that TensorBoard would show, by tag."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_events_hold_every_step_and_every_epoch(make_store, tmp_path: Path):
    run = train_head(make_store(60), tmp_path / "run", head=GRU, train=LOGGED.model_copy(update={"refit": True}))
    shown = curves(run.path / "tensorboard" / "train")
    per_epoch = math.ceil(run.metrics["split"]["train"] / 8)
    assert [step for step, _ in shown["train/loss"]] == list(range(1, 3 * per_epoch + 1))
    rates = [rate for _, rate in shown["train/lr"]]
    assert max(rates) == pytest.approx(1e-2, rel=0.1)
    assert rates.index(max(rates)) < 3
    with (run.path / "curves.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["stage"] == "train"]
    losses = [loss for _, loss in shown["train/loss"]]
    for number, row in enumerate(rows, start=1):
        last = number * per_epoch
        assert (last, number) in shown["epoch"]
        assert sum(losses[last - per_epoch : last]) / per_epoch == pytest.approx(float(row["train_loss"]), rel=1e-4)
        for metric in ("srcc", "plcc", "rmse"):
            value = dict(shown[f"validation/{metric}"])[last]
            assert value == pytest.approx(float(row[f"validation_{metric}"]), rel=1e-4)
    again = curves(run.path / "tensorboard" / "refit")
    assert len(again["epoch"]) == run.metrics["chosen_epoch"]
    assert "validation/srcc" not in again


@pytest.mark.parametrize("step", [3, 16])
def test_a_resumed_training_shows_every_step_once(make_store, tmp_path: Path, step):
    store = make_store(60)
    whole = train_head(store, tmp_path / "whole", head=GRU, train=LOGGED)
    with pytest.raises(Broken):
        train_head(store, tmp_path / "run", head=GRU, train=LOGGED, progress=BreakingProgress(step=step))
    time.sleep(1.0)  # readers order the files by the second in their names, which a new process never shares
    run = train_head(store, tmp_path / "run", head=GRU, train=LOGGED)
    assert curves(run.path / "tensorboard" / "train") == curves(whole.path / "tensorboard" / "train")


def test_no_events_unless_asked_for(make_store, tmp_path: Path):
    run = train_head(make_store(40), tmp_path / "run", head=GRU, train=LOGGED.model_copy(update={"tensorboard": False}))
    assert not (run.path / "tensorboard").exists()


def test_a_missing_package_is_told_before_anything_is_read(make_store, tmp_path: Path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "tensorboard" else find(name))
    with pytest.raises(ConfigError, match=r"pip install 'agiqa\[tensorboard\]'"):
        train_head(make_store(40), tmp_path / "run", head=GRU, train=LOGGED)
    assert list(tmp_path.iterdir()) == []
