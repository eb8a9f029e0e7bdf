"""An image encoder of timm with a two-layer regressor: VGG16, ResNet50, ViT, and any other name that timm knows."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from agiqa.bench.networks.architectures.contract import Network, Pixels, Scores, regressor
from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.models.timm_models import import_timm

_SHOWN = 5
"""Names of timm in an error: it knows more than a thousand."""


class EncoderNetwork(Network):
    """The pooled features of an encoder, and a regressor."""

    def __init__(self, encoder: nn.Module, features: int, *, hidden: int) -> None:
        """`encoder` maps pixels to (batch, features)."""
        super().__init__()
        self.encoder = encoder
        self.regressor = regressor(features, hidden)

    @property
    def body(self) -> nn.Module:
        """The encoder."""
        return self.encoder

    @property
    def new_layers(self) -> Sequence[nn.Module]:
        """The regressor."""
        return [self.regressor]

    def forward(self, pixels: Pixels) -> Scores:
        """The scores."""
        scores: Scores = self.regressor(self.encoder(pixels)).squeeze(-1)
        return scores


class MeanOfConvolutions(nn.Module):
    """The features of a VGG: its last convolution, averaged over the image.

    Without its two layers of 4,096 channels, which hold nine tenths of VGG16's parameters and were made for images of
    224 pixels.
    """

    def __init__(self, vgg: Any) -> None:
        """Take the convolutions of timm's `vgg`."""
        super().__init__()
        self.features: nn.Module = vgg.features

    def forward(self, pixels: Pixels) -> Float[Tensor, "batch channel"]:
        """The means over the image."""
        means: Tensor = self.features(pixels).mean(dim=(2, 3))
        return means


def timm_network(name: str, *, image_size: int, hidden: int) -> EncoderNetwork:
    """timm's encoder `name` with random weights and a regressor, for images of `image_size` pixels. As `timm_model`."""
    model = timm_model(name, image_size=image_size)
    is_vgg = hasattr(model, "pre_logits") and hasattr(model, "features")
    features = model.num_features if is_vgg else getattr(model, "head_hidden_size", None) or model.num_features
    network = EncoderNetwork(MeanOfConvolutions(model) if is_vgg else model, int(features), hidden=hidden)
    network.mean, network.std = (tuple(model.default_cfg[name]) for name in ("mean", "std"))
    return network


def timm_model(name: str, *, image_size: int | None = None) -> Any:
    """timm's model `name` without its classifier, with random weights; for other images than usual if it has a choice.

    Raises UnknownName with the nearest names of timm, and ConfigError for an image size that the model cannot have.
    """
    timm = import_timm()
    check_name(name)
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **size_of(name, image_size))
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        message = f"timm cannot build {name!r} for images of {image_size} pixels ({error}). Change --image-size."
        raise ConfigError(message) from error


def resnet_stages(resnet: Any, pixels: Pixels) -> list[Tensor]:
    """What timm's ResNet hands to each of its four stages, and what the last of them gives: five feature maps."""
    found: list[Tensor] = [resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(pixels))))]
    for stage in (resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4):
        found.append(stage(found[-1]))
    return found


def check_name(name: str, known: Sequence[str] = ()) -> None:
    """Raise UnknownName, with the nearest of timm's names and `known`, if timm has no model `name`."""
    timm = import_timm()
    if timm.is_model(name):
        return
    kind = "network"
    near = get_close_matches(name, [*known, *timm.list_models()], n=_SHOWN, cutoff=0.4)
    error = UnknownName.of(kind, name, [*known, *near])
    error.add_note("These are the built-in networks and the nearest of timm's names; timm.list_models() has them all.")
    raise error


def size_of(name: str, image_size: int | None) -> dict[str, int]:
    """timm's option for images of `image_size` pixels, if it builds the model for one size, as those of patches."""
    timm = import_timm()
    config = timm.get_pretrained_cfg(name)
    is_fixed = config is not None and config.fixed_input_size
    return {"img_size": image_size} if is_fixed and image_size is not None else {}
