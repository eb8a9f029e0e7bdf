"""Laws for every registered encoder, and padding laws for every registered pooling and head."""

import numpy as np
import pytest
import torch
from torch import nn

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.model.encoders import (
    ENCODERS,
    BidirectionalEncoder,
    EitherWay,
    Encoder,
    Mamba2Encoder,
    XLSTMEncoder,
)
from agiqa.heads.model.head import build_head, check_sizes
from agiqa.heads.model.laws import (
    ENCODER_LAWS,
    LENGTHS,
    SIZES,
    WIDTH,
    EncoderCase,
    check_encoder,
    check_pooling,
    ragged_mask,
    ragged_tokens,
)
from agiqa.heads.model.pooling import POOLINGS
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.training.training import train_head
from tests.heads.conftest import MemoryStore

ONE_WAY = ("none",)
"""Encoders that refuse `bidirectional`."""
VARIANTS = [(name, both) for name in ENCODERS for both in (False, True) if not (both and name in ONE_WAY)]
DIRECTIONS = {False: "causal", True: "bidirectional"}
ENCODINGS = {"vocabulary": "hidden", "hidden": "hidden", "sketch": "sketch", "logits": "logits"}
"""What each projection reads."""
IDS = [f"{name}-{DIRECTIONS[both]}" for name, both in VARIANTS]
HEADS = [
    (projection, name, both, pooling)
    for projection in ENCODINGS
    for name, both in VARIANTS
    for pooling in POOLINGS.names()
    if (projection == "sketch") + (name == "none") + (pooling == "mean") >= 1
]
"""Every two of the parts of a head meet: the third is then the sketch's projection, no encoder, or the mean."""


@pytest.mark.parametrize("law", ENCODER_LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("name", "bidirectional"), VARIANTS, ids=IDS)
def test_every_registered_encoder_obeys_the_laws(name, bidirectional, law):
    assert law(EncoderCase.make(name, bidirectional=bidirectional)) is None


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


def test_an_encoder_of_ones_own_obeys_the_laws(ones_own):
    check_encoder(ones_own)


@pytest.mark.parametrize("bidirectional", DIRECTIONS, ids=DIRECTIONS.get)
@pytest.mark.parametrize("pooling", POOLINGS.names())
def test_a_head_takes_the_width_of_ones_own_encoder(make_store, ones_own, bidirectional, mask, pooling):
    config = HeadConfig(projection="sketch", encoder=ones_own, pooling=pooling, bidirectional=bidirectional, **SIZES)
    head = build_head(config, FeatureSpec.of(make_store(3)))
    assert head.encoder.out_width == (WIDTH if bidirectional else WIDTH // 2)
    assert head(torch.randn(*mask.shape, 4), mask).shape == (len(LENGTHS), 1)


@pytest.fixture
def tokens():
    return ragged_tokens()


@pytest.fixture
def mask():
    return ragged_mask()


NOT_FINITE = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("name", POOLINGS.names())
def test_every_registered_pooling_obeys_the_laws(name):
    check_pooling(name)


def test_poolings_by_hand(tokens, mask):
    by_hand = {
        "mean": np.stack([row[:length].mean(0) for row, length in zip(tokens.numpy(), LENGTHS, strict=True)]),
        "last": np.stack([row[length - 1] for row, length in zip(tokens.numpy(), LENGTHS, strict=True)]),
    }
    for name, expected in by_hand.items():
        assert POOLINGS.get(name)(HeadConfig(), WIDTH)(tokens, mask).numpy() == pytest.approx(expected)


def gradients_of(outputs, parameters):
    """Those of the sum of the squares; zeros where a parameter has no say."""
    found = torch.autograd.grad(outputs.square().sum(), parameters, allow_unused=True)
    return [torch.zeros(()) if one is None else one for one in found]


@pytest.mark.parametrize(("projection", "encoder_name", "bidirectional", "pooling"), HEADS)
def test_a_whole_head_obeys_the_laws(make_store, mask, projection, encoder_name, bidirectional, pooling):
    torch.manual_seed(0)
    config = HeadConfig(
        projection=projection, encoder=encoder_name, bidirectional=bidirectional, pooling=pooling, **SIZES
    )
    head = build_head(config, FeatureSpec.of(make_store(3, encoding=ENCODINGS[projection]))).double()
    features = torch.randn(len(LENGTHS), max(LENGTHS), 4, dtype=torch.float64)
    clean = head(features, mask)
    dirty = head(features.masked_fill(~mask[..., None], 1e3), mask)
    torch.testing.assert_close(clean, dirty)
    parameters = list(head.parameters())
    zeros = features.masked_fill(~mask[..., None], 0.0)
    wanted = gradients_of(head(zeros, mask), parameters)
    for value in NOT_FINITE:
        spoilt = head(features.masked_fill(~mask[..., None], value), mask)
        torch.testing.assert_close(spoilt, clean)
        torch.testing.assert_close(gradients_of(spoilt, parameters), wanted)
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
        ({"encoder": "xlstm", "width": 6, "num_heads": 3}, "its mLSTMs have 64 channels"),
        ({"encoder": "transformer", "width": 18, "num_heads": 4}, "multiple of the heads"),
        *(({"encoder": name, "bidirectional": True}, f"'{name}' has no bidirectional form") for name in ONE_WAY),
    ],
)
def test_settings_that_cannot_be_are_refused(make_store, settings, said):
    with pytest.raises(ConfigError, match=said):
        build_head(HeadConfig(projection="sketch", **settings), FeatureSpec.of(make_store(3)))


