"""Training for real: heads learn what is there, nothing where there is nothing, and the same each time."""

import csv
import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from agiqa.errors import ConfigError, DataError, HeadError, UnknownName
from agiqa.heads import HeadConfig, LineProgress, TrainConfig, train_head
from agiqa.heads.training.schedule import lr_factor
from tests.heads.fits import fit_everything

GRU = HeadConfig(projection="sketch", encoder="gru", width=16)
QUICK = TrainConfig(split="grouped", epochs=2, lr=1e-2)


def read_csv(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(StringIO(path.read_text())))


@pytest.mark.parametrize(
    ("head", "encoding", "n"),
    [
        (GRU, "sketch", 500),
        (GRU.model_copy(update={"projection": "vocabulary"}), "hidden", 500),
        (HeadConfig(projection="sketch", encoder="xlstm", width=16, blocks=2, num_heads=2), "sketch", 700),
    ],
)
def test_heads_learn_the_order_of_tokens(make_store, tmp_path: Path, head, encoding, n):
    store = make_store(n, encoding=encoding, logical_dtype="bfloat16")
    run = train_head(store, tmp_path / "run", head=head, train=QUICK.model_copy(update={"epochs": 15}))
    assert run.metrics["test"]["srcc"] > 0.8
    assert run.metrics["test"]["rmse"] < np.std(store.items.labels["quality"])


def test_nothing_is_learned_from_permuted_labels(make_store, tmp_path: Path):
    store = make_store(300)
    permuted = np.random.default_rng(0).permutation(store.items.labels["quality"])
    store = replace(store, items=replace(store.items, labels={"quality": permuted}))
    run = train_head(store, tmp_path / "run", head=GRU, train=QUICK.model_copy(update={"epochs": 6}))
    assert abs(run.metrics["test"]["srcc"]) < 0.35


def test_the_order_is_out_of_reach_without_an_encoder(make_store, tmp_path: Path):
    head = HeadConfig(projection="sketch", encoder="none", width=16)
    run = train_head(make_store(500), tmp_path / "run", head=head, train=QUICK.model_copy(update={"epochs": 15}))
    assert run.metrics["test"]["srcc"] < 0.75


@pytest.mark.parametrize("scale", [0.01, 20.0])
def test_training_does_not_depend_on_the_unit_of_the_labels(make_store, tmp_path: Path, scale):
    store = make_store(100)
    scaled = replace(store, items=replace(store.items, labels={"quality": store.items.labels["quality"] * scale}))
    runs = [train_head(s, tmp_path / str(k), head=GRU, train=QUICK) for k, s in enumerate((store, scaled))]
    assert runs[0].metrics["test"]["plcc"] == pytest.approx(runs[1].metrics["test"]["plcc"], abs=1e-4)
    assert runs[0].metrics["test"]["rmse"] * scale == pytest.approx(runs[1].metrics["test"]["rmse"], rel=1e-3)


def test_a_seed_gives_the_same_numbers_and_leaves_the_callers_state(make_store, tmp_path: Path):
    store = make_store(80)
    state = torch.get_rng_state()
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        train_head(store, tmp_path / name, head=GRU, train=QUICK.model_copy(update={"seed": seed}))
    assert torch.equal(state, torch.get_rng_state())
    tables = [(tmp_path / name / "predictions.csv").read_text() for name in "abc"]
    assert tables[0] == tables[1] != tables[2]


