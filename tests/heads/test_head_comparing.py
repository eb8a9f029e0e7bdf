"""Means over seeds and paired differences, against resamples that are really drawn and scored with scipy."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from agiqa.errors import ConfigError, DataError
from agiqa.heads import holm, paired, seeds_score
from agiqa.heads.bootstrap import draw_groups
from agiqa.heads.comparing import SeedScores
from agiqa.heads.metrics import METRICS, evaluate_scores
from agiqa.heads.prompts import prompt_groups

RESAMPLES = 60


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


def resampled(predicted, labels, prompts, *, seed):
    """(resamples, 4): the items of the drawn prompts repeated as often as drawn, scored per seed, the seeds averaged."""
    groups = prompt_groups(prompts)
    rows = []
    for times in draw_groups(groups, seed=seed, resamples=RESAMPLES).astype(int):
        items = np.repeat(np.arange(len(labels)), times[groups])
        rows.append(np.mean([explicit(one[items], labels[items]) for one in predicted], axis=0))
    return np.array(rows)


def percentiles(drawn):
    return {name: pytest.approx(np.quantile(drawn[:, k], [0.025, 0.975])) for k, name in enumerate(METRICS)}


@pytest.mark.parametrize("seed", [0, 7])
def test_scores_are_those_of_resamples_that_are_really_drawn(seed):
    predicted, labels, prompts = example(seed=seed)
    found = seeds_score(predicted, labels, prompts, seed=seed, resamples=RESAMPLES)
    each = np.array([explicit(one, labels) for one in predicted])
    assert [found[name] for name in METRICS] == pytest.approx(each.mean(axis=0))
    assert [found["sd"][name] for name in METRICS] == pytest.approx(each.std(axis=0, ddof=1))
    assert found["ci"] == percentiles(resampled(predicted, labels, prompts, seed=seed))
    assert (found["n"], found["seeds"], found["resamples"], found["confidence"]) == (80, 3, RESAMPLES, 0.95)
    assert "undefined" not in found
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_paired_difference_is_that_of_the_same_resamples():
    predicted, labels, prompts = example()
    other = example(error=0.7, seeds=2)[0]
    found = paired(predicted, other, labels, prompts, seed=3, resamples=RESAMPLES)
    means = [np.mean([explicit(one, labels) for one in side], axis=0) for side in (predicted, other)]
    drawn = [resampled(side, labels, prompts, seed=3) for side in (predicted, other)]
    assert [found["difference"][name] for name in METRICS] == pytest.approx(means[0] - means[1])
    assert found["ci"] == percentiles(drawn[0] - drawn[1])
    for k, name in enumerate(METRICS):
        below, above = ((drawn[0] - drawn[1])[:, k] <= 0).sum(), ((drawn[0] - drawn[1])[:, k] >= 0).sum()
        assert found["p"][name] == pytest.approx(min(1.0, 2 * (min(below, above) + 1) / (RESAMPLES + 1)))
    assert (found["n"], found["seeds"], found["resamples"]) == (80, [3, 2], RESAMPLES)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_one_seed_has_the_numbers_of_a_single_evaluation():
    predicted, labels, prompts = example(seeds=1)
    found = seeds_score(predicted, labels, prompts, seed=4, resamples=RESAMPLES, confidence=0.8)
    alone = evaluate_scores(predicted[0], labels, prompts, seed=4, resamples=RESAMPLES, confidence=0.8)
    assert {name: found[name] for name in alone} == alone
    assert found["sd"] == dict.fromkeys(METRICS)


def test_swapping_the_sides_turns_the_difference_round():
    predicted, labels, prompts = example()
    other = example(error=0.7)[0]
    one, back = (paired(*sides, labels, prompts, resamples=200) for sides in ((predicted, other), (other, predicted)))
    assert one["p"] == back["p"]
    for name in METRICS:
        assert one["difference"][name] == -back["difference"][name]
        assert one["ci"][name] == pytest.approx([-end for end in back["ci"][name]][::-1])


def test_a_head_does_not_differ_from_itself_and_a_far_better_one_does():
    predicted, labels, prompts = example(items=200, prompts=60)
    same = paired(predicted, predicted[::-1], labels, prompts, resamples=200)
    assert same["p"] == dict.fromkeys(METRICS, 1.0)
    assert same["ci"] == dict.fromkeys(METRICS, pytest.approx([0.0, 0.0]))
    worse = example(items=200, prompts=60, error=4.0)[0]
    better = paired(predicted, worse, labels, prompts, resamples=200)
    assert better["p"] == dict.fromkeys(METRICS, 2 / 201)
    assert better["ci"]["srcc"][0] > 0 > better["ci"]["rmse"][1]


def test_no_difference_is_called_one_about_as_rarely_as_it_says():
    """Two predictors of equal error on fresh items: p under .1 in about a tenth of them."""
    rejected = 0
    for seed in range(150):
        predicted, labels, prompts = example(items=90, prompts=30, seeds=2, seed=seed)
        rejected += paired(predicted[:1], predicted[1:], labels, prompts, resamples=150)["p"]["plcc"] <= 0.1
    assert 5 <= rejected <= 25


def test_what_is_kept_of_a_head_compares_it_with_many():
    predicted, labels, prompts = example()
    other = example(error=0.7)[0]
    a, b = (SeedScores.of(side, labels, prompts, resamples=RESAMPLES) for side in (predicted, other))
    assert a.against(b) == paired(predicted, other, labels, prompts, resamples=RESAMPLES)
    assert a.score() == seeds_score(predicted, labels, prompts, resamples=RESAMPLES)
    with pytest.raises(ConfigError, match="60 of seed 0 and 60 of seed 1"):
        a.against(SeedScores.of(other, labels, prompts, seed=1, resamples=RESAMPLES))
    with pytest.raises(DataError, match="on the same items only"):
        a.against(SeedScores.of(other, labels[::-1].copy(), prompts, resamples=RESAMPLES))
    with pytest.raises(DataError, match="on the same items only"):
        a.against(SeedScores.of(other, labels, prompts[::-1], resamples=RESAMPLES))


def test_correlations_that_are_not_defined_are_null_and_said():
    predicted, labels, prompts = example()
    predicted[1] = 2.0
    found = seeds_score(predicted, labels, prompts, resamples=RESAMPLES)
    assert (found["srcc"], found["plcc"], found["krcc"], found["ci"]["srcc"], found["sd"]["srcc"]) == (None,) * 5
    assert found["rmse"] > 0
    assert found["undefined"] == "all predictions are equal"
    against = paired(predicted, predicted[:1], labels, prompts, resamples=RESAMPLES)
    assert (against["difference"]["srcc"], against["p"]["srcc"], against["ci"]["srcc"]) == (None, None, None)
    assert against["p"]["rmse"] is not None
    assert against["undefined"] == "all predictions are equal"


def test_what_cannot_be_scored_is_told():
    predicted, labels, prompts = example()
    for wrong in (predicted[:, 1:], predicted[0]):
        with pytest.raises(DataError, match=r"expected \(seeds, items\); there are 80 labels and 80 prompts"):
            seeds_score(wrong, labels, prompts)
    with pytest.raises(DataError, match="nothing to score: 0 seeds, 80 items"):
        seeds_score(predicted[:0], labels, prompts)
    predicted[0, 3] = np.nan
    with pytest.raises(DataError, match="not a finite number"):
        seeds_score(predicted, labels, prompts)


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
