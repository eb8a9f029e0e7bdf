"""Regressions in closed form: the fits and the choices of a cross-validation, each against a computation by hand."""

import functools
import itertools

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.spatial.distance import pdist
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.model_selection import GroupKFold

from agiqa.errors import ConfigError, DataError
from agiqa.heads.closed import regressions
from agiqa.heads.closed.forms import TRIED_STRENGTHS, TRIED_WIDTHS
from agiqa.heads.closed.regressions import (
    KERNEL_STRENGTHS,
    STRENGTHS,
    WIDTHS,
    best_kernel_ridge,
    best_ridge,
    lowest,
    some_groups,
)


def ridge(known, mos, unknown, strength):
    """In closed form, the intercept free of the penalty."""
    centre, mean = known.mean(0), mos.mean()
    matrix = (known - centre).T @ (known - centre) + strength * np.eye(known.shape[1])
    return (unknown - centre) @ np.linalg.solve(matrix, (known - centre).T @ (mos - mean)) + mean


def kernel_ridge(known, mos, unknown, strength, scale, everything):
    """By scikit-learn's own kernel of the rows, the mean of the MOS taken off and put back."""
    gamma = 1 / (2 * scale**2)
    spread = 1 - rbf_kernel(everything, gamma=gamma).mean()
    model = KernelRidge(alpha=strength * spread, kernel="rbf", gamma=gamma).fit(known, mos - mos.mean())
    return model.predict(unknown) + mos.mean()


def inner_rmse(predict, known, mos, groups):
    """Of a cross-validation in five folds that share no group."""
    folds = GroupKFold(5).split(known, groups=groups)
    errors = [np.square(predict(known[kept], mos[kept], known[held]) - mos[held]) for kept, held in folds]
    return np.sqrt(np.concatenate(errors).mean())


@pytest.fixture
def linear():
    """40 items of 10 groups, whose MOS follows a channel, the group and chance; and 9 more."""
    random = np.random.default_rng(0)
    known, unknown, groups = random.normal(size=(40, 30)), random.normal(size=(9, 30)), np.repeat(np.arange(10), 4)
    mos = known[:, 0] + random.normal(size=10)[groups] + 0.5 * random.normal(size=40)
    return known, mos, groups, unknown


@pytest.fixture
def curved():
    """120 items of 12 groups in the plane, whose MOS is a curved function; and 50 more, and their MOS."""
    random = np.random.default_rng(1)
    rows = random.normal(size=(170, 2))
    mos = 3 + np.cos(2 * rows[:, 0]) * rows[:, 1] + 0.3 * random.normal(size=170)
    return rows[:120], mos[:120], np.arange(120) % 12, rows[120:], mos[120:]


def test_ridge_is_the_closed_form_at_the_strength_that_unknown_groups_choose(linear):
    known, mos, groups, unknown = linear
    errors = [
        inner_rmse(lambda *parts, strength=strength: ridge(*parts, strength), known, mos, groups)
        for strength in STRENGTHS
    ]
    chosen = best_ridge(known, mos, groups)
    assert chosen.strength == STRENGTHS[int(np.argmin(errors))]
    assert (chosen.kind, chosen.width, chosen.at_edge) == ("ridge", None, ())
    assert chosen.inner_rmse == pytest.approx(min(errors))
    expected = ridge(known, mos, unknown, chosen.strength)
    assert chosen.predict(known, mos, unknown) == pytest.approx(expected)
    sparse = best_ridge(csr_array(known), mos, groups)
    assert sparse.strength == chosen.strength
    assert sparse.predict(csr_array(known), mos, csr_array(unknown)) == pytest.approx(
        expected, abs=2e-3
    )  # iterated, not solved


def test_kernel_ridge_is_that_of_scikit_learn_at_the_settings_that_unknown_groups_choose(curved):
    known, mos, groups, unknown, truth = curved
    median = float(np.median(pdist(known)))
    errors = {
        (width, strength): inner_rmse(
            lambda *parts, settings=(strength, width * median, known): kernel_ridge(*parts, *settings),
            known,
            mos,
            groups,
        )
        for width, strength in itertools.product(WIDTHS, KERNEL_STRENGTHS)
    }
    chosen = best_kernel_ridge(known, mos, groups)
    assert (chosen.width, chosen.strength) == min(errors, key=lambda settings: errors[settings])
    assert chosen.inner_rmse == pytest.approx(min(errors.values()))
    told = chosen.predict(known, mos, unknown)
    assert told == pytest.approx(kernel_ridge(known, mos, unknown, chosen.strength, chosen.width * median, known))
    plain = best_ridge(known, mos, groups)
    assert chosen.inner_rmse < plain.inner_rmse
    assert np.square(told - truth).mean() < 0.7 * np.square(plain.predict(known, mos, unknown) - truth).mean()


def test_a_setting_at_the_end_of_those_that_were_tried_is_told(linear, curved):
    known, _, groups, _ = linear
    noise = np.random.default_rng(5).normal(size=40)
    assert best_ridge(known, 1e3 * known[:, 0] + 1e-6 * noise, groups).at_edge == ("strength",)
    known, mos, groups, _, _ = curved
    chosen = best_kernel_ridge(known, mos, groups)
    places = {"strength": (chosen.strength, KERNEL_STRENGTHS), "width": (chosen.width, WIDTHS)}
    assert chosen.at_edge == tuple(name for name, (value, all_) in places.items() if value in (all_[0], all_[-1]))
    assert "width" in chosen.at_edge
    assert chosen.record()["at_edge"] == list(chosen.at_edge)


