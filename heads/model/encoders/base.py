"""What a sequence encoder is, and the registry that names them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import ClassVar

from jaxtyping import Bool, Float
from torch import Tensor, nn

from agiqa.heads.settings.config import HeadConfig
from agiqa.registry import Registry


class Encoder(nn.Module, ABC):
    """Base of encoders over right-padded sequences, built from a HeadConfig.

    The laws that the tests hold every registered encoder to: padding is invisible, an item does not feel its
    batch, padded outputs are zero, every parameter learns, no layer is used twice, and where `mixes_tokens`
    is true the last token feels the first. With `bidirectional` the first token feels the last too; without it
    no token feels a later one.
    """

    mixes_tokens: ClassVar[bool] = True
    """Whether an output depends on other tokens at all."""

    reads: ClassVar[frozenset[str] | None] = None
    """The settings of a HeadConfig that have a say in it, beside `width` and `bidirectional`; None is any of them. A
    grid over a setting that no encoder of it reads is refused."""

    graphable: bool = False
    """Whether a pass on a GPU only queues work there, of a shape that follows from the batch's: nothing is read back,
    so that training can replay it from a CUDA graph."""

    def __init__(self, out_width: int) -> None:
        """`out_width` is the number of channels of the outputs."""
        super().__init__()
        self.out_width = out_width

    @property
    def kernels(self) -> str:
        """What computes where the weights are; a run records it, since kernels differ in the last digits."""
        return "torch"

    @property
    def repeated(self) -> Iterable[nn.Module]:
        """Blocks for torch.compile to compile one by one, of few kinds, so that a compilation serves all of a kind."""
        return ()

    @abstractmethod
    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token out_width"]:
        """Encode; `mask` is True on real tokens, of which every item has at least one."""


def settings_read(encoder: str) -> frozenset[str] | None:
    """`Encoder.reads` of the encoder called `encoder`; None for one that is not registered."""
    return getattr(ENCODERS.get(encoder), "reads", None) if encoder in ENCODERS else None


ENCODERS: Registry[Callable[[HeadConfig], Encoder]] = Registry("encoder")
