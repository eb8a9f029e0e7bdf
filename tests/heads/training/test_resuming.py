"""An interrupted and resumed training ends with the numbers of an uninterrupted one."""

import csv
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from agiqa.errors import HeadError
from agiqa.heads import HeadConfig, TrainConfig, train_head
from agiqa.heads.training.resuming import state_folder

GRU = HeadConfig(projection="sketch", encoder="gru", width=8, dropout=0.2, token_dropout=0.2)
XLSTM = HeadConfig(projection="vocabulary", encoder="xlstm", width=8, blocks=2, num_heads=2, dropout=0.2)
EVERY = TrainConfig(split="grouped", epochs=4, batch_size=16, lr=1e-2, save_seconds=0)
CHOOSING = {"validation": 0.75, "batch_size": 64, "refit": True}
"""Validation items enough to choose the epoch by, and as many steps an epoch without them as with them."""


class Broken(Exception):
    """What happens in the middle of a training."""


class BreakingProgress:
    """Breaks the training off at its n-th step, or at the end of its n-th epoch."""

    def __init__(self, *, step: int | None = None, epoch: int | None = None) -> None:
        self.steps = self.epochs = 0
        self._last_step, self._last_epoch = step, epoch

    def begin(self, stage: str, *, epochs: int, steps: int, done: int) -> None:
        pass

    def validated(self) -> None:
        pass

    def step(self) -> None:
        self.steps += 1
        if self.steps == self._last_step:
            raise Broken

    def epoch(self, epoch) -> None:
        self.epochs += 1
        if self.epochs == self._last_epoch:
            raise Broken

    def end(self) -> None:
        pass


def numbers(run: Path) -> dict[str, object]:
    """Everything that a run folder says, but for the time that it took and the memory that was free."""
    metrics = json.loads((run / "metrics.json").read_text())
    del metrics["seconds"], metrics["trained_at"], metrics["features"]
    with (run / "curves.csv").open(newline="") as file:
        curves = [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]
    return {
        "weights": (run / "head.safetensors").read_bytes(),
        "predictions": (run / "predictions.csv").read_text(),
        "metrics": metrics,
        "curves": curves,
    }


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        (GRU, {"refit": True, "ema": 0.9, "epochs": 3}),
        (GRU, {"validation": 0.0, "precision": "bf16"}),
        (GRU, CHOOSING | {"patience": 1, "epochs": 20, "lr": 1e-9, "schedule": "constant"}),
        (GRU, CHOOSING | {"calibrate": True, "ema": 0.9, "epochs": 5}),
        (XLSTM, {"warmup": 0.5, "epochs": 2}),
    ],
    ids=["refit, averaged", "last epoch, bf16", "patience", "calibrated", "xlstm"],
)
def test_a_training_broken_off_anywhere_ends_with_the_same_numbers(make_store, tmp_path: Path, head, changes):
    store = make_store(50, encoding="hidden" if head is XLSTM else "sketch")
    config = EVERY.model_copy(update=changes)
    whole = BreakingProgress()
    expected = numbers(train_head(store, tmp_path / "whole", head=head, train=config, progress=whole).path)
    run = tmp_path / "run"
    places = [{"step": n} for n in range(1, whole.steps + 1, 3)] + [{"epoch": n} for n in range(1, whole.epochs + 1)]
    for place in places:
        with pytest.raises(Broken):
            train_head(store, run, head=head, train=config, progress=BreakingProgress(**place))
        assert not run.exists()
        rest = BreakingProgress()
        assert numbers(train_head(store, run, head=head, train=config, progress=rest).path) == expected
        finished = place.get("epoch", (place.get("step", 0) - 1) // (whole.steps // whole.epochs) + 1) - 1
        assert rest.epochs == whole.epochs - finished
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
        for file in sorted(run.rglob("*")):
            file.unlink()
        run.rmdir()


def test_one_that_is_broken_off_again_and_again_comes_to_its_end(make_store, tmp_path: Path):
    store, config = make_store(50), EVERY.model_copy(update={"refit": True})
    expected = numbers(train_head(store, tmp_path / "whole", head=GRU, train=config).path)
    for _ in range(20):
        try:
            run = train_head(store, tmp_path / "run", head=GRU, train=config, progress=BreakingProgress(step=4))
        except Broken:
            continue
        break
    assert numbers(run.path) == expected


def test_the_time_of_all_parts_is_told(make_store, tmp_path: Path):
    with pytest.raises(Broken):
        train_head(make_store(50), tmp_path / "run", head=GRU, train=EVERY, progress=BreakingProgress(epoch=3))
    run = train_head(make_store(50), tmp_path / "run", head=GRU, train=EVERY)
    with (run.path / "curves.csv").open(newline="") as file:
        assert run.metrics["seconds"]["train"] > sum(float(row["seconds"]) for row in csv.DictReader(file))


def broken_off(store, run: Path, config: TrainConfig = EVERY) -> Path:
    """The state of a training that was broken off in its third epoch."""
    with pytest.raises(Broken):
        train_head(store, run, head=GRU, train=config, progress=BreakingProgress(epoch=3))
    return state_folder(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda store: {"train": EVERY.model_copy(update={"lr": 0.5})}, "lr: kept 0.01, asked for 0.5"),
        (lambda store: {"head": GRU.model_copy(update={"width": 4})}, "width: kept 8, asked for 4"),
        (lambda store: store.items.labels["quality"].__setitem__(slice(None), range(50)), "labels of train"),
        (lambda store: store.items.names.__setitem__(slice(None), map(str, range(50))), "items of test"),
        (lambda store: object.__setattr__(store, "id", "other"), "store: kept 'memory', asked for 'other'"),
    ],
    ids=["lr", "width", "labels", "items", "store"],
)
def test_another_training_is_refused_with_what_differs_until_restarted(
    make_store, tmp_path: Path, change: Callable, said
):
    store, run = make_store(50), tmp_path / "run"
    folder = broken_off(store, run)
    kept = (folder / "state.ckpt").read_bytes()
    settings = {"head": GRU, "train": EVERY, **(change(store) or {})}
    with pytest.raises(HeadError, match=said) as caught:
        train_head(store, run, **settings)
    assert "--restart" in str(caught.value)
    assert (folder / "state.ckpt").read_bytes() == kept
    afresh = train_head(store, run, **settings, restart=True)
    assert numbers(afresh.path) == numbers(train_head(store, tmp_path / "whole", **settings).path)


