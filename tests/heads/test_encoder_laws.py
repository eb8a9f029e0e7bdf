"""Laws for every registered encoder, and padding laws for every registered pooling and head."""

import numpy as np
import pytest
import torch
from torch import nn

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.config import HeadConfig
from agiqa.heads.encoders import (
    ENCODERS,
    BidirectionalEncoder,
    EitherWay,
    Encoder,
    Mamba2Encoder,
    XLSTMEncoder,
)
from agiqa.heads.head import build_head
from agiqa.heads.pooling import POOLINGS
from agiqa.heads.projection import FeatureSpec
from tests.heads.encoder_contract import LENGTHS, SIZES, WIDTH, EncoderContract, ragged_mask, ragged_tokens

ONE_WAY = ("none",)
"""Encoders that refuse `bidirectional`."""
VARIANTS = [(name, both) for name in ENCODERS for both in (False, True) if not (both and name in ONE_WAY)]
DIRECTIONS = {False: "causal", True: "bidirectional"}
IDS = [f"{name}-{DIRECTIONS[both]}" for name, both in VARIANTS]


class TestEveryRegisteredEncoder(EncoderContract):
    @pytest.fixture(params=VARIANTS, ids=IDS)
    def variant(self, request):
        return request.param


class RunningMean(Encoder):
    """An encoder as a user may write one: a linear map of the mean of the tokens so far."""

    def __init__(self, config):
        super().__init__(config.width // 2)
        self.linear = nn.Linear(config.width, config.width // 2)

    def forward(self, tokens, mask):
        tokens = tokens.masked_fill(~mask[..., None], 0.0)
        counts = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
        return self.linear(tokens.cumsum(1) / counts[:, None]).masked_fill(~mask[..., None], 0.0)


@pytest.fixture
def ones_own(monkeypatch):
    """The registered name of RunningMean, for the length of one test."""
    monkeypatch.setattr(ENCODERS, "_parts", dict(ENCODERS._parts))
    ENCODERS.add("running-mean", EitherWay(RunningMean))
    return "running-mean"


class TestAnEncoderOfOnesOwn(EncoderContract):
    @pytest.fixture(params=DIRECTIONS, ids=DIRECTIONS.get)
    def variant(self, request, ones_own):
        return ones_own, request.param

    @pytest.mark.parametrize("pooling", POOLINGS.names())
    def test_a_head_takes_its_width(self, make_store, encoder, bidirectional, mask, pooling):
        assert encoder.out_width == (WIDTH if bidirectional else WIDTH // 2)
        config = HeadConfig(
            projection="sketch", encoder="running-mean", pooling=pooling, bidirectional=bidirectional, **SIZES
        )
        head = build_head(config, FeatureSpec.of(make_store(3)))
        assert head(torch.randn(*mask.shape, 4), mask).shape == (len(LENGTHS), 1)


@pytest.fixture
def tokens():
    return ragged_tokens()


@pytest.fixture
def mask():
    return ragged_mask()


@pytest.mark.parametrize("name", POOLINGS.names())
def test_pooling_is_blind_to_padding(name, tokens, mask):
    pooling = POOLINGS.get(name)(HeadConfig(), WIDTH).double()
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
        assert POOLINGS.get(name)(HeadConfig(), WIDTH)(tokens, mask).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("pooling", POOLINGS.names())
@pytest.mark.parametrize(("encoder_name", "bidirectional"), VARIANTS, ids=IDS)
@pytest.mark.parametrize(("projection", "encoding"), [("vocabulary", "hidden"), ("sketch", "sketch")])
def test_a_whole_head_obeys_the_laws(make_store, mask, projection, encoding, encoder_name, bidirectional, pooling):
    torch.manual_seed(0)
    config = HeadConfig(
        projection=projection, encoder=encoder_name, bidirectional=bidirectional, pooling=pooling, **SIZES
    )
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
    # Where reading starts there is no past: what carries the past gets no gradient.
    starts = {"first", "last"} if bidirectional else {"first"}
    assert not dead or (pooling in starts and all(name.startswith("encoder.") for name in dead))


def test_unknown_parts_name_the_nearest(make_store):
    spec = FeatureSpec.of(make_store(3))
    with pytest.raises(UnknownName, match=r"No encoder is called 'xlsmt'\. Did you mean 'xlstm'"):
        build_head(HeadConfig(projection="sketch", encoder="xlsmt"), spec)
    with pytest.raises(UnknownName, match="Did you mean 'mean'"):
        build_head(HeadConfig(projection="sketch", pooling="maen"), spec)


@pytest.mark.parametrize(("part", "entry"), [(XLSTMEncoder, "xlstm"), (Mamba2Encoder, "mamba2")])
def test_one_direction_of_an_encoder_names_what_builds_both(part, entry):
    config = HeadConfig(encoder=entry, width=16, bidirectional=True)
    with pytest.raises(ConfigError, match=rf"{part.__name__} reads forwards only; `ENCODERS\.get\('{entry}'\)` builds"):
        part(config)
    assert isinstance(ENCODERS.get(entry)(config), BidirectionalEncoder)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"encoder": "xlstm", "width": 18, "num_heads": 4}, "multiple of the heads"),
        ({"encoder": "xlstm", "width": 4, "num_heads": 4}, "at least twice as many"),
        ({"encoder": "transformer", "width": 18, "num_heads": 4}, "multiple of the heads"),
        *(({"encoder": name, "bidirectional": True}, f"'{name}' has no bidirectional form") for name in ONE_WAY),
    ],
)
def test_settings_that_cannot_be_are_refused(make_store, settings, said):
    with pytest.raises(ConfigError, match=said):
        build_head(HeadConfig(projection="sketch", **settings), FeatureSpec.of(make_store(3)))
