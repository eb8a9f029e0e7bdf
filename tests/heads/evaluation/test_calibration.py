"""Warnings about few validation items, SRCC that still rises, and wrong scales of predictions; calibration."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from agiqa.heads import HeadConfig, TrainConfig, load_run, predict, train_head
from agiqa.heads.data.splits import make_partition
from agiqa.heads.evaluation.calibration import Calibration, calibration_fields, calibration_line, calibration_warnings
from agiqa.heads.training.curves import Epoch, Outcome, epoch_warnings

NONE = HeadConfig(projection="sketch", encoder="none", width=8)
QUICK = TrainConfig(split="grouped", epochs=3, lr=1e-2)
ONE = ("quality",)


def outcome(scores, *, epoch, items=40):
    rows = [
        Epoch(
            stage="train",
            epoch=number,
            lr=1e-3,
            train_loss=1.0,
            validation_srcc=score,
            validation_plcc=score,
            validation_rmse=1.0,
            seconds=0.1,
        )
        for number, score in enumerate(scores, 1)
    ]
    return Outcome(curves=rows, epoch=epoch, choice="", validation_predictions=np.zeros((items, 1)))


def train(store, run: Path, **changes):
    return train_head(store, run, head=NONE, train=QUICK.model_copy(update=changes))


def test_by_few_validation_items_no_epoch_is_chosen_and_it_is_said(make_store, tmp_path: Path):
    """At this step size the SRCC of a few items is highest anywhere: four seeds would not all keep the last epoch."""
    store = make_store(40)
    for seed in range(4):
        run = train(store, tmp_path / str(seed), epochs=6, lr=0.1, seed=seed, patience=1, refit=True)
        held_out = run.metrics["validation"]["n"]
        assert held_out == len(make_partition(store, run.train).validation) < 30
        assert (run.metrics["chosen_epoch"], run.metrics["epochs_run"]) == (6, 6)
        assert run.metrics["chosen_by"] == f"last epoch, as {held_out} validation items are too few to choose by"
        assert any(
            f"only {held_out} validation items" in line and "last epoch" in line for line in run.metrics["warnings"]
        )
        stages = [line.split(",")[0] for line in (run.path / "curves.csv").read_text().splitlines()[1:]]
        assert stages == ["train"] * 6 + ["refit"] * 6


def test_thirty_validation_items_choose(make_store, tmp_path: Path):
    run = train(make_store(50), tmp_path / "run", validation=0.75)
    assert run.metrics["validation"]["n"] == 30
    assert run.metrics["chosen_by"] == "highest validation SRCC"
    assert not any("too few" in line for line in run.metrics["warnings"])


@pytest.mark.parametrize(
    ("scores", "epoch", "said"),
    [
        ([0.2, 0.4, 0.5, 0.6, 0.65, 0.7, 0.74, 0.78], 8, "still rose at the end, from 0.700 to 0.780 over the last 2"),
        ([0.2, 0.6, 0.7, 0.75, 0.77, 0.78, 0.781, 0.782], 8, None),
        ([0.2, 0.6, 0.7, 0.75, 0.77, 0.80, 0.79, 0.785], 6, None),
        ([0.7, 0.6, 0.65], 1, "first of 3 epochs"),
        ([0.7], 1, None),
        ([0.2, 0.8], 2, "still rose"),
        ([float("nan")] * 3, 3, None),
    ],
)
def test_curves_that_rise_to_the_end_or_fall_from_the_first_epoch_are_told(scores, epoch, said):
    found = epoch_warnings(outcome(scores, epoch=epoch), TrainConfig(epochs=len(scores)))
    assert len(found) == (said is not None)
    assert said is None or said in found[0]


def test_a_training_that_was_stopped_does_not_still_rise():
    assert epoch_warnings(outcome([0.2, 0.5, 0.7], epoch=3), TrainConfig(epochs=9)) == []


def test_without_validation_items_there_is_nothing_to_tell():
    assert epoch_warnings(outcome([None, None], epoch=2, items=0), TrainConfig(epochs=2)) == []


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_the_line_is_that_of_least_squares(scale):
    random = np.random.default_rng(0)
    predicted = 3.0 + random.normal(size=200) * scale
    labels = 1.5 * predicted - 0.7 + random.normal(size=200)
    fitted = stats.linregress(predicted, labels)
    assert calibration_line(predicted, labels) == pytest.approx((fitted.slope, fitted.intercept), rel=1e-6)


def test_a_line_that_is_not_defined_is_null():
    one, two = np.array([1.0]), np.array([1.0, 2.0])
    for predicted, labels in ((one, one), (one[:0], one[:0]), (np.full(2, 3.0), two), (two, np.array([1.0, np.nan]))):
        assert calibration_fields(predicted, labels) == {"slope": None, "intercept": None}
    assert calibration_fields(two, np.full(2, 4.0)) == {"slope": 0.0, "intercept": 4.0}


def test_predictions_of_another_scale_are_told_and_right_ones_are_not():
    random = np.random.default_rng(0)
    labels = random.normal(size=(100, 1)) + 3.0
    right = labels + 0.3 * random.normal(size=labels.shape)
    right = right * np.polyfit(right[:, 0], labels[:, 0], 1)[0]
    right += labels.mean() - right.mean()
    assert calibration_warnings(ONE, right, labels) == []
    (narrow,) = calibration_warnings(ONE, 3.0 + (right - 3.0) / 1.5, labels)
    assert "changes by 1.50" in narrow
    assert "too little" in narrow
    (wide,) = calibration_warnings(ONE, 3.0 + (right - 3.0) * 1.5, labels)
    assert "changes by 0.67" in wide
    assert "too much" in wide
    (level,) = calibration_warnings(ONE, right + 5.0, labels)
    assert "above the standard deviation" in level
    assert calibration_warnings(ONE, right[:29] + 5.0, labels[:29]) == []


def test_calibrating_is_advised_only_where_it_helps():
    random = np.random.default_rng(0)
    labels = random.normal(3.0, 1.0, size=(50, 1))
    advised = "Set `calibrate`"
    assert advised in calibration_warnings(ONE, 3.0 * labels, labels)[0]
    assert advised not in " ".join(calibration_warnings(ONE, 3.0 * labels, labels, calibrate=True))
    turned = calibration_warnings(ONE, -labels, labels)
    assert "the wrong way" in turned[0]
    assert advised not in " ".join(turned)


def test_one_validation_item_is_counted_as_one():
    (line,) = epoch_warnings(outcome([0.5, 0.6], epoch=2, items=1), QUICK)
    assert line.startswith("There is only 1 validation item: too few")


def test_a_line_is_fitted_for_each_label_that_allows_one():
    random = np.random.default_rng(0)
    predicted = random.normal(size=(40, 3))
    labels = np.stack([2.0 * predicted[:, 0] + 1.0, -predicted[:, 1], random.normal(size=40)], axis=1)
    predicted[:, 2] = 0.5
    found = Calibration.fit(predicted, labels)
    assert found.lines[0] == pytest.approx((2.0, 1.0))
    assert found.lines[1:] == ((1.0, 0.0), (1.0, 0.0))
    assert found.refused[0] is None
    assert len(found.warnings(("a", "b", "c"))) == 2
    assert (
        "the slope of validation MOS on predictions is -1, and a line must rise" in found.warnings(("a", "b", "c"))[0]
    )
    np.testing.assert_allclose(found.applied(predicted)[:, 0], labels[:, 0])
    few = Calibration.fit(predicted[:29], labels[:29])
    assert few.lines[0] == (1.0, 0.0)
    assert "29 validation items are too few" in few.warnings(("a", "b", "c"))[0]


@pytest.mark.parametrize("refit", [False, True])
def test_a_loss_that_leaves_the_level_open_is_calibrated(make_store, tmp_path: Path, refit):
    """Before: RMSE above the deviation of the MOS, and said. After: the head itself predicts on the line."""
    store = make_store(150)
    labels = store.items.labels["quality"] * 20.0
    store = replace(store, items=replace(store.items, labels={"quality": labels}))
    settings = {"loss": "fidelity", "epochs": 8, "validation": 0.3, "refit": refit}
    plain = train(store, tmp_path / "plain", **settings)
    calibrated = train(store, tmp_path / "calibrated", calibrate=True, **settings)
    assert plain.metrics["calibration"] is None
    before, after = (run.metrics["validation"] for run in (plain, calibrated))
    line = calibrated.metrics["calibration"]
    assert (line["slope"], line["intercept"]) == pytest.approx((before["slope"], before["intercept"]))
    assert (line["n"], line["applied_to_refit"]) == (before["n"], refit)
    assert "calibrated_here" not in before
    assert after["calibrated_here"]
    assert "calibrated_here" not in calibrated.metrics["test"]
    assert (after["slope"], after["intercept"]) == pytest.approx((1.0, 0.0), abs=1e-6)
    assert after["srcc"] == before["srcc"]
    assert after["rmse"] < before["rmse"]
    assert any("the quality MOS changes by" in text for text in plain.metrics["warnings"])
    assert not any("the quality MOS changes by" in text for text in calibrated.metrics["warnings"])
    everything = predict(load_run(plain.path), store) * line["slope"] + line["intercept"]
    np.testing.assert_allclose(predict(load_run(calibrated.path), store), everything, rtol=1e-5, atol=1e-4)
    assert calibrated.metrics["test"]["rmse"] < plain.metrics["test"]["rmse"]


def test_too_few_validation_items_leave_the_head_as_it_is_and_say_so(make_store, tmp_path: Path):
    store = make_store(40)
    plain, asked = (train(store, tmp_path / str(on), calibrate=on) for on in (False, True))
    assert (plain.path / "head.safetensors").read_bytes() == (asked.path / "head.safetensors").read_bytes()
    assert asked.metrics["calibration"]["slope"] is None
    assert "too few" in asked.metrics["calibration"]["not_fitted"]
    assert any("`calibrate` left the quality predictions as they are" in line for line in asked.metrics["warnings"])
    assert "calibrated_here" not in asked.metrics["validation"]
