"""Metrics against scipy and by hand, and their intervals against a bootstrap that really draws prompts."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import evaluate_scores, score


def sample(n: int = 597, seed: int = 0, prompts: int = 100):
    random = np.random.default_rng(seed)
    labels = random.uniform(0, 5, n).round(1)
    predicted = labels + random.normal(size=n)
    return predicted, labels, [f"p {k % prompts}" for k in range(n)]


def test_metrics_are_scipys_ties_included():
    predicted, labels, _ = sample()
    predicted = predicted.round(1)
    found = score(predicted, labels)
    assert found["srcc"] == pytest.approx(stats.spearmanr(predicted, labels).statistic, abs=1e-12)
    assert found["plcc"] == pytest.approx(stats.pearsonr(predicted, labels).statistic, abs=1e-12)
    assert found["krcc"] == pytest.approx(stats.kendalltau(predicted, labels).statistic, abs=1e-12)
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((predicted - labels) ** 2)), abs=1e-12)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), max_size=12))
def test_metrics_are_in_range_or_undefined(pairs):
    predicted, labels = np.array(pairs, dtype=np.float64).reshape(-1, 2).T
    found = score(predicted, labels)
    for name in ("srcc", "plcc", "krcc"):
        assert math.isnan(found[name]) or -1.0 <= found[name] <= 1.0


@pytest.mark.parametrize("predicted", [[1.0, 2.0], [2.0, 1.0]])
def test_two_items_have_perfect_correlations(predicted):
    found = score(np.array(predicted), np.array([3.0, 4.0]))
    sign = 1.0 if predicted[1] > predicted[0] else -1.0
    assert [found[name] for name in ("srcc", "plcc", "krcc")] == pytest.approx([sign] * 3)


@given(
    pairs=st.lists(st.tuples(st.integers(-9, 9), st.integers(-9, 9)), min_size=2, max_size=20),
    rising=st.sampled_from([lambda x: x**3, lambda x: np.exp(x / 3), lambda x: 7 * x - 20]),
)
def test_rank_correlations_do_not_change_under_rising_maps(pairs, rising):
    predicted, labels = np.array(pairs, dtype=np.float64).T
    plain, mapped = score(predicted, labels), score(rising(predicted), labels)
    for name in ("srcc", "krcc"):
        assert mapped[name] == pytest.approx(plain[name], abs=1e-12, nan_ok=True)
        assert score(-predicted, labels)[name] == pytest.approx(-plain[name], abs=1e-12, nan_ok=True)
    assert score(2 * predicted - 5, labels)["plcc"] == pytest.approx(plain["plcc"], abs=1e-9, nan_ok=True)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(wrong):
    predicted, labels, prompts = sample(10)
    broken = np.where(np.arange(10) < 3, wrong, predicted)
    with pytest.raises(DataError, match="3 of 10 predictions and 0 of 10 labels are not finite"):
        evaluate_scores(broken, labels, prompts)
    with pytest.raises(DataError, match="0 of 10 predictions and 3 of 10 labels"):
        evaluate_scores(predicted, broken, prompts)
    assert math.isnan(score(broken, labels)["srcc"])
    with pytest.raises(DataError, match="10 predictions, 10 labels and 9 prompts"):
        evaluate_scores(predicted, labels, prompts[1:])


@pytest.mark.parametrize(
    ("predicted", "labels", "reason"),
    [
        ([1.0] * 20, [float(k) for k in range(20)], "all predictions are equal"),
        ([float(k) for k in range(20)], [1.0] * 20, "all labels are equal"),
        ([1.0], [1.0], "two items or more"),
    ],
)
def test_undefined_correlations_are_null_with_a_reason(predicted, labels, reason):
    result = evaluate_scores(np.array(predicted), np.array(labels), [str(k) for k in range(len(labels))])
    assert reason in result["undefined"]
    assert result["srcc"] is result["plcc"] is result["krcc"] is result["ci"]["srcc"] is None
    assert result["rmse"] >= 0
    interval = result["ci"]["rmse"]
    assert interval is None if len(labels) == 1 else len(interval) == 2


@pytest.mark.parametrize("count", [1, 2, 9, 10, 19, 20])
def test_few_prompts_have_no_interval_and_say_so(count):
    predicted, labels = np.random.default_rng(count).normal(size=(2, 40))
    result = evaluate_scores(predicted, labels, [f"p{number % count}" for number in range(40)])
    for name, interval in result["ci"].items():
        if count < (20 if name == "rmse" else 10):
            assert interval is None
        else:
            assert interval[0] < result[name] < interval[1]
    assert result["prompts"] == count
    assert f"{count} prompts only" in result["caution"]
    assert ("RMSE needs 20" in result["caution"]) == (10 <= count < 20)


def test_the_result_is_what_the_command_line_promises():
    result = evaluate_scores(*sample())
    assert (result["n"], result["prompts"], result["confidence"]) == (597, 100, 0.95)
    for name in ("srcc", "plcc", "krcc", "rmse"):
        low, high = result["ci"][name]
        assert low < result[name] < high
    assert "undefined" not in result
    assert "caution" not in result
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_intervals_leave_out_whole_prompts():
    random = np.random.default_rng(0)
    labels = np.repeat(random.normal(size=60), 10)
    predicted = np.repeat(labels[::10] + random.normal(size=60), 10) + 1e-3 * random.normal(size=600)
    prompts = [f"  Prompt {k // 10}" if k % 2 else f"prompt  {k // 10} " for k in range(600)]
    low, high = evaluate_scores(predicted, labels, prompts)["ci"]["plcc"]
    table = np.stack([predicted, labels]).reshape(2, 60, 10)
    drawn = [np.corrcoef(table[:, random.integers(60, size=60)].reshape(2, -1))[0, 1] for _ in range(1000)]
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.05)
    alone_low, alone_high = evaluate_scores(predicted, labels, [str(k) for k in range(600)])["ci"]["plcc"]
    assert high - low > 2.5 * (alone_high - alone_low)


def test_nothing_to_evaluate_is_refused():
    with pytest.raises(DataError, match="no items"):
        evaluate_scores(np.empty(0), np.empty(0), [])
