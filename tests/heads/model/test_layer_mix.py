"""Several layers in one projection, against the sums written out in numpy."""

import numpy as np
import pytest
import torch

from agiqa.heads import HeadConfig
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.model.head import build_head
from agiqa.heads.model.projection import PROJECTIONS, FeatureSpec
from tests.heads.layered_stores import LAYERS, WIDTH, made_states, mos_of, write_store

STATES = made_states(12)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    store = write_store(tmp_path_factory.mktemp("mix") / "store.agiqa", STATES, mos_of(STATES["16"]))
    return store.layer("+".join(LAYERS))


def projection_of(source, mix):
    torch.manual_seed(0)
    config = HeadConfig(projection="hidden", width=3, layer_mix=mix)
    made = PROJECTIONS.get("hidden")(config, FeatureSpec.of(source))
    features = FeatureSet.from_store(source, np.arange(12))
    made.standardise(features.statistics(np.arange(12)))
    return made


def standardised(layer):
    """All tokens of a layer, each channel scaled over all of them, in float64."""
    rows = np.concatenate(STATES[layer]).astype(np.float64)
    return (rows - rows.mean(0)) / rows.std(0)


def test_a_softmax_mix_is_the_weighted_sum_of_standardised_layers(source):
    made = projection_of(source, "softmax")
    parameters = np.array([0.1, -0.05, 0.02])
    made.mix.data = torch.tensor(parameters, dtype=torch.float32)
    shares = np.exp(10 * parameters) / np.exp(10 * parameters).sum()
    mixed = sum(share * standardised(layer) for share, layer in zip(shares, LAYERS, strict=True))
    weight, bias = (value.detach().double().numpy() for value in (made.linear.weight, made.linear.bias))
    assert weight.shape == (3, WIDTH)
    rows = torch.from_numpy(np.concatenate([np.concatenate(STATES[layer]) for layer in LAYERS], axis=1))
    np.testing.assert_allclose(made(rows[None])[0].detach().numpy(), mixed @ weight.T + bias, rtol=0, atol=2e-5)
    assert made.layer_weights == pytest.approx(dict(zip(LAYERS, shares, strict=True)), abs=1e-6)


def test_a_mix_begins_with_equal_weights_and_learns(source):
    made = projection_of(source, "softmax")
    assert made.layer_weights == pytest.approx(dict.fromkeys(LAYERS, 1 / 3))
    rows = torch.from_numpy(np.concatenate([np.concatenate(STATES[layer]) for layer in LAYERS], axis=1))
    made(rows[None]).square().sum().backward()
    assert made.mix.grad.abs().min() > 0


def test_concatenated_layers_are_scaled_each_on_its_own(source):
    made = projection_of(source, "concat")
    assert made.layer_weights is None
    joined = np.concatenate([standardised(layer) for layer in LAYERS], axis=1)
    weight, bias = (value.detach().double().numpy() for value in (made.linear.weight, made.linear.bias))
    rows = torch.from_numpy(np.concatenate([np.concatenate(STATES[layer]) for layer in LAYERS], axis=1))
    np.testing.assert_allclose(made(rows[None])[0].detach().numpy(), joined @ weight.T + bias, rtol=0, atol=2e-5)


def test_a_channel_is_noise_beside_its_own_layer_only(source):
    """States of layer 8 are a hundred times smaller than the last ones; a floor over all channels would erase them."""
    tiny = {layer: [rows * (1e-6 if layer == "8" else 1.0) for rows in of] for layer, of in STATES.items()}
    made = projection_of(source, "concat")
    stds = [torch.from_numpy(np.concatenate(tiny[layer]).astype(np.float64)).std(0) for layer in LAYERS]
    statistics = FeatureSet.from_store(source, np.arange(12)).statistics(np.arange(12))
    made.standardise(type(statistics)(mean=statistics.mean, std=torch.cat(stds), sample=statistics.sample))
    np.testing.assert_allclose(made.std.numpy(), torch.cat(stds).numpy(), rtol=1e-6)


def test_one_layer_has_no_mix(source):
    config = HeadConfig(projection="hidden", encoder="none", width=3, layer_mix="softmax")
    head = build_head(config, FeatureSpec.of(source.store.layer("8")))
    assert "projection.mix" not in head.state_dict()
    assert head.projection.layer_weights is None


def test_a_head_pools_the_row_that_its_pooling_names():
    """Of rows that share a role, as `mean@answer` and `max@answer` do."""
    config = HeadConfig(projection="hidden", encoder="none", pooling="mean@answer", width=3)
    spec = FeatureSpec(
        encoding="hidden",
        width=WIDTH,
        lm_head_sha256="",
        basis_id=None,
        pooled=("max@answer", "mean@answer", "last"),
    )
    head = build_head(config, spec).eval()
    rows = torch.randn(2, 3, WIDTH)
    mask = torch.ones(2, 3, dtype=torch.bool)
    alone = head.regressor(head.projection(rows)[:, 1])
    torch.testing.assert_close(head(rows, mask), alone)
