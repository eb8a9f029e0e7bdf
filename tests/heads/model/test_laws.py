"""Every law finds an encoder, or a pooling, that breaks it, and says what to do."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from agiqa.errors import BrokenLaw, ConfigError, UnknownName
from agiqa.heads.model.encoders import ENCODERS, EitherWay, Encoder
from agiqa.heads.model.encoders.base import completed
from agiqa.heads.model.head import check_parts
from agiqa.heads.model.laws import EncoderCase, check_encoder, check_pooling
from agiqa.heads.model.pooling import POOLINGS, Pooling
from agiqa.heads.settings.config import HeadConfig


def masked(values, mask):
    return values.masked_fill(~mask[..., None], 0.0)


class Sound(Encoder):
    """A linear map of the sum of the tokens so far."""

    def __init__(self, config):
        super().__init__(config.width)
        self.linear = nn.Linear(config.width, config.width)

    def forward(self, tokens, mask):
        return masked(self.linear(masked(tokens, mask).cumsum(1)), mask)


class Wider(Sound):
    def __init__(self, config):
        super().__init__(config)
        self.out_width += 1


class Idle(Sound):
    def __init__(self, config):
        super().__init__(config)
        self.idle = nn.Parameter(torch.ones(3))


class Twice(Sound):
    def forward(self, tokens, mask):
        return super().forward(self.linear(masked(tokens, mask)), mask)


class Pointwise(Sound):
    def forward(self, tokens, mask):
        return masked(self.linear(masked(tokens, mask)), mask)


class OfTheBatch(Sound):
    def forward(self, tokens, mask):
        tokens = masked(tokens, mask)
        return super().forward(tokens - tokens.mean(0, keepdim=True), mask)


class SeesPadding(Sound):
    def forward(self, tokens, mask):
        return masked(super().forward(tokens, mask) + tokens.mean(1, keepdim=True).cumsum(1), mask)


class FillsPadding(Sound):
    def forward(self, tokens, mask):
        return self.linear(masked(tokens, mask).cumsum(1))


class Everywhere(Sound):
    def forward(self, tokens, mask):
        tokens = masked(tokens, mask)
        return masked(self.linear(tokens.sum(1, keepdim=True).expand_as(tokens) + tokens), mask)


class OtherInAutocast(Sound):
    def forward(self, tokens, mask):
        encoded = super().forward(tokens, mask)
        return 2.0 * encoded if torch.is_autocast_enabled("cpu") else encoded


BROKEN = {
    Wider: "shape (4, 9, 16), expected (4, 9, 17)",
    Idle: "parameter idle gets no gradient",
    Twice: "layer linear is called 2 times",
    Pointwise: "the last token does not depend on the first",
    OfTheBatch: "other outputs in a batch than alone",
    SeesPadding: "in the padding changes its outputs",
    FillsPadding: "outputs at padding are not zero",
    OtherInAutocast: "outputs under autocast to bfloat16 are far",
    Everywhere: "the first token depends on the last, without `bidirectional`",
}


@pytest.fixture
def own(monkeypatch):
    monkeypatch.setattr(ENCODERS, "_parts", dict(ENCODERS._parts))
    monkeypatch.setattr(POOLINGS, "_parts", dict(POOLINGS._parts))


def test_a_sound_encoder_passes(own):
    ENCODERS.add("sound", EitherWay(Sound))
    check_encoder("sound")


@pytest.mark.parametrize(("encoder", "said"), BROKEN.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_law_is_named(own, encoder, said):
    ENCODERS.add("broken", EitherWay(encoder))
    with pytest.raises(BrokenLaw) as caught:
        check_encoder("broken")
    assert said in str(caught.value)
    assert "The encoder 'broken' (causal)" in str(caught.value)


def test_a_causal_encoder_that_ignores_bidirectional_hears_of_either_way(own):
    ENCODERS.add("broken", Sound)
    with pytest.raises(BrokenLaw, match=r"'broken' \(bidirectional\): the first token does not depend .* EitherWay"):
        check_encoder("broken")


def test_a_direction_that_is_refused_is_not_checked(own):
    def refusing(way):
        def make(config):
            if config.bidirectional in way:
                message = f"not {way}"
                raise ConfigError(message)
            return (Everywhere if config.bidirectional else Sound)(config)

        return make

    for way in ([True], [False]):
        ENCODERS._parts.pop("one-way", None)
        ENCODERS.add("one-way", refusing(way))
        check_encoder("one-way")
    ENCODERS._parts.pop("one-way")
    ENCODERS.add("one-way", refusing([True, False]))
    with pytest.raises(ConfigError, match="not"):
        check_encoder("one-way")


def test_settings_of_its_own_reach_the_encoder_under_test(own):
    class Scaled(Sound):
        own_settings: ClassVar = {"factor": 1.0}

        def __init__(self, config):
            super().__init__(config)
            self.factor = config.own_settings["factor"]

        def forward(self, tokens, mask):
            return super().forward(tokens, mask) * self.factor

    ENCODERS.add("scaled", EitherWay(Scaled))
    check_encoder("scaled")
    assert EncoderCase.make("scaled", bidirectional=False, own_settings={"factor": "2"}).encoder.factor == 2.0
    with pytest.raises(BrokenLaw, match="gets no gradient"):
        check_encoder("scaled", own_settings={"factor": 0})


def test_poolings_that_read_padding_or_keep_tokens_are_named(own):
    class Sum(Pooling):
        def forward(self, tokens, mask):
            return tokens.sum(1)

    class Keeps(Pooling):
        def forward(self, tokens, mask):
            return masked(tokens, mask)

    POOLINGS.add("sum", Sum)
    POOLINGS.add("keeps", Keeps)
    with pytest.raises(BrokenLaw, match="in the padding changes its outputs"):
        check_pooling("sum")
    with pytest.raises(BrokenLaw, match=r"'keeps': its outputs have the shape \(4, 9, 16\), expected \(4, 16\)"):
        check_pooling("keeps")


def test_names_that_are_not_registered_are_refused():
    with pytest.raises(UnknownName, match=r"'xlsmt'\. Did you mean 'xlstm'"):
        check_encoder("xlsmt")
    with pytest.raises(UnknownName, match="--import MODULE"):
        check_pooling("sums")


def test_values_of_own_settings_have_the_type_of_the_default(own):
    class Typed(Sound):
        own_settings: ClassVar = {"size": 3, "share": 0.5, "causal": True, "kind": "a"}

    ENCODERS.add("typed", EitherWay(Typed))

    def read(**given):
        return completed(HeadConfig(encoder="typed", own_settings=given)).own_settings

    assert read() == Typed.own_settings
    given = read(size="5", share="1e-3", causal="false", kind="b")
    assert given == {"size": 5, "share": 0.001, "causal": False, "kind": "b"}
    assert type(read(share=1)["share"]) is float
    for wrong in ({"size": "5.5"}, {"size": True}, {"causal": 1}, {"kind": 3}, {"share": "x"}):
        (name,) = wrong
        with pytest.raises(ConfigError, match=f"'typed': {name} is .*; it must be of the type"):
            read(**wrong)
    with pytest.raises(ConfigError, match=r"No setting of its own is called 'sise'\. Did you mean 'size'"):
        read(sise=3)
    with pytest.raises(ConfigError, match=r"'lstm': No setting of its own is called 'size'.*Known: none"):
        check_parts(HeadConfig(encoder="lstm", own_settings={"size": 3}))
