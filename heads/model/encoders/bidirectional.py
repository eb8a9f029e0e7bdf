"""Both directions from an encoder that only reads forwards: two of them, one on the items reversed."""

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from agiqa.errors import ConfigError
from agiqa.heads.model.encoders.base import Encoder
from agiqa.heads.settings.config import HeadConfig


class BidirectionalEncoder(Encoder):
    """Two encoders with weights of their own, each of the full width, and their outputs side by side."""

    def __init__(self, forwards: Encoder, backwards: Encoder) -> None:
        """Both must be causal; `backwards` reads from the last token to the first."""
        super().__init__(forwards.out_width + backwards.out_width)
        self.forwards = forwards
        self.backwards = backwards
        self.graphable = forwards.graphable and backwards.graphable

    @property
    def repeated(self) -> Iterable[nn.Module]:
        """Those of either direction."""
        return [*self.forwards.repeated, *self.backwards.repeated]

    @property
    def kernels(self) -> str:
        """Those of either direction."""
        return self.forwards.kernels

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token out_width"]:
        """The outputs of both at each token; padding stays at the end for either, and comes out as zeros."""
        order = reversal(mask)
        ahead: Tensor = self.forwards(tokens, mask)
        back: Tensor = self.backwards(torch.take_along_dim(tokens, order, 1), mask)
        return torch.cat([ahead, torch.take_along_dim(back, order, 1)], dim=-1)


def reversal(mask: Bool[Tensor, "batch token"]) -> Int64[Tensor, "batch token 1"]:
    """Indices that reverse every item within its own length and leave the padding; their own inverse."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    lengths = mask.sum(1, keepdim=True)
    return torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]


class EitherWay:
    """Builds what `config.bidirectional` asks for: one causal encoder, or two in a BidirectionalEncoder."""

    def __init__(self, causal: Callable[[HeadConfig], Encoder]) -> None:
        """`causal` is always called with `bidirectional` off."""
        self.reads: frozenset[str] | None = getattr(causal, "reads", None)
        self._causal = causal

    def __call__(self, config: HeadConfig) -> Encoder:
        """The encoder."""
        if not config.bidirectional:
            return self._causal(config)
        one_way = config.model_copy(update={"bidirectional": False})
        return BidirectionalEncoder(self._causal(one_way), self._causal(one_way))


def check_forwards_only(config: HeadConfig, name: str) -> None:
    """Raise ConfigError when `bidirectional` is asked of the encoder called `name`, which does not have it."""
    if config.bidirectional:
        message = f"The encoder {name!r} has no bidirectional form: set bidirectional to false, or choose another."
        raise ConfigError(message)


def check_one_way(config: HeadConfig, part: type[Encoder], *, entry: str) -> None:
    """Raise ConfigError when `bidirectional` is asked of the causal `part` itself; `entry` of the registry has it."""
    if config.bidirectional:
        message = (
            f"{part.__name__} reads forwards only; `ENCODERS.get({entry!r})` builds a bidirectional encoder of two of "
            "them. Build it by that name, or set bidirectional to false."
        )
        raise ConfigError(message)
