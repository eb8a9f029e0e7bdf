"""Standard errors against scipy on what is left, an analysis of variance by hand, and simulated chance."""

import math
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from agiqa.errors import ConfigError
from agiqa.heads import holm, paired, seeds_score
from agiqa.heads.evaluation.significance import (
    METRICS,
    MetricBySeed,
    SamplingError,
    leave_one_out,
    prompt_blocks,
    sampling_error,
)


def explicit(predicted, labels):
    """The four metrics by scipy and the definition of RMSE; NaN for a correlation with a constant."""
    if np.ptp(predicted) == 0 or np.ptp(labels) == 0:
        correlations = [math.nan] * 3
    else:
        tests = (stats.spearmanr, stats.pearsonr, stats.kendalltau)
        correlations = [test(predicted, labels).statistic for test in tests]
    return [*correlations, math.sqrt(np.mean((predicted - labels) ** 2))]


@settings(max_examples=40, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2), st.integers(-2, 2)), min_size=5, max_size=25),
    scale=st.sampled_from([1.0, 1e-6, 1e6]),
    shift=st.sampled_from([0.0, 3.0]),
)
def test_what_is_left_is_scored_as_scipy_scores_it(items, scale, shift):
    blocks, predicted, labels = np.array(items).T
    _, blocks = np.unique(blocks, return_inverse=True)
    predicted, labels = predicted * scale + shift, labels.astype(np.float64)
    found = leave_one_out(np.stack([predicted, -predicted]), labels, blocks)
    for block in range(blocks.max() + 1):
        kept = blocks != block
        for row, sign in zip(found, (1.0, -1.0), strict=True):
            if not kept.any():
                assert np.isnan(row[block]).all()
                continue
            expected = explicit(sign * predicted[kept], labels[kept])
            assert row[block] == pytest.approx(expected, rel=1e-6, abs=1e-9, nan_ok=True)


def test_many_prompts_are_left_out_in_a_thousand_parts():
    groups = np.random.default_rng(0).permutation(2500)
    blocks = prompt_blocks(groups)
    assert sorted(np.bincount(blocks).tolist()) == [2] * 500 + [3] * 500
    assert prompt_blocks(np.arange(1000)).tolist() == list(range(1000))


@pytest.mark.parametrize("giant", [1, 5500])
def test_the_memory_of_many_items_does_not_grow_with_pairs(giant):
    """A matrix of pairs of 6,000 items takes 288 MB; one prompt may have most of them."""
    random = np.random.default_rng(0)
    predicted, labels = random.normal(size=(2, 6000))
    groups = np.maximum(np.arange(6000) - giant + 1, 0)
    tracemalloc.start()
    leave_one_out(predicted[None], labels, prompt_blocks(groups))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def cells(seeds, prompts, *, of_seeds, of_prompts, of_both, random):
    return (
        of_seeds * random.normal(size=(seeds, 1))
        + of_prompts * random.normal(size=(1, prompts))
        + of_both * random.normal(size=(seeds, prompts))
    )


def side_of(values):
    """The means of the rows of `values` (seeds, prompts), whole and without each prompt."""
    prompts = values.shape[1]
    return MetricBySeed(
        values=values.mean(axis=1), left_out=(values.sum(axis=1, keepdims=True) - values) / (prompts - 1)
    )


@pytest.mark.parametrize(("seeds", "prompts"), [(3, 12), (5, 40)])
def test_the_parts_are_those_of_an_analysis_of_variance(seeds, prompts):
    """Of a table of seeds and prompts the variance of the mean is (MS seeds + MS prompts - MS rest) / cells."""
    values = cells(seeds, prompts, of_seeds=1.0, of_prompts=1.0, of_both=0.5, random=np.random.default_rng(seeds))
    by_seed, by_prompt, mean = values.mean(axis=1), values.mean(axis=0), values.mean()
    rest = values - by_seed[:, None] - by_prompt + mean
    squares = [
        prompts * np.square(by_seed - mean).sum() / (seeds - 1),
        seeds * np.square(by_prompt - mean).sum() / (prompts - 1),
        np.square(rest).sum() / ((seeds - 1) * (prompts - 1)),
    ]
    expected = (squares[0] + squares[1] - squares[2]) / (seeds * prompts)
    found = sampling_error(side_of(values))
    assert found.variance == pytest.approx(expected, rel=1e-12)
    parts = [(squares[1] / (seeds * prompts), prompts - 1), (squares[0] / (seeds * prompts), seeds - 1)]
    for part, told in zip(found.parts, parts, strict=True):
        assert part == pytest.approx(told, rel=1e-12)
    if seeds == 5:
        doubt = sum(variance**2 / dof for variance, dof in parts)
        quantile = stats.t.ppf(0.975, expected**2 / doubt)
    else:
        of_seeds = parts[1][0] / expected
        quantile = (1 - of_seeds) * stats.t.ppf(0.975, prompts - 1) + of_seeds * stats.t.ppf(0.975, seeds - 1)
    assert found.interval(0.0, 0.95)[1] == pytest.approx(quantile * math.sqrt(expected), rel=1e-9)