def test_the_run_folder_holds_what_it_says(make_store, tmp_path: Path):
    store = make_store(100, prompts=41, published=True)
    lines = []
    run = train_head(
        store,
        tmp_path / "deep" / "run",
        head=GRU,
        train=TrainConfig(epochs=3, validation=0.4),
        progress=LineProgress(lines.append),
    )
    assert sorted(p.name for p in run.path.iterdir()) == [
        "config.json",
        "curves.csv",
        "head.safetensors",
        "metrics.json",
        "parts.json",
        "predictions.csv",
    ]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]
    assert lines[0].startswith("train: 3 epochs of 2 steps")
    assert [line.split(":")[0] for line in lines[1:]] == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]
    curves = read_csv(run.path / "curves.csv")
    srcc = [float(row["validation_srcc"]) for row in curves]
    assert run.metrics["chosen_epoch"] == 1 + int(np.argmax(srcc))
    assert run.metrics["validation"]["srcc"] == max(srcc)
    rows = read_csv(run.path / "predictions.csv")
    test = [row for row in rows if row["split"] == "test"]
    assert [row["name"] for row in test] == store.items.names[::5]
    mos, predicted = ([float(row[key]) for row in test] for key in ("mos", "predicted"))
    assert run.metrics["test"]["srcc"] == pytest.approx(stats.spearmanr(mos, predicted).statistic)
    assert run.metrics["split"]["leak"]["share"] > 0
    assert run.metrics["warnings"]
    config = json.loads((run.path / "config.json").read_text())
    assert config["features"] == {
        "store": "memory",
        "encoding": "sketch",
        "width": 4,
        "logical_dtype": "float32",
        "lm_head_sha256": store.lm_head_sha256,
        "basis_id": "basis-a",
        "layer": "last",
        "pooled": [],
        "tap": None,
    }
    assert config["kernels"] == "torch"
    assert config["train"]["epochs"] == 3


