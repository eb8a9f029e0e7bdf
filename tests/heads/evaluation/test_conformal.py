"""Conformal intervals: quantile and CQR against plain numpy, coverage by simulation, the cost of choosing the epoch."""

import numpy as np
import pytest
from scipy import stats

from agiqa.errors import ConfigError
from agiqa.heads.evaluation.conformal import (
    ConformalScores,
    clopper_pearson,
    coverage_warnings,
    fewest_items,
    interval_records,
    kind_of_readout,
)
from agiqa.heads.model.readouts import GAUSSIAN, GRADED, SOFTMAX, VALUE


def scores_of(errors) -> ConformalScores:
    return ConformalScores.of(
        "absolute", np.asarray(errors, dtype=np.float64)[:, None], np.zeros((len(errors), 1)), None
    )


@pytest.mark.parametrize("level", [0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("count", [19, 20, 99, 100, 238])
def test_the_quantile_is_numpys(level, count):
    errors = np.random.default_rng(count).exponential(size=count)
    rank = int(np.ceil(round((count + 1) * level, 9)))
    found = scores_of(errors).quantile(0, level)[0]
    assert found == np.quantile(errors, (rank - 1) / (count - 1), method="higher")
    assert found == np.quantile(np.append(errors, np.inf), (rank - 0.5) / (count + 1), method="inverted_cdf")
    assert (errors <= found).sum() >= (count + 1) * level - 1e-9


@pytest.mark.parametrize(("level", "count"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.85, 6)])
def test_too_few_items_are_refused_with_the_number_needed(level, count):
    assert fewest_items(level) == count
    scores_of(np.ones(count)).quantile(0, level)
    with pytest.raises(ConfigError, match=rf"needs {count} validation items or more .* has {count - 1}\."):
        scores_of(np.ones(count - 1)).quantile(0, level)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 90.0])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        scores_of(np.ones(50)).quantile(0, level)


def covered(random, *, count: int, epochs: int = 1, own: float = 0.0, shift: float = 1.0, trials: int = 1000) -> float:
    """The mean coverage of 90 % intervals made from `count` items, which also chose one of `epochs` by their SRCC.

    MOS have the deviation 1, errors that all epochs share .6, and those of each epoch `own`; of the latter, an epoch
    has nine tenths in common with the next one. Test errors are `shift` times as large as validation errors.
    """
    mos = random.normal(size=(trials, 1, count))
    noise = random.normal(size=(trials, epochs, count))
    for epoch in range(1, epochs):
        noise[:, epoch] = 0.9 * noise[:, epoch - 1] + np.sqrt(1 - 0.9**2) * noise[:, epoch]
    predicted = mos + 0.6 * random.normal(size=(trials, 1, count)) + own * noise
    ranks, truth = (values.argsort(-1).argsort(-1) - (count - 1) / 2 for values in (predicted, mos))
    best = (ranks * truth).sum(-1).argmax(-1)
    chosen = predicted[np.arange(trials), best]
    halves = [scores_of(errors).quantile(0, 0.9)[0] for errors in np.abs(chosen - mos[:, 0])]
    deviation = shift * np.sqrt(0.36 + own**2)
    return float((1 - 2 * stats.norm.sf(np.array(halves) / deviation)).mean())


def promised(count: int) -> float:
    """The exact mean coverage of exchangeable items: rank / (count + 1)."""
    return float(np.ceil(round((count + 1) * 0.9, 9)) / (count + 1))


@pytest.mark.parametrize("count", [30, 120, 238])
def test_exchangeable_items_are_covered_as_often_as_promised(count):
    assert covered(np.random.default_rng(0), count=count, trials=4000) == pytest.approx(promised(count), abs=0.004)


@pytest.mark.parametrize(("count", "lost"), [(30, 0.014), (238, 0.006)])
def test_choosing_the_epoch_on_the_same_items_costs_little_coverage(count, lost):
    """Of twenty epochs with errors of their own a third as large as those in common: 1.4 points with 30 items."""
    found = covered(np.random.default_rng(0), count=count, epochs=20, own=0.2)
    assert promised(count) - found == pytest.approx(lost, abs=0.004)


def test_other_images_are_not_covered():
    assert covered(np.random.default_rng(2), count=100, shift=2.0) < 0.65


def test_intervals_are_cut_at_the_ends_of_the_scale_and_scale_with_the_spread():
    scores = ConformalScores.of("scaled", np.full((20, 1), 3.0), np.full((20, 1), 2.0), np.full((20, 1), 0.5))
    assert scores.quantile(0, 0.9) == (2.0, 20)
    predicted, spread = np.array([[1.0], [4.5], [2.0]]), np.array([[1.0], [0.5], [0.1]])
    low, high = scores.intervals(predicted, spread, level=0.9, scales=((0.0, 5.0),))
    assert np.hstack([low, high]) == pytest.approx(np.array([[0.0, 3.0], [3.5, 5.0], [1.8, 2.2]]))
    low, _ = scores.intervals(predicted, spread, level=0.9, scales=(None,))
    assert low[0, 0] == -1.0


