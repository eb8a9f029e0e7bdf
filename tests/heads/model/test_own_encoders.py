"""Encoders of one's own that cannot be built, and values that their settings refuse."""

from typing import ClassVar

import pytest

from agiqa.errors import ConfigError
from agiqa.heads.model.encoders import ENCODERS, Encoder
from agiqa.heads.model.encoders.base import completed
from agiqa.heads.model.head import check_sizes
from agiqa.heads.settings.config import HeadConfig


class Picky(Encoder):
    """Its `share` must be below 1."""

    own_settings: ClassVar = {"share": 0.5}

    def __init__(self, config):
        super().__init__(config.width)
        if config.own_settings["share"] >= 1:
            message = "too much"
            raise ValueError(message)

    def forward(self, tokens, mask):
        return tokens.masked_fill(~mask[..., None], 0.0)


@pytest.fixture
def picky(monkeypatch):
    monkeypatch.setattr(ENCODERS, "_parts", {**ENCODERS._parts, "picky": Picky})


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), float("-inf"), 10**400])
def test_a_number_of_ones_own_is_finite(picky, value):
    with pytest.raises(ConfigError, match="of the type float and finite"):
        completed(HeadConfig(encoder="picky").model_copy(update={"own_settings": {"share": value}}))


def test_an_encoder_that_cannot_be_built_is_a_wrong_setting(picky):
    check_sizes(HeadConfig(encoder="picky", own_settings={"share": 0.9}))
    with pytest.raises(
        ConfigError, match=r"cannot be built .*ValueError: too much \(.*test_own_encoders.py, line \d+\)"
    ):
        check_sizes(HeadConfig(encoder="picky", own_settings={"share": 1.5}))
