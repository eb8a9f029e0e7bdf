"""Layer norms and RMS norms as two Triton kernels, one each way, whose outputs may be narrower than their inputs.

Torch's norms answer in float32 under autocast, and the next product copies that to the narrow dtype; the gradient takes
the same way back, and the sums over tokens for the weights take as long as all the rest. Here one pass each way does
everything. Equal inputs give bitwise equal gradients: those of the weights are summed from parts.
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

_VALUES = 4096
"""Values that a program holds at a time."""
_PARTS = 528
"""Most parts of the sums over tokens: four per multiprocessor of a large GPU."""


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def _forward_kernel(
    inputs, weight, bias, outputs, means, scales, tokens, heads, width, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDTH)
    known, there = token < tokens, (token < tokens)[:, None] & (channel < width)[None, :]
    row = token.to(tl.int64) * heads + head
    place = row[:, None] * width + channel[None, :]
    values = tl.load(inputs + place, there, 0.0).to(tl.float32)
    if CENTRED:
        mean = tl.sum(values, 1) / width
        tl.store(means + row, mean, known)
        values = tl.where(there, values - mean[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / width + eps)
    tl.store(scales + row, scale, known)
    of_channel = head * width + channel
    normed = values * scale[:, None] * tl.load(weight + of_channel, channel < width, 0.0).to(tl.float32)[None, :]
    if BIASED:
        normed += tl.load(bias + of_channel, channel < width, 0.0).to(tl.float32)[None, :]
    tl.store(outputs + place, normed.to(outputs.dtype.element_ty), there)


@triton.jit(do_not_specialize=["tokens"])
@no_type_check
def _back_kernel(
    grad, inputs, weight, means, scales, of_inputs, of_weight, of_bias, tokens, heads, width,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, CENTRED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    inside = channel < width
    of_channel = head * width + channel
    weights = tl.load(weight + of_channel, inside, 0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros((WIDTH,), tl.float32)
    bias_sum = tl.zeros((WIDTH,), tl.float32)
    for begin in range(tl.program_id(0) * ROWS, tokens, tl.num_programs(0) * ROWS):
        token = begin + tl.arange(0, ROWS)
        known, there = token < tokens, (token < tokens)[:, None] & inside[None, :]
        row = token.to(tl.int64) * heads + head
        place = row[:, None] * width + channel[None, :]
        felt = tl.load(grad + place, there, 0.0).to(tl.float32)
        values = tl.load(inputs + place, there, 0.0).to(tl.float32)
        scale = tl.load(scales + row, known, 0.0)[:, None]
        if CENTRED:
            values = tl.where(there, values - tl.load(means + row, known, 0.0)[:, None], 0.0)
        normed = values * scale
        weight_sum += tl.sum(felt * normed, 0)
        if BIASED:
            bias_sum += tl.sum(felt, 0)
        felt *= weights
        change = felt - normed * (tl.sum(felt * normed, 1) / width)[:, None]
        if CENTRED:
            change -= (tl.sum(felt, 1) / width)[:, None]
        tl.store(of_inputs + place, (change * scale).to(of_inputs.dtype.element_ty), there)
    part = tl.program_id(0) * heads * width + of_channel
    tl.store(of_weight + part, weight_sum, inside)
    if BIASED:
        tl.store(of_bias + part, bias_sum, inside)


class KernelNorm(torch.autograd.Function):
    """(x - mean) / std * weight + bias over the last axis, or without a mean; statistics are float32."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        inputs: Float[Tensor, "*tokens width"],
        weight: Float[Tensor, "*head width"],
        bias: Float[Tensor, " width"] | None,
        eps: float,
        centred: bool,  # noqa: FBT001  (autograd takes no keywords)
        dtype: torch.dtype,
    ) -> Float[Tensor, "*tokens width"]:
        """The outputs in `dtype`. With weights of (head, width) the axis before the last of the inputs is the head."""
        inputs, weight = inputs.contiguous(), weight.contiguous()
        width = inputs.shape[-1]
        heads = weight.numel() // width
        tokens = inputs.numel() // (heads * width)
        outputs = torch.empty(inputs.shape, dtype=dtype, device=inputs.device)
        means, scales = torch.empty(2, tokens * heads, dtype=torch.float32, device=inputs.device)
        sizes = {"CENTRED": centred, "BIASED": bias is not None, **_sizes(width)}
        _forward_kernel[triton.cdiv(tokens, sizes["ROWS"]), heads](
            inputs, weight, weight if bias is None else bias, outputs, means, scales, tokens, heads, width, eps, **sizes
        )
        ctx.save_for_backward(inputs, weight, means, scales)
        ctx.sizes, ctx.shape = sizes, (tokens, heads, width)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of inputs, weight and bias."""
        inputs, weight, means, scales = ctx.saved_tensors
        tokens, heads, width = ctx.shape
        of_inputs = torch.empty_like(inputs)
        parts = min(triton.cdiv(tokens, ctx.sizes["ROWS"]), max(1, _PARTS // heads))
        biased = ctx.sizes["BIASED"]
        sums = torch.empty(1 + biased, parts, heads * width, dtype=torch.float32, device=inputs.device)
        _back_kernel[parts, heads](
            grad.contiguous(), inputs, weight, means, scales, of_inputs, sums[0], sums[-1], tokens, heads, width,
            **ctx.sizes,
        )  # fmt: skip
        summed = sums.sum(1).to(weight.dtype)
        return of_inputs, summed[0].view(weight.shape), summed[1] if biased else None, None, None, None


def _sizes(width: int) -> dict[str, int]:
    whole = triton.next_power_of_2(width)
    return {"ROWS": max(1, min(16, _VALUES // whole)), "WIDTH": whole, "num_warps": 4 if whole <= _VALUES else 8}
