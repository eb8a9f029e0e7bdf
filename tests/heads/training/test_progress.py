"""What a training reports: epochs of how many, steps within long epochs, the time left, and a resumed beginning."""

import re
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from agiqa.heads import HeadConfig, LineProgress, TrainConfig, train_head
from agiqa.heads.training.progress import BarProgress
from tests.heads.training.test_resuming import BreakingProgress, Broken

HEAD = HeadConfig(projection="sketch", encoder="none", width=4)
TRAIN = TrainConfig(split="grouped", validation=0.4, epochs=4, batch_size=8, device="cpu", save_seconds=0.0)


class Clock:
    """A clock that each reading moves by the same time."""

    def __init__(self, step: float) -> None:
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def test_short_epochs_are_a_line_each_with_the_time_left(make_store, tmp_path: Path):
    lines = []
    train_head(make_store(60), tmp_path / "run", head=HEAD, train=TRAIN, progress=LineProgress(lines.append))
    assert lines[0] == "train: 4 epochs of 4 steps"
    assert [line.split(":")[0] for line in lines[1:]] == [f"epoch {k}/4" for k in range(1, 5)]
    assert ["left" in line for line in lines[1:]] == [True, True, True, False]


def test_long_epochs_say_their_steps_and_validation_off_a_terminal(make_store, tmp_path: Path):
    """Each reading of the clock takes 8 s, so that a line is due after two steps."""
    lines = []
    clock = Clock(8.0)
    progress = LineProgress(lines.append, clock=clock)
    train_head(make_store(120), tmp_path / "run", head=HEAD, train=TRAIN, progress=progress)
    within = [line for line in lines if ": step " in line]
    assert len(within) >= 8
    assert all(line.startswith("epoch ") and "/4: step " in line and line.endswith(" left") for line in within)
    assert any(": validation, " in line for line in lines)
    assert within[0].startswith("epoch 1/4: step ")
    assert within[-1].startswith("epoch 4/4: step ")


def broken_off(store, run: Path) -> None:
    with pytest.raises(Broken):
        train_head(store, run, head=HEAD, train=TRAIN, progress=BreakingProgress(epoch=3))


def test_a_resumed_training_begins_where_it_stands(make_store, tmp_path: Path):
    store, lines = make_store(60), []
    broken_off(store, tmp_path / "run")
    train_head(store, tmp_path / "run", head=HEAD, train=TRAIN, progress=LineProgress(lines.append))
    assert lines[0] == "train: 4 epochs of 4 steps, 2 of them done before"
    assert [line.split(":")[0] for line in lines[1:]] == ["epoch 3/4", "epoch 4/4"]


def test_a_bar_counts_epochs_and_begins_where_the_training_stands(make_store, tmp_path: Path):
    store, out = make_store(60), StringIO()
    broken_off(store, tmp_path / "run")
    console = Console(file=out, force_terminal=True, width=120)
    train_head(store, tmp_path / "run", head=HEAD, train=TRAIN, progress=BarProgress(console))
    shown = out.getvalue()
    assert "0/4 epochs" not in shown
    assert "4/4 epochs" in shown
    assert "epoch 3/4: loss" in shown


def test_an_interrupted_training_leaves_no_bar_that_looks_finished(make_store, tmp_path: Path):
    class Interrupted(BarProgress):
        def epoch(self, epoch) -> None:
            super().epoch(epoch)
            if epoch.epoch == 2:
                raise Broken

    out = StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    with pytest.raises(Broken):
        train_head(make_store(60), tmp_path / "run", head=HEAD, train=TRAIN, progress=Interrupted(console))
    assert not re.search(r"/4 epochs in \d", out.getvalue())
    assert out.getvalue().endswith("\x1b[?25h")
