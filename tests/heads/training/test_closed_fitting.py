"""What a run of a closed form records: one row of curves, no advice on epochs, intervals from items that it had not seen."""

import numpy as np
import pytest

from agiqa.errors import HeadError
from agiqa.heads import HeadConfig, TrainConfig, load_run, stack_runs, train_head
from agiqa.heads.evaluation.intervals import predict_intervals
from tests.heads.label_stores import BOTH, with_correspondence

GROUPED = TrainConfig(split="grouped", device="cpu", validation=0.3)
KRR = HeadConfig(encoder="krr", strength=0.01)


@pytest.fixture
def store(make_store):
    return make_store(100, prompts=50)


def test_a_closed_form_has_one_row_of_curves_and_no_advice_on_epochs(store, tmp_path):
    few = GROUPED.model_copy(update={"validation": 0.1})
    runs = [train_head(store, tmp_path / name, head=HeadConfig(encoder=name), train=few) for name in ("ridge", "krr")]
    for run in (*runs, stack_runs(runs, tmp_path / "stack", store)):
        assert [row["epoch"] for row in run.curves] == [1]
        assert not any("epoch" in line for line in run.metrics["warnings"])
    assert not stack_runs(runs, tmp_path / "again", store).metrics["refit"]


def test_paper_compatible_scores_of_a_closed_form_have_no_bias(store, tmp_path):
    config = GROUPED.model_copy(update={"paper_compatible": True})
    run = train_head(store, tmp_path / "run", head=KRR, train=config)
    assert run.metrics["paper_compatible"]["bias"] == {"srcc": 0.0, "plcc": 0.0}
    assert run.curves[0]["test_srcc"] == run.metrics["test"]["srcc"]


@pytest.mark.parametrize(
    "changes", [{}, {"calibrate": True, "validation": 0.5}, {"calibration_share": 0.5, "validation": 0.6}]
)
def test_intervals_are_made_from_items_that_the_fit_had_not_seen(store, tmp_path, changes):
    config = GROUPED.model_copy(update=changes)
    run = train_head(store, tmp_path / "run", head=KRR, train=config)
    validation = [row["item"] for row in run.predictions if row["split"] in ("validation", "calibration")]
    part = "calibration" if "calibration_share" in changes else "validation"
    kept_back = [row["item"] for row in run.predictions if row["split"] == part]
    splits = ["train"] * 100
    for item in {*validation, *[row["item"] for row in run.predictions]}:
        splits[item] = "test"
    published = store.items.__class__(**{**vars(store.items), "splits": splits})
    alone = type(store)(**{**vars(store), "items": published, "id": "training part"})
    fit = train_head(alone, tmp_path / "fit", head=KRR, train=TrainConfig(device="cpu", validation=0.0))
    mos, predicted = store.items.labels["quality"], fit.predict(alone)
    if "calibrate" in changes:
        slope, intercept = np.polyfit(predicted[validation], mos[validation], 1)
        predicted = slope * predicted + intercept
    errors = np.sort(np.abs(predicted - mos)[kept_back])
    found = predict_intervals(run, store, level=0.8)
    half = errors[int(np.ceil(0.8 * (len(errors) + 1) - 1e-9)) - 1]
    assert found.high - found.low == pytest.approx(np.full(100, 2 * half), abs=1e-5)


def test_intervals_of_a_closed_form_without_its_predictions_are_refused(store, tmp_path):
    run = train_head(store, tmp_path / "run", head=KRR, train=GROUPED)
    (run.path / "predictions.csv").unlink()
    with pytest.raises(HeadError, match="has learned its validation items"):
        predict_intervals(load_run(run.path), store)


def test_items_that_lack_a_label_count_for_the_other_one_alone(make_store, tmp_path):
    store = with_correspondence(make_store(100, prompts=50))
    gone = np.arange(100) % 7 == 0
    labels = {**store.items.labels}
    labels["correspondence"] = np.where(gone, np.nan, labels["correspondence"])
    gaps = type(store)(**{**vars(store), "items": type(store.items)(**{**vars(store.items), "labels": labels})})
    config = GROUPED.model_copy(update={"label": BOTH, "calibrate": True, "validation": 0.5})
    run = train_head(gaps, tmp_path / "both", head=KRR, train=config)
    alone = train_head(gaps, tmp_path / "one", head=KRR, train=config.model_copy(update={"label": "quality"}))
    assert run.predict(gaps)[:, 0] == pytest.approx(alone.predict(gaps))
    rows = [row for row in run.predictions if row["split"] == "validation"]
    lacking = sum(row["mos_correspondence"] is None for row in rows)
    assert lacking == sum(gone[row["item"]] for row in rows) > 0
    assert [line["n"] for line in run.metrics["calibration"].values()] == [len(rows), len(rows) - lacking]
