"""Metrics of one and of several seeds and their paired differences, against scipy, by hand, and against a bootstrap."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agiqa.errors import DataError
from agiqa.heads import paired, seeds_score
from agiqa.heads.evaluation.metrics import SeedScores, evaluate_scores, score
from agiqa.heads.evaluation.significance import METRICS


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
    with pytest.raises(
        DataError, match=r"shape \(1, 10\), expected \(seeds, items\); there are 10 labels and 9 prompts"
    ):
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
    with pytest.raises(DataError, match="nothing to score: 1 seeds, 0 items"):
        evaluate_scores(np.empty(0), np.empty(0), [])


def example(items=80, prompts=25, seeds=3, seed=0, error=0.6):
    """Predictions (seeds, items) that err about alike in each seed, MOS with ties, and prompts in no order."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 30, items) / 6.0
    predicted = labels + error * random.normal(size=(seeds, items)) + 0.2 * random.normal(size=items)
    return predicted, labels, [f"Prompt {k}" for k in random.integers(0, prompts, items)]


def explicit(predicted, labels):
    """The four metrics of one seed, by scipy and the definition of RMSE."""
    return [
        stats.spearmanr(predicted, labels).statistic,
        stats.pearsonr(predicted, labels).statistic,
        stats.kendalltau(predicted, labels).statistic,
        float(np.sqrt(np.mean((predicted - labels) ** 2))),
    ]


def without_prompts(predicted, labels, prompts):
    """(prompts, metrics): the means over seeds of what scipy says of the items of all other prompts."""
    names = np.array(prompts)
    return np.array(
        [
            np.mean([explicit(one[names != name], labels[names != name]) for one in predicted], axis=0)
            for name in sorted(set(prompts))
        ]
    )


def jackknife(left_out):
    return (len(left_out) - 1) / len(left_out) * np.square(left_out - left_out.mean(axis=0)).sum(axis=0)


def test_scores_are_means_over_seeds_of_those_of_scipy():
    predicted, labels, prompts = example()
    found = seeds_score(predicted, labels, prompts)
    each = np.array([explicit(one, labels) for one in predicted])
    assert [found[name] for name in METRICS] == pytest.approx(each.mean(axis=0))
    assert [found["sd"][name] for name in METRICS] == pytest.approx(each.std(axis=0, ddof=1))
    assert (found["n"], found["seeds"], found["confidence"]) == (80, 3, 0.95)
    assert (found["prompts"], found["covers"]) == (len(set(prompts)), "prompts and seeds")
    assert all(low < found[name] < high for name, (low, high) in found["ci"].items())
    assert "undefined" not in found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_difference_of_closed_forms_is_tested_over_prompts_that_are_left_out():
    predicted, labels, prompts = example(seeds=2)
    a, b = predicted[:1], predicted[1:]
    found = paired(a, b, labels, prompts, seedless=(True, True), confidence=0.9)
    left_out = without_prompts(a, labels, prompts) - without_prompts(b, labels, prompts)
    difference = np.subtract(explicit(a[0], labels), explicit(b[0], labels))
    error, dof = np.sqrt(jackknife(left_out)), len(set(prompts)) - 1
    assert [found["difference"][name] for name in METRICS] == pytest.approx(difference)
    assert [found["p"][name] for name in METRICS] == pytest.approx(2 * stats.t.sf(np.abs(difference) / error, dof))
    for k, name in enumerate(METRICS):
        assert found["ci"][name] == pytest.approx(stats.t.interval(0.9, dof, difference[k], error[k]))
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_seeds_add_to_the_error_of_a_difference():
    predicted, labels, prompts = example(items=300, prompts=100, seeds=6)
    levels = np.array([[-2.0], [0.0], [2.0]])
    a, b = predicted[:3], predicted[3:]
    low, high = paired(a + levels, b, labels, prompts)["ci"]["rmse"]
    of_seeds = [explicit(one, labels)[3] for one in a + levels]
    welch = stats.ttest_ind(of_seeds, [explicit(one, labels)[3] for one in b], equal_var=False)
    assert [low, high] == pytest.approx(list(welch.confidence_interval()), rel=0.1)
    calm = paired(a, b, labels, prompts)["ci"]["rmse"]
    assert high - low > 10 * (calm[1] - calm[0])


def test_one_seed_has_the_numbers_of_a_single_evaluation():
    predicted, labels, prompts = example(seeds=1)
    found = seeds_score(predicted, labels, prompts, confidence=0.8)
    alone = evaluate_scores(predicted[0], labels, prompts, confidence=0.8)
    assert {name: found[name] for name in alone} == alone
    assert found["sd"] == dict.fromkeys(METRICS)
    assert found["covers"] == "prompts"


def test_two_seeds_have_no_interval_of_rmse():
    for seeds in (1, 2, 3):
        predicted, labels, prompts = example(seeds=seeds)
        ends = seeds_score(predicted, labels, prompts)["ci"]
        assert [name for name in METRICS if ends[name] is None] == (["rmse"] if seeds == 2 else [])


