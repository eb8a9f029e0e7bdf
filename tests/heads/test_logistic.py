"""Logistic mappings against their formulas and an independent fit, and where they come from in a run."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from agiqa.heads.bootstrap import bootstrap_linear, bootstrap_metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from agiqa.errors import DataError, HeadError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, predict, train_head
from agiqa.heads.logistic import LogisticMap, Mappings, fit_logistic, fit_mappings
from agiqa.heads.metrics import evaluate_scores
from agiqa.heads.prompts import prompt_groups

KINDS = ("logistic4", "logistic5")
SMALL = HeadConfig(projection="sketch", encoder="none", width=8)
QUICK = TrainConfig(split="grouped", epochs=2, lr=1e-2, validation=0.25)


def vqeg(x, b1, b2, b3, b4):
    return b2 + (b1 - b2) / (1 + np.exp(-(x - b3) / abs(b4)))


def sheikh(x, b1, b2, b3, b4, b5):
    return b1 * (0.5 - 1 / (1 + np.exp(b2 * (x - b3)))) + b4 * x + b5


FORMULAS = {"logistic4": vqeg, "logistic5": sheikh}


def noisy(n: int = 240, seed: int = 0):
    """Predictions that saturate against MOS on 0 to 5."""
    random = np.random.default_rng(seed)
    predicted = random.normal(3.0, 0.8, n)
    return predicted, np.clip(vqeg(predicted, 4.4, 0.6, 3.1, 0.4) + random.normal(0, 0.3, n), 0, 5)


def squares(mapping, predicted, labels):
    return float(np.sum((mapping(predicted) - labels) ** 2))


@pytest.mark.parametrize("scale", [1.0, -1.0, 100.0, 1e-3])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_free_curves_are_recovered_on_any_scale_in_either_direction(kind, scale):
    true = {"logistic4": (4.4, 0.6, 2.8, 0.5), "logistic5": (2.5, 1.7, 2.8, 0.5, 1.0)}[kind]
    x = np.random.default_rng(1).normal(3.0, 0.8, 200)
    y = scale * FORMULAS[kind](x, *true)
    found = fit_logistic(x, y, kind)
    factors = np.array([1, 1, 1, 1] if kind == "logistic4" else [1, 1, 1, 1, 1], dtype=float)
    factors[[0, 1] if kind == "logistic4" else [0, 3, 4]] = scale
    assert np.array(found.parameters) == pytest.approx(factors * true, rel=1e-7)
    assert found(x) == pytest.approx(y, abs=1e-9 * abs(scale))
    assert found.monotone
    assert found.n == 200


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapping_is_its_formula(kind):
    x = np.linspace(-40, 40, 101)
    parameters = (4.0, 1.0, 2.0, 0.7, 0.3)[: 4 if kind == "logistic4" else 5]
    mapping = LogisticMap(kind=kind, parameters=parameters, n=1, monotone=True)
    assert mapping(x) == pytest.approx(FORMULAS[kind](x, *parameters), abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_no_independent_fit_from_many_starts_is_better(kind, seed):
    """scipy on all parameters at once, in raw units, as others write it."""
    x, y = noisy(seed=seed)
    found = squares(fit_logistic(x, y, kind), x, y)
    random = np.random.default_rng(seed)
    others = []
    for _ in range(12):
        start = [random.uniform(3, 6), random.uniform(0, 2), random.uniform(2, 4), random.uniform(0.2, 1)]
        if kind == "logistic5":
            start = [
                random.uniform(0, 5),
                random.uniform(0.5, 5),
                start[2],
                random.uniform(-0.5, 1),
                random.uniform(0, 3),
            ]
        fit = optimize.least_squares(lambda b: FORMULAS[kind](x, *b) - y, start, max_nfev=400)
        others.append(2 * fit.cost)
    assert found == pytest.approx(min(others), rel=1e-4)


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    unit=st.sampled_from([0.05, 1.0, 20.0]),
    shift=st.sampled_from([-3.0, 0.0, 50.0]),
    seed=st.integers(0, 50),
)
def test_the_unit_of_the_mos_and_of_the_predictions_does_not_matter(kind, unit, shift, seed):
    x, y = noisy(80, seed)
    plain, other = fit_logistic(x, y, kind), fit_logistic(unit * x + shift, 100 - 20 * y, kind)
    assert squares(other, unit * x + shift, 100 - 20 * y) == pytest.approx(400 * squares(plain, x, y), rel=1e-5)


def test_what_a_line_and_a_step_and_noise_give_is_finite_and_no_worse_than_the_mean():
    random = np.random.default_rng(0)
    x = random.normal(size=100)
    for y in (2 * x + 1, (x > 0.2).astype(float), random.normal(size=100), np.exp(3 * x)):
        for kind in KINDS:
            mapping = fit_logistic(x, y, kind)
            assert np.isfinite(mapping(np.linspace(-10, 10, 50))).all()
            assert squares(mapping, x, y) <= len(y) * y.var() * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_turn_within_the_predictions_is_told(seed):
    x, y = noisy(60, seed)
    for labels in (y, (x - 3.0) ** 2):
        mapping = fit_logistic(x, labels, "logistic5")
        steps = np.diff(mapping(np.linspace(x.min(), x.max(), 20001)))
        assert mapping.monotone == bool((steps >= 0).all() or (steps <= 0).all())
        rising = np.diff(fit_logistic(x, labels, "logistic4")(np.sort(x)))
        assert (rising >= 0).all() or (rising <= 0).all()


@pytest.mark.parametrize(
    ("predicted", "labels", "reason"),
    [
        (np.arange(19.0), np.arange(19.0), "needs 20 validation items, and there are 19"),
        (np.zeros(0), np.zeros(0), "there are 0"),
        (np.ones(40), np.arange(40.0), "1 different predictions only"),
        (np.arange(40.0), np.ones(40), "all validation labels are equal"),
        (np.where(np.arange(40) == 3, np.nan, np.arange(40.0)), np.arange(40.0), "not finite"),
    ],
)
def test_items_that_determine_no_fit_leave_it_out_and_say_why(predicted, labels, reason):
    with pytest.raises(DataError, match=reason):
        fit_logistic(predicted, labels, "logistic4")
    mappings = fit_mappings(predicted, labels)
    assert mappings.fitted == {}
    assert reason in mappings.record()["logistic4"]["absent"]
    assert set(mappings.record()) == set(KINDS)


def test_an_unknown_kind_answers_with_the_nearest():
    with pytest.raises(UnknownName, match=r"Did you mean 'logistic\d'\?"):
        fit_logistic(*noisy(), "logistic6")


def test_a_record_gives_the_same_mapping_again():
    made = fit_mappings(*noisy())
    again = Mappings.from_record(json.loads(json.dumps(made.record())))
    assert again == made
    assert Mappings.from_record(Mappings.none("why").record()) == Mappings.none("why")


def test_metrics_after_a_mapping_are_those_of_the_mapped_predictions():
    predicted, labels = noisy(150, seed=7)
    prompts = [f"p {k % 30}" for k in range(150)]
    mappings = fit_mappings(*noisy(200, seed=8)).fitted
    result = evaluate_scores(predicted, labels, prompts, mappings=mappings, seed=2, resamples=60)
    plain = evaluate_scores(predicted, labels, prompts, seed=2, resamples=60)
    assert {key: result[key] for key in plain if key != "ci"} == {key: plain[key] for key in plain if key != "ci"}
    for kind in KINDS:
        mapped = FORMULAS[kind](predicted, *mappings[kind].parameters)
        assert result[f"plcc_{kind}"] == pytest.approx(stats.pearsonr(mapped, labels).statistic, abs=1e-9)
        assert result[f"rmse_{kind}"] == pytest.approx(np.sqrt(np.mean((mapped - labels) ** 2)), abs=1e-9)
        expected = evaluate_scores(mapped, labels, prompts, seed=2, resamples=60)["ci"]
        for name in ("plcc", "rmse"):
            assert result["ci"][f"{name}_{kind}"] == pytest.approx(expected[name], abs=1e-9)
    assert result["plcc_logistic4"] > result["plcc"]
    assert result["rmse_logistic4"] < result["rmse"]


@pytest.mark.parametrize("decimals", [0, 6])
def test_the_short_bootstrap_is_the_long_one(decimals):
    predicted, labels = (values.round(decimals) for values in noisy(30))
    groups = prompt_groups([f"p {k % 4}" for k in range(30)])
    short = bootstrap_linear(predicted, labels, groups, seed=1, resamples=300)
    assert short == pytest.approx(bootstrap_metrics(predicted, labels, groups, seed=1, resamples=300)[:, [1, 3]])
    alike = np.array([1.0, 1.0, 2.0])
    undefined = np.isnan(bootstrap_linear(alike, alike, np.array([0, 0, 1]), seed=0, resamples=100)[:, 0])
    assert 0 < undefined.sum() < 100


def test_a_mapping_that_makes_all_predictions_equal_leaves_no_plcc():
    flat = LogisticMap(kind="logistic5", parameters=(0.0, 1.0, 0.0, 0.0, 2.5), n=30, monotone=True)
    predicted, labels = noisy(30)
    result = evaluate_scores(predicted, labels, ["p"] * 30, mappings={"logistic5": flat}, resamples=20)
    assert result["plcc_logistic5"] is result["ci"]["plcc_logistic5"] is None
    assert result["plcc"] is not None
    assert "all predictions are equal" in result["undefined"]


@pytest.fixture
def trained(make_store, tmp_path: Path):
    store = make_store(200)
    return store, train_head(store, tmp_path / "run", head=SMALL, train=QUICK)


def test_a_run_fits_on_validation_and_applies_to_test(trained):
    _, run = trained
    rows = [line.split(",") for line in (run.path / "predictions.csv").read_text().splitlines()[1:]]
    validation = np.array([row[-2:] for row in rows if row[2] == "validation"], dtype=float)
    test = np.array([row[-2:] for row in rows if row[2] == "test"], dtype=float)
    for kind in KINDS:
        recorded = run.metrics["logistic"][kind]
        expected = fit_logistic(validation[:, 1], validation[:, 0], kind)
        assert recorded["parameters"] == pytest.approx(expected.parameters, rel=1e-3)
        assert recorded["n"] == len(validation)
        mapped = FORMULAS[kind](test[:, 1], *recorded["parameters"])
        expected_plcc = stats.pearsonr(mapped, test[:, 0]).statistic
        assert run.metrics["test"][f"plcc_{kind}"] == pytest.approx(expected_plcc, abs=1e-6)
        assert f"plcc_{kind}" not in run.metrics["validation"]


def test_the_test_labels_have_no_say_in_a_mapping(trained, tmp_path: Path):
    store, run = trained
    names = {name for name, _ in run.parts()["test"]}
    labels = store.items.labels["quality"].copy()
    labels[[k for k, name in enumerate(store.items.names) if name in names]] = 1.0
    other = replace(store, items=replace(store.items, labels={"quality": labels}))
    again = train_head(other, tmp_path / "other", head=SMALL, train=QUICK)
    assert again.metrics["logistic"] == run.metrics["logistic"]


def test_evaluate_uses_the_recorded_mapping_and_never_on_its_own_items(trained):
    store, run = trained
    result = evaluate(load_run(run.path), store)
    for name in ("plcc_logistic4", "rmse_logistic5"):
        assert result[name] == pytest.approx(run.metrics["test"][name], abs=1e-6)
    assert result["logistic"] == run.metrics["logistic"]
    for part in ("validation", "all"):
        inside = evaluate(run, store, part)
        assert "plcc_logistic4" not in inside
        assert "validation items, which the mappings were fitted to" in inside["logistic"]["logistic5"]["absent"]
    elsewhere = replace(store, id="other", items=replace(store.items, names=[f"x{k}.png" for k in range(200)]))
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
