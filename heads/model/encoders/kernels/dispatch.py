"""When Triton kernels run instead of torch, and the short convolution that xLSTM and Mamba2 share, in both forms."""

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv1d, layer_norm, rms_norm, silu

from agiqa.cuda import kernels_missing

LONGEST = 2048
"""Items of more tokens are computed in chunks with states, whose work does not grow with the square of the tokens."""
_WIDEST = {160 << 10: 256, 96 << 10: 128}
"""Most channels per head of the mLSTM's and Mamba2's kernels by the bytes of shared memory that a block may have."""
_P = ParamSpec("_P")
_R = TypeVar("_R")
_UNCOMPILED = list[dict[str, Callable[..., Any]]]()
"""What each function marked `uncompiled` calls."""


@cache
def widest_rows(device: torch.device) -> int:
    """Most channels per head of the mLSTM's and Mamba2's kernels on `device`; 0 where its memory holds no blocks."""
    if device.type != "cuda":
        return max(_WIDEST.values())
    properties = torch.cuda.get_device_properties(device)
    memory: int = getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block)  # AMD: one
    return next((channels for least, channels in _WIDEST.items() if memory >= least), 0)


def is_power_of_two(channels: int) -> bool:
    """Whether a Triton block can be `channels` wide."""
    return channels > 0 and channels & (channels - 1) == 0


def product_dtype(values: Tensor) -> torch.dtype:
    """The dtype of a matrix product of `values`: autocast's where autocast is on, else their own."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function`, which `exclude_from_compiling` excludes, because it has its own kernels or a long loop."""
    called: dict[str, Callable[_P, _R]] = {"function": function}
    _UNCOMPILED.append(called)

    @wraps(function)
    def run(*args: _P.args, **named: _P.kwargs) -> _R:
        return called["function"](*args, **named)

    return run


def exclude_from_compiling() -> None:
    """Exclude the functions marked `uncompiled` from torch.compile; to be called before it.

    Torch imports its compiler for that, which takes seconds that evaluations and predictions can do without.
    """
    for called in _UNCOMPILED:
        called["function"] = torch.compiler.disable(called["function"])
    _UNCOMPILED.clear()


def causal_conv_silu(
    tokens: Float[Tensor, "batch token channel"],
    weight: Float[Tensor, "channel 1 taps"],
    bias: Float[Tensor, " channel"] | None,
) -> Float[Tensor, "batch token channel"]:
    """SiLU of a causal convolution of each channel; the last weight belongs to the present token.

    The output has autocast's dtype where autocast is on. Torch's convolution wants (batch, channel, time), which costs
    two copies each way; the Triton kernels pass over the tokens once, and torch's form here once per tap.
    """
    dtype, added = product_dtype(tokens), weight.new_zeros(len(weight)) if bias is None else bias
    if kernels_missing(tokens.device, ("triton",)) is None and tokens.dtype != torch.float64:
        return _by_kernels(tokens.to(dtype), weight, added)
    if torch.compiler.is_compiling():  # which fuses the passes over a convolution itself
        channels, _, taps = weight.shape
        padded = conv1d(tokens.transpose(1, 2), weight, bias, padding=taps - 1, groups=channels)
        return silu(padded[..., : tokens.shape[1]].transpose(1, 2))
    outputs: Tensor = ShiftedConv.apply(tokens.to(dtype), weight.to(dtype), added.to(dtype))
    return outputs


@uncompiled
def _by_kernels(tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from agiqa.heads.model.encoders.kernels.causal_conv_triton import KernelConv  # triton is absent without a GPU

    outputs: Tensor = KernelConv.apply(tokens, weight, bias)
    return outputs


class ShiftedConv(torch.autograd.Function):
    """`causal_conv_silu` in torch, as products of each weight with the tokens some steps earlier."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `causal_conv_silu`; all are of one dtype."""
        taps, length = weight.shape[-1], tokens.shape[1]
        sums = torch.addcmul(bias, tokens, weight[:, 0, -1])
        for back in range(1, min(taps, length)):
            sums[:, back:].addcmul_(tokens[:, :-back], weight[:, 0, taps - 1 - back])
        ctx.save_for_backward(tokens, weight, sums)
        return silu(sums)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of tokens, weight and bias."""
        tokens, weight, sums = ctx.saved_tensors
        taps, length = weight.shape[-1], tokens.shape[1]
        felt = torch.ops.aten.silu_backward(grad, sums)
        of_tokens = felt * weight[:, 0, -1]
        of_weight = torch.zeros_like(weight)
        of_weight[:, 0, -1] = (felt * tokens).sum((0, 1))
        for back in range(1, min(taps, length)):
            of_tokens[:, :-back].addcmul_(felt[:, back:], weight[:, 0, taps - 1 - back])
            of_weight[:, 0, taps - 1 - back] = (felt[:, back:] * tokens[:, :-back]).sum((0, 1))
        return of_tokens, of_weight, felt.sum((0, 1))


def norm(
    inputs: Float[Tensor, "*tokens width"],
    weight: Float[Tensor, "*head width"],
    bias: Float[Tensor, " width"] | None = None,
    *,
    eps: float,
    centred: bool = True,
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*tokens width"]:
    """Layer norm of the last axis, or RMS norm unless `centred`; with weights of (head, width) no bias.

    On a GPU the kernels answer in `dtype`, by default autocast's where autocast is on. Torch, also when it compiles
    this, answers as its norms do.
    """
    by_torch = torch.compiler.is_compiling() or kernels_missing(inputs.device, ("triton",)) is not None
    if not by_torch and torch.float64 not in (inputs.dtype, weight.dtype):
        return _norm_by_kernels(inputs, weight, bias, eps, centred, dtype or product_dtype(inputs))
    shape = inputs.shape[-1:]
    if weight.ndim > 1:
        return layer_norm(inputs, shape, eps=eps) * weight
    return layer_norm(inputs, shape, weight, bias, eps) if centred else rms_norm(inputs, shape, weight, eps)


def _norm_by_kernels(*given: Any) -> Tensor:
    from agiqa.heads.model.encoders.kernels.norm_triton import KernelNorm  # triton is absent without a GPU

    outputs: Tensor = KernelNorm.apply(*given)
    return outputs