def test_swapping_the_sides_turns_the_difference_round():
    predicted, labels, prompts = example()
    other = example(error=0.7)[0]
    one, back = (paired(*sides, labels, prompts) for sides in ((predicted, other), (other, predicted)))
    assert one["p"] == pytest.approx(back["p"])
    for name in METRICS:
        assert one["difference"][name] == -back["difference"][name]
        assert one["ci"][name] == pytest.approx([-end for end in back["ci"][name]][::-1])


def test_a_head_does_not_differ_from_itself_and_a_far_better_one_does():
    predicted, labels, prompts = example(items=200, prompts=60)
    same = paired(predicted, predicted[::-1], labels, prompts)
    assert same["p"] == pytest.approx(dict.fromkeys(METRICS, 1.0))
    for seeds, most in ((3, 0.02), (6, 1e-3)):  # the variance over three seeds is known with two degrees of freedom
        predicted, labels, prompts = example(items=200, prompts=60, seeds=seeds)
        worse = example(items=200, prompts=60, seeds=seeds, error=4.0)[0]
        better = paired(predicted, worse, labels, prompts)
        assert all(p < most for p in better["p"].values())
    assert better["ci"]["srcc"][0] > 0 > better["ci"]["rmse"][1]


def test_a_head_on_another_scale_has_the_same_correlations_as_without():
    """Their PLCC differ by rounding, of which p can be anything, 0 too."""
    for seed in range(40):
        predicted, labels, prompts = example(seed=seed, seeds=1)
        found = paired(predicted * 1.37 + 0.21, predicted, labels, prompts, seedless=(True, True))
        for name in ("srcc", "plcc", "krcc"):
            assert (found["difference"][name], found["p"][name]) == (0.0, 1.0)
        assert found["difference"]["rmse"] != 0.0


@pytest.mark.parametrize("slope", [1.0, 3.7, -1e-7])
def test_predictions_on_a_line_with_the_mos_have_a_correlation_of_one_and_its_interval(slope):
    for seed in range(20):
        _, labels, prompts = example(seed=seed)
        sign = float(np.sign(slope))
        for told in (
            seeds_score(np.stack([labels * slope + 0.3] * 3), labels, prompts),
            evaluate_scores(labels * slope + 0.3, labels, prompts),
        ):
            for name in ("srcc", "plcc", "krcc"):
                assert [told[name], *told["ci"][name]] == pytest.approx([sign] * 3, abs=1e-12)
            json.dumps(told, allow_nan=False)


def test_what_is_kept_of_a_head_compares_it_with_many():
    predicted, labels, prompts = example()
    other = example(error=0.7)[0]
    a, b = (SeedScores.of(side, labels, prompts) for side in (predicted, other))
    assert a.against(b) == paired(predicted, other, labels, prompts)
    assert a.score() == seeds_score(predicted, labels, prompts)
    with pytest.raises(DataError, match="on the same items only"):
        a.against(SeedScores.of(other, labels[::-1].copy(), prompts))
    with pytest.raises(DataError, match="on the same items only"):
        a.against(SeedScores.of(other, labels, prompts[::-1]))


def test_correlations_that_are_not_defined_are_null_and_said():
    predicted, labels, prompts = example()
    predicted[1] = 2.0
    found = seeds_score(predicted, labels, prompts)
    assert (found["srcc"], found["plcc"], found["krcc"], found["ci"]["srcc"], found["sd"]["srcc"]) == (None,) * 5
    assert found["rmse"] > 0
    assert found["undefined"] == "all predictions are equal"
    against = paired(predicted, predicted[:2], labels, prompts)
    assert (against["difference"]["srcc"], against["p"]["srcc"], against["ci"]["srcc"]) == (None, None, None)
    assert against["p"]["rmse"] is not None
    assert against["undefined"] == "all predictions are equal"


@pytest.mark.parametrize("prompts", [5, 9])
def test_a_handful_of_prompts_is_not_tested(prompts):
    predicted, labels, _ = example(seeds=4)
    found = paired(predicted[:2], predicted[2:], labels, [str(k % prompts) for k in range(80)])
    assert found["p"] == found["ci"] == dict.fromkeys(METRICS)
    assert found["caution"] == f"{prompts} prompts only: an interval needs 10"
    assert found["difference"]["srcc"] is not None


def test_what_cannot_be_scored_is_told():
    predicted, labels, prompts = example()
    for wrong in (predicted[:, 1:], predicted[0]):
        with pytest.raises(DataError, match=r"expected \(seeds, items\); there are 80 labels and 80 prompts"):
            seeds_score(wrong, labels, prompts)
    with pytest.raises(DataError, match="nothing to score: 0 seeds, 80 items"):
        seeds_score(predicted[:0], labels, prompts)
    predicted[0, 3] = np.nan
    with pytest.raises(DataError, match="1 of 240 predictions and 0 of 80 labels are not finite"):
        seeds_score(predicted, labels, prompts)
