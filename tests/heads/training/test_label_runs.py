"""Run folders of heads with several labels: what they report and predict, and how training resumes."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads import FeatureBatches, evaluate, load_run, predict, train_head
from agiqa.heads.data.splits import make_partition
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.evaluation.mos_mappings import Mappings
from tests.heads.label_stores import BOTH, GRU, LABELS, QUICK, with_correspondence
from tests.heads.training.test_events import curves
from tests.heads.training.test_resuming import BreakingProgress, Broken, numbers


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_head_learns_both_labels_and_its_metrics_are_those_of_its_table(make_store, tmp_path: Path):
    store = with_correspondence(make_store(500))
    config = QUICK.model_copy(update={"epochs": 15})
    run = train_head(store, tmp_path / "run", head=GRU, train=config)
    rows = read_csv(run.path / "predictions.csv")
    assert list(rows[0]) == [
        *("name", "prompt", "split", "item", "mos_quality", "predicted_quality"),
        *("mos_correspondence", "predicted_correspondence"),
    ]
    numbers_of = {name: k for k, name in enumerate(store.items.names)}
    for part in ("validation", "test"):
        assert list(run.metrics[part]) == list(LABELS)
        table = [row for row in rows if row["split"] == part]
        for label in LABELS:
            truth, guesses = (
                np.array([float(row[f"{what}_{label}"]) for row in table]) for what in ("mos", "predicted")
            )
            assert truth.tolist() == [store.items.labels[label][numbers_of[row["name"]]] for row in table]
            fits = Mappings.from_record(run.metrics["logistic"][label]).fitted if part == "test" else {}
            prompts = [row["prompt"] for row in table]
            told = {name: value for name, value in run.metrics[part][label].items() if name != "intervals"}
            scores = evaluate_scores(guesses, truth, prompts, mappings=fits)
            slope, intercept = np.polyfit(guesses, truth, 1)
            assert told == {**scores, "slope": pytest.approx(slope), "intercept": pytest.approx(intercept)}
            assert told["srcc"] > 0.8
            assert told["rmse"] < 0.6 * truth.std()
    assert run.metrics["test"]["quality"]["rmse_linear"] != run.metrics["test"]["correspondence"]["rmse_linear"]


def test_the_epoch_is_chosen_by_the_mean_and_said(make_store, tmp_path: Path):
    config = QUICK.model_copy(update={"epochs": 4, "tensorboard": True, "validation": 0.5})
    run = train_head(with_correspondence(make_store(80)), tmp_path / "run", head=GRU, train=config)
    assert run.metrics["chosen_by"] == "highest mean validation SRCC of quality, correspondence"
    rows = read_csv(run.path / "curves.csv")
    srcc = [float(row["validation_srcc"]) for row in rows]
    assert run.metrics["chosen_epoch"] == 1 + int(np.argmax(srcc))
    for metric in ("srcc", "plcc", "rmse"):
        mean = np.mean([run.metrics["validation"][label][metric] for label in LABELS])
        assert float(rows[run.metrics["chosen_epoch"] - 1][f"validation_{metric}"]) == pytest.approx(mean, abs=1e-12)
    shown = [value for _, value in curves(run.path / "tensorboard" / "train")["validation/srcc"]]
    assert shown == pytest.approx(srcc, rel=1e-4)
    assert (run.config["label"], run.config["labels"], run.metrics["label"]) == (BOTH, list(LABELS), BOTH)


def test_a_mean_that_is_undefined_for_one_label_chooses_nothing(make_store, tmp_path: Path):
    store, config = with_correspondence(make_store(80)), QUICK.model_copy(update={"validation": 0.5})
    store.items.labels["correspondence"][make_partition(store, config).validation] = 50.0
    run = train_head(store, tmp_path / "run", head=GRU, train=config)
    assert run.metrics["chosen_epoch"] == 2
    assert run.metrics["chosen_by"] == (
        "last epoch, as the mean validation SRCC of quality, correspondence was never defined"
    )
    assert run.metrics["validation"]["quality"]["srcc"] is not None
    assert run.metrics["validation"]["correspondence"]["undefined"] == "all labels are equal"


def test_each_label_has_the_numbers_of_its_own_column(make_store, tmp_path: Path):
    """Swapping the names in `label` swaps the reported results, and changes nothing else."""
    store = with_correspondence(make_store(60))
    swapped = replace(
        store, items=replace(store.items, labels=dict(zip(LABELS[::-1], store.items.labels.values(), strict=True)))
    )
    other = QUICK.model_copy(update={"label": "correspondence+quality"})
    runs = [
        train_head(store, tmp_path / "a", head=GRU, train=QUICK),
        train_head(swapped, tmp_path / "b", head=GRU, train=other),
    ]
    assert (tmp_path / "a" / "head.safetensors").read_bytes() == (tmp_path / "b" / "head.safetensors").read_bytes()
    for part in ("validation", "test", "logistic"):
        assert runs[0].metrics[part]["quality"] == runs[1].metrics[part]["correspondence"]
        assert runs[0].metrics[part]["correspondence"] == runs[1].metrics[part]["quality"]


@pytest.fixture
def trained(make_store, tmp_path: Path):
    store = with_correspondence(make_store(200))
    config = QUICK.model_copy(update={"validation": 0.3})
    return store, train_head(store, tmp_path / "run", head=GRU, train=config)


def test_a_loaded_run_predicts_and_evaluates_every_label(trained):
    store, run = trained
    again = load_run(run.path)
    everything = predict(again, store)
    assert everything.shape == (200, 2)
    items = np.random.default_rng(0).permutation(200)[:50]
    assert predict(again, store, items, batch_size=7) == pytest.approx(everything[items], rel=1e-5)
    assert predict(again, store, []).shape == (0, 2)
    table = {row["name"]: row for row in read_csv(run.path / "predictions.csv")}
    for item, name in enumerate(store.items.names):
        if name in table:
            told = [float(table[name][f"predicted_{label}"]) for label in LABELS]
            assert everything[item].tolist() == pytest.approx(told, rel=1e-5)
    for part in ("validation", "test"):
        scores = evaluate(again, store, part)
        assert list(scores) == [*LABELS, "warnings"]
        for label in LABELS:
            for metric in ("n", "srcc", "plcc", "krcc", "rmse"):
                assert scores[label][metric] == pytest.approx(run.metrics[part][label][metric], abs=1e-5)
    test = evaluate(again, store)
    for label in LABELS:
        assert test[label]["logistic"] == run.metrics["logistic"][label]
        assert "plcc_linear" in test[label]
        inside = evaluate(again, store, "validation")[label]
        assert "which the mappings were fitted to" in inside["logistic"]["logistic4"]["absent"]


def test_a_store_without_one_of_the_labels_is_predicted_and_not_evaluated(trained, make_store):
    store, run = trained
    other = make_store(25, published=True, seed=9, weights=store.weights, id="other")
    assert predict(run, other).shape == (25, 2)
    with pytest.raises(UnknownName, match=r"label of other is called 'correspondence'.*Known: quality"):
        evaluate(run, other)
    other.items.labels["correspondence"] = np.arange(25.0)
    assert evaluate(run, other)["correspondence"]["n"] == 5
    other.items.labels["correspondence"][10] = np.nan
    scores = evaluate(run, other)
    assert (scores["quality"]["n"], scores["correspondence"]["n"]) == (5, 4)
    other.items.labels["quality"][10] = np.nan
    with pytest.raises(DataError, match=r"'0010.png' has no quality MOS\n.*has no correspondence MOS"):
        evaluate(run, other)
    other.items.labels["correspondence"][:] = np.nan
    with pytest.raises(DataError, match="has no correspondence MOS"):
        evaluate(run, other)


def test_metrics_and_weights_of_another_number_of_labels_are_refused(trained):
    store, run = trained
    metrics = {**run.metrics, "logistic": run.metrics["logistic"]["quality"]}
    (run.path / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(HeadError, match=r"metrics\.json: `logistic` is not what a training writes"):
        evaluate(load_run(run.path), store)
    config = {**run.config, "train": {**run.config["train"], "label": "quality"}}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match="does not hold the weights"):
        predict(load_run(run.path), store)


def test_a_run_folder_of_one_label_is_as_ever(make_store, tmp_path: Path):
    store = with_correspondence(make_store(80))
    one = QUICK.model_copy(update={"label": "quality", "validation": 0.5})
    run = train_head(store, tmp_path / "run", head=GRU, train=one)
    assert list(read_csv(run.path / "predictions.csv")[0]) == ["name", "prompt", "split", "item", "mos", "predicted"]
    assert run.metrics["test"]["n"] > 0
    assert set(run.metrics["logistic"]) == {"linear", "logistic4"}
    assert run.metrics["chosen_by"] == "highest validation SRCC"
    assert set(evaluate(run, store)) == {*run.metrics["test"], "logistic", "warnings"}
    config = {name: value for name, value in run.config.items() if name != "labels"}
    (run.path / "config.json").write_text(json.dumps(config))
    assert predict(load_run(run.path), store).shape == (80,)


def test_a_training_broken_off_goes_on_with_all_labels(make_store, tmp_path: Path):
    store = with_correspondence(make_store(50))
    config = QUICK.model_copy(update={"epochs": 3, "save_seconds": 0.0, "refit": True, "ema": 0.9})
    expected = numbers(train_head(store, tmp_path / "whole", head=GRU, train=config).path)
    for number, place in enumerate([{"step": 5}, {"epoch": 4}]):
        run = tmp_path / f"run{number}"
        with pytest.raises(Broken):
            train_head(store, run, head=GRU, train=config, progress=BreakingProgress(**place))
        other = config.model_copy(update={"label": "correspondence+quality"})
        with pytest.raises(HeadError, match=r"label: kept 'quality\+correspondence', asked for 'correspondence\+qual"):
            train_head(store, run, head=GRU, train=other)
        shifted = {**store.items.labels, "correspondence": store.items.labels["correspondence"] + 1.0}
        relabelled = replace(store, items=replace(store.items, labels=shifted))
        with pytest.raises(HeadError, match="labels of train are not those that it was trained with"):
            train_head(relabelled, run, head=GRU, train=config)
        assert numbers(train_head(store, run, head=GRU, train=config).path) == expected


@pytest.mark.parametrize("keep", ["memmap", "stream"])
def test_all_labels_go_wherever_the_features_are(make_store, tmp_path: Path, monkeypatch, keep):
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))
    store = with_correspondence(make_store(60))
    runs = [
        train_head(store, tmp_path / way, head=GRU, train=QUICK.model_copy(update={"keep": way}))
        for way in ("ram", keep)
    ]
    assert (runs[0].path / "predictions.csv").read_text() == (runs[1].path / "predictions.csv").read_text()


def test_batches_of_loops_of_ones_own_hold_all_labels(make_store):
    store = with_correspondence(make_store(20))
    for batch in FeatureBatches(store, range(20), batch_size=4, seed=0, epoch=0, label=BOTH):
        expected = [[store.items.labels[label][k] for label in LABELS] for k in batch.positions.tolist()]
        assert batch.targets.numpy() == pytest.approx(np.array(expected), rel=1e-6)