def cqr(mos, lower, upper, new_lower, new_upper, level):
    """Algorithm 1 of Romano, Patterson and Candes (arXiv 1905.03222), for quantiles of one label that are known."""
    scores = np.maximum(lower - mos, mos - upper)
    rank = min(1.0, (1.0 + 1.0 / len(mos)) * level)
    addend = np.quantile(scores, rank, method="inverted_cdf")
    return new_lower - addend, new_upper + addend


def drawn(random, count, *, told=1.0):
    """Predictions, spreads and MOS (items, 1): errors are Gaussian, and `told` times as large as the spread says."""
    predicted, spread = random.uniform(1, 4, (count, 1)), random.uniform(0.1, 1.0, (count, 1))
    return predicted, spread, predicted + told * spread * random.normal(size=(count, 1))


@pytest.mark.parametrize("level", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("told", [0.2, 1.0, 3.0])
def test_quantile_scores_make_the_intervals_of_cqr(level, told):
    random = np.random.default_rng(5)
    (predicted, spread, mos), (new, new_spread, truth) = (drawn(random, count, told=told) for count in (119, 500))
    ends = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    quantiles = [at + end * of for at, of in ((predicted, spread), (new, new_spread)) for end in ends]
    low, high = cqr(mos, *quantiles, level)
    scores = ConformalScores.of("quantile", predicted, mos, spread)
    found = scores.intervals(new, new_spread, level=level, scales=(None,))
    crossed = low > high
    assert crossed.any() == (told == 0.2)
    assert found[0][~crossed] == pytest.approx(low[~crossed])
    assert found[1][~crossed] == pytest.approx(high[~crossed])
    assert (found[0] == found[1])[crossed].all()  # a point, which covers no less than nothing
    assert found[0][crossed].tolist() == new[crossed].tolist()
    (record,) = interval_records(scores, new, new_spread, truth, [None] * 500, level=level)
    assert record["coverage"]["inside"] == ((found[0] <= truth) & (truth <= found[1])).sum()
    assert record["mean_width"] == pytest.approx((found[1] - found[0]).mean())
    assert record["scores"] == "quantile"


@pytest.mark.parametrize("kind", ["absolute", "scaled", "quantile"])
@pytest.mark.parametrize("told", [0.5, 1.0, 2.0])
def test_every_score_covers_as_promised_whatever_the_spread_says(kind, told):
    """Within three standard errors of the share over 400 draws of validation and test items."""
    random, level, shares, wanted = np.random.default_rng(6), 0.9, [], promised(99)
    for _ in range(400):
        predicted, spread, mos = drawn(random, 99, told=told)
        new, new_spread, truth = drawn(random, 200, told=told)
        scores = ConformalScores.of(kind, predicted, mos, spread)
        low, high = scores.intervals(new, new_spread, level=level, scales=(None,))
        shares.append(((low <= truth) & (truth <= high)).mean())
    error = np.sqrt(wanted * (1 - wanted) / (400 * 200) + wanted * (1 - wanted) / (400 * 101))
    assert abs(np.mean(shares) - wanted) < 3 * error


def test_the_kind_of_score_follows_from_what_the_head_predicts():
    kinds = [kind_of_readout(name) for name in (VALUE, SOFTMAX, GRADED, GAUSSIAN)]
    assert kinds == ["absolute", "scaled", "scaled", "quantile"]


@pytest.mark.parametrize(("hits", "count"), [(0, 7), (7, 7), (43, 50), (1, 90)])
def test_the_interval_of_a_share_is_scipys(hits, count):
    expected = stats.binomtest(hits, count).proportion_ci(method="exact")
    assert clopper_pearson(hits, count) == pytest.approx([expected.low, expected.high], abs=1e-9)


def test_coverage_by_generator_and_a_warning_where_it_fails():
    random = np.random.default_rng(3)
    errors = scores_of(random.normal(size=200))
    mos = np.zeros((300, 1))
    generators = ["like"] * 150 + ["other"] * 100 + [None] * 50
    predicted = random.normal(size=(300, 1)) * np.repeat([1.0, 3.0, 1.0], [150, 100, 50])[:, None]
    (record,) = interval_records(errors, predicted, None, mos, generators)
    inside = np.abs(predicted[:, 0]) <= record["quantile"]
    assert record["coverage"]["inside"] == inside.sum()
    assert {name: own["inside"] for name, own in record["generators"].items()} == {
        "like": inside[:150].sum(),
        "other": inside[150:250].sum(),
    }
    assert record["mean_width"] == pytest.approx(2 * record["quantile"])
    warnings = coverage_warnings("quality", record)
    assert any("of the 100 MOS of other" in line for line in warnings)
    assert not any("MOS of like" in line for line in warnings)
    (absent,) = interval_records(scores_of(np.ones(5)), predicted, None, mos, generators)
    assert "needs 9 validation items" in absent["absent"]
    assert coverage_warnings("quality", absent) == []
