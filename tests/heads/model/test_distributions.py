"""Losses and readouts of heads that predict a distribution, against scipy and float64 formulas written out."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional

from agiqa.errors import ConfigError
from agiqa.heads import HeadConfig
from agiqa.heads.data.soft_labels import gaussian_levels
from agiqa.heads.model.head import Regressor
from agiqa.heads.model.losses import get_loss
from agiqa.heads.model.readouts import GradedResponse, SoftmaxLevels

LEVELS = np.linspace(0.0, 5.0, 5)


def begun(readout, *, shares=(0.1, 0.2, 0.4, 0.2, 0.1), grouping=0.0):
    """A readout of one label on the levels of 0 to 5."""
    with torch.no_grad():
        readout.double().begin(
            torch.from_numpy(LEVELS[None]), torch.tensor([grouping]).double(), torch.tensor([shares]).double()
        )
    return readout


def graded(theta: float, scale: float, thresholds) -> np.ndarray:
    """Samejima's probabilities of the five levels."""
    reached = [1.0, *(1 / (1 + math.exp(-scale * (theta - b))) for b in thresholds), 0.0]
    return -np.diff(reached)


def test_kl_is_torchs_divergence_of_explicit_gaussians():
    """In the middle of a wide scale the soft label is the plain discretised Gaussian, which scipy integrates."""
    levels, mos, std = np.linspace(-10.0, 10.0, 5), 0.0, 4.0
    raw = np.diff(stats.norm.cdf(np.array([-12.5, -7.5, -2.5, 2.5, 7.5, 12.5]), mos, std))
    shares = torch.from_numpy(gaussian_levels(np.array([mos]), np.array([std]), levels))
    logits = torch.tensor([[0.3, -1.0, 0.7, 0.2, -0.4]]).double()
    expected = functional.kl_div(
        functional.log_softmax(logits, dim=1), torch.from_numpy(raw / raw.sum())[None], reduction="batchmean"
    )
    none = torch.zeros(1).double()
    found = get_loss("kl")(none, none, distribution=functional.log_softmax(logits, dim=1), shares=shares)
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)
    by_hand = (raw / raw.sum()) @ (np.log(raw / raw.sum()) - functional.log_softmax(logits, 1).numpy()[0])
    assert found.item() == pytest.approx(by_hand, abs=1e-12)


@pytest.mark.parametrize(("theta", "log_scale"), [(0.0, 0.0), (1.3, 0.7), (-2.0, -1.0), (6.0, 1.5)])
def test_graded_response_probabilities(theta, log_scale):
    readout = begun(GradedResponse(1))
    thresholds = readout.thresholds[0].detach().numpy()
    assert (np.diff(thresholds) > 0).all()
    found = readout.log_probabilities(torch.tensor([[[theta, log_scale]]], dtype=torch.float64)).exp()[0, 0]
    assert found.detach().numpy() == pytest.approx(graded(theta, math.exp(log_scale), thresholds), abs=1e-12)


def test_thresholds_stay_ordered_whatever_the_optimiser_does():
    readout = GradedResponse(2)
    with torch.no_grad():
        readout.gaps.copy_(torch.tensor([[-90.0, 3.0, -50.0], [0.0, -200.0, 40.0]]))
    assert (readout.thresholds.diff(dim=1) > 0).all()


@pytest.mark.parametrize("kind", [SoftmaxLevels, GradedResponse])
def test_outputs_of_zero_mean_the_shares_of_the_training_ratings(kind):
    shares = (0.05, 0.15, 0.3, 0.4, 0.1)
    readout = begun(kind(1), shares=shares)
    outputs = torch.zeros(1, 1, 5 if kind is SoftmaxLevels else 2).double()
    assert readout.log_probabilities(outputs).exp()[0, 0].tolist() == pytest.approx(shares, abs=1e-6)
    mos, spread = readout.moments(outputs)
    mean = np.dot(shares, LEVELS)
    assert mos.item() == pytest.approx(mean, rel=1e-6)
    assert spread.item() == pytest.approx(math.sqrt(np.dot(shares, np.square(LEVELS - mean))), rel=1e-6)


@pytest.mark.parametrize("kind", [SoftmaxLevels, GradedResponse])
@pytest.mark.parametrize("size", [3.0, 60.0, 1e4])
def test_extreme_outputs_have_finite_logs_and_gradients(kind, size):
    readout = begun(kind(1), shares=(1.0, 0.0, 0.0, 0.0, 0.0)).float()
    for sign in (size, -size):
        outputs = torch.full((1, 1, 5 if kind is SoftmaxLevels else 2), sign, requires_grad=True)
        found = readout.log_probabilities(outputs)
        loss = functional.kl_div(found, torch.full_like(found, 0.2), reduction="batchmean")
        (slope,) = torch.autograd.grad(loss, outputs)
        assert loss.isfinite()
        assert slope.isfinite().all()


def test_the_likelihood_is_that_of_scipy():
    random = np.random.default_rng(0)
    mean, log_variance, labels = random.normal(size=(3, 9))
    expected = -stats.norm.logpdf(labels, mean, np.exp(log_variance / 2)).mean() - 0.5 * math.log(2 * math.pi)
    pair = torch.from_numpy(np.stack([mean, log_variance], axis=1))
    found = get_loss("nll")(pair[:, 0], torch.from_numpy(labels), distribution=pair)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_in_a_sum_other_losses_read_the_mean():
    random = np.random.default_rng(1)
    predicted, labels = (torch.from_numpy(random.normal(size=6)) for _ in range(2))
    logs = torch.from_numpy(np.log(random.dirichlet(np.ones(5), size=6)))
    shares = torch.from_numpy(random.dirichlet(np.ones(5), size=6))
    both = {"distribution": logs, "shares": shares}
    parts = [get_loss(name)(predicted, labels, **both).item() for name in ("kl", "plcc")]
    found = get_loss("kl+0.5*plcc")(predicted, labels, **both).item()
    assert found == pytest.approx(parts[0] + 0.5 * parts[1], abs=1e-12)
    assert get_loss("kl+0.5*plcc").smallest_batch == 2


@pytest.mark.parametrize("name", ["kl+ordinal", "mse+kl+0.1*nll"])
def test_losses_of_different_heads_cannot_be_summed(name):
    with pytest.raises(ConfigError, match=r"sums (kl and ordinal|kl and nll), whose heads have different outputs"):
        get_loss(name)


def test_a_distribution_loss_without_a_distribution_is_an_error():
    with pytest.raises(ConfigError, match="needs the predicted distribution"):
        get_loss("kl")(torch.zeros(2), torch.zeros(2))


@pytest.mark.parametrize("readout", ["value", "levels", "graded", "gaussian"])
def test_rescaling_maps_mos_and_spread(readout):
    torch.manual_seed(0)
    regressor = Regressor(HeadConfig(regressor_hidden=3), 4, labels=2, readout=readout).double()
    pooled = torch.randn(6, 4).double()
    outputs = regressor.outputs(pooled)
    mos, spread = regressor.moments(outputs)
    assert torch.equal(regressor(pooled), mos)
    regressor.rescale([(20.0, 1.0), (0.5, -3.0)])
    mapped, wider = regressor.moments(outputs)
    slopes, offsets = torch.tensor([20.0, 0.5]).double(), torch.tensor([1.0, -3.0]).double()
    torch.testing.assert_close(mapped, mos * slopes + offsets)
    if spread is not None:
        torch.testing.assert_close(wider, spread * slopes)
    assert (spread is None) == (readout == "value")
