"""Losses: equal to their formulas written as loops, finite where batches degenerate, and able to train a head."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import optimize, stats
from scipy.special import huber as scipy_huber

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads import HeadConfig, LineProgress, TrainConfig, train_head
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.model.losses import LOSSES, check_loss, get_loss
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.model.readouts import VALUE
from agiqa.heads.training.fitting import fit_head

VALUE_LOSSES = [name for name in LOSSES.names() if LOSSES.get(name).readout == VALUE]
"""Those that compare predictions with labels; test_distributions.py has the others."""
PAIRED = ("fidelity", "margin", "plcc", "ranknet")
MIXES = ("mse+0.5*plcc", "0.3*mae+ranknet", "huber+margin+0.1*fidelity")
NONE_HEAD = HeadConfig(projection="sketch", encoder="none", width=8)


def preference(difference):
    return 1.0 if difference > 0 else 0.0 if difference < 0 else 0.5


def by_pairs(cost):
    def formula(predicted, labels):
        pairs = itertools.combinations(range(len(labels)), 2)
        return np.mean([cost(predicted[i] - predicted[j], labels[i] - labels[j]) for i, j in pairs])

    return formula


def fidelity_cost(difference, wanted):
    p, q = preference(wanted), stats.norm.cdf(difference / math.sqrt(2))
    return 1 - math.sqrt(p * q) - math.sqrt((1 - p) * (1 - q))


def margin_cost(difference, wanted):
    return max(0.0, abs(wanted) - np.sign(wanted) * difference)


def ranknet_cost(difference, wanted):
    p, q = preference(wanted), 1 / (1 + math.exp(-difference))
    return -p * math.log(q) - (1 - p) * math.log(1 - q)


ORACLES = {
    "mse": lambda f, y: np.mean((f - y) ** 2),
    "mae": lambda f, y: np.mean(np.abs(f - y)),
    "huber": lambda f, y: np.mean(scipy_huber(1.0, f - y)),
    "plcc": lambda f, y: 1 - stats.pearsonr(f, y).statistic,
    "fidelity": by_pairs(fidelity_cost),
    "margin": by_pairs(margin_cost),
    "ranknet": by_pairs(ranknet_cost),
}


def sample(n=12, seed=0):
    """Predictions and labels, float64, with ties among both."""
    random = np.random.default_rng(seed)
    predicted, labels = random.normal(size=n) * 1.5, random.normal(size=n)
    labels[1], labels[2], predicted[4] = labels[0], labels[0], predicted[3]
    return predicted, labels


def value(name, predicted, labels):
    return get_loss(name)(torch.from_numpy(predicted), torch.from_numpy(labels)).item()


def gradient(name, predicted, labels):
    """Loss and gradient, which must be attached to the predictions."""
    predicted = predicted.clone().requires_grad_()
    loss = get_loss(name)(predicted, labels)
    loss.backward()
    return loss.detach(), predicted.grad


def test_every_loss_has_an_oracle_and_says_what_it_compares():
    assert sorted(ORACLES) == VALUE_LOSSES
    assert tuple(name for name in VALUE_LOSSES if get_loss(name).smallest_batch == 2) == PAIRED


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [2, 3, 12])
@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_a_loss_is_its_formula(name, n, seed):
    predicted, labels = sample(12, seed)
    predicted, labels = predicted[-n:], labels[-n:]
    assert value(name, predicted, labels) == pytest.approx(ORACLES[name](predicted, labels), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_a_gradient_is_that_of_the_formula(name):
    predicted, labels = sample(8)
    _, found = gradient(name, torch.from_numpy(predicted), torch.from_numpy(labels))
    expected = optimize.approx_fprime(predicted, lambda f: ORACLES[name](f, labels), 1e-7)
    assert found.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_the_order_of_a_batch_is_no_matter(name):
    predicted, labels = sample()
    order = np.random.default_rng(1).permutation(len(labels))
    assert value(name, predicted[order], labels[order]) == pytest.approx(value(name, predicted, labels))


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_perfect_predictions_cost_nothing_but_for_the_losses_that_want_them_further_apart(name):
    _, labels = sample()
    cost = value(name, labels, labels)
    if name in ("fidelity", "ranknet"):
        assert value(name, 3 * labels, labels) < cost
    else:
        assert cost == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_reversed_predictions_cost_more(name):
    _, labels = sample()
    assert value(name, -labels, labels) > value(name, labels, labels) + 0.1


@pytest.mark.parametrize("name", PAIRED)
def test_losses_that_compare_items_ignore_the_level(name):
    predicted, labels = sample()
    assert value(name, predicted + 7.0, labels - 3.0) == pytest.approx(value(name, predicted, labels))


def test_correlation_ignores_scale_and_ranks_ignore_that_of_the_labels():
    predicted, labels = sample()
    assert value("plcc", 40 * predicted + 2, 0.01 * labels) == pytest.approx(value("plcc", predicted, labels))
    assert value("plcc", -predicted, labels) == pytest.approx(2 - value("plcc", predicted, labels))
    for name in ("fidelity", "ranknet"):
        assert value(name, predicted, 9 * labels) == pytest.approx(value(name, predicted, labels))


@given(
    st.lists(st.tuples(st.floats(-5, 5, width=32), st.floats(-5, 5, width=32)), min_size=2, max_size=9),
    st.sampled_from(VALUE_LOSSES),
)
def test_losses_and_gradients_are_finite(pairs, name):
    predicted, labels = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    loss, slope = gradient(name, predicted, labels)
    assert loss.isfinite()
    assert loss >= -1e-5
    assert slope.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", ["predicted", "labels", "both"])
@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_constant_inputs_are_finite(name, constant, dtype):
    varied = torch.linspace(-1, 1, 7, dtype=dtype)
    same = torch.full_like(varied, 0.1)
    predicted, labels = (same if constant in (side, "both") else varied for side in ("predicted", "labels"))
    loss, slope = gradient(name, predicted, labels)
    assert loss.isfinite()
    assert slope.isfinite().all()
    if name == "plcc":
        assert loss == pytest.approx(1.0, abs=1e-4)
    if name in ("plcc", "margin") and constant != "predicted":
        assert slope.abs().max() < 1e-3


@pytest.mark.parametrize("size", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_predictions_far_off_are_finite(name, size):
    labels = torch.tensor([-1.0, 0.0, 0.0, 1.0])
    for sign in (size, -size):
        loss, slope = gradient(name, sign * labels, labels)
        assert loss.isfinite()
        assert slope.isfinite().all()


@pytest.mark.parametrize("name", [*VALUE_LOSSES, *MIXES])
def test_a_batch_of_one_is_finite_and_still_differentiable(name):
    loss, slope = gradient(name, torch.tensor([0.7]), torch.tensor([0.2]))
    assert loss.isfinite()
    assert slope.isfinite().all()
    if name in PAIRED:
        assert (loss.item(), slope.item()) == (0.0, 0.0)


def test_in_a_sum_a_batch_of_one_feels_the_terms_that_need_no_other():
    one = (np.array([0.7]), np.array([0.2]))
    assert value("mse+0.5*plcc", *one) == value("mse", *one) == pytest.approx(0.25)


@pytest.mark.parametrize("name", [*VALUE_LOSSES, "mse+0.5*plcc"])
def test_low_precision_is_computed_in_float32(name):
    predicted, labels = (torch.from_numpy(column).bfloat16() for column in sample())
    expected = get_loss(name)(predicted.float(), labels.float())
    with torch.autocast(device_type="cpu", dtype=torch.bfloat16):
        found = get_loss(name)(predicted, labels)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("mse+0.5*plcc", {"mse": 1.0, "plcc": 0.5}),
        ("0.3*mae+ranknet", {"mae": 0.3, "ranknet": 1.0}),
        (" 2 * huber + 1e-1*fidelity + margin ", {"huber": 2.0, "fidelity": 0.1, "margin": 1.0}),
        ("3*mse", {"mse": 3.0}),
    ],
)
def test_a_mix_is_the_weighted_sum(name, weights):
    predicted, labels = sample()
    expected = sum(weight * ORACLES[term](predicted, labels) for term, weight in weights.items())
    assert value(name, predicted, labels) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("plc", r"No loss is called 'plc'\. Did you mean 'plcc'"),
        ("mse+0.5*fidelty", r"No loss is called 'fidelty'\. Did you mean 'fidelity'"),
    ],
)
def test_unknown_losses_name_the_nearest(name, message):
    with pytest.raises(UnknownName, match=message):
        get_loss(name)


@pytest.mark.parametrize("name", ["", "mse+", "+mse", "0.5*", "*mse", "x*mse", "0*mse", "-1*mse", "nan*mse", "inf*mse"])
def test_text_that_is_no_sum_is_refused(name):
    with pytest.raises(ConfigError, match=r"mse\+0\.5\*plcc"):
        get_loss(name)


@pytest.mark.parametrize("name", [*PAIRED, "mse+0.5*plcc"])
def test_pairs_need_batches_of_two(name):
    with pytest.raises(ConfigError, match="batch_size is 1"):
        check_loss(TrainConfig(loss=name, batch_size=1))
    check_loss(TrainConfig(loss=name, batch_size=2))
    check_loss(TrainConfig(loss="mse", batch_size=1))


def fitted(store, loss, **settings):
    """A fit of one epoch on every item of `store`; 41 items leave one over at batch sizes of 8 and 2."""
    features = FeatureSet.from_store(store, range(len(store.features)))
    everything, ten = (LabelledItems.at(features, np.arange(count), "quality") for count in (len(features), 10))
    return fit_head(
        features,
        FeatureSpec.of(store),
        NONE_HEAD,
        TrainConfig(**{"loss": loss, "epochs": 1, "batch_size": 8, "lr": 1e-2, **settings}),
        train=everything,
        validation=ten,
        epochs=1,
        stage="train",
        progress=LineProgress(lambda _: None),
    )


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("name", [*VALUE_LOSSES, *MIXES])
def test_every_loss_trains_with_an_item_left_over(make_store, name, batch_size):
    fit = fitted(make_store(41), name, batch_size=batch_size)
    assert math.isfinite(fit.curves[0].train_loss)
    assert np.isfinite(fit.validation_predictions).all()
    assert all(weights.isfinite().all() for weights in fit.head.state_dict().values())


@pytest.mark.parametrize("name", [*VALUE_LOSSES, *MIXES])
def test_training_does_not_depend_on_the_unit_of_the_labels(make_store, name):
    fits = []
    for scale in (1.0, 20.0):
        store = make_store(41)
        store.items.labels["quality"] *= scale
        fits.append(fitted(store, name))
    found, expected = fits[1].validation_predictions, 20 * fits[0].validation_predictions
    if name in PAIRED:
        # The level is open: the output bias gets rounding noise for a gradient, and AdamW scales it up to steps.
        found, expected = found - found.mean(), expected - expected.mean()
        assert found == pytest.approx(expected, abs=0.02 * expected.std())
    else:
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-3)
    assert fits[1].curves[0].train_loss == pytest.approx(fits[0].curves[0].train_loss, rel=1e-3)


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_every_loss_learns_the_order(make_store, name):
    store = make_store(300, width=2)
    for rows, k in zip(store.features, range(300), strict=True):
        store.items.labels["quality"][k] = 3 + rows[:, 0].mean()
    fit = fitted(store, name)
    truth = store.items.labels["quality"][:10]
    assert stats.spearmanr(fit.validation_predictions[:, 0], truth).statistic > 0.8


@pytest.mark.parametrize("name", ["mse", "plcc"])
def test_mixed_precision_trains_with_a_loss(make_store, name):
    assert math.isfinite(fitted(make_store(41), name, precision="bf16").curves[0].train_loss)


@pytest.mark.parametrize("name", VALUE_LOSSES)
def test_every_loss_goes_from_the_store_to_a_run_folder(make_store, tmp_path, name):
    config = TrainConfig(split="grouped", epochs=1, batch_size=8, loss=name)
    run = train_head(make_store(41), tmp_path / "run", head=NONE_HEAD, train=config)
    assert run.train.loss == name
    assert math.isfinite(run.metrics["test"]["rmse"])


def test_batches_of_one_are_refused_before_training(make_store):
    with pytest.raises(ConfigError, match=r"'mse\+ranknet' compares items .* batch_size is 1"):
        fitted(make_store(12), "mse+ranknet", batch_size=1)


def log_cosh(predicted, labels):
    return torch.log(torch.cosh(predicted - labels)).mean()


def test_a_plain_function_is_a_loss_of_batches_of_any_size(make_store, tmp_path, monkeypatch):
    monkeypatch.setattr(LOSSES, "_parts", dict(LOSSES._parts))
    LOSSES.add("mine", log_cosh)
    predicted, labels = torch.randn(2, 5)
    expected = 0.5 * log_cosh(predicted, labels) + (predicted - labels).square().mean()
    assert get_loss("0.5*mine+mse")(predicted, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    head = HeadConfig(projection="sketch", encoder="none", width=4)
    train = TrainConfig(split="grouped", epochs=1, loss="mine", batch_size=1, device="cpu")
    run = train_head(make_store(20), tmp_path / "run", head=head, train=train)
    assert np.isfinite(run.metrics["test"]["rmse"])


def test_a_class_is_no_loss():
    with pytest.raises(ConfigError, match=r"'mine' must be a function of predictions and labels.*class MSELoss"):
        LOSSES.add("mine", torch.nn.MSELoss)
    assert "mine" not in LOSSES


@pytest.mark.parametrize(
    ("formula", "said"),
    [
        (lambda predicted, labels: (predicted - labels).square(), r"a tensor of shape \(7,\)"),
        (lambda predicted, labels: (predicted - labels).abs().mean().item(), "a float"),
    ],
    ids=["a loss per item", "a number"],
)
def test_a_loss_of_anything_but_one_tensor_value_is_refused(monkeypatch, formula, said):
    """A sum over the items would train at a learning rate that grows with the batch."""
    monkeypatch.setattr(LOSSES, "_parts", dict(LOSSES._parts))
    LOSSES.add("own", formula)
    for name in ("own", "mse+0.5*own"):
        with pytest.raises(ConfigError, match=f"one number for a batch.* this one returned {said}"):
            get_loss(name)(torch.zeros(7, requires_grad=True), torch.arange(7.0))