def test_settings_that_change_no_number_may_change(make_store, tmp_path: Path):
    store, run = make_store(50), tmp_path / "run"
    broken_off(store, run)
    progress = BreakingProgress()
    other = EVERY.model_copy(update={"save_seconds": 9.0, "keep": "stream", "memory": 10**9})
    train_head(store, run, head=GRU, train=other, progress=progress)
    assert progress.epochs == 2


def test_a_state_that_cannot_be_read_says_so(make_store, tmp_path: Path):
    store, run = make_store(50), tmp_path / "run"
    path = broken_off(store, run) / "state.ckpt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(HeadError, match=r"state\.ckpt cannot be read.*--restart"):
        train_head(store, run, head=GRU, train=EVERY)
    assert path.exists()
    train_head(store, run, head=GRU, train=EVERY, restart=True)


def test_a_half_written_state_is_not_taken_for_one(make_store, tmp_path: Path):
    """Killed while saving: the file under the final name is the one before."""
    store, run = make_store(50), tmp_path / "run"
    folder = broken_off(store, run)
    (folder / "state.ckpt.new").write_bytes(b"half")
    progress = BreakingProgress()
    train_head(store, run, head=GRU, train=EVERY, progress=progress)
    assert progress.epochs == 2
    assert not folder.exists()


def test_a_full_disk_names_the_state_and_keeps_the_epochs_before(make_store, tmp_path: Path):
    store, run = make_store(50), tmp_path / "run"
    folder = broken_off(store, run)
    kept = (folder / "state.ckpt").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) // 2, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            train_head(store, run, head=GRU, train=EVERY)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"saving the training to {folder / 'state.ckpt'}" in caught.value.__notes__[0]
    assert (folder / "state.ckpt").read_bytes() == kept
    assert not (folder / "state.ckpt.new").exists()


def test_a_state_holds_no_code(make_store, tmp_path: Path):
    path = broken_off(make_store(50), tmp_path / "run") / "state.ckpt"
    assert len(torch.load(path, weights_only=True)["agiqa"]["curves"]) in (1, 2)


def test_a_run_that_another_process_trains_is_refused(make_store, tmp_path: Path):
    class Nested(BreakingProgress):
        def epoch(self, epoch) -> None:
            child = os.fork()
            if child == 0:
                try:
                    train_head(make_store(50), tmp_path / "run", head=GRU, train=EVERY)
                except HeadError as error:
                    os._exit(3 if "Another process trains" in str(error) else 4)
                os._exit(5)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3

    train_head(make_store(50), tmp_path / "run", head=GRU, train=EVERY, progress=Nested())


def test_nothing_is_saved_before_it_is_time(make_store, tmp_path: Path):
    store, run = make_store(50), tmp_path / "run"
    patient = EVERY.model_copy(update={"save_seconds": 1000.0})
    with pytest.raises(Broken):
        train_head(store, run, head=GRU, train=patient, progress=BreakingProgress(epoch=3))
    assert list(tmp_path.iterdir()) == []
