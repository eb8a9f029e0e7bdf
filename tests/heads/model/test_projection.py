"""Projections against explicit logits in float64, and their refusals."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from agiqa.errors import HeadError
from agiqa.heads.data.features import FeatureSet, TokenStatistics
from agiqa.heads.model.projection import PROJECTIONS, FeatureSpec, SketchProjection, VocabularyProjection
from agiqa.heads.settings.config import HeadConfig


class ExplicitLogits(nn.Module):
    """The paper as written: logits, then Linear(V, d)."""

    def __init__(self, like: VocabularyProjection) -> None:
        super().__init__()
        self.linear = nn.Linear(like.weight.shape[1], like.weight.shape[0])
        self.linear.load_state_dict({"weight": like.weight, "bias": like.bias})
        self.constants = like.lm_head.clone(), like.shift.clone(), like.whitening.clone(), like.scale.clone()

    def forward(self, hidden):
        lm_head, shift, whitening, scale = self.constants
        logits = (hidden - shift) @ whitening.T @ lm_head.T
        return self.linear(logits) / scale


def build(store, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = HeadConfig(width=6, **settings)
    projection = PROJECTIONS.get(config.projection)(config, FeatureSpec.of(store))
    projection.standardise(FeatureSet.from_store(store, range(40)).statistics(np.arange(40)))
    return projection.double()


@pytest.mark.parametrize("standardise", [True, False])
def test_vocabulary_trains_as_explicit_logits_do(make_store, standardise):
    ours = build(make_store(40, encoding="hidden"), projection="vocabulary", standardise=standardise)
    paper = ExplicitLogits(ours).double()
    pairs = [(ours.weight, paper.linear.weight), (ours.bias, paper.linear.bias)]
    optimizers = [
        torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-12) for module in (ours, paper)
    ]
    torch.manual_seed(1)
    for _ in range(10):
        hidden = torch.randn(3, 5, 4, dtype=torch.float64)
        targets = torch.randn(3, 5, 6, dtype=torch.float64)
        outputs = [module(hidden) for module in (ours, paper)]
        torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
        for optimizer, output in zip(optimizers, outputs, strict=True):
            optimizer.zero_grad()
            (output - targets).square().mean().backward()
        for mine, theirs in pairs:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-8, atol=1e-12)
        for optimizer in optimizers:
            optimizer.step()
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


def test_vocabulary_keeps_the_language_model_head_out_of_the_checkpoint(make_store):
    projection = build(make_store(40, encoding="hidden"), projection="vocabulary")
    assert set(projection.state_dict()) == {"weight", "bias", "shift", "whitening", "scale"}
    assert not projection.lm_head.requires_grad


def test_vocabulary_keeps_a_head_of_bfloat16_values_in_bfloat16(make_store):
    store = make_store(40, encoding="hidden")
    rounded = dataclasses.replace(store, weights=torch.from_numpy(store.weights).bfloat16().float().numpy())
    kept = [PROJECTIONS.get("vocabulary")(HeadConfig(width=6), FeatureSpec.of(each)) for each in (store, rounded)]
    assert [projection.lm_head.dtype for projection in kept] == [torch.float32, torch.bfloat16]
    projection, hidden = kept[1], torch.randn(1, 3, 4)
    explicit = hidden @ torch.from_numpy(rounded.weights).T @ projection.weight.T
    torch.testing.assert_close(projection(hidden), explicit, rtol=1e-4, atol=1e-4)


def test_vocabulary_evaluates_with_the_weights_of_the_moment(make_store):
    projection = build(make_store(40, encoding="hidden"), projection="vocabulary").eval()
    hidden = torch.randn(1, 3, 4, dtype=torch.float64)
    with torch.no_grad():
        before = projection(hidden)
        assert torch.equal(before, projection(hidden))
        projection.weight.mul_(2.0)
        changed = projection(hidden)
        projection.load_state_dict({**projection.state_dict(), "weight": projection.weight / 2.0})
        restored = projection(hidden)
    assert not torch.allclose(before, changed)
    torch.testing.assert_close(before, restored)


def test_vocabulary_steps_shrink_with_the_vocabulary(make_store):
    assert build(make_store(40, encoding="hidden", vocabulary=40), projection="vocabulary").lr_scale == 4 / 40


@pytest.mark.parametrize(("name", "encoding"), [("vocabulary", "hidden"), ("sketch", "sketch")])
def test_standardised_outputs_have_unit_scale(make_store, name, encoding):
    store = make_store(40, encoding=encoding)
    for rows in store.features:
        rows[:] = rows * np.array([1e3, 1.0, 1e-2, 30.0]) + 500.0
    projection = build(store, projection=name)
    tokens = torch.from_numpy(np.concatenate(store.features)).double()[None]
    outputs = projection(tokens)[0]
    assert outputs.mean(0).abs().max() < 1e-2
    assert 0.5 < outputs.std() < 1.5


def test_whitened_tokens_weigh_alike_in_every_direction(make_store):
    store = make_store(200, encoding="hidden")
    mixing = np.array([[1.0, 0.9, 0.0, 0.2], [0.0, 0.3, 0.1, 0.0], [0.0, 0.0, 0.2, 0.1], [0.0, 0.0, 0.0, 0.05]])
    for rows in store.features:
        rows[:] = rows @ mixing + 3.0
    projection = build(store, projection="vocabulary")
    tokens = np.concatenate([store.features[item] for item in range(40)]).astype(np.float64)
    white = (tokens - projection.shift.numpy()) @ projection.whitening.numpy().T
    np.testing.assert_allclose(np.cov(white.T, bias=True), np.eye(4), atol=0.02)


def test_sketch_is_a_linear_map_of_standardised_coordinates(make_store):
    store = make_store(40)
    for rows in store.features:
        rows[:, 2] = 7.0
    projection = build(store, projection="sketch")
    assert isinstance(projection, SketchProjection)
    tokens = np.concatenate(store.features).astype(np.float64)
    std = np.maximum(tokens.std(0), 1e-4 * tokens.std(0).max())
    by_hand = (tokens - tokens.mean(0)) / std @ projection.linear.weight.detach().numpy().T
    assert projection(torch.from_numpy(tokens)[None])[0].detach().numpy() == pytest.approx(by_hand, abs=1e-4)
    assert {"mean", "std"} <= set(projection.state_dict())


def full_rank(store):
    """The sketch of all directions: coordinates c with E = Q c for the logits E, and Q."""
    q, singular, right = np.linalg.svd(store.weights.astype(np.float64), full_matrices=False)
    coordinates = [(rows.astype(np.float64) @ right.T * singular).astype(np.float32) for rows in store.features]
    return dataclasses.replace(store, features=coordinates, encoding="sketch"), torch.from_numpy(q)


@torch.no_grad()
def fold(projection, weight, bias, q):
    """Give a sketch projection W_proj and bias on logits `E = Q c`: `W_proj E = (W_proj Q) c`."""
    folded = weight @ q
    projection.linear.weight.copy_(folded * projection.std)
    projection.linear.bias.copy_(bias + folded @ projection.mean)


def test_a_sketch_of_full_rank_is_the_vocabulary_projection(make_store):
    hidden = make_store(40, encoding="hidden")
    sketched, q = full_rank(hidden)
    paper = build(hidden, projection="vocabulary", standardise=False)
    ours = build(sketched, projection="sketch")
    fold(ours, paper.weight, paper.bias, q)
    for rows, coordinates in zip(hidden.features, sketched.features, strict=True):
        expected = paper(torch.from_numpy(rows).double()[None])
        torch.testing.assert_close(ours(torch.from_numpy(coordinates).double()[None]), expected, rtol=1e-5, atol=1e-5)


def lifted(projection, q):
    """W_proj and bias on logits that are this projection of coordinates: `(W / std) Q^T`."""
    weight = projection.linear.weight / projection.std
    return weight @ q.T, projection.linear.bias - weight @ projection.mean


def test_lifting_and_folding_are_inverse_and_true_to_the_logits(make_store):
    sketched, q = full_rank(make_store(40, encoding="hidden"))
    ours = build(sketched, projection="sketch")
    weight, bias = lifted(ours, q)
    coordinates = torch.randn(3, 5, 4, dtype=torch.float64)
    explicit = nn.functional.linear(coordinates @ q.T, weight, bias)
    torch.testing.assert_close(ours(coordinates), explicit, rtol=1e-9, atol=1e-9)
    again = build(sketched, projection="sketch")
    nn.init.zeros_(again.linear.weight)
    fold(again, weight, bias, q)
    torch.testing.assert_close(again(coordinates), explicit, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "encoding"), [("hidden", "hidden"), ("logits", "logits"), ("sketch", "sketch")])
def test_channels_are_standardised_and_mapped(make_store, name, encoding):
    store = make_store(40, encoding=encoding)
    for rows in store.features:
        rows[:] = rows * np.array([1e3, 1.0, 1e-2, 30.0]) + 500.0
    projection = build(store, projection=name)
    tokens = np.concatenate(store.features).astype(np.float64)
    weight, bias = (value.detach().numpy() for value in (projection.linear.weight, projection.linear.bias))
    by_hand = (tokens - tokens.mean(0)) / np.maximum(tokens.std(0), 1e-4 * tokens.std(0).max()) @ weight.T + bias
    assert projection(torch.from_numpy(tokens)[None])[0].detach().numpy() == pytest.approx(by_hand, abs=1e-3)


def test_steps_on_raw_logits_shrink_with_the_vocabulary(make_store):
    assert build(make_store(40, encoding="logits", width=4), projection="logits").lr_scale == 1.0
    assert build(make_store(40, encoding="logits", width=8192), projection="logits").lr_scale == 0.5


@pytest.mark.parametrize(
    ("name", "encoding", "said"),
    [
        ("vocabulary", "sketch", "reads 'hidden' features, but the store holds 'sketch'.*'sketch'"),
        ("sketch", "hidden", "agiqa store sketch"),
        ("hidden", "sketch", "reads 'hidden' features, but the store holds 'sketch'"),
        ("logits", "hidden", "agiqa store convert STORE OUT --encoding logits"),
    ],
)
def test_other_encodings_are_refused_with_a_remedy(make_store, name, encoding, said):
    with pytest.raises(HeadError, match=said):
        build(make_store(40, encoding=encoding), projection=name)


def test_a_language_model_head_of_another_width_is_refused(make_store):
    with pytest.raises(HeadError, match=r"shape \(9, 5\), expected \(\*, 4\)"):
        build(make_store(40, encoding="hidden", weights=np.ones((9, 5), np.float32)), projection="vocabulary")


def test_in_mixed_precision_hidden_states_are_centred_before_they_are_rounded(make_store):
    """A mean of 1,000 deviations would leave nothing of bfloat16 hidden states that were rounded first."""
    ours = build(make_store(40, encoding="hidden"), projection="vocabulary").float()
    hidden = torch.randn(3, 5, 4)
    ours.shift.fill_(1000.0)
    expected = nn.functional.linear(hidden, ours.effective_weight(), ours.bias) / ours.scale
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ours(hidden + 1000.0)
        with_gradient = ours((hidden + 1000.0).requires_grad_())
    assert torch.equal(found, with_gradient)
    assert (found - expected).detach().norm() < 0.02 * expected.detach().norm()


def in_mixed_precision(projection):
    projection.eval()  # forgets what was kept
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        projection(torch.randn(1, 3, 4))


def standardised_anew(projection):
    tokens = np.random.default_rng(3).normal(size=(200, 4)).astype(np.float32) @ np.triu(np.ones((4, 4), np.float32))
    projection.standardise(
        TokenStatistics(
            mean=torch.from_numpy(tokens.mean(0)).double(),
            std=torch.from_numpy(tokens.std(0)).double(),
            sample=torch.from_numpy(tokens),
        )
    )


def loaded(projection):
    projection.load_state_dict({name: value + 0.25 for name, value in projection.state_dict().items()})


def replaced(projection):
    projection.whitening = 3.0 * torch.eye(4)


def stepped(projection):
    """By an optimiser whose kernel does not count its changes, and without a word of `train`."""
    with torch.enable_grad():
        projection(torch.randn(1, 3, 4)).square().sum().backward()
    torch.optim.AdamW(projection.parameters(), lr=0.1, fused=True).step()


CHANGES = {
    "a fused step": stepped,
    "autocast": in_mixed_precision,
    "standardise": standardised_anew,
    "load_state_dict": loaded,
    "shift": lambda projection: projection.shift.add_(1.0),
    "whitening": lambda projection: projection.whitening.mul_(2.0),
    "another whitening": replaced,
    "lm_head": lambda projection: projection.lm_head.mul_(2.0),
    "weight": lambda projection: setattr(projection.weight, "data", 2.0 * projection.weight),
    "dtype": lambda projection: projection.double().float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_product_kept_for_evaluation_is_never_a_stale_one(make_store, change):
    projection = build(make_store(40, encoding="hidden"), projection="vocabulary").float().eval()
    hidden = torch.randn(1, 3, 4)
    with torch.no_grad():
        projection(hidden)
        CHANGES[change](projection)
        found = projection(hidden)
        shifted = (hidden - projection.shift) @ projection.whitening.T @ projection.lm_head.float().T
        expected = (shifted @ projection.weight.T + projection.bias) / projection.scale
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_product_is_kept_while_nothing_changes(make_store):
    projection = build(make_store(40, encoding="hidden"), projection="vocabulary").eval()
    made = []
    effective_weight = projection.effective_weight
    projection.effective_weight = lambda: made.append(1) or effective_weight()
    with torch.no_grad():
        for _ in range(3):
            projection(torch.randn(1, 3, 4, dtype=torch.float64))
    assert len(made) == 1


def test_a_head_that_was_built_in_inference_mode_evaluates_with_its_weights(make_store):
    store, hidden = make_store(40, encoding="hidden"), torch.randn(1, 3, 4)
    with torch.inference_mode():
        projection = build(store, projection="vocabulary").float().eval()
        before = projection(hidden)
        projection.weight.mul_(2.0)
        torch.testing.assert_close(projection(hidden) - projection.bias, 2.0 * (before - projection.bias))