def test_the_test_part_has_no_say(make_store, tmp_path: Path):
    store = make_store(100, published=True)
    labels = store.items.labels["quality"].copy()
    labels[::5] = 5.0 - labels[::5]
    features = [rows * 9.0 if k % 5 == 0 else rows for k, rows in enumerate(store.features)]
    other = replace(store, features=features, items=replace(store.items, labels={"quality": labels}))
    runs = [
        train_head(s, tmp_path / str(k), head=GRU, train=TrainConfig(epochs=3)) for k, s in enumerate((store, other))
    ]
    weights = [(run.path / "head.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def test_without_validation_the_last_epoch_is_kept_and_said(make_store, tmp_path: Path):
    run = train_head(make_store(40), tmp_path / "run", head=GRU, train=QUICK.model_copy(update={"validation": 0.0}))
    assert run.metrics["validation"] is None
    assert run.metrics["chosen_epoch"] == 2
    assert run.metrics["chosen_by"] == "last epoch, as there are no validation items"


def test_refit_trains_on_validation_items_too(make_store, tmp_path: Path):
    store = make_store(60)
    plain, refit = (
        train_head(store, tmp_path / name, head=GRU, train=QUICK.model_copy(update={"refit": name == "refit"}))
        for name in ("plain", "refit")
    )
    assert refit.metrics["validation"] == plain.metrics["validation"]
    assert refit.metrics["test"] != plain.metrics["test"]
    stages = [row["stage"] for row in read_csv(refit.path / "curves.csv")]
    assert stages == ["train"] * 2 + ["refit"] * refit.metrics["chosen_epoch"]


def test_patience_stops(make_store, tmp_path: Path):
    config = QUICK.model_copy(
        update={"epochs": 50, "patience": 2, "lr": 1e-9, "schedule": "constant", "validation": 0.5}
    )
    run = train_head(make_store(80), tmp_path / "run", head=GRU, train=config)
    assert run.metrics["epochs_run"] - run.metrics["chosen_epoch"] == 2


def test_hidden_tokens_and_averaged_weights_still_learn_and_repeat(make_store, tmp_path: Path):
    store = make_store(300, encoding="sketch")
    head = GRU.model_copy(update={"token_dropout": 0.2})
    config = QUICK.model_copy(update={"epochs": 15, "ema": 0.9})
    runs = [train_head(store, tmp_path / name, head=head, train=config) for name in ("a", "b")]
    assert runs[0].metrics["test"] == runs[1].metrics["test"]
    assert runs[0].metrics["test"]["srcc"] > 0.4
    plain = train_head(store, tmp_path / "c", head=GRU, train=config.model_copy(update={"ema": None}))
    assert plain.metrics["test"] != runs[0].metrics["test"]


@pytest.mark.parametrize(
    ("ema", "decay"), [(0.4, 0.4), (0.99, 0.5)], ids=["as asked for", "bound to a tenth of the run"]
)
def test_averages_are_weighted_means_of_the_weights_after_every_step(make_store, ema, decay):
    """One step an epoch, 20 in all, against the weighted mean in float64."""
    store = make_store(12)
    plain = TrainConfig(epochs=20, batch_size=12, validation=0.0, lr=1e-2, schedule="constant", warmup=0, ema=None)
    steps: list[dict[str, torch.Tensor]] = []
    fit_everything(
        store,
        plain,
        GRU,
        test_scorer=lambda now: steps.append({k: v.double().clone() for k, v in now.state_dict().items()}) or {},
    )
    averages: list[dict[str, torch.Tensor]] = []
    averaged = plain.model_copy(update={"ema": ema})
    _, kept = fit_everything(
        store,
        averaged,
        GRU,
        test_scorer=lambda now: averages.append({k: v.clone() for k, v in now.state_dict().items()}) or {},
    )
    for number in (1, 2, 7, 20):
        weights = decay ** np.arange(number)[::-1]
        weights /= weights.sum()
        for name, value in averages[number - 1].items():
            expected = sum(weight * step[name] for weight, step in zip(weights, steps, strict=False))
            torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(averages[-1]["regressor.layers.0.weight"], steps[-1]["regressor.layers.0.weight"].float())
    torch.testing.assert_close(dict(kept.head.state_dict()), averages[-1])


def test_weights_are_averaged_beside_constants_that_grow_with_the_items(make_store, tmp_path: Path):
    """Items of more tokens than the masks that the package keeps: a copy of all constants would not fit."""
    store = make_store(8)
    store = replace(store, features=[np.resize(rows, (600, rows.shape[1])) for rows in store.features])
    head = HeadConfig(projection="sketch", encoder="xlstm", width=8, blocks=1, num_heads=2)
    config = TrainConfig(split="grouped", epochs=2, batch_size=4, validation=0.0, ema=0.7)
    run = train_head(store, tmp_path / "run", head=head, train=config)
    assert np.isfinite(run.metrics["test"]["rmse"])


@pytest.mark.parametrize("encoder", ["gru", "xlstm"])
def test_mixed_precision_trains(make_store, tmp_path: Path, encoder):
    head = HeadConfig(projection="sketch", encoder=encoder, width=8, blocks=2, num_heads=2)
    config = QUICK.model_copy(update={"precision": "bf16", "epochs": 1, "threads": 1})
    run = train_head(make_store(40), tmp_path / "run", head=head, train=config)
    assert np.isfinite(run.metrics["test"]["rmse"])


def test_faults_are_told_before_training(make_store, tmp_path: Path):
    store = make_store(40)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(HeadError, match="not empty"):
        train_head(store, tmp_path / "full", head=GRU, train=QUICK)
    with pytest.raises(UnknownName, match=r"No loss is called 'msse'\. Did you mean 'mse'"):
        train_head(store, tmp_path / "run", head=GRU, train=QUICK.model_copy(update={"loss": "msse"}))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="finds no CUDA device"):
            train_head(store, tmp_path / "run", head=GRU, train=QUICK.model_copy(update={"device": "cuda"}))
    store.items.labels["quality"][:] = 3.0
    with pytest.raises(DataError, match=r"memory: all \d+ training items have the label 3.0"):
        train_head(store, tmp_path / "run", head=GRU, train=QUICK)
    assert [p.name for p in tmp_path.iterdir()] == ["full"]


def test_a_diverging_run_is_an_error_and_leaves_nothing(make_store, tmp_path: Path):
    config = QUICK.model_copy(update={"lr": 1e30, "gradient_clip": None})
    with pytest.raises(HeadError, match="Training diverged"):
        train_head(make_store(40), tmp_path / "run", head=GRU, train=config)
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_rises_and_falls():
    config = TrainConfig(warmup=0.1)
    factors = [lr_factor(step, 100, config) for step in range(101)]
    assert factors[:11] == sorted(factors[:11])
    assert max(factors) == factors[10] == 1.0
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[100] == pytest.approx(0.0)
    assert lr_factor(80, 100, TrainConfig(schedule="constant")) == 1.0
