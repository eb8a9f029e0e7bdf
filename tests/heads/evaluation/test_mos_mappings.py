"""Logistic mappings against their formulas and an independent fit, and where they come from in a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from agiqa.errors import DataError, HeadError
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, predict, train_head
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.evaluation.mos_mappings import CURVE_ITEMS, Mappings, MosMapping, fit_line, fit_logistic, fit_mappings

SMALL = HeadConfig(projection="sketch", encoder="none", width=8)
QUICK = TrainConfig(split="grouped", epochs=2, lr=1e-2, validation=0.5)
OLD = {"parameters": [2.5, 1.7, 2.8, 0.5, 1.0], "fitted_on": "validation", "n": 40, "monotone": False}


def vqeg(x, b1, b2, b3, b4):
    return b2 + (b1 - b2) / (1 + np.exp(-(x - b3) / abs(b4)))


def noisy(n: int = 240, seed: int = 0):
    """Predictions that saturate against MOS on 0 to 5."""
    random = np.random.default_rng(seed)
    predicted = random.normal(3.0, 0.8, n)
    return predicted, np.clip(vqeg(predicted, 4.4, 0.6, 3.1, 0.4) + random.normal(0, 0.3, n), 0, 5)


def of_a_kind(seed: int):
    """Data sets that saturate, bend, are straight, step, or are mostly noise, of 25 to 240 items."""
    random = np.random.default_rng(seed)
    x = random.normal(size=int(random.integers(25, 240)))
    shape = [np.tanh(2 * x), np.exp(0.8 * x), x, (x > 0.3).astype(float), 0.3 * x][seed % 5]
    return x, shape + random.normal(0, [0.1, 0.3, 1.0][seed % 3], len(x))


def squares(mapping, predicted, labels):
    return float(np.sum((mapping(predicted) - labels) ** 2))


@pytest.mark.parametrize("scale", [1.0, 20.0, 0.01])
def test_an_exact_curve_is_found_to_the_last_digits(scale):
    true = np.array([4.4, 0.6, 2.8, 0.5])
    x = np.random.default_rng(1).normal(3.0, 0.8, 200)
    y = scale * vqeg(x, *true)
    found = fit_logistic(x, y)
    assert np.array(found.parameters) == pytest.approx([scale, scale, 1, 1] * true, rel=1e-6)
    assert found(x) == pytest.approx(y, abs=1e-7 * scale)
    assert (found.kind, found.n) == ("logistic4", 200)


def test_a_mapping_is_its_formula():
    x = np.linspace(-40, 40, 101)
    mapping = MosMapping(kind="logistic4", parameters=(4.0, 1.0, 2.0, 0.7), n=1)
    assert mapping(x) == pytest.approx(vqeg(x, 4.0, 1.0, 2.0, 0.7), abs=1e-12)
    assert MosMapping(kind="linear", parameters=(2.0, -1.0), n=1)(x) == pytest.approx(2 * x - 1)


def test_a_line_is_that_of_least_squares():
    x, y = noisy(40)
    line = fit_line(x, y)
    assert line.parameters == pytest.approx(np.polyfit(x, y, 1))
    assert (line.kind, line.n) == ("linear", 40)


@pytest.mark.parametrize("seed", range(3))
def test_no_independent_fit_from_many_starts_is_better(seed):
    """scipy on all parameters at once, in raw units, as others write it."""
    x, y = noisy(seed=seed)
    random = np.random.default_rng(seed)
    others = []
    for _ in range(12):
        start = [random.uniform(3, 6), random.uniform(0, 2), random.uniform(2, 4), random.uniform(0.2, 1)]
        fit = optimize.least_squares(lambda b: vqeg(x, *b) - y, start, max_nfev=400)
        others.append(2 * fit.cost)
    assert squares(fit_logistic(x, y), x, y) == pytest.approx(min(others), rel=1e-4)


@pytest.mark.parametrize("seed", range(30))
def test_units_do_not_matter_and_the_curve_rises_and_is_no_worse_than_a_line(seed):
    x, y = of_a_kind(seed)
    plain, line = fit_logistic(x, y), fit_line(x, y)
    units, heights = 10.0 ** np.random.default_rng(seed).uniform(-3, 3, 2)
    other = fit_logistic(units * x + 7 * units, heights * y - 3 * heights)
    assert other(units * x + 7 * units) == pytest.approx(heights * plain(x) - 3 * heights, rel=1e-6)
    for mapping in (plain, line):
        assert (np.diff(mapping(np.linspace(2 * x.min(), 2 * x.max(), 2001))) >= 0).all()
    assert squares(plain, x, y) <= squares(line, x, y) * (1 + 1e-4)


@pytest.mark.parametrize(
    ("predicted", "labels", "reason"),
    [
        (np.arange(9.0), np.arange(9.0), "needs 10 validation items, and there are 9"),
        (np.zeros(0), np.zeros(0), "there are 0"),
        (np.ones(40), np.arange(40.0), "all validation predictions are equal"),
        (np.arange(40.0), np.ones(40), "all validation labels are equal"),
        (np.arange(40.0), -np.arange(40.0), "do not rise with the predictions"),
        (np.where(np.arange(40) == 3, np.nan, np.arange(40.0)), np.arange(40.0), "not finite"),
    ],
)
def test_items_that_determine_no_fit_leave_it_out_and_say_why(predicted, labels, reason):
    for fit in (fit_logistic, fit_line):
        with pytest.raises(DataError, match=reason):
            fit(predicted, labels)
    mappings = fit_mappings(predicted, labels)
    assert mappings.fitted == {}
    assert reason in mappings.record()["logistic4"]["absent"]


def test_many_items_whose_mos_fall_leave_the_curve_out_too():
    falling = fit_mappings(np.arange(200.0), -np.arange(200.0))
    assert falling.record() == {"logistic4": {"absent": "the validation MOS do not rise with the predictions"}}


def test_few_items_give_a_line_under_a_name_of_its_own():
    few, enough = fit_mappings(*noisy(CURVE_ITEMS - 1)), fit_mappings(*noisy(CURVE_ITEMS))
    assert (set(few.fitted), set(enough.fitted), enough.absent) == ({"linear"}, {"logistic4"}, {})
    assert (
        few.record()["logistic4"]["absent"]
        == "a curve needs 100 validation items, and there are 99: a line is fitted instead"
    )
    x, y = noisy(50, seed=3)
    result = evaluate_scores(x, y, [f"p {k % 10}" for k in range(50)], mappings=few.fitted)
    assert result["plcc_linear"] == pytest.approx(result["plcc"])
    assert result["rmse_linear"] == pytest.approx(np.sqrt(np.mean((few.fitted["linear"](x) - y) ** 2)))
    assert "plcc_logistic4" not in result


@pytest.mark.parametrize("n", [30, 150])
def test_a_mapping_is_the_same_on_another_scale(n):
    (mapping,), x = fit_mappings(*noisy(n)).fitted.values(), np.linspace(0, 5, 50)
    assert mapping.rescaled(20.0, 3.0)(20 * x + 3) == pytest.approx(20 * mapping(x) + 3)


def test_a_record_gives_the_same_mapping_again():
    for n in (30, 150):
        made = fit_mappings(*noisy(n))
        assert Mappings.from_record(json.loads(json.dumps(made.record()))) == made
    assert Mappings.from_record(Mappings.none("why").record()) == Mappings.none("why")


def test_five_parameters_of_an_old_run_are_not_applied():
    old = {"parameters": [4.4, 0.6, 2.8, 0.5], "fitted_on": "validation", "n": 40, "monotone": True}
    read = Mappings.from_record({"logistic4": old, "logistic5": OLD})
    assert set(read.fitted) == {"logistic4"}
    assert "five parameters give a curve that may fall" in read.record()["logistic5"]["absent"]
    assert "needs" in Mappings.from_record({"logistic5": {"absent": "it needs 25 items"}}).absent["logistic5"]


def test_metrics_after_a_mapping_are_those_of_the_mapped_predictions():
    predicted, labels = noisy(150, seed=7)
    prompts = [f"p {k % 30}" for k in range(150)]
    mappings = fit_mappings(*noisy(200, seed=8)).fitted
    result = evaluate_scores(predicted, labels, prompts, mappings=mappings)
    plain = evaluate_scores(predicted, labels, prompts)
    assert {key: result[key] for key in plain if key != "ci"} == {key: plain[key] for key in plain if key != "ci"}
    mapped = vqeg(predicted, *mappings["logistic4"].parameters)
    assert result["plcc_logistic4"] == pytest.approx(stats.pearsonr(mapped, labels).statistic, abs=1e-9)
    assert result["rmse_logistic4"] == pytest.approx(np.sqrt(np.mean((mapped - labels) ** 2)), abs=1e-9)
    expected = evaluate_scores(mapped, labels, prompts)["ci"]
    for name in ("plcc", "rmse"):
        assert result["ci"][f"{name}_logistic4"] == pytest.approx(expected[name], abs=1e-9)
    assert result["plcc_logistic4"] > result["plcc"]
    assert result["rmse_logistic4"] < result["rmse"]


def test_a_mapping_that_makes_all_predictions_equal_leaves_no_plcc():
    flat = MosMapping(kind="logistic4", parameters=(2.5, 2.5, 0.0, 1.0), n=30)
    predicted, labels = noisy(30)
    result = evaluate_scores(predicted, labels, ["p"] * 30, mappings={"logistic4": flat})
    assert result["plcc_logistic4"] is result["ci"]["plcc_logistic4"] is None
    assert result["plcc"] is not None
    assert "all predictions are equal" in result["undefined"]


@pytest.fixture
def trained(make_store, tmp_path: Path):
    store = make_store(280)
    return store, train_head(store, tmp_path / "run", head=SMALL, train=QUICK)


def test_a_run_fits_on_validation_and_applies_to_test(trained):
    _, run = trained
    rows = [line.split(",") for line in (run.path / "predictions.csv").read_text().splitlines()[1:]]
    validation = np.array([row[-2:] for row in rows if row[2] == "validation"], dtype=float)
    test = np.array([row[-2:] for row in rows if row[2] == "test"], dtype=float)
    recorded = run.metrics["logistic"]["logistic4"]
    expected = fit_logistic(validation[:, 1], validation[:, 0])
    assert recorded["parameters"] == pytest.approx(expected.parameters, rel=1e-3)
    assert recorded["n"] == len(validation) >= CURVE_ITEMS
    mapped = vqeg(test[:, 1], *recorded["parameters"])
    assert run.metrics["test"]["plcc_logistic4"] == pytest.approx(
        stats.pearsonr(mapped, test[:, 0]).statistic, abs=1e-6
    )
    assert "plcc_logistic4" not in run.metrics["validation"]


def test_the_test_labels_have_no_say_in_a_mapping(trained, tmp_path: Path):
    store, run = trained
    names = {name for name, _ in run.parts().pairs["test"]}
    labels = store.items.labels["quality"].copy()
    labels[[k for k, name in enumerate(store.items.names) if name in names]] = 1.0
    other = replace(store, items=replace(store.items, labels={"quality": labels}))
    again = train_head(other, tmp_path / "other", head=SMALL, train=QUICK)
    assert again.metrics["logistic"] == run.metrics["logistic"]


def test_evaluate_uses_the_recorded_mapping_and_never_on_its_own_items(trained):
    store, run = trained
    result = evaluate(load_run(run.path), store)
    for name in ("plcc_logistic4", "rmse_logistic4"):
        assert result[name] == pytest.approx(run.metrics["test"][name], abs=1e-6)
    assert result["logistic"] == run.metrics["logistic"]
    for part in ("validation", "all"):
        inside = evaluate(run, store, part)
        assert "plcc_logistic4" not in inside
        assert "validation items, which the mappings were fitted to" in inside["logistic"]["logistic4"]["absent"]
    elsewhere = replace(store, id="other", items=replace(store.items, names=[f"x{k}.png" for k in range(280)]))
    scores = evaluate(run, elsewhere, "all")
    mapped = vqeg(predict(run, elsewhere), *run.metrics["logistic"]["logistic4"]["parameters"])
    assert scores["rmse_logistic4"] == pytest.approx(
        np.sqrt(np.mean((mapped - store.items.labels["quality"]) ** 2)), abs=1e-6
    )


def test_runs_without_a_fit_say_why(make_store, tmp_path: Path):
    store = make_store(60)
    run = train_head(store, tmp_path / "run", head=SMALL, train=QUICK.model_copy(update={"validation": 0.0}))
    assert "there are 0" in run.metrics["logistic"]["logistic4"]["absent"]
    assert "plcc_logistic4" not in run.metrics["test"]
    old = {key: value for key, value in run.metrics.items() if key != "logistic"}
    (run.path / "metrics.json").write_text(json.dumps(old))
    assert "recorded no fit" in evaluate(load_run(run.path), store)["logistic"]["logistic4"]["absent"]
    (run.path / "metrics.json").write_text(json.dumps({**old, "logistic": {"logistic5": OLD}}))
    told = evaluate(load_run(run.path), store)
    assert "not applied" in told["logistic"]["logistic5"]["absent"]
    assert "plcc_logistic5" not in told


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        {"logistic4": {"parameters": [1.0]}},
        {"logistic9": {"parameters": [1.0, 2.0, 3.0, 4.0], "n": 20, "monotone": True}},
        {"logistic4": {"parameters": [1.0, 2.0, 3.0], "n": 20, "monotone": True}},
        {"logistic4": {"parameters": ["a", 2.0, 3.0, 4.0], "n": 20, "monotone": True}},
        {"logistic4": "fitted"},
    ],
)
def test_a_record_that_no_training_wrote_is_refused(trained, wrong):
    store, run = trained
    (run.path / "metrics.json").write_text(json.dumps({**run.metrics, "logistic": wrong}))
    with pytest.raises(HeadError, match=r"metrics\.json: `logistic` is not what a training writes"):
        evaluate(load_run(run.path), store)
