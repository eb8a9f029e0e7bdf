"""The settings of a network: its crops and its training, from recipes.yaml, a file of the user's, and options."""

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from pydantic import Field, model_validator

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.settings.config import FrozenSettings, read_yaml

RECIPES = Path(__file__).with_name("recipes.yaml")
TABLE_II = ("vgg16", "resnet50", "vit_base_patch16_224", "vil", "hyperiqa", "dbcnn", "stairiqa")
"""The networks of Table II that can be trained here."""
OWN = ("vil", "vil_tiny", "vil_small", "vil_base", "hyperiqa", "dbcnn", "stairiqa")
"""Those that are written in this room; timm has the others."""
VIL_WEIGHTS = "https://ml.jku.at/research/vision_lstm/download/"
"""Where the authors of ViL publish pretrained weights."""
CENTRE_AND_CORNERS = 5


class NetworkConfig(FrozenSettings):
    """One network, and how it is trained and tested."""

    network: str
    """Name of the network: one of `OWN`, or one of timm's."""
    source: str
    """Where these settings come from; `changed here` names those that a user changed."""
    pretrained: str | None = None
    """Name of timm's pretrained weights; the name of the network if absent. Ignored with `weights`."""
    weights: str | None = None
    """SHA-256 of the file of pretrained weights, in hex; `none` for random weights."""
    resize: int = Field(default=256, ge=1)
    """Pixels of the square that images are resized to: shorter side first, then the centre is cut out."""
    image_size: int = Field(default=224, ge=1)
    """Pixels of the square crop that the network reads."""
    train_crops: int = Field(default=1, ge=1)
    """Random crops of each image in one epoch."""
    test_crops: int = Field(default=1, ge=1)
    """Crops of an image whose scores are averaged: 1 (centre), 5 (centre and corners), or n x n on a grid."""
    flip: bool = True
    """Mirror half of the training crops."""
    regressor_hidden: int = Field(default=128, ge=0)
    """Channels between the two linear layers of the regressor of an encoder; 0 for one layer."""
    alone_epochs: int = Field(default=0, ge=0)
    """Epochs before all others in which the new layers are trained alone."""
    alone_lr: float = Field(default=1e-3, gt=0.0)
    """Learning rate in these epochs."""
    epochs: int = Field(default=20, ge=1)
    """Epochs in which all layers are trained."""
    batch_size: int = Field(default=32, ge=2)
    """Crops per step. Two at least, since batch normalisation cannot train on one."""
    lr: float = Field(default=1e-4, gt=0.0)
    """Peak learning rate of pretrained layers."""
    new_lr_factor: float = Field(default=10.0, gt=0.0)
    """Learning rate of new layers, as a multiple of `lr`."""
    weight_decay: float = Field(default=1e-2, ge=0.0)
    """Weight decay: decoupled for adamw, part of the gradient for adam."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    """Optimiser."""
    schedule: Literal["cosine", "constant", "steps"] = "cosine"
    """Learning rate over time: half a cosine down to 0, constant, or times `decay` every `decay_epochs`."""
    decay: float = Field(default=0.1, gt=0.0, le=1.0)
    """Factor of the schedule `steps`."""
    decay_epochs: int = Field(default=10, ge=1)
    """Epochs between two steps of the schedule `steps`."""
    warmup: float = Field(default=0.05, ge=0.0, lt=1.0)
    """Share of all steps over which the learning rate rises linearly."""
    loss: str = "mse"
    """Loss on standardised MOS, as of `agiqa train`."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision; auto is bf16 (mixed) on a GPU, and fp32 on a CPU."""

    @model_validator(mode="after")
    def _crops_fit(self) -> "NetworkConfig":
        side = round(self.test_crops**0.5)
        if self.image_size > self.resize:
            message = (
                f"Crops of {self.image_size} pixels (image_size) do not fit into images of {self.resize} (resize)."
            )
        elif self.test_crops != CENTRE_AND_CORNERS and side * side != self.test_crops:
            message = f"test_crops is {self.test_crops}, and must be 5 or a square number, such as 1, 9 or 25."
        else:
            return self
        raise ConfigError(message)

    @property
    def needs_file(self) -> bool:
        """Whether pretrained weights come from a file alone, since timm has none."""
        return self.pretrained is None and self.network in OWN

    @property
    def all_epochs(self) -> int:
        """The epochs with and without pretrained layers."""
        return self.alone_epochs + self.epochs


def network_config(network: str, changes: Mapping[str, Any]) -> NetworkConfig:
    """The recipe of a network with `changes` (None: unchanged). `image_size` alone changes `resize` in proportion.

    Raises ConfigError for unknown settings and values out of range.
    """
    recipes = _recipes()
    given = {name: value for name, value in changes.items() if value is not None}
    values = {**recipes["default"], **recipes["networks"].get(network, {})}
    if "image_size" in given and "resize" not in given:
        given["resize"] = max(given["image_size"], round(values["resize"] * given["image_size"] / values["image_size"]))
    changed = [name for name in given if name not in ("weights", "precision") and given[name] != values.get(name)]
    source = values.pop("source") + (f"; changed here: {', '.join(changed)}" if changed else "")
    return NetworkConfig(network=network, source=source, **{**values, **given})


def read_changes(file: Path | None) -> dict[str, Any]:
    """The settings of a user's YAML file, flat. Raises ConfigError for another form, and UnknownName for a setting."""
    content = None if file is None else read_yaml(file)
    if content is None:
        return {}
    if not isinstance(content, dict):
        message = f"{file}: expected `setting: value` lines, found {content!r}."
        raise ConfigError(message)
    changes = {str(name): value for name, value in cast("dict[object, Any]", content).items()}
    known = [name for name in NetworkConfig.model_fields if name not in ("network", "source", "weights")]
    for name in changes:
        if name not in known:
            kind = "setting of a network"
            error = UnknownName.of(kind, name, known)
            error.add_note(f"in {file}")
            raise error
    return changes


@cache
def _recipes() -> dict[str, Any]:
    return cast("dict[str, Any]", read_yaml(RECIPES))
