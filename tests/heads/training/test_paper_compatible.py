"""The test scores of every epoch: correct, never used for selection, and reported beside the honest number."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from agiqa.heads import HeadConfig, HeadJob, TrainConfig, evaluate, train_head, train_heads
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.data.keeping import KeptFeatures, SharedFeatures
from agiqa.heads.data.splits import make_partition
from tests.heads.label_stores import BOTH, LABELS, with_correspondence
from tests.heads.training.test_resuming import BreakingProgress, Broken, numbers

GRU = HeadConfig(projection="sketch", encoder="gru", width=8, dropout=0.2, token_dropout=0.2)
XLSTM = HeadConfig(projection="vocabulary", encoder="xlstm", width=8, blocks=2, num_heads=2, dropout=0.2)
PAPER = TrainConfig(
    split="grouped", epochs=4, lr=1e-2, batch_size=16, device="cpu", save_seconds=0, paper_compatible=True
)


def curves(run) -> list[dict[str, str]]:
    with (run.path / "curves.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    ("head", "changes"),
    [
        (GRU, {"refit": True, "ema": 0.9}),
        (GRU, {"precision": "bf16", "validation": 0.0}),
        (GRU, {"keep": "stream", "memory": 12_000, "batch_size": 8}),
        (XLSTM, {"epochs": 2}),
    ],
    ids=["refit, averaged", "bf16, last epoch", "streamed", "xlstm"],
)
def test_the_trace_changes_nothing_but_what_it_adds(make_store, tmp_path: Path, head, changes):
    store = make_store(60, encoding="hidden" if head is XLSTM else "sketch")
    config = PAPER.model_copy(update=changes)
    state = torch.get_rng_state()
    runs = [
        train_head(
            store, tmp_path / str(traced), head=head, train=config.model_copy(update={"paper_compatible": traced})
        )
        for traced in (False, True)
    ]
    assert torch.equal(state, torch.get_rng_state())
    plain, traced = (numbers(run.path) for run in runs)
    assert traced["weights"] == plain["weights"]
    assert traced["predictions"] == plain["predictions"]
    added = [{name: row.pop(name) for name in list(row) if name.startswith("test_")} for row in traced["curves"]]
    assert traced["curves"] == plain["curves"]
    assert [row["stage"] == "train" for row in traced["curves"]] == [all(row.values()) for row in added]
    assert {name for row in added for name in row} == {"test_srcc", "test_plcc"}
    told = traced["metrics"].pop("paper_compatible")
    assert plain["metrics"]["warnings"] == traced["metrics"].pop("warnings")[:-1]
    assert {name: value for name, value in plain["metrics"].items() if name != "warnings"} == traced["metrics"]
    chosen = added[runs[1].metrics["chosen_epoch"] - 1]
    if "refit" not in changes:
        assert float(chosen["test_srcc"]) == traced["metrics"]["test"]["srcc"]
        assert float(chosen["test_plcc"]) == traced["metrics"]["test"]["plcc"]
        assert told["bias"]["srcc"] >= 0


def test_the_scores_are_those_of_heads_that_were_trained_for_so_many_epochs(make_store, tmp_path: Path):
    store = make_store(60)
    config = PAPER.model_copy(update={"schedule": "constant", "warmup": 0.0, "validation": 0.0})
    rows = curves(train_head(store, tmp_path / "run", head=GRU, train=config))
    assert len(rows) == 4
    for epochs, row in enumerate(rows, start=1):
        alone = config.model_copy(update={"epochs": epochs, "paper_compatible": False})
        run = train_head(store, tmp_path / str(epochs), head=GRU, train=alone)
        scores = evaluate(run, store, device="cpu", batch_size=16)
        assert (float(row["test_srcc"]), float(row["test_plcc"])) == (scores["srcc"], scores["plcc"])
        with (run.path / "predictions.csv").open(newline="") as file:
            test = [one for one in csv.DictReader(file) if one["split"] == "test"]
        pair = [[float(one[name]) for one in test] for name in ("predicted", "mos")]
        assert float(row["test_srcc"]) == pytest.approx(stats.spearmanr(*pair).statistic)
        assert float(row["test_plcc"]) == pytest.approx(stats.pearsonr(*pair).statistic)


@pytest.mark.parametrize("refit", [False, True])
def test_the_best_epoch_on_test_stands_beside_the_honest_number(make_store, tmp_path: Path, refit):
    """Of the first training in which the two protocols choose different epochs."""
    store = make_store(60)
    for seed in range(20):
        config = PAPER.model_copy(update={"epochs": 6, "refit": refit, "lr": 3e-2, "seed": seed})
        run = train_head(store, tmp_path / str(seed), head=GRU, train=config)
        rows = [row for row in curves(run) if row["stage"] == "train"]
        srcc, plcc = ([float(row[f"test_{metric}"]) for row in rows] for metric in ("srcc", "plcc"))
        best, honest, told = int(np.argmax(srcc)), run.metrics["test"], run.metrics["paper_compatible"]
        if best + 1 != run.metrics["chosen_epoch"]:
            break
    assert best + 1 != run.metrics["chosen_epoch"]
    assert told == {
        "chosen_by": "highest test SRCC",
        "epoch": best + 1,
        "srcc": srcc[best],
        "plcc": plcc[best],
        "bias": {"srcc": srcc[best] - honest["srcc"], "plcc": plcc[best] - honest["plcc"]},
    }
    assert run.metrics["warnings"][0].startswith(f"There are only {run.metrics['validation']['n']} validation items")
    assert run.metrics["warnings"][1:] == [
        f"paper-compatible: the best epoch on the test part itself ({best + 1}) has test SRCC {srcc[best]:.4f} PLCC "
        f"{plcc[best]:.4f}; this run, which chose without the test part, has SRCC {honest['srcc']:.4f} PLCC "
        f"{honest['plcc']:.4f}. The difference, SRCC {told['bias']['srcc']:+.4f} PLCC {told['bias']['plcc']:+.4f}, is bias."
    ]
    assert json.loads((run.path / "metrics.json").read_text())["paper_compatible"] == told


def test_of_several_labels_one_epoch_is_the_best_and_each_is_told(make_store, tmp_path: Path):
    store, config = with_correspondence(make_store(60)), PAPER.model_copy(update={"label": BOTH, "validation": 0.0})
    run = train_head(store, tmp_path / "run", head=GRU, train=config)
    rows = curves(run)
    means = [np.mean([float(row[f"test_srcc_{label}"]) for label in LABELS]) for row in rows]
    best = int(np.argmax(means))
    assert list(run.metrics["paper_compatible"]) == list(LABELS)
    for label in LABELS:
        told, honest = run.metrics["paper_compatible"][label], run.metrics["test"][label]
        assert (told["chosen_by"], told["epoch"]) == ("highest mean test SRCC of quality, correspondence", best + 1)
        for metric in ("srcc", "plcc"):
            assert told[metric] == float(rows[best][f"test_{metric}_{label}"])
            assert told["bias"][metric] == told[metric] - honest[metric]
    assert [line.split(":")[0] for line in run.metrics["warnings"]] == [
        f"paper-compatible, {label}" for label in LABELS
    ]


def test_test_scores_that_are_not_defined_choose_nothing(make_store, tmp_path: Path):
    store = make_store(60)
    labels = store.items.labels["quality"].copy()
    labels[make_partition(store, PAPER).test] = 3.0
    store = replace(store, items=replace(store.items, labels={"quality": labels}))
    run = train_head(store, tmp_path / "run", head=GRU, train=PAPER)
    assert run.metrics["paper_compatible"] == {
        "chosen_by": "none, as the test SRCC was never defined",
        "epoch": None,
        "srcc": None,
        "plcc": None,
        "bias": {"srcc": None, "plcc": None},
    }
    assert "has test SRCC undefined PLCC undefined" in run.metrics["warnings"][-1]


def test_one_that_was_broken_off_ends_with_the_same_curves(make_store, tmp_path: Path):
    store, config = make_store(50), PAPER.model_copy(update={"refit": True, "ema": 0.9})
    expected = numbers(train_head(store, tmp_path / "whole", head=GRU, train=config).path)
    for place in ({"step": 5}, {"epoch": 1}, {"epoch": 3}, {"epoch": 5}):
        run = tmp_path / "run"
        with pytest.raises(Broken):
            train_head(store, run, head=GRU, train=config, progress=BreakingProgress(**place))
        assert numbers(train_head(store, run, head=GRU, train=config).path) == expected
        run.rename(tmp_path / f"done {place}")


def test_a_sweep_follows_the_same_scores_wherever_the_test_rows_are(make_store, tmp_path: Path):
    store = make_store(60)
    expected = numbers(train_head(store, tmp_path / "alone", head=GRU, train=PAPER).path)
    job = HeadJob(run=tmp_path / "swept", head=GRU, train=PAPER)
    assert [one.status for one in train_heads(store, [job], workers=1)] == ["trained"]
    assert numbers(job.run) == expected
    learned = {name: items for name, items in make_partition(store, PAPER).parts().items() if name != "test"}
    features = FeatureSet.from_store(store, np.sort(np.concatenate(list(learned.values()))))
    shared = SharedFeatures(kept=KeptFeatures(features=features, keep="ram"))
    without = train_head(store, tmp_path / "without", head=GRU, train=PAPER, shared=shared)
    assert numbers(without.path) == expected
