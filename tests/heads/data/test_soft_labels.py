"""Soft labels: shares of a Gaussian by scipy, with the MOS as their mean, and what stores without deviations say."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from agiqa.errors import DataError
from agiqa.heads import TrainConfig
from agiqa.heads.data.soft_labels import (
    counted_levels,
    gaussian_levels,
    grouping_variance,
    label_deviations,
    level_values,
    soft_labels,
)
from tests.heads.conftest import MemoryItems

ON_FIVE = np.linspace(0.0, 5.0, 5)


@dataclass(frozen=True, kw_only=True)
class RatedItems(MemoryItems):
    deviations: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    mos_ranges: dict[str, tuple[float, float]] = field(default_factory=dict)


def rated(store, **more: Any):
    """The store with deviations, counts or scales."""
    return replace(store, items=RatedItems(**vars(store.items), **more))


def bins(mos: float, std: float, levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """A Gaussian integrated around each level."""
    half = (levels[1] - levels[0]) / 2
    return stats.norm.cdf(levels + half, mos, std) - stats.norm.cdf(levels - half, mos, std)


@pytest.mark.parametrize(("mos", "std"), [(2.5, 0.7), (2.4, 0.6), (3.1, 0.5)])
def test_far_from_the_ends_the_shares_are_those_of_a_gaussian(mos, std):
    found = gaussian_levels(np.array([mos]), np.array([std]), ON_FIVE)[0]
    assert found == pytest.approx(bins(mos, std, ON_FIVE), abs=0.01)


def test_a_mos_in_the_middle_is_discretised_exactly():
    expected = bins(2.5, 1.1, ON_FIVE)
    found = gaussian_levels(np.array([2.5]), np.array([1.1]), ON_FIVE)[0]
    assert found == pytest.approx(expected / expected.sum(), abs=1e-12)


@pytest.mark.parametrize(("mos", "std"), [(0.2, 0.9), (4.7, 0.6), (1.4, 2.0), (3.3, 0.4)])
def test_of_all_shares_with_that_mean_they_are_nearest_to_the_gaussian(mos, std):
    """A general optimiser finds the same minimum of the Kullback-Leibler divergence under the two constraints."""
    raw = bins(mos, std, ON_FIVE)

    def divergence(shares):
        return float(np.sum(shares * np.log(shares / raw)))

    best = optimize.minimize(
        divergence,
        np.full(5, 0.2),
        method="SLSQP",
        bounds=[(1e-12, 1.0)] * 5,
        constraints=[
            {"type": "eq", "fun": lambda shares: shares.sum() - 1},
            {"type": "eq", "fun": lambda shares: shares @ ON_FIVE - mos},
        ],
        options={"ftol": 1e-14, "maxiter": 500},
    )
    assert best.success
    assert gaussian_levels(np.array([mos]), np.array([std]), ON_FIVE)[0] == pytest.approx(best.x, abs=1e-4)


def test_the_mean_is_the_mos_and_no_share_is_negative():
    random = np.random.default_rng(0)
    mos, std = random.uniform(1, 5, 500), random.uniform(0.01, 2.5, 500)
    mos[:2] = 1.0, 5.0
    levels = np.linspace(1.0, 5.0, 5)
    shares = gaussian_levels(mos, std, levels)
    assert shares.min() >= 0.0
    assert shares.sum(axis=1) == pytest.approx(1.0)
    assert shares @ levels == pytest.approx(mos, abs=1e-6)


def test_rounding_to_levels_adds_the_variance_that_is_taken_off():
    levels = np.linspace(-20.0, 20.0, 5)[None] / 10  # wide enough for no loss at the ends
    mos, std = np.linspace(-0.5, 0.5, 21), np.full(21, 0.5)
    shares = gaussian_levels(mos, std, levels[0])
    variance = (shares * np.square(levels[0] - mos[:, None])).sum(axis=1)
    assert np.sqrt(variance - grouping_variance(levels)).mean() == pytest.approx(0.5, rel=0.02)


def test_levels_span_the_recorded_scale_or_the_smallest_usual_one():
    labels = np.array([[0.4, 61.0], [3.0, 20.0]])
    assert level_values(((1.0, 5.0), None), labels).tolist() == [[1, 2, 3, 4, 5], [0, 25, 50, 75, 100]]


def test_stores_without_deviations_are_refused_unless_one_is_given(make_store):
    store, items = make_store(4), np.arange(4)
    with pytest.raises(DataError, match=r"no std column for quality .*--label-std"):
        label_deviations(store, items, TrainConfig(loss="kl"))
    given = TrainConfig(loss="kl", label_std=0.6)
    assert label_deviations(store, items, given).tolist() == [[0.6]] * 4
    some = rated(store, deviations={"quality": np.array([0.5, np.nan, 0.7, 0.8])})
    assert label_deviations(some, items, given).tolist() == [[0.5], [0.6], [0.7], [0.8]]
    with pytest.raises(DataError, match=r"'0001.png' has no std of quality") as caught:
        label_deviations(some, items, TrainConfig(loss="kl"))
    assert "--label-std" in caught.value.__notes__[0]
    assert label_deviations(some, items[[0, 2]], TrainConfig(loss="kl")).tolist() == [[0.5], [0.7]]


def test_counts_are_shares_and_must_agree_with_the_mos(make_store):
    store, items = make_store(3), np.arange(3)
    config = TrainConfig(loss="kl", soft_labels="counts")
    with pytest.raises(DataError, match=r"no counts of ratings for quality \(count_quality_1 to count_quality_5\)"):
        counted_levels(store, items, "quality")
    counts = np.array([[0, 0, 1, 2, 1], [4, 0, 0, 0, 0], [0, 5, 5, 0, 0]], dtype=np.float64)
    with_counts = rated(
        store, counts={f"quality_{k + 1}": counts[:, k] for k in range(5)}, mos_ranges={"quality": (1.0, 5.0)}
    )
    mos, levels = np.array([[4.0], [1.0], [2.5]]), np.linspace(1.0, 5.0, 5)[None]
    found = soft_labels(with_counts, items, mos, config, levels)
    assert found[:, 0].tolist() == [[0, 0, 0.25, 0.5, 0.25], [1, 0, 0, 0, 0], [0, 0.5, 0.5, 0, 0]]
    with pytest.raises(DataError, match=r"contradict its MOS on 1 of 3 items: '0002.png' has the MOS 3.*mean 2.5"):
        soft_labels(with_counts, items, np.array([[4.0], [1.0], [3.0]]), config, levels)
    counts[1] = np.nan
    with pytest.raises(DataError, match=r"'0001.png' has no counts of quality"):
        counted_levels(with_counts, items, "quality")
