"""HyperIQA (Su et al., CVPR 2020): a hyper network writes, for each image, the weights of the network that scores it.

A ResNet50; local distortion aware modules on its first three stages; three 1 x 1 convolutions down to 112 channels;
from these, one branch for the weights and one for the biases of each layer of the target network, whose fully connected
layers have 224, 112, 56, 28, 14 and 1 channels.

The code is written here. Compared with the authors' code (github.com/SSL92/hyperIQA, models.py), which was read for
numbers: the widths 16, 112, 224, 112, 56, 28 and 14, kernels, biases and tiles of every layer, where sigmoids are, and
which layers begin with He's normal values. The shapes make 27.38 million parameters for patches of 224 pixels, which
others measured on the authors' code too (github.com/cny123222/Perceptual-IQA-CS3324). It was not compared with the
figures of the paper.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from agiqa.bench.networks.architectures.contract import Network, Pixels, Scores
from agiqa.bench.networks.architectures.encoders import resnet_stages, timm_model

TARGET = (224, 112, 56, 28, 14, 1)
"""Channels of the target network."""
LOCAL = 16
"""Channels of each local distortion aware module."""
_NARROW, _TILES = (16, 32, 64), (8, 4, 2)
"""Channels of the 1 x 1 convolution of each of them, and rows of tiles: tiles of 7 x 7 for patches of 224 pixels."""
HYPER = 112
"""Channels that the hyper network reads."""
_STAGES = (256, 512, 1024, 2048)
"""Channels of the stages of a ResNet50."""
_GRID = 7
"""Rows and columns of the features of the last stage for patches of 224 pixels."""
Features = Float[Tensor, "batch channel height width"]
Vectors = Float[Tensor, "batch channel"]


class LocalDistortions(nn.Module):
    """The local distortion aware module of one stage: a 1 x 1 convolution, means over tiles, and a linear layer."""

    def __init__(self, channels: int, narrow: int, tiles: int, out: int) -> None:
        """`tiles` are the rows and columns of tiles; `narrow` is the width of the convolution, 0 for none."""
        super().__init__()
        self.narrow = nn.Conv2d(channels, narrow, 1, bias=False) if narrow else nn.Identity()
        self.tiles = nn.AdaptiveAvgPool2d(tiles)
        self.linear = nn.Linear((narrow or channels) * tiles * tiles, out)

    def forward(self, features: Features) -> Vectors:
        """A vector of every image."""
        found: Tensor = self.linear(self.tiles(self.narrow(features)).flatten(1))
        return found


class TargetLayer(nn.Module):
    """The branches that write the weights and biases of one layer of the target network."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """The last layers are too small for a convolution: a linear layer on the mean features writes them."""
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        weights, rest = divmod(inputs * outputs, _GRID * _GRID)
        self.by_convolution = rest == 0
        self.weights: nn.Module = (
            nn.Conv2d(HYPER, weights, 3, padding=1) if self.by_convolution else nn.Linear(HYPER, inputs * outputs)
        )
        self.biases = nn.Linear(HYPER, outputs)

    def forward(self, vectors: Vectors, features: Features, means: Vectors) -> Vectors:
        """Apply the layer that these features write, a different one for every image, to its vector."""
        weights: Tensor = self.weights(features if self.by_convolution else means)
        matrices = weights.reshape(len(vectors), self.outputs, self.inputs)
        return torch.baddbmm(self.biases(means)[..., None], matrices, vectors[..., None]).squeeze(-1)


class HyperIQA(Network):
    """ResNet50, local distortion aware modules, hyper network and target network."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        self.resnet: Any = timm_model("resnet50")
        self.local = nn.ModuleList(
            LocalDistortions(channels, narrow, tiles, LOCAL)
            for channels, narrow, tiles in zip(_STAGES[:3], _NARROW, _TILES, strict=True)
        )
        self.whole = LocalDistortions(_STAGES[3], 0, 1, TARGET[0] - 3 * LOCAL)
        self.hyper = nn.Sequential(
            *(nn.Conv2d(_STAGES[3], 1024, 1), nn.ReLU(), nn.Conv2d(1024, 512, 1), nn.ReLU()),
            *(nn.Conv2d(512, HYPER, 1), nn.ReLU()),
        )
        self.target = nn.ModuleList(TargetLayer(a, b) for a, b in pairwise(TARGET))
        for module in (*self.local.modules(), *self.whole.modules(), *self.target.modules()):
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @property
    def body(self) -> nn.Module:
        """The ResNet50."""
        body: nn.Module = self.resnet
        return body

    @property
    def new_layers(self) -> Sequence[nn.Module]:
        """All but the ResNet50."""
        return [self.local, self.whole, self.hyper, self.target]

    def forward(self, pixels: Pixels) -> Scores:
        """The scores. Patches of other sizes than 224 pixels are pooled to the same 7 x 7 features."""
        _, *stages = resnet_stages(self.resnet, pixels)
        vectors = [module(stage) for module, stage in zip(self.local, stages[:3], strict=True)]
        values = torch.cat([*vectors, self.whole(stages[3])], dim=1)
        written: Tensor = functional.adaptive_avg_pool2d(self.hyper(stages[3]), _GRID)
        means = written.mean(dim=(2, 3))
        for number, layer in enumerate(self.target):
            values = layer(values, written, means)
            if number < len(self.target) - 1:
                values = torch.sigmoid(values)
        return values.squeeze(-1)
