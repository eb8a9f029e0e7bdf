"""Heads that predict a spread: they learn it, and it is kept in every file, command and conversion."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from agiqa.errors import ConfigError, DataError, HeadError
from agiqa.heads import HeadConfig, TrainConfig, load_run, predict, predict_intervals, train_head
from agiqa.heads.evaluation.scoring import evaluate
from tests.heads.data.test_soft_labels import rated
from tests.heads.label_stores import with_correspondence

HEAD = HeadConfig(projection="sketch", encoder="none", width=16, regressor_hidden=16)
TRAIN = TrainConfig(split="grouped", epochs=25, lr=2e-2, batch_size=32, validation=0.25)


def spread_store(make_store, *, items: int = 240, scale: float = 1.0):
    """A store whose MOS are from 0 to 5 (times `scale`), and whose deviation depends on channel 2 of the features."""
    store = make_store(items, seed=4)
    means = np.array([rows.mean(axis=0) for rows in store.features])
    mos = np.clip(2.5 + 2.0 * means[:, 0], 0.0, 5.0)
    std = 0.4 + 1.0 * stats.norm.cdf(3.0 * means[:, 2])
    store.items.labels["quality"] = mos * scale
    store.items.generators[:] = [("one", "two")[k % 2] for k in range(items)]
    return rated(store, deviations={"quality": std * scale}, mos_ranges={"quality": (0.0, 5.0 * scale)})


def rows_of(path: Path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A store and the runs of each loss on it, made when a test asks."""
    made = {}

    def of(make_store, loss: str):
        store = spread_store(make_store)
        if loss not in made:
            config = TRAIN.model_copy(update={"loss": loss})
            made[loss] = train_head(store, tmp_path_factory.mktemp("runs") / "run", head=HEAD, train=config)
        return store, made[loss]

    return of


@pytest.mark.parametrize("loss", ["kl", "ordinal", "kl+0.1*plcc"])
def test_mos_and_spread_are_learned(make_store, runs, loss):
    store, run = runs(make_store, loss)
    scores = run.metrics["test"]
    assert scores["srcc"] > 0.9
    assert scores["spread"]["srcc"] > 0.6
    table = [row for row in rows_of(run.path / "predictions.csv") if row["split"] == "test"]
    mos, predicted, spread = (np.array([float(row[name]) for row in table]) for name in ("mos", "predicted", "spread"))
    known = store.items.deviations["quality"][[int(row["item"]) for row in table]]
    assert spread.mean() == pytest.approx(known.mean(), rel=0.15)
    assert scores["spread"]["n_std"] == len(table)
    assert scores["spread"]["srcc"] == pytest.approx(stats.spearmanr(spread, known).statistic)
    assert scores["spread"]["nll"] == pytest.approx(-stats.norm.logpdf(mos, predicted, spread).mean())
    draws = mos + known * stats.norm.ppf(np.linspace(0.5e-3, 1 - 0.5e-3, 1000))[:, None]
    expected = -stats.norm.logpdf(draws, predicted, spread).mean()
    assert scores["spread"]["rating_nll"] == pytest.approx(expected, rel=0.01)


def test_nll_learns_the_error_of_the_mos(make_store, tmp_path):
    """Errors of half of the items are five times as large, and the head can tell which."""
    store = spread_store(make_store)
    means = np.array([rows.mean(axis=0) for rows in store.features])
    noisy = means[:, 1] > 0
    noise = np.where(noisy, 0.5, 0.1) * np.random.default_rng(0).normal(size=len(means))
    store.items.labels["quality"] = np.clip(2.5 + means[:, 0] + noise, 0.0, 5.0)
    config = TRAIN.model_copy(update={"loss": "nll"})
    run = train_head(replace(store, items=replace(store.items, deviations={})), tmp_path / "r", head=HEAD, train=config)
    table = [row for row in rows_of(run.path / "predictions.csv") if row["split"] == "test"]
    of_noisy = noisy[[int(row["item"]) for row in table]]
    spread = np.array([float(row["spread"]) for row in table])
    assert spread[of_noisy].mean() > 1.5 * spread[~of_noisy].mean()
    assert run.metrics["test"]["spread"]["n_std"] == 0
    assert "rating_nll" not in run.metrics["test"]["spread"]


