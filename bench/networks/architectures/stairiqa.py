"""StairIQA (Sun et al., IEEE JSTSP 2023, arXiv 2105.14550): a ResNet50 whose early features climb to its last stage.

The features before each of the four stages start a staircase. Each step is a bottleneck of three convolutions without
activation (1 x 1 down to a quarter of the channels, 3 x 3, 1 x 1 up), which gives the features the size of those after
the next stage, to which they are added before the next step. The ends of all four staircases are added to the last
stage, pooled, and read by two linear layers, of 128 channels and 1.

The code is written here. Compared with the authors' code (github.com/sunwei925/StairIQA, models/stairIQA_resnet.py),
which was read for numbers: channels, kernels, strides and missing biases of all ten steps, what they are added to, and
the two linear layers of 128 and 1. The shapes make 30.49 million parameters; we found no published number. It
was not compared with the figures of the paper.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from agiqa.bench.networks.architectures.contract import Network, Pixels, Scores
from agiqa.bench.networks.architectures.encoders import resnet_stages, timm_model

WIDTHS = (64, 256, 512, 1024, 2048)
"""Channels before the first stage of a ResNet50, and after each stage."""
HIDDEN = 128


def step(inputs: int, outputs: int, *, stride: int) -> nn.Sequential:
    """One step of a staircase."""
    narrow = inputs // 4
    return nn.Sequential(
        nn.Conv2d(inputs, narrow, 1, bias=False),
        nn.Conv2d(narrow, narrow, 3, stride=stride, padding=1, bias=False),
        nn.Conv2d(narrow, outputs, 1, bias=False),
    )


class StairIQA(Network):
    """ResNet50, four staircases, and two linear layers."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.resnet: Any = timm_model("resnet50")
        self.stairs = nn.ModuleList(
            nn.ModuleList(
                step(WIDTHS[stage], WIDTHS[stage + 1], stride=1 if stage == 0 else 2) for stage in range(first, 4)
            )
            for first in range(4)
        )
        self.regressor = nn.Sequential(nn.Linear(WIDTHS[-1], HIDDEN), nn.Linear(HIDDEN, 1))

    @property
    def body(self) -> nn.Module:
        """The ResNet50."""
        body: nn.Module = self.resnet
        return body

    @property
    def new_layers(self) -> Sequence[nn.Module]:
        """The staircases and the linear layers."""
        return [self.stairs, self.regressor]

    def forward(self, pixels: Pixels) -> Scores:
        """The scores."""
        *before, last = resnet_stages(self.resnet, pixels)
        climbing: list[Tensor] = []
        for stage, features in enumerate(before):
            starts = [climbed + features for climbed in climbing] + [features]
            climbing = [self.stairs[first][stage - first](start) for first, start in enumerate(starts)]  # type: ignore[index]
        pooled = (last + sum(climbing)).mean(dim=(2, 3))
        scores: Scores = self.regressor(pooled).squeeze(-1)
        return scores
