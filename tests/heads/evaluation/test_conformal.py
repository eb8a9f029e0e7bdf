"""Conformal intervals: the quantile against numpy's, coverage by simulation, and what the choice of the epoch costs."""

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
)


def scores_of(errors) -> ConformalScores:
    return ConformalScores.of(np.asarray(errors, dtype=np.float64)[:, None], np.zeros((len(errors), 1)), None)


@pytest.mark.parametrize("level", [0.5, 0.7, 0.9, 0.95])
@pytest.mark.parametrize("count", [19, 20, 99, 100, 238])
def test_the_quantile_is_numpys(level, count):
    errors = np.random.default_rng(count).exponential(size=count)
    rank = int(np.ceil(round((count + 1) * level, 9)))
    found = scores_of(errors).quantiles(level)[0]
    assert found == np.quantile(errors, (rank - 1) / (count - 1), method="higher")
    assert found == np.quantile(np.append(errors, np.inf), (rank - 0.5) / (count + 1), method="inverted_cdf")
    assert (errors <= found).sum() >= (count + 1) * level - 1e-9


@pytest.mark.parametrize(("level", "count"), [(0.9, 9), (0.95, 19), (0.99, 99), (0.5, 1), (0.85, 6)])
def test_too_few_items_are_refused_with_the_number_needed(level, count):
    assert fewest_items(level) == count
    scores_of(np.ones(count)).quantiles(level)
    with pytest.raises(ConfigError, match=rf"needs {count} validation items or more .* has {count - 1}\."):
        scores_of(np.ones(count - 1)).quantiles(level)


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 90.0])
def test_a_level_is_between_0_and_1(level):
    with pytest.raises(ConfigError, match="between 0 and 1"):
        scores_of(np.ones(50)).quantiles(level)


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
    halves = [scores_of(errors).quantiles(0.9)[0] for errors in np.abs(chosen - mos[:, 0])]
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
    scores = ConformalScores.of(np.full((20, 1), 3.0), np.full((20, 1), 2.0), np.full((20, 1), 0.5))
    assert scores.scaled
    assert scores.quantiles(0.9).tolist() == [2.0]
    predicted, spread = np.array([[1.0], [4.5], [2.0]]), np.array([[1.0], [0.5], [0.1]])
    low, high = scores.intervals(predicted, spread, level=0.9, scales=((0.0, 5.0),))
    assert np.hstack([low, high]) == pytest.approx(np.array([[0.0, 3.0], [3.5, 5.0], [1.8, 2.2]]))
    low, _ = scores.intervals(predicted, spread, level=0.9, scales=(None,))
    assert low[0, 0] == -1.0


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
