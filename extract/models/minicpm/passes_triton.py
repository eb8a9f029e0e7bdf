"""The passes of `agiqa.extract.models.minicpm.passes` as Triton kernels, which compute in float32."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN202

from typing import no_type_check

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
"""Values of one program."""
_HEADS = 8
"""Heads of one program."""


@triton.jit(do_not_specialize=["count"])
@no_type_check
def _gate_kernel(gate, up, count, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    values = tl.load(gate + place, inside, 0.0).to(tl.float32)
    product = values * tl.sigmoid(values) * tl.load(up + place, inside, 0.0).to(tl.float32)
    tl.store(gate + place, product.to(gate.dtype.element_ty), inside)


@triton.jit
@no_type_check
def _rotate_kernel(read, cos, sin, pitch, heads, HALF: tl.constexpr, HEADS: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    channel = tl.arange(0, HALF)
    there = (head < heads)[:, None] & (channel >= 0)[None, :]
    place = read + token * pitch + head[:, None] * (2 * HALF) + channel[None, :]
    first = tl.load(place, there, 0.0).to(tl.float32)
    second = tl.load(place + HALF, there, 0.0).to(tl.float32)
    across = tl.load(cos + token * 2 * HALF + channel).to(tl.float32)[None, :]
    up = tl.load(sin + token * 2 * HALF + HALF + channel).to(tl.float32)[None, :]
    tl.store(place, (first * across - second * up).to(read.dtype.element_ty), there)
    tl.store(place + HALF, (second * across + first * up).to(read.dtype.element_ty), there)


def gate_in_place(gate: Tensor, up: Tensor) -> None:
    """`gate` becomes SiLU(gate) * up; both contiguous and of one shape."""
    count = gate.numel()
    _gate_kernel[(triton.cdiv(count, _BLOCK),)](gate, up, count, BLOCK=_BLOCK)


def rotate_in_place(read: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    """Turn the first `heads` of `read` (tokens, all heads, width), contiguous; `cos`, `sin` (tokens, 1, width) too."""
    tokens, _, width = read.shape
    grid = (tokens, triton.cdiv(heads, _HEADS))
    _rotate_kernel[grid](read, cos, sin, read.stride(0), heads, HALF=width // 2, HEADS=_HEADS)
