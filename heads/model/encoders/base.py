"""What a sequence encoder is, the registry of encoders, `none`, and how a causal encoder becomes bidirectional."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.settings.config import CLOSED_FORMS, HeadConfig, Setting
from agiqa.registry import Registry

Tokens = Float[Tensor, "batch token width"]
Encoded = Float[Tensor, "batch token out_width"]
Mask = Bool[Tensor, "batch token"]
"""True on real tokens. Padding comes last, and every item has at least one token."""
NO_SETTINGS: Mapping[str, Setting] = MappingProxyType({})


class Encoder(nn.Module, ABC):
    """Base of encoders over right-padded sequences, built from a HeadConfig.

    `check_encoder` of heads/model/laws.py holds a registered encoder to these laws: padding changes nothing, an item's
    output does not depend on its batch, outputs at padding are zero, every parameter gets a gradient, no layer is used
    twice, and the last token depends on the first where `mixes_tokens`. The first token depends on the last exactly
    where `bidirectional` is set.
    """

    mixes_tokens: ClassVar[bool] = True
    """Whether an output depends on other tokens at all."""

    settings: ClassVar[frozenset[str] | None] = None
    """The fields of HeadConfig that change this encoder, besides `width` and `bidirectional`; None is any of them. A
    grid over a field that changes none of its encoders is refused."""

    own_settings: ClassVar[Mapping[str, Setting]] = NO_SETTINGS
    """Settings that only this encoder has, with their default values, for an encoder of one's own. Its `__init__` gets
    their values, completed, in `config.own_settings`."""

    graphable: bool = False
    """Whether training can replay a pass from a CUDA graph: it only queues work on the GPU, of a shape that follows
    from the shape of the batch, and reads nothing back."""

    def __init__(self, out_width: int) -> None:
        """`out_width` is the number of channels of the outputs."""
        super().__init__()
        self.out_width = out_width

    @property
    def kernels(self) -> str:
        """The kernels used on the device of the weights. Runs record them, since kernels differ in the last digits."""
        return "torch"

    @property
    def compiled_blocks(self) -> Iterable[nn.Module]:
        """Blocks that torch.compile compiles one by one. Blocks of one kind share a compilation."""
        return ()

    @abstractmethod
    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """Encode; the outputs at padding are zero."""


ENCODERS: Registry[Callable[[HeadConfig], Encoder]] = Registry("encoder", beside=CLOSED_FORMS)


def completed(config: HeadConfig) -> HeadConfig:
    """`config` with every setting that its encoder declares itself, by default of the declared value.

    Raises UnknownName for an encoder that is not registered, and ConfigError for a setting that the encoder does not
    declare, or a value of another type than the default has.
    """
    encoder = None if config.is_closed else ENCODERS.get(config.encoder)
    declared: Mapping[str, Setting] = getattr(encoder, "own_settings", NO_SETTINGS)
    for name in config.own_settings:
        if name not in declared:
            unknown = UnknownName.of("setting of its own", name, declared)
            message = f"The encoder {config.encoder!r}: {unknown}"
            raise ConfigError(message)
    values = {
        name: _of_type(default, config.own_settings.get(name, default), f"{config.encoder!r}: {name}")
        for name, default in declared.items()
    }
    return config if values == config.own_settings else config.model_copy(update={"own_settings": values})


def _of_type(default: Setting, value: Setting, name: str) -> Setting:
    """`value` with the type of `default`; texts are read as on the command line. Raises ConfigError."""
    kind = type(default)
    if isinstance(value, str) and kind is bool and value.lower() in ("true", "false"):
        return value.lower() == "true"
    number = not isinstance(value, bool) and kind in (int, float)
    if number and (isinstance(value, str) or kind is float):
        with suppress(ValueError, OverflowError):
            read = kind(value)
            if math.isfinite(float(read)):
                return read
    if type(value) is kind and kind is not float:
        return value
    wanted = f"of the type {kind.__name__}{' and finite' if kind is float else ''}"
    message = f"The encoder {name} is {value!r}; it must be {wanted}, as its default {default!r} is."
    raise ConfigError(message)


def encoder_settings(name: str) -> frozenset[str] | None:
    """`Encoder.settings` of the encoder called `name`; None for one that is not registered."""
    if name in CLOSED_FORMS:
        return frozenset()
    return getattr(ENCODERS.get(name), "settings", None) if name in ENCODERS else None


@ENCODERS.register("none")
class IdentityEncoder(Encoder):
    """Returns every token unchanged: the paper's ablation without xLSTM."""

    mixes_tokens = False
    settings = frozenset()

    def __init__(self, config: HeadConfig) -> None:
        """Only the width matters. Raises ConfigError for `bidirectional`."""
        if config.bidirectional:
            message = "The encoder 'none' has no bidirectional form: set bidirectional to false, or choose another."
            raise ConfigError(message)
        super().__init__(config.width)

    @property
    def kernels(self) -> str:
        """Nothing is computed."""
        return "none"

    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """The tokens, with zeros in the padding."""
        return tokens.masked_fill(~mask[..., None], 0.0)


class BidirectionalEncoder(Encoder):
    """Two causal encoders with weights of their own, each of the full width, and their outputs side by side."""

    def __init__(self, forwards: Encoder, backwards: Encoder) -> None:
        """`backwards` reads each item from its last token to its first."""
        super().__init__(forwards.out_width + backwards.out_width)
        self.forwards = forwards
        self.backwards = backwards
        self.graphable = forwards.graphable and backwards.graphable

    @property
    def compiled_blocks(self) -> Iterable[nn.Module]:
        """The blocks of both directions."""
        return [*self.forwards.compiled_blocks, *self.backwards.compiled_blocks]

    @property
    def kernels(self) -> str:
        """The kernels, which are the same in both directions."""
        return self.forwards.kernels

    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """The outputs of both directions at each token."""
        order = reversal(mask)
        ahead: Tensor = self.forwards(tokens, mask)
        back: Tensor = self.backwards(torch.take_along_dim(tokens, order, 1), mask)
        return torch.cat([ahead, torch.take_along_dim(back, order, 1)], dim=-1)


def reversal(mask: Mask) -> Int64[Tensor, "batch token 1"]:
    """Indices that reverse every item within its own length and leave its padding; they are their own inverse."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    lengths = mask.sum(1, keepdim=True)
    return torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]


class EitherWay:
    """What the registry holds of a causal encoder: builds one, or with `bidirectional` a BidirectionalEncoder."""

    def __init__(self, causal: Callable[[HeadConfig], Encoder]) -> None:
        """`causal` only ever gets configs without `bidirectional`."""
        self.settings: frozenset[str] | None = getattr(causal, "settings", None)
        self.own_settings: Mapping[str, Setting] = getattr(causal, "own_settings", NO_SETTINGS)
        self.__wrapped__ = causal

    def __call__(self, config: HeadConfig) -> Encoder:
        """The encoder."""
        if not config.bidirectional:
            return self.__wrapped__(config)
        causal = config.model_copy(update={"bidirectional": False})
        return BidirectionalEncoder(self.__wrapped__(causal), self.__wrapped__(causal))


def refuse_bidirectional(config: HeadConfig, encoder: type[Encoder], *, entry: str) -> None:
    """Raise ConfigError where `bidirectional` is set for a causal class; `entry` is its name in the registry."""
    if config.bidirectional:
        message = (
            f"{encoder.__name__} reads forwards only; `ENCODERS.get({entry!r})` builds a bidirectional encoder of two "
            "of them. Build it by that name, or set bidirectional to false."
        )
        raise ConfigError(message)
