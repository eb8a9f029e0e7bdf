"""`causal_conv_silu` as two Triton kernels, one each way, which compute in float32.

Equal inputs give bitwise equal gradients: those of the weights are summed from parts, without atomic additions.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN202

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_STEPS, _CHANNELS = 32, 128
"""Steps and channels of one program."""


@triton.jit
@no_type_check
def _convolved(item, weight, bias, step, channel, time, width, pitch, there, TAPS: tl.constexpr):
    """The sums at `step` before the SiLU, of an item whose rows are `pitch` apart; `step` may be past its end."""
    total = tl.zeros_like(step[:, None] + channel[None, :]).to(tl.float32)
    total += tl.load(bias + channel, channel < width, 0.0)[None, :]
    for tap in tl.static_range(TAPS):
        at = step - (TAPS - 1 - tap)
        inside = there & (at >= 0)[:, None] & (at < time)[:, None]
        values = tl.load(item + at[:, None] * pitch + channel[None, :], inside, 0.0).to(tl.float32)
        total += values * tl.load(weight + channel * TAPS + tap, channel < width, 0.0)[None, :]
    return total


@triton.jit(do_not_specialize=["time"])
@no_type_check
def _forward_kernel(
    tokens, weight, bias, outputs, time, width, pitch,
    TAPS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * time * width
    item = tokens + tl.program_id(0).to(tl.int64) * time * pitch
    step = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    there = (channel < width)[None, :]
    total = _convolved(item, weight, bias, step, channel, time, width, pitch, there, TAPS)
    place = base + step[:, None] * width + channel[None, :]
    tl.store(outputs + place, (total * tl.sigmoid(total)).to(outputs.dtype.element_ty), there & (step < time)[:, None])


@triton.jit
@no_type_check
def _felt(grad, item, weight, bias, base, step, channel, time, width, pitch, there, TAPS: tl.constexpr):
    """The gradient of the sums at `step`, zero past the end."""
    total = _convolved(item, weight, bias, step, channel, time, width, pitch, there, TAPS)
    place = base + step[:, None] * width + channel[None, :]
    of_output = tl.load(grad + place, there & (step < time)[:, None], 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(total)
    return of_output * sigmoid * (1.0 + total * (1.0 - sigmoid))


@triton.jit(do_not_specialize=["time"])
@no_type_check
def _back_kernel(
    grad, tokens, weight, bias, of_tokens, of_weight, time, width, pitch,
    TAPS: tl.constexpr, STEPS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    base = tl.program_id(0).to(tl.int64) * time * width
    item = tokens + tl.program_id(0).to(tl.int64) * time * pitch
    step = tl.program_id(1) * STEPS + tl.arange(0, STEPS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < width
    there = known[None, :]
    felt = _felt(grad, item, weight, bias, base, step, channel, time, width, pitch, there, TAPS)
    part = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * (TAPS + 1) * width
    tl.store(of_weight + part + TAPS * width + channel, tl.sum(felt, 0), known)
    total = tl.zeros_like(felt)
    for tap in tl.static_range(TAPS):
        at = step - (TAPS - 1 - tap)
        inside = there & (at >= 0)[:, None] & (at < time)[:, None]
        values = tl.load(item + at[:, None] * pitch + channel[None, :], inside, 0.0).to(tl.float32)
        tl.store(of_weight + part + tap * width + channel, tl.sum(felt * values, 0), known)
        later = step + (TAPS - 1 - tap)
        reached = _felt(grad, item, weight, bias, base, later, channel, time, width, pitch, there, TAPS)
        total += reached * tl.load(weight + channel * TAPS + tap, known, 0.0)[None, :]
    place = base + step[:, None] * width + channel[None, :]
    tl.store(of_tokens + place, total.to(of_tokens.dtype.element_ty), there & (step < time)[:, None])


class KernelConv(torch.autograd.Function):
    """`causal_conv_silu` by the kernels, in the dtype of the tokens; weights and their gradients are float32."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        tokens: Float[Tensor, "batch token channel"],
        weight: Float[Tensor, "channel 1 taps"],
        bias: Float[Tensor, " channel"],
    ) -> Float[Tensor, "batch token channel"]:
        """See `causal_conv_silu`."""
        tokens, weight, bias = _in_rows(tokens), weight.contiguous(), bias.contiguous()
        outputs = tokens.new_empty(tokens.shape)
        _forward_kernel[_grid(tokens)](tokens, weight, bias, outputs, *_rows_of(tokens), **_sizes(weight))
        ctx.save_for_backward(tokens, weight, bias)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of tokens, weight and bias."""
        tokens, weight, bias = ctx.saved_tensors
        channels, _, taps = weight.shape
        of_tokens = tokens.new_empty(tokens.shape)
        items, pieces, _ = _grid(tokens)
        parts = tokens.new_empty(items * pieces, taps + 1, channels, dtype=torch.float32)
        _back_kernel[_grid(tokens)](
            grad.contiguous(), tokens, weight, bias, of_tokens, parts, *_rows_of(tokens), **_sizes(weight)
        )
        summed = parts.sum(0)
        return of_tokens, summed[:taps].T[:, None].to(weight.dtype), summed[taps].to(bias.dtype)


def _in_rows(tokens: Tensor) -> Tensor:
    """The tokens, copied unless their rows are evenly spaced; a slice of the channels of wider rows is not copied."""
    of_item, of_row, of_channel = tokens.stride()
    return tokens if of_channel == 1 and of_item == len(tokens[0]) * of_row else tokens.contiguous()


def _rows_of(tokens: Tensor) -> tuple[int, int, int]:
    """Steps, channels, and the distance between rows."""
    _, time, width = tokens.shape
    return time, width, tokens.stride(1)


def _grid(tokens: Tensor) -> tuple[int, int, int]:
    items, time, width = tokens.shape
    return items, triton.cdiv(time, _STEPS), triton.cdiv(width, _CHANNELS)


def _sizes(weight: Tensor) -> dict[str, int]:
    return {"TAPS": weight.shape[-1], "STEPS": _STEPS, "CHANNELS": _CHANNELS}