def test_what_cannot_be_chosen_or_takes_too_long_is_refused(linear, monkeypatch):
    known, mos, groups, _ = linear
    for best in (best_ridge, best_kernel_ridge):
        with pytest.raises(DataError, match="one prompt only"):
            best(known, mos, np.zeros(40, np.int64))
    with pytest.raises(DataError, match="or more, have equal features"):
        best_kernel_ridge(np.zeros((40, 3)), mos, groups)
    with monkeypatch.context() as patched:
        patched.setattr(regressions, "MOST_ITEMS", 39)
        with pytest.raises(ConfigError, match="at most 39 training items, and there are 40"):
            best_kernel_ridge(known, mos, groups)
    monkeypatch.setattr(regressions, "available_memory", lambda _device: 16 * 40 * 40 - 1)
    with pytest.raises(ConfigError, match=r"needs 0\.0 GB of cpu, and 0\.0 GB are free"):
        best_kernel_ridge(known, mos, groups)


@pytest.mark.parametrize("channels", [10, 60])  # fewer and more channels than items: primal and dual
def test_weighted_ridge_is_that_of_scikit_learn_in_the_choice_and_in_the_fit(channels):
    random = np.random.default_rng(2)
    known, unknown, groups = random.normal(size=(40, channels)), random.normal(size=(7, channels)), np.arange(40) // 3
    mos, weights = known[:, 0] + random.normal(size=40), random.uniform(0.1, 3.0, size=40)
    errors = np.zeros(len(STRENGTHS))
    for kept, held in GroupKFold(5).split(known, groups=groups):
        for number, strength in enumerate(STRENGTHS):
            model = Ridge(alpha=strength).fit(known[kept], mos[kept], sample_weight=weights[kept])
            errors[number] += (weights[held] * (model.predict(known[held]) - mos[held]) ** 2).sum()
    chosen = best_ridge(known, mos, groups, weights=weights)
    assert chosen.strength == STRENGTHS[int(errors.argmin())]
    assert chosen.inner_rmse == pytest.approx(np.sqrt(errors.min() / weights.sum()))
    model = Ridge(alpha=chosen.strength).fit(known, mos, sample_weight=weights)
    assert chosen.fit(known, mos, weights=weights).predict(unknown) == pytest.approx(model.predict(unknown))


def test_weighted_kernel_ridge_is_that_of_scikit_learn(curved):
    known, mos, groups, unknown, _ = curved
    weights = np.random.default_rng(3).uniform(0.1, 3.0, size=len(mos))
    chosen = best_kernel_ridge(known, mos, groups, weights=weights, widths=(1.0,), strengths=np.array([0.5]))
    gamma, mean = 1 / (2 * np.median(pdist(known)) ** 2), np.average(mos, weights=weights)
    alpha = 0.5 * (1 - rbf_kernel(known, gamma=gamma).mean())
    model = KernelRidge(alpha=alpha, kernel="rbf", gamma=gamma).fit(known, mos - mean, sample_weight=weights)
    predicted = chosen.fit(known, mos, weights=weights).predict(unknown)
    assert predicted == pytest.approx(model.predict(unknown) + mean)


def test_large_choices_are_made_on_whole_groups():
    groups = np.random.default_rng(4).integers(0, 30, size=200)
    some = some_groups(groups, 90)
    assert 60 < len(some) <= 90
    assert not set(groups[some]) & set(np.delete(groups, some))
    assert (some_groups(groups, 200) == np.arange(200)).all()


@pytest.mark.parametrize("seed", range(20))
def test_a_walk_finds_the_lowest_error_of_a_slanting_valley(seed):
    random = np.random.default_rng(seed)
    slope, centre = random.uniform(-1.2, 0), random.uniform([0, 0], [3, 7])
    across, along = np.stack(np.meshgrid(np.arange(4), np.arange(8), indexing="ij")) - centre[:, None, None]
    errors = np.square(along - slope * across) + np.square(across)
    met = set()

    def error(*place):
        met.add(place)
        return float(errors[place])

    place, least = lowest(error, errors.shape)
    assert least == errors[place] == errors.min()
    assert len(met) < 24


@pytest.mark.parametrize("seed", range(4))
def test_the_kernel_ridge_found_by_a_walk_is_as_good_as_that_of_the_whole_grid(seed):
    random = np.random.default_rng(seed)
    rows, groups = random.normal(size=(80, 6)), np.arange(80) // 4
    mos = np.tanh(rows[:, 0] * rows[:, 1]) + rows[:, 2] + (0.1, 0.5, 1.0, 2.0)[seed] * random.normal(size=80)
    found = best_kernel_ridge(rows, mos, groups, strengths=TRIED_STRENGTHS, widths=TRIED_WIDTHS)
    scale, errors = np.median(pdist(rows)), {}
    for setting in itertools.product(TRIED_WIDTHS, TRIED_STRENGTHS):
        predict = functools.partial(kernel_ridge, strength=setting[1], scale=setting[0] * scale, everything=rows)
        errors[setting] = inner_rmse(predict, rows, mos, groups)
    assert found.inner_rmse == pytest.approx(errors[found.width, found.strength])
    assert found.inner_rmse <= min(errors.values()) * 1.001
