"""Poolings: from the encoded tokens of an item to one vector, blind to padding."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from agiqa.heads.config import HeadConfig
from agiqa.registry import Registry


class Pooling(nn.Module, ABC):
    """Base: built from a HeadConfig, called with tokens and mask."""

    def __init__(self, config: HeadConfig) -> None:
        """The poolings that learn take their sizes from `config`."""
        del config
        super().__init__()

    @abstractmethod
    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch width"]:
        """Pool; `mask` is True on real tokens, of which every item has at least one, from the left."""


POOLINGS: Registry[Callable[[HeadConfig], Pooling]] = Registry("pooling")


@POOLINGS.register("mean")
class MeanPooling(Pooling):
    """The mean of the real tokens, as in the paper."""

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch width"]:
        """Sum over real tokens divided by their number."""
        return tokens.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True)


@POOLINGS.register("last")
class LastPooling(Pooling):
    """The last real token."""

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch width"]:
        """The row at the item's length minus one."""
        return tokens[torch.arange(len(tokens), device=tokens.device), mask.sum(1) - 1]
