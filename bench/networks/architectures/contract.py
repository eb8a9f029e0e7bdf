"""What every network is: a module from pixels to one score per image, with pretrained and new layers."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

Pixels = Float[Tensor, "batch 3 height width"]
Scores = Float[Tensor, " batch"]
Colour = tuple[float, ...]

IMAGENET_MEAN: Colour = (0.485, 0.456, 0.406)
IMAGENET_STD: Colour = (0.229, 0.224, 0.225)
"""Mean and standard deviation of red, green and blue in ImageNet, of pixels from 0 to 1."""


class Network(nn.Module):
    """Predicts a score, on the scale of standardised MOS, from pixels that were normalised by `mean` and `std`."""

    mean: Colour = IMAGENET_MEAN
    std: Colour = IMAGENET_STD

    @property
    def body(self) -> nn.Module:
        """The layers that pretrained weights are for."""
        raise NotImplementedError

    @property
    def new_layers(self) -> Sequence[nn.Module]:
        """All other layers, which begin with random weights."""
        raise NotImplementedError

    def forward(self, pixels: Pixels) -> Scores:
        """The scores."""
        raise NotImplementedError


def regressor(features: int, hidden: int) -> nn.Sequential:
    """The two-layer regressor of the paper: linear, ReLU, linear; one layer where `hidden` is 0."""
    if hidden == 0:
        return nn.Sequential(nn.Linear(features, 1))
    return nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 1))