@pytest.mark.parametrize(("loss", "kind"), [("mse", "absolute"), ("kl", "scaled"), ("nll", "quantile")])
def test_evaluation_and_prediction_of_the_folder_are_those_of_the_training(make_store, runs, loss, kind):
    store, run = runs(make_store, loss)
    scores = evaluate(run, store, "test")
    for name, value in run.metrics["test"].items():
        assert scores[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
    record = scores["intervals"]
    assert record["scores"] == run.config["interval_scores"] == kind
    table = rows_of(run.path / "predictions.csv")
    validation = [row for row in table if row["split"] == "validation"]
    errors = [
        score_of(*(float(row.get(name, 1.0)) for name in ("mos", "predicted", "spread")), kind) for row in validation
    ]
    rank = int(np.ceil((len(errors) + 1) * 0.9))
    assert record["quantile"] == pytest.approx(sorted(errors)[rank - 1])
    assert {*record["generators"]} == {"one", "two"}
    test = [int(row["item"]) for row in table if row["split"] == "test"]
    found = predict_intervals(run, store, test)
    inside = (found.low <= store.items.labels["quality"][test]) & (store.items.labels["quality"][test] <= found.high)
    assert record["coverage"]["inside"] == inside.sum()
    assert found.mos == pytest.approx(predict(run, store, test))
    assert (found.spread is None) == (loss == "mse")
    assert found.low.min() >= 0.0
    assert found.high.max() <= 5.0


def score_of(mos: float, predicted: float, spread: float, kind: str) -> float:
    lower, upper = stats.norm.ppf([0.05, 0.95], predicted, spread)
    scores = {"absolute": abs(mos - predicted), "scaled": abs(mos - predicted) / spread}
    return {**scores, "quantile": max(lower - mos, mos - upper)}[kind]


def test_a_run_of_an_older_agiqa_keeps_its_scores(make_store, tmp_path):
    """It records no kind: the intervals of a head with a spread were of scaled scores."""
    store = spread_store(make_store)
    run = train_head(store, tmp_path / "run", head=HEAD, train=TRAIN.model_copy(update={"loss": "nll", "epochs": 3}))
    now = predict_intervals(run, store)
    config = json.loads((run.path / "config.json").read_text())
    del config["interval_scores"]
    (run.path / "config.json").write_text(json.dumps(config))
    older = load_run(run.path)
    rows = [row for row in rows_of(run.path / "predictions.csv") if row["split"] == "validation"]
    errors = sorted(abs(float(row["mos"]) - float(row["predicted"])) / float(row["spread"]) for row in rows)
    half = errors[int(np.ceil((len(errors) + 1) * 0.9)) - 1] * now.spread
    found = predict_intervals(older, store)
    assert found.high == pytest.approx(np.clip(now.mos + half, 0.0, 5.0))
    assert evaluate(older, store)["intervals"]["scores"] == "scaled"
    assert np.abs(found.high - now.high).max() > 0.01
    (run.path / "config.json").write_text(json.dumps({**config, "interval_scores": "guessed"}))
    with pytest.raises(HeadError, match=r"config.json: `interval_scores` is 'guessed', and this agiqa knows absolute"):
        predict_intervals(load_run(run.path), store)


def test_training_and_validation_items_have_no_coverage(make_store, runs):
    store, run = runs(make_store, "mse")
    for part in ("train", "validation", "all"):
        assert "intervals are for new ones" in evaluate(run, store, part)["intervals"]["absent"]


def test_a_run_without_predictions_computes_the_errors_on_its_store(make_store, tmp_path):
    store = spread_store(make_store)
    run = train_head(store, tmp_path / "run", head=HEAD, train=TRAIN)
    before = predict_intervals(run, store)
    (run.path / "predictions.csv").unlink()
    after = predict_intervals(run, store)
    assert after.high == pytest.approx(before.high, abs=1e-5)
    with pytest.raises(HeadError, match=r"has no predictions.csv.* Give the store that the head was trained on"):
        predict_intervals(run, replace(store, id="other"))
    assert "predictions.csv cannot be read" in evaluate(run, store, "test")["intervals"]["absent"]


def test_too_few_validation_items_are_counted(make_store, tmp_path):
    config = TRAIN.model_copy(update={"validation": 0.05, "epochs": 1})
    run = train_head(spread_store(make_store), tmp_path / "run", head=HEAD, train=config)
    with pytest.raises(ConfigError, match=r"An interval of 0.99 needs 99 validation items or more .* run has 10\."):
        predict_intervals(run, spread_store(make_store), level=0.99)


def test_the_scale_of_the_mos_does_not_matter(make_store, runs, tmp_path):
    _, run = runs(make_store, "kl")
    wide = train_head(
        spread_store(make_store, scale=20.0), tmp_path / "run", head=HEAD, train=TRAIN.model_copy(update={"loss": "kl"})
    )
    pairs = zip(rows_of(run.path / "predictions.csv"), rows_of(wide.path / "predictions.csv"), strict=True)
    for small, large in pairs:
        for name in ("mos", "predicted", "spread"):
            assert 20 * float(small[name]) == pytest.approx(float(large[name]), rel=1e-2, abs=0.3)


@pytest.mark.parametrize("loss", ["kl", "ordinal"])
def test_calibration_maps_the_spread_too(make_store, runs, tmp_path, loss):
    store, plain = runs(make_store, loss)
    config = TRAIN.model_copy(update={"loss": loss, "calibrate": True})
    run = train_head(store, tmp_path / "run", head=HEAD, train=config)
    slope = run.metrics["calibration"]["slope"]
    for before, after in zip(
        rows_of(plain.path / "predictions.csv"), rows_of(run.path / "predictions.csv"), strict=True
    ):
        assert float(after["spread"]) == pytest.approx(slope * float(before["spread"]), rel=1e-4)


def test_a_start_needs_the_same_outputs(make_store, runs, tmp_path):
    store, run = runs(make_store, "kl")
    config = TRAIN.model_copy(update={"epochs": 1, "loss": "mse"})
    with pytest.raises(HeadError, match=r"loss: 'kl' there, 'mse' here, whose heads have other outputs"):
        train_head(store, tmp_path / "run", head=HEAD, train=config, start=run)
    scaled = spread_store(make_store, scale=20.0)
    config = TRAIN.model_copy(update={"epochs": 1, "loss": "kl+mse", "lr": 1e-9})
    again = train_head(replace(scaled, id="scaled"), tmp_path / "again", head=HEAD, train=config, start=run)
    assert predict(again, scaled) == pytest.approx(20 * predict(run, store), rel=1e-3)


def test_two_labels_have_a_spread_each(make_store, tmp_path):
    store = with_correspondence(spread_store(make_store))
    config = TRAIN.model_copy(
        update={"label": "quality+correspondence", "loss": "kl", "label_std": 4.0, "epochs": 2, "refit": True}
    )
    run = load_run(train_head(store, tmp_path / "run", head=HEAD, train=config).path)
    assert list(rows_of(run.path / "predictions.csv")[0])[4:] == [
        *("mos_quality", "predicted_quality", "spread_quality"),
        *("mos_correspondence", "predicted_correspondence", "spread_correspondence"),
    ]
    found = predict_intervals(run, store, [3, 1])
    assert found.low.shape == found.high.shape == (2, 2)
    assert evaluate(run, store)["correspondence"]["spread"]["n_std"] == 0


def test_without_deviations_nothing_is_trained(make_store, tmp_path):
    with pytest.raises(DataError, match="no std column for quality"):
        train_head(make_store(60), tmp_path / "run", head=HEAD, train=TRAIN.model_copy(update={"loss": "ordinal"}))
    assert not (tmp_path / "run").exists()


def test_calibration_items_make_intervals_and_choose_nothing(make_store, tmp_path):
    store = spread_store(make_store)
    config = TRAIN.model_copy(update={"calibration_share": 0.5, "epochs": 3, "calibrate": True, "validation": 0.4})
    run = train_head(store, tmp_path / "run", head=HEAD, train=config)
    table = rows_of(run.path / "predictions.csv")
    parts = {part: {row["prompt"] for row in table if row["split"] == part} for part in ("validation", "calibration")}
    assert not parts["validation"] & parts["calibration"]
    count = len([row for row in table if row["split"] == "calibration"])
    assert run.metrics["test"]["intervals"]["validation_items"] == count > 30
    assert run.metrics["validation"]["n"] == run.metrics["calibration"]["n"] == 77 - count
    before = predict_intervals(run, store)
    assert evaluate(run, store)["intervals"]["quantile"] == pytest.approx(run.metrics["test"]["intervals"]["quantile"])
    (run.path / "predictions.csv").unlink()
    assert predict_intervals(run, store).high == pytest.approx(before.high, abs=1e-5)
    scores = evaluate(run, store, "validation")
    assert scores["n"] == 77


def test_the_epoch_is_that_of_the_items_that_choose(make_store, tmp_path):
    """The MOS of calibration items are spoilt, and the same epoch is chosen, with the same weights."""
    store = spread_store(make_store)
    config = TRAIN.model_copy(update={"calibration_share": 0.5, "epochs": 6, "validation": 0.4})
    run = train_head(store, tmp_path / "run", head=HEAD, train=config)
    spoilt = [int(row["item"]) for row in rows_of(run.path / "predictions.csv") if row["split"] == "calibration"]
    store.items.labels["quality"][spoilt] = 5.0 - store.items.labels["quality"][spoilt]
    again = train_head(store, tmp_path / "again", head=HEAD, train=config)
    assert again.metrics["validation"] == run.metrics["validation"]
    assert again.metrics["chosen_epoch"] == run.metrics["chosen_epoch"]
    assert again.metrics["test"]["intervals"]["quantile"] > 1.5 * run.metrics["test"]["intervals"]["quantile"]