def test_one_seed_and_no_prompts_between_it_is_the_classical_t_test():
    a, b = np.random.default_rng(0).normal(size=(2, 1, 30))
    found = sampling_error(side_of(a), side_of(b))
    told = stats.ttest_rel(a[0], b[0])
    difference = a.mean() - b.mean()
    assert found.p_value(difference) == pytest.approx(told.pvalue, rel=1e-9)
    assert found.interval(difference, 0.9) == pytest.approx(list(told.confidence_interval(0.9)), rel=1e-9)


def only_seeds(counts):
    """Sides whose seeds differ and whose prompts do not, the second by three times as much, and their values."""
    random = np.random.default_rng(1)
    values = [random.normal(size=(count, 1)) * scale for count, scale in zip(counts, (1, 3), strict=True)]
    return [one[:, 0] for one in values], [side_of(one + np.zeros((1, 20))) for one in values]


def test_where_only_five_seeds_and_more_differ_it_is_welchs_test():
    (a, b), sides = only_seeds((6, 5))
    told = stats.ttest_ind(a, b, equal_var=False)
    assert sampling_error(*sides).p_value(a.mean() - b.mean()) == pytest.approx(told.pvalue, rel=1e-9)


def test_where_only_fewer_seeds_differ_it_is_the_test_of_cochran_and_cox():
    """Of as many seeds on both sides that is the t-test with the degrees of freedom of one; else it is safer than Welch's."""
    (a, b), sides = only_seeds((4, 4))
    error = math.sqrt(a.var(ddof=1) / 4 + b.var(ddof=1) / 4)
    expected = 2 * stats.t.sf(abs(a.mean() - b.mean()) / error, 3)
    assert sampling_error(*sides).p_value(a.mean() - b.mean()) == pytest.approx(expected, rel=1e-9)
    (a, b), sides = only_seeds((3, 5))
    shares, found = np.array([a.var(ddof=1) / 3, b.var(ddof=1) / 5]), sampling_error(*sides)
    error, quantile = math.sqrt(shares.sum()), shares @ stats.t.ppf(0.95, [2, 4]) / shares.sum()
    assert found.interval(0.0, 0.9) == pytest.approx([-quantile * error, quantile * error], rel=1e-9)
    assert found.p_value(quantile * error) == pytest.approx(0.1, rel=1e-9)
    difference = a.mean() - b.mean()
    welch = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert welch < found.p_value(difference) < 2 * stats.t.sf(abs(difference) / error, 2)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_an_interval_at_one_minus_p_ends_at_no_difference(seeds):
    random = np.random.default_rng(seeds)
    for scale in (0.0, 0.1, 1.0, 30.0):
        a, b = (cells(seeds, 25, of_seeds=scale, of_prompts=0.5, of_both=0.5, random=random) for _ in range(2))
        found = sampling_error(side_of(a), side_of(b))
        for errors in (0.5, 2.0, 5.0):
            difference = errors * math.sqrt(found.variance)
            low, high = found.interval(difference, 1 - found.p_value(difference))
            assert low / high == pytest.approx(0.0, abs=1e-6)
    assert 0 < found.p_value(1e6) < 1e-3
    assert sampling_error(side_of(a[:1]), side_of(b[:1])).p_value(1e9) < 1e-100


def test_p_values_hold_for_parts_of_any_size():
    random = np.random.default_rng(0)
    for _ in range(300):
        sizes = 10.0 ** random.uniform(-12, 2, size=3)
        parts = tuple(zip(sizes.tolist(), (float(random.integers(9, 400)), 2.0, 3.0), strict=True))
        found = SamplingError(variance=float(sizes.sum()), parts=parts)
        error = math.sqrt(found.variance)
        told = [found.p_value(error * errors) for errors in (0.0, 1e-6, 0.1, 1.0, 2.0, 4.0, 300.0, 1e5)]
        assert told == sorted(told, reverse=True)
        assert told[0] == pytest.approx(1.0)
        assert 0 < told[-1] < 1e-3
        assert found.interval(2.0 * error, 1 - told[4])[0] == pytest.approx(0.0, abs=1e-6 * error)


