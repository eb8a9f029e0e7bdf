"""The sLSTM as two Triton kernels, one each way: one program runs all steps of one head for 16 items.

The recurrence is a chain of small products that no library call can batch over the steps. Launched one by one, the
steps of a conversation take longer than everything else of a head. Here the state stays on the chip, and tensors keep
the layout of the layers around, (batch, time, gate, head, dim) with the gates i, f, z, o: copies to another layout
would take as long as the kernels. The equations are those of slstm.py; tests compare both.
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

_ITEMS = 16
"""Items per program, the fewest that tensor cores can multiply."""


@triton.jit
@no_type_check
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
@no_type_check
def _tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
@no_type_check
def _product(weights, at, kept, states, PRECISION: tl.constexpr):
    """Weights times states: from `kept` in bfloat16; wider weights do not fit on the chip and are loaded from `at`."""
    if PRECISION == "bf16":
        product = tl.dot(kept, states.to(tl.bfloat16))
    else:
        product = tl.dot(tl.load(weights + at), states, input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def _four(values, distance):
    """The values at four addresses, `distance` apart: one for each of the gates i, f, z, o."""
    return tl.load(values), tl.load(values + distance), tl.load(values + 2 * distance), tl.load(values + 3 * distance)


@triton.jit(do_not_specialize=["time", "batch"])
@no_type_check
def _run_kernel(
    inputs, weights, bias, gates, hidden, memory, log_norm, time, heads, batch,
    DIM: tl.constexpr, ITEMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, item = tl.program_id(0), tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    channel = tl.arange(0, DIM)
    there = (item < batch)[None, :]
    row = heads * DIM
    state = channel[:, None] + head * DIM + item.to(tl.int64)[None, :] * time * row
    gate = channel[:, None] + head * DIM + item.to(tl.int64)[None, :] * time * 4 * row
    square = channel[:, None] * DIM + channel[None, :]
    of_head = weights + head * 4 * DIM * DIM
    whole = DIM * DIM
    entry_w, forget_w, candidate_w, output_w = _four(of_head + square, whole)
    entry_b, forget_b, candidate_b, output_b = _four(bias + head * DIM + channel[:, None], row)
    h = tl.zeros((DIM, ITEMS), tl.float32)
    r = tl.zeros((DIM, ITEMS), tl.float32)
    norm = tl.full((DIM, ITEMS), float("-inf"), tl.float32)
    for _ in range(time):
        entry = tl.load(inputs + gate, there, 0.0).to(tl.float32) + entry_b
        entry += _product(of_head, square, entry_w, h, PRECISION)
        forget = tl.load(inputs + gate + row, there, 0.0).to(tl.float32) + forget_b
        forget += _product(of_head + whole, square, forget_w, h, PRECISION)
        candidate = tl.load(inputs + gate + 2 * row, there, 0.0).to(tl.float32) + candidate_b
        candidate += _product(of_head + 2 * whole, square, candidate_w, h, PRECISION)
        output = tl.load(inputs + gate + 3 * row, there, 0.0).to(tl.float32) + output_b
        output += _product(of_head + 3 * whole, square, output_w, h, PRECISION)
        decayed = norm + _log_sigmoid(forget)
        largest = tl.maximum(decayed, entry)
        norm = largest + tl.log(tl.exp(decayed - largest) + tl.exp(entry - largest))
        share = tl.exp(entry - norm)
        output = tl.sigmoid(output)
        candidate = _tanh(candidate)
        r += share * (candidate - r)
        h = output * r
        tl.store(gates + gate, share, there)
        tl.store(gates + gate + row, forget, there)
        tl.store(gates + gate + 2 * row, candidate, there)
        tl.store(gates + gate + 3 * row, output, there)
        tl.store(hidden + state, h, there)
        tl.store(memory + state, r, there)
        gate += 4 * row
        state += row
    tl.store(log_norm + channel[:, None] + head * DIM + item[None, :] * row, norm, there)


@triton.jit(do_not_specialize=["time", "batch"])
@no_type_check
def _back_kernel(
    grad, gates, weights, hidden, memory, raw, time, heads, batch,
    DIM: tl.constexpr, ITEMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, item = tl.program_id(0), tl.program_id(1) * ITEMS + tl.arange(0, ITEMS)
    channel = tl.arange(0, DIM)
    there = (item < batch)[None, :]
    row = heads * DIM
    last = item.to(tl.int64)[None, :] * time + time - 1
    state = channel[:, None] + head * DIM + last * row
    gate = channel[:, None] + head * DIM + last * 4 * row
    transposed = channel[None, :] * DIM + channel[:, None]
    of_head = weights + head * 4 * DIM * DIM
    whole = DIM * DIM
    entry_w, forget_w, candidate_w, output_w = _four(of_head + transposed, whole)
    of_hidden = tl.zeros((DIM, ITEMS), tl.float32)
    of_norm = tl.zeros((DIM, ITEMS), tl.float32)
    of_memory = tl.zeros((DIM, ITEMS), tl.float32)
    for back in range(time):
        of_hidden += tl.load(grad + state, there, 0.0)
        share, forget = tl.load(gates + gate, there, 0.0), tl.load(gates + gate + row, there, 0.0)
        candidate, output = tl.load(gates + gate + 2 * row, there, 0.0), tl.load(gates + gate + 3 * row, there, 0.0)
        before = tl.load(memory + state - row, there & (back < time - 1), 0.0)
        h = tl.load(hidden + state, there, 0.0)
        of_memory += of_hidden * output
        of_output = of_hidden * h * (1.0 - output)
        of_candidate = of_memory * share * (1.0 - candidate * candidate)
        of_entry = of_memory * (candidate - before) * share * (1.0 - share) + of_norm * share
        of_norm -= of_entry
        of_forget = of_norm * tl.sigmoid(-forget)
        of_memory *= 1.0 - share
        kind = raw.dtype.element_ty
        tl.store(raw + gate, of_entry.to(kind), there)
        tl.store(raw + gate + row, of_forget.to(kind), there)
        tl.store(raw + gate + 2 * row, of_candidate.to(kind), there)
        tl.store(raw + gate + 3 * row, of_output.to(kind), there)
        of_hidden = _product(of_head, transposed, entry_w, of_entry, PRECISION)
        of_hidden += _product(of_head + whole, transposed, forget_w, of_forget, PRECISION)
        of_hidden += _product(of_head + 2 * whole, transposed, candidate_w, of_candidate, PRECISION)
        of_hidden += _product(of_head + 3 * whole, transposed, output_w, of_output, PRECISION)
        gate -= 4 * row
        state -= row


class KernelSLSTM(torch.autograd.Function):
    """`slstm` of slstm.py by the kernels; `precision` of the products is bf16, tf32, tf32x3 or ieee.

    With bf16 the gradient of the recurrent weights is a product in bfloat16 too, as of any layer under autocast.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        inputs: Float[Tensor, "time batch 4 heads dim"],
        recurrent: Float[Tensor, "heads 4 dim dim"],
        bias: Float[Tensor, "4 heads dim"],
        precision: str,
    ) -> tuple[Tensor, Tensor]:
        """As of slstm.py; `inputs` may have a narrower dtype than the float32 weights."""
        given = inputs.transpose(0, 1).contiguous()
        batch, time, _, heads, dim = given.shape
        weights = recurrent.to(torch.bfloat16 if precision == "bf16" else torch.float32).contiguous()
        gates = torch.empty_like(given, dtype=torch.float32)
        hidden, memory = gates.new_empty(2, batch, time, heads, dim)
        log_norm = gates.new_empty(batch, heads, dim)
        _run_kernel[_grid(heads, batch)](
            given, weights, bias.contiguous(), gates, hidden, memory, log_norm, time, heads, batch,
            DIM=dim, ITEMS=_ITEMS, PRECISION=precision, num_warps=_warps(dim), num_stages=1,
        )  # fmt: skip
        ctx.precision, ctx.dtype = precision, inputs.dtype
        ctx.save_for_backward(gates, weights, hidden, memory)
        last = torch.stack([hidden[:, -1], memory[:, -1], torch.ones_like(log_norm), log_norm])
        ctx.mark_non_differentiable(last)
        return hidden.transpose(0, 1), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of inputs, recurrent weights and bias."""
        gates, weights, hidden, memory = ctx.saved_tensors
        batch, time, _, heads, dim = gates.shape
        raw = torch.empty_like(gates, dtype=ctx.dtype)
        _back_kernel[_grid(heads, batch)](
            grad.transpose(0, 1).contiguous(), gates, weights, hidden, memory, raw, time, heads, batch,
            DIM=dim, ITEMS=_ITEMS, PRECISION=ctx.precision, num_warps=_warps(dim), num_stages=1,
        )  # fmt: skip
        return raw.transpose(0, 1), _of_recurrent(raw, hidden, weights.dtype), _of_bias(raw), None


def _of_recurrent(raw: Tensor, hidden: Tensor, dtype: torch.dtype) -> Float[Tensor, "heads 4 dim dim"]:
    """Sums over items and steps of the gradient of a gate times the state before it."""
    felt, states = raw[:, 1:].to(dtype), hidden[:, :-1].to(dtype)
    with torch.autocast(raw.device.type, enabled=False):
        return torch.einsum("btgko,btki->kgoi", felt, states).float()


def _of_bias(raw: Tensor) -> Float[Tensor, "4 heads dim"]:
    return raw.sum((0, 1), dtype=torch.float32)


def _grid(heads: int, batch: int) -> tuple[int, int]:
    return heads, triton.cdiv(batch, _ITEMS)


def _warps(dim: int) -> int:
    return 8 if dim >= 64 else 4
