"""Metrics against scipy and by hand, and the prompt bootstrap against an independent one."""

import math
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agiqa.errors import DataError
from agiqa.heads.bootstrap import bootstrap_metrics
from agiqa.heads.metrics import evaluate_scores, score
from agiqa.heads.prompts import prompt_groups


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
        ([1.0] * 5, [1.0, 2.0, 3.0, 4.0, 5.0], "all predictions are equal"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5, "all labels are equal"),
        ([1.0], [1.0], "two items or more"),
    ],
)
def test_undefined_correlations_are_null_with_a_reason(predicted, labels, reason):
    result = evaluate_scores(np.array(predicted), np.array(labels), list("abcde")[: len(labels)])
    assert reason in result["undefined"]
    assert result["srcc"] is result["plcc"] is result["krcc"] is result["ci"]["srcc"] is None
    assert result["rmse"] >= 0
    interval = result["ci"]["rmse"]
    assert interval is None if len(labels) == 1 else len(interval) == 2


@pytest.mark.parametrize("count", [1, 2, 4, 5, 6])
def test_a_handful_of_prompts_has_no_interval(count):
    """Resamples of two prompts often have a correlation at one value only, and an interval of no width."""
    predicted, labels = np.random.default_rng(count).normal(size=(2, 12))
    result = evaluate_scores(predicted, labels, [f"p{number % count}" for number in range(12)])
    if count < 5:
        assert result["ci"] == dict.fromkeys(("srcc", "plcc", "krcc", "rmse"))
    else:
        assert all(low < high for low, high in result["ci"].values())


def test_the_result_is_what_the_command_line_promises():
    result = evaluate_scores(*sample(), resamples=50)
    assert result["n"] == 597
    for name in ("srcc", "plcc", "krcc", "rmse"):
        low, high = result["ci"][name]
        assert low < result[name] < high
    assert "undefined" not in result


def test_the_bootstrap_is_seeded_and_fast():
    started = time.perf_counter()
    first = evaluate_scores(*sample(), seed=3)
    assert time.perf_counter() - started < 3.0
    assert first == evaluate_scores(*sample(), seed=3)
    assert first["ci"] != evaluate_scores(*sample(), seed=4)["ci"]


def test_the_bootstrap_draws_whole_prompts():
    random = np.random.default_rng(0)
    labels = np.repeat(random.normal(size=30), 20)
    predicted = np.repeat(labels[::20] + random.normal(size=30), 20) + 1e-3 * random.normal(size=600)
    prompts = [f"  Prompt {k // 20}" if k % 2 else f"prompt  {k // 20} " for k in range(600)]
    low, high = evaluate_scores(predicted, labels, prompts)["ci"]["plcc"]
    table = np.stack([predicted, labels]).reshape(2, 30, 20)
    drawn = [np.corrcoef(table[:, random.integers(30, size=30)].reshape(2, -1))[0, 1] for _ in range(1000)]
    assert [low, high] == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    alone_low, alone_high = evaluate_scores(predicted, labels, [str(k) for k in range(600)])["ci"]["plcc"]
    assert high - low > 2.5 * (alone_high - alone_low)


@pytest.mark.parametrize("decimals", [0, 3])
def test_resamples_are_scored_as_if_their_items_were_repeated(decimals):
    predicted, labels, prompts = sample(40, prompts=7)
    predicted, labels = predicted.round(decimals), labels.round(decimals)
    groups = prompt_groups(prompts)
    found = bootstrap_metrics(predicted, labels, groups, seed=5, resamples=20)
    drawn = np.random.default_rng(5).multinomial(7, np.full(7, 1 / 7), size=20)
    for row, counts in zip(found, drawn, strict=True):
        items = np.repeat(np.arange(40), counts[groups])
        a, b = predicted[items], labels[items]
        assert row == pytest.approx(
            [
                stats.spearmanr(a, b).statistic,
                stats.pearsonr(a, b).statistic,
                stats.kendalltau(a, b).statistic,
                np.sqrt(np.mean((a - b) ** 2)),
            ],
            abs=1e-12,
        )


def test_resamples_without_a_correlation_do_not_count():
    predicted, labels = np.array([1.0, 1.0, 2.0]), np.array([1.0, 2.0, 4.0])
    found = bootstrap_metrics(predicted, labels, np.array([0, 0, 1]), seed=0, resamples=200)
    undefined = np.isnan(found[:, 0])
    assert 0 < undefined.sum() < 200
    assert np.isfinite(found[:, 3]).all()
    labels = np.array([1.0, 2.0, 4.0, 3.0, 3.0, 3.0])
    some_undefined = evaluate_scores(np.array([1.0, 1.0, 2.0, 1.0, 1.0, 1.0]), labels, list("aabcde"))
    assert some_undefined["ci"]["plcc"] is not None
    with pytest.raises(DataError, match="no items"):
        evaluate_scores(predicted[:0], labels[:0], [])