IMPOSSIBLE = {"encoder": "transformer", "width": 18, "num_heads": 4}


class NeverRead(MemoryStore):
    """A store that fails the test if its features are decoded."""

    def read(self, items):
        message = f"{len(items)} items were decoded"
        raise AssertionError(message)


@pytest.mark.parametrize("settings", [IMPOSSIBLE, {**IMPOSSIBLE, "encoder": "xlstm"}])
def test_impossible_sizes_are_refused_before_anything_is_decoded(make_store, tmp_path, settings):
    store = NeverRead(**vars(make_store(20)))
    head, train = HeadConfig(projection="sketch", **settings), TrainConfig(split="grouped", epochs=1, device="cpu")
    before = torch.get_rng_state()
    with pytest.raises(ConfigError, match="width 18 cannot have 4 heads"):
        train_head(store, tmp_path / "run", head=head, train=train)
    assert not list(tmp_path.iterdir())
    check_sizes(HeadConfig())
    assert torch.equal(torch.get_rng_state(), before)


class ReadsItsWeights(Encoder):
    """Builds from values, which a device without memory has not; as torch's attention it asserts that heads fit."""

    def __init__(self, config):
        super().__init__(config.width)
        self.attention = nn.MultiheadAttention(config.width, config.num_heads)
        self.scale = float(self.attention.in_proj_weight.abs().max())

    def forward(self, tokens, mask):
        return self.scale * tokens.masked_fill(~mask[..., None], 0.0)


def test_sizes_of_ones_own_encoder_are_tried_with_values_where_it_needs_them(monkeypatch):
    monkeypatch.setattr(ENCODERS, "_parts", {**ENCODERS._parts, "own": ReadsItsWeights})
    check_sizes(HeadConfig(encoder="own", width=8, num_heads=2))
    with pytest.raises(ConfigError, match="embed_dim must be divisible by num_heads"):
        check_sizes(HeadConfig(encoder="own", width=9, num_heads=2))


@pytest.mark.parametrize(("registry", "field"), [(ENCODERS, "encoder"), (POOLINGS, "pooling")])
def test_a_part_of_another_class_is_refused_with_what_to_derive_it_from(monkeypatch, registry, field):
    monkeypatch.setattr(registry, "_parts", {**registry._parts, "mine": lambda *_: nn.Identity()})
    base = field.capitalize().replace("Pooling", "pooling.Pooling").replace("Encoder", "encoders.base.Encoder")
    with pytest.raises(ConfigError, match=f"The {field} 'mine' builds .* Identity, .* from agiqa.heads.model.{base}"):
        check_sizes(HeadConfig(**{field: "mine"}))
