"""What a sweep shows while it runs."""

from pathlib import Path

import pytest

from agiqa.heads import HeadConfig, HeadJob, TrainConfig, train_head, train_heads
from agiqa.heads.sweeps.watching import HeadState, StateProgress, watching
from agiqa.progress import said_to
from tests.heads.training.test_resuming import BreakingProgress, Broken
from tests.test_progress import Clock

HEAD = HeadConfig(projection="sketch", encoder="none", width=4)
TRAIN = TrainConfig(split="grouped", validation=0.4, epochs=4, batch_size=8, device="cpu", save_seconds=0.0)


def state(share: float, *, before: float = 0.0, stage: str = "train") -> HeadState:
    return HeadState(stage=stage, epoch=int(share * 10) + 1, epochs=10, share=share, before=before)


def test_heads_under_way_and_the_time_left_are_shown_before_the_first_head_ends():
    clock, lines = Clock(), []
    with said_to(lines.append), watching("ablation", 24, "runs", done=4, clock=clock) as watch:
        clock.now += 20.0
        watch.running("gru,seed=0", state(0.2))
        clock.now += 10.0
        watch.running("xlstm,seed=0", state(0.5, before=0.4))
        clock.now += 10.0
        watch.running("xlstm,seed=0", state(0.7, before=0.4, stage="refit"))
        watch.ended("gru,seed=0")
        watch.ended("lstm,seed=0", there=True)
        assert watch.left == "8 min 52 s"
    assert lines == [
        "ablation: 4/24 runs, 36.0/h, 33 min 0 s left, running: gru,seed=0 (epoch 3/10)",
        "ablation: 4/24 runs, 45.0/h, 25 min 28 s left, running: gru,seed=0 (epoch 3/10), xlstm,seed=0 (refit, epoch 8/10)",
        "ablation: 6/24 runs in 40.0 s, running: xlstm,seed=0 (refit, epoch 8/10)",
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_shows_each_head_by_name_and_epoch(make_store, tmp_path: Path, workers):
    """The clock of the watch moves with every reading, so that each state is due."""

    class Running(Clock):
        def __call__(self) -> float:
            self.now += 8.0
            return self.now

    lines = []
    jobs = [HeadJob(run=tmp_path / name, head=HEAD, train=TRAIN) for name in ("a", "b")]
    with said_to(lines.append), watching("train", 2, clock=Running()) as watch:
        assert [one.status for one in train_heads(make_store(60), jobs, workers=workers, watch=watch)] == [
            "trained"
        ] * 2
    told = [line for line in lines if line.startswith("train: ")]
    for name in "ab":
        assert any(f"{name} (epoch " in line for line in told)
    assert any(" left, running: " in line for line in told)
    assert told[-1].startswith("train: 2/2 heads in")


def test_the_share_of_a_resumed_head_counts_as_done_before(make_store, tmp_path: Path):
    store, states = make_store(60), []
    with pytest.raises(Broken):
        train_head(store, tmp_path / "run", head=HEAD, train=TRAIN, progress=BreakingProgress(epoch=3))
    clock = iter(range(10_000))
    progress = StateProgress(lambda _line: None, states.append, TRAIN, clock=lambda: float(next(clock)))
    train_head(store, tmp_path / "run", head=HEAD, train=TRAIN, progress=progress)
    assert {one.before for one in states} == {0.5}
    shares = [one.share for one in states]
    assert shares[0] == 0.5
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert {(one.epoch, one.epochs) for one in states} == {(3, 4), (4, 4)}


def test_a_refit_is_the_second_half(make_store, tmp_path: Path):
    states, train = [], TRAIN.model_copy(update={"refit": True})
    clock = iter(range(10_000))
    progress = StateProgress(lambda _line: None, states.append, train, clock=lambda: float(next(clock)))
    train_head(make_store(120), tmp_path / "run", head=HEAD, train=train, progress=progress)
    by_stage = {stage: [one.share for one in states if one.stage == stage] for stage in ("train", "refit")}
    assert (by_stage["train"][0], by_stage["train"][-1]) == (0.0, 0.5)
    assert (by_stage["refit"][0], by_stage["refit"][-1]) == (0.5, 1.0)
