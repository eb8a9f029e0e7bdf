"""An encoder of your own: each token becomes the mean of the tokens so far, between two linear maps."""

import torch
from torch import nn

from agiqa import ENCODERS, EitherWay, Encoder


class RunningMean(Encoder):
    """The mean of the tokens so far, in `hidden` channels."""

    settings = frozenset()  # none of agiqa's settings changes it, besides the width
    own_settings = {"hidden": 64}  # with their defaults; --set hidden=32

    def __init__(self, config):
        super().__init__(out_width=config.width)
        self.first = nn.Linear(config.width, config.own_settings["hidden"])
        self.last = nn.Linear(config.own_settings["hidden"], config.width)

    def forward(self, tokens, mask):  # (batch, token, width), and True on real tokens; padding comes last
        tokens = self.first(tokens.masked_fill(~mask[..., None], 0.0))
        means = tokens.cumsum(1) / torch.arange(1, mask.shape[1] + 1, device=mask.device)[:, None]
        return self.last(nn.functional.gelu(means)).masked_fill(~mask[..., None], 0.0)


ENCODERS.add("running-mean", EitherWay(RunningMean))  # EitherWay: --bidirectional adds a copy that reads backwards
