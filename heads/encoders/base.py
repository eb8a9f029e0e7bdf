"""What a sequence encoder is, and the registry that names them."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from agiqa.heads.config import HeadConfig
from agiqa.registry import Registry


class Encoder(nn.Module, ABC):
    """Base of encoders over right-padded sequences, built from a HeadConfig.

    The laws that the tests hold every registered encoder to: padding is invisible, an item does not feel its
    batch, padded outputs are zero, every parameter learns, no layer is used twice, and where `mixes_tokens`
    is true the last token feels the first.
    """

    mixes_tokens: ClassVar[bool] = True
    """Whether an output depends on other tokens at all."""

    @property
    def kernels(self) -> str:
        """What computes the encoder where it is now; recorded with every run: kernels differ in the last digits."""
        return "torch"

    @abstractmethod
    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """Encode; `mask` is True on real tokens, of which every item has at least one."""


ENCODERS: Registry[Callable[[HeadConfig], Encoder]] = Registry("encoder")
