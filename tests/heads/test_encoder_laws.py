"""Laws for every registered encoder, and padding laws for every registered pooling and head."""

from collections import Counter

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders import ENCODERS
from agiqa.heads.head import build_head
from agiqa.heads.pooling import POOLINGS
from agiqa.heads.projection import FeatureSpec

LENGTHS = (9, 6, 4)
SIZES = {"width": 16, "num_heads": 2, "blocks": 3, "layers": 2}
VARIANTS = [(name, {}) for name in ENCODERS] + [("gru", {"bidirectional": True})]


@pytest.fixture(params=VARIANTS, ids=str)
def encoder(request):
    name, more = request.param
    torch.manual_seed(0)
    return ENCODERS.get(name)(HeadConfig(encoder=name, **SIZES, **more)).double()


@pytest.fixture
def tokens():
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), max(LENGTHS), 16, dtype=torch.float64)


@pytest.fixture
def mask():
    return torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def test_every_parameter_gets_a_gradient(encoder, tokens, mask):
    (encoder(tokens.requires_grad_(), mask) * torch.randn_like(tokens)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_no_layer_is_used_twice(encoder, tokens, mask):
    calls = Counter()
    for name, module in encoder.named_modules(remove_duplicate=True):
        if not list(module.children()):
            module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    encoder(tokens, mask)
    assert all(count == 1 for count in calls.values()), calls


def test_the_last_token_feels_the_first(encoder, tokens, mask):
    if not encoder.mixes_tokens:
        pytest.skip("this encoder looks at one token at a time, by design")
    tokens.requires_grad_()
    (encoder(tokens, mask)[0, -1] * torch.randn(16)).sum().backward()
    assert tokens.grad[0, 0].abs().max() > 1e-12


def test_an_item_does_not_feel_its_batch(encoder, tokens, mask):
    together = encoder(tokens, mask)
    for row, length in enumerate(LENGTHS):
        alone = encoder(tokens[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [1e3, float("nan")])
def test_padding_is_invisible_and_its_outputs_are_zero(encoder, tokens, mask, value):
    clean = encoder(tokens, mask)
    dirty = encoder(tokens.masked_fill(~mask[..., None], value), mask)
    torch.testing.assert_close(clean, dirty, rtol=1e-12, atol=1e-12)
    assert (dirty[~mask] == 0).all()


@pytest.mark.parametrize("name", POOLINGS.names())
def test_pooling_is_blind_to_padding(name, tokens, mask):
    pooling = POOLINGS.get(name)(HeadConfig(width=16)).double()
    clean = pooling(tokens, mask)
    torch.testing.assert_close(pooling(tokens.masked_fill(~mask[..., None], float("nan")), mask), clean)
    for row, length in enumerate(LENGTHS):
        alone = pooling(tokens[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], clean[row])


def test_poolings_by_hand(tokens, mask):
    by_hand = {
        "mean": np.stack([row[:length].mean(0) for row, length in zip(tokens.numpy(), LENGTHS, strict=True)]),
        "last": np.stack([row[length - 1] for row, length in zip(tokens.numpy(), LENGTHS, strict=True)]),
    }
    for name, expected in by_hand.items():
        assert POOLINGS.get(name)(HeadConfig())(tokens, mask).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("pooling", POOLINGS.names())
@pytest.mark.parametrize("encoder_name", ENCODERS.names())
@pytest.mark.parametrize(("projection", "encoding"), [("vocabulary", "hidden"), ("sketch", "sketch")])
def test_a_whole_head_obeys_the_laws(make_store, mask, projection, encoding, encoder_name, pooling):
    torch.manual_seed(0)
    config = HeadConfig(projection=projection, encoder=encoder_name, pooling=pooling, **SIZES)
    head = build_head(config, FeatureSpec.of(make_store(3, encoding=encoding))).double()
    features = torch.randn(len(LENGTHS), max(LENGTHS), 4, dtype=torch.float64)
    clean = head(features, mask)
    dirty = head(features.masked_fill(~mask[..., None], 1e3), mask)
    torch.testing.assert_close(clean, dirty)
    for row, length in enumerate(LENGTHS):
        alone = head(features[row : row + 1, :length], mask[row : row + 1, :length])
        torch.testing.assert_close(alone[0], clean[row])
    (clean * torch.randn_like(clean)).sum().backward()
    dead = [name for name, parameter in head.named_parameters() if not parameter.grad.abs().max() > 0]
    # The first token of an encoder that reads forwards has no past: what carries the past gets no gradient.
    assert not dead or (pooling == "first" and all(name.startswith("encoder.") for name in dead))


def test_unknown_parts_name_the_nearest(make_store):
    spec = FeatureSpec.of(make_store(3))
    with pytest.raises(UnknownName, match=r"No encoder is called 'xlsmt'\. Did you mean 'xlstm'"):
        build_head(HeadConfig(projection="sketch", encoder="xlsmt"), spec)
    with pytest.raises(UnknownName, match="Did you mean 'mean'"):
        build_head(HeadConfig(projection="sketch", pooling="maen"), spec)


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "xlstm", "width": 18, "num_heads": 4},
        {"encoder": "xlstm", "width": 4, "num_heads": 4},
        {"encoder": "gru", "width": 5, "bidirectional": True},
    ],
)
def test_sizes_that_cannot_be_are_refused(make_store, settings):
    with pytest.raises(ConfigError, match=r"width|even"):
        build_head(HeadConfig(projection="sketch", **settings), FeatureSpec.of(make_store(3)))