def test_intervals_of_correlations_stay_within_one_and_that_of_rmse_above_zero():
    wide = SamplingError(variance=0.04, parts=((0.04, 9.0),))
    low, high = wide.metric_interval(0.9, "srcc", 0.95)
    assert -1 < low < 0.9 < high < 1
    assert np.arctanh([low, high]).mean() == pytest.approx(math.atanh(0.9))
    low, high = wide.metric_interval(1.0, "rmse", 0.95)
    assert 0 < low < 1 < high
    assert (1 / low + 1 / high) / 2 == pytest.approx(1.0)
    assert SamplingError(variance=1.0, parts=((1.0, 9.0),)).metric_interval(1.0, "rmse", 0.95) is None
    assert SamplingError(variance=0.0, parts=((0.0, 9.0),)).metric_interval(1.0, "srcc", 0.95) == [1.0, 1.0]
    for unknown in (SamplingError(variance=math.nan, parts=((math.nan, 9.0), (0.1, 2.0))), wide):
        estimate = 0.5 if unknown is not wide else math.nan
        assert unknown.metric_interval(estimate, "plcc", 0.95) is unknown.interval(estimate, 0.95) is None
        assert unknown.share_interval(estimate, 0.95) is unknown.p_value(estimate) is None
    assert [SamplingError(variance=0.0, parts=((0.0, 9.0),)).p_value(one) for one in (0.0, 0.1)] == [1.0, 0.0]


def world(seeds, seed, *, prompts=30, images=1):
    """MOS, prompts, and predictions of one method by two sides of `seeds` seeds; a seed has errors of its own."""
    random = np.random.default_rng([seed, seeds])
    groups = np.repeat(np.arange(prompts), images)
    mos = random.normal(size=prompts)[groups] + random.normal(size=len(groups))
    shared = 0.5 * (random.normal(size=prompts)[groups] + random.normal(size=len(groups)))
    sides = []
    for _ in range(2):
        own = 0.2 * random.normal(size=(seeds, len(groups)))
        slopes, levels = 1 + 0.1 * random.normal(size=(seeds, 1)), 0.1 * random.normal(size=(seeds, 1))
        sides.append(slopes * (mos + shared + own) + levels)
    return *sides, mos, [str(group) for group in groups]


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_method_is_rarely_told_from_itself(seeds):
    """p below .05 in about a twentieth of trials; a bootstrap over prompts alone had it in .3 to .6 of them for RMSE."""
    trials = 150
    found = [paired(*world(seeds, seed))["p"] for seed in range(trials)]
    for name in METRICS:
        assert np.mean([p[name] < 0.05 for p in found]) < 0.1
        assert np.mean([p[name] < 0.5 for p in found]) > 0.2


def test_one_seed_has_an_interval_over_prompts_and_no_p():
    a, b, mos, prompts = world(1, 0)
    found = paired(a, b, mos, prompts)
    assert found["p"] == dict.fromkeys(METRICS)
    assert found["covers"] == seeds_score(a, mos, prompts)["covers"] == "prompts"
    assert "one seed" in found["no_p"]
    assert found["ci"]["srcc"][0] < found["difference"]["srcc"] < found["ci"]["srcc"][1]
    closed = paired(a, b, mos, prompts, seedless=(True, True))
    assert "no_p" not in closed
    assert closed["ci"] == found["ci"]
    assert 0 < closed["p"]["srcc"] < 1


def test_intervals_of_twenty_prompts_cover():
    """The percentile bootstrap covered RMSE in .87 of such trials."""
    random, trials, held = np.random.default_rng(0), 200, np.zeros(4)
    single = random.normal(size=(3, 200_000))
    truth = explicit(single[0] + 0.6 * single[1], single[0])
    for _ in range(trials):
        groups = np.repeat(np.arange(20), 8)
        mos, errors = (random.normal(size=20)[groups] + random.normal(size=160) for _ in range(2))
        told = seeds_score((mos + 0.6 * errors)[None] / math.sqrt(2), mos / math.sqrt(2), [str(g) for g in groups])
        held += [
            told["ci"][name][0] <= value <= told["ci"][name][1] for name, value in zip(METRICS, truth, strict=True)
        ]
    assert (held / trials > 0.89).all()


def test_holm_is_the_step_down_of_the_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    with pytest.raises(ConfigError, match="from 0 to 1"):
        holm([0.1, float("nan")])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.sampled_from([0.01, 0.05, 0.2]))
def test_holm_rejects_what_its_procedure_rejects(p, alpha):
    """One after the other from the smallest, p-value k (from 0) of m is rejected up to alpha / (m - k), until one is not."""
    rejected = set()
    for k, number in enumerate(sorted(range(len(p)), key=lambda number: p[number])):
        if p[number] * (len(p) - k) > alpha:
            break
        rejected.add(number)
    adjusted = holm(p)
    assert {number for number, value in enumerate(adjusted) if value <= alpha} == rejected
    assert all(before <= after <= 1 for before, after in zip(p, adjusted, strict=True))
