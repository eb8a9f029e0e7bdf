"""DBCNN (Zhang et al., IEEE TCSVT 2020, arXiv 1907.02665): two networks whose features are pooled bilinearly.

S-CNN, nine convolutions of 3 x 3 that were trained to tell synthetic distortions apart, and VGG16 up to its last
convolution. The products of all pairs of their channels (128 x 512), averaged over the image, go through a signed
square root and are divided by their length; one linear layer reads them.

The code is written here. Compared with the authors' code (github.com/zwx8981/DBCNN-PyTorch, SCNN.py and DBCNN.py),
which was read for numbers: channels, strides and normalisation of S-CNN, the last layer of VGG16, the pooling with its
1e-8, and the initial values of the linear layer. The shapes make 15.31 million parameters without the classifier of
S-CNN, or 58.4 MiB; an ONNX file that others made of it has 59 MB (huggingface.co/86Cao/IQA-ONNX-Models). It was not
compared with the figures of the paper.

S-CNN's published weights come as a file (`pretrained_scnn` of the same repository); without them it starts with random
weights, and VGG16 with those of ImageNet.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from agiqa.bench.networks.architectures.contract import Network, Pixels, Scores
from agiqa.bench.networks.architectures.encoders import timm_model

S_CNN = ((48, 1), (48, 2), (64, 1), (64, 2), (64, 1), (64, 2), (128, 1), (128, 1), (128, 2))
"""Channels and stride of each convolution of S-CNN."""
VGG_CHANNELS = 512
_LEAST = 1e-8
"""Added below the square root, whose slope at 0 is infinite."""
Features = Float[Tensor, "batch channel height width"]


def distortion_network() -> nn.Sequential:
    """S-CNN without its classifier: convolution, batch normalisation and ReLU, nine times."""
    layers: list[nn.Module] = []
    inputs = 3
    for channels, stride in S_CNN:
        layers += [nn.Conv2d(inputs, channels, 3, stride=stride, padding=1), nn.BatchNorm2d(channels), nn.ReLU()]
        inputs = channels
    return nn.Sequential(*layers)


def bilinear(features: Features, others: Features) -> Float[Tensor, "batch product"]:
    """The products of the channels of both: their means over the image, signed roots of these, divided by their length.

    In float32, since bf16 rounds products of small means to 0.
    """
    with torch.autocast(features.device.type, enabled=False):
        means = torch.einsum("bcyx,bdyx->bcd", features.float(), others.float()).flatten(1) / features[0, 0].numel()
        return functional.normalize(torch.copysign((means.abs() + _LEAST).sqrt(), means))


class DBCNN(Network):
    """S-CNN, VGG16, bilinear pooling and a linear layer."""

    knows_distortions = False
    """Whether S-CNN has pretrained weights. It then belongs to the body; else it is as new as the linear layer."""

    def __init__(self) -> None:
        """Random weights."""
        super().__init__()
        vgg: Any = timm_model("vgg16")
        self.content = nn.Sequential(*list(vgg.features)[:-1])
        self.distortion = distortion_network()
        self.linear = nn.Linear(S_CNN[-1][0] * VGG_CHANNELS, 1)
        nn.init.kaiming_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def body(self) -> nn.Module:
        """The convolutions of VGG16, and those of S-CNN if they have pretrained weights."""
        return nn.ModuleList([self.content, self.distortion]) if self.knows_distortions else self.content

    @property
    def new_layers(self) -> Sequence[nn.Module]:
        """The linear layer, and S-CNN unless it has pretrained weights."""
        return [self.linear] if self.knows_distortions else [self.distortion, self.linear]

    def forward(self, pixels: Pixels) -> Scores:
        """The scores."""
        content: Tensor = self.content(pixels)
        distortion: Tensor = self.distortion(pixels)
        if distortion.shape[2:] != content.shape[2:]:
            distortion = functional.interpolate(distortion, content.shape[2:], mode="bilinear", align_corners=False)
        scores: Scores = self.linear(bilinear(content, distortion)).squeeze(-1)
        return scores
