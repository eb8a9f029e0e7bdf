"""What backbones share whose states are those of image patches: they have no `W_lm`, no logits and no answers."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ModelError, ViewRefused
from agiqa.extract.data.images import ImageSource
from agiqa.extract.data.items import Message
from agiqa.extract.models.contract import GenerationSettings, Prepared
from agiqa.store import TOKEN_ROLES
from agiqa.store.format.layers import LAST

Shape = tuple[int, int, int]
"""Rows before the patches (class tokens and registers), patches, and values per row."""


def roles_of(shape: Shape) -> NDArray[np.uint8]:
    """The roles of the rows (n,): special before the patches, and image."""
    prefix, patches, _ = shape
    return np.repeat(np.array([TOKEN_ROLES["special"], TOKEN_ROLES["image"]], np.uint8), [prefix, patches])


class ImageFeatures:
    """The part of a `Backbone` that is the same for all image encoders."""

    kind: str
    tap: str | None
    """Where the states come from, as stores record it."""
    name: str
    """For messages."""
    hidden_size: int
    device: torch.device
    logical_dtype: str
    reads_images: bool = True
    reads_conversations: bool = False
    vocab_size: int = 0
    max_positions: int | None = None
    saved_by_compiling = 0.0

    def layer_states(self, batch: Sequence[Prepared], layers: Sequence[str]) -> list[dict[str, torch.Tensor]]:
        """See `Backbone.layer_states`."""
        raise NotImplementedError

    def prepare(self, conversation: Sequence[Message], image: ImageSource | None, *, answer: bool = False) -> Prepared:
        """See `Backbone.prepare`; the conversation is not read."""
        raise NotImplementedError

    def hidden_states(self, batch: Sequence[Prepared]) -> list[torch.Tensor]:
        """See `Backbone.hidden_states`."""
        return [states[LAST] for states in self.layer_states(batch, (LAST,))]

    def compile_layers(self) -> None:
        """See `Backbone.compile_layers`; does nothing, as compiling never pays by `saved_by_compiling`."""

    def logits(self, item: Prepared) -> torch.Tensor:
        """Raises ViewRefused."""
        del item
        self._refuse("logits")

    def lm_head(self, *, bent: bool = False) -> torch.Tensor:
        """Raises ViewRefused."""
        del bent
        self._refuse("lm_head")

    def project(self, states: torch.Tensor) -> torch.Tensor:
        """Raises ViewRefused."""
        del states
        self._refuse("logits")

    def generate(
        self, batch: Sequence[Prepared], settings: GenerationSettings, *, seeds: Sequence[int] | None = None
    ) -> list[str]:
        """Raises ModelError."""
        del batch, settings, seeds
        message = f"{self.name} reads images and writes no text; give a vision-language model to describe images."
        raise ModelError(message)

    def _refuse(self, what: str) -> NoReturn:
        message = (
            f"{self.name}: the states of {self.tap!r} are those of an image encoder, which has no {what}. Store hidden "
            "states, int8 or a sketch, and train with --projection hidden."
        )
        raise ViewRefused(message)


def joined(batch: Sequence[Prepared], device: torch.device, dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    """The inputs of all items, on `device`; those with fractions in `dtype`."""
    found: dict[str, Any] = {}
    for key in batch[0].inputs:
        values = torch.cat([item.inputs[key] for item in batch])
        found[key] = values.to(device, dtype if values.is_floating_point() else values.dtype)
    return found
