"""When Triton kernels run instead of torch, and the short convolution that xLSTM and Mamba2 share, in both forms."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import ParamSpec, TypeVar, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import conv1d, silu

_P = ParamSpec("_P")
_R = TypeVar("_R")


def kernels_missing(device: torch.device, packages: tuple[str, ...]) -> str | None:
    """The reason why kernels that need `packages` cannot run on `device`; None where they can."""
    if device.type != "cuda":
        return f"the kernels need CUDA, not {device.type}"
    missing = [package for package in packages if not _is_installed(package)]
    return f"not installed: {', '.join(missing)}" if missing else None


def is_power_of_two(channels: int) -> bool:
    """Whether a Triton block can be `channels` wide."""
    return channels > 0 and channels & (channels - 1) == 0


def product_dtype(values: Tensor) -> torch.dtype:
    """The dtype of a matrix product of `values`: autocast's where autocast is on, else their own."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, excluded from torch.compile, because it has its own kernels or a long loop."""
    return cast("Callable[_P, _R]", torch.compiler.disable(function))


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


def causal_conv_silu(
    tokens: Float[Tensor, "batch token channel"],
    weight: Float[Tensor, "channel 1 taps"],
    bias: Float[Tensor, " channel"] | None,
) -> Float[Tensor, "batch token channel"]:
    """SiLU of a causal convolution of each channel; the last weight belongs to the present token.

    The output has autocast's dtype where autocast is on. Torch's convolution wants (batch, channel, time), which costs
    two copies each way; the Triton kernels pass over the tokens once.
    """
    if kernels_missing(tokens.device, ("triton",)) is None and tokens.dtype != torch.float64:
        return _by_kernels(tokens, weight, bias)
    channels, _, taps = weight.shape
    padded = conv1d(tokens.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
    return silu(padded[..., : tokens.shape[1]].transpose(1, 2))


@uncompiled
def _by_kernels(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from agiqa.heads.model.encoders.kernels.causal_conv_triton import KernelConv  # triton is absent without a GPU

    added = weight.new_zeros(len(weight)) if bias is None else bias
    outputs: Tensor = KernelConv.apply(tokens.to(product_dtype(tokens)), weight, added)
    return outputs
