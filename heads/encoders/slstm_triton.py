"""The two loops of the sLSTM as Triton kernels: one program runs all steps of one head for 16 items.

The recurrence is a chain of small products that no library call can batch over the steps: launched one by one, the
steps of a conversation take longer than everything else of a head. Here the state stays on the chip.
Layouts and equations are those of slstm.py, whose loops these replace; the tests compare both.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN202

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

_ITEMS = 16
"""Items per program, the least that a product on tensor cores has."""


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
    """`kept` (bfloat16) times the states; in another precision the weights do not fit on the chip and are read `at`."""
    if PRECISION == "bf16":
        product = tl.dot(kept, states.to(tl.bfloat16))
    else:
        product = tl.dot(tl.load(weights + at), states, input_precision=PRECISION)
    return product


@triton.jit
@no_type_check
def _run_kernel(
    gates, weights, hidden, memory, log_norm, time, heads, batch,
    DIM: tl.constexpr, ITEMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0), tl.program_id(1) * ITEMS
    channel, item = tl.arange(0, DIM), first + tl.arange(0, ITEMS)
    place = channel[:, None] * batch + item[None, :]
    there = (item < batch)[None, :]
    slab = DIM * batch
    square = channel[:, None] * DIM + channel[None, :]
    of_head = weights + head * 4 * DIM * DIM
    whole = DIM * DIM
    forget_w = tl.load(of_head + square)
    output_w = tl.load(of_head + whole + square)
    input_w = tl.load(of_head + 2 * whole + square)
    candidate_w = tl.load(of_head + 3 * whole + square)
    h = tl.zeros((DIM, ITEMS), tl.float32)
    r = tl.zeros((DIM, ITEMS), tl.float32)
    norm = tl.full((DIM, ITEMS), float("-inf"), tl.float32)
    for step in range(time):
        at = gates + (step * heads + head).to(tl.int64) * 4 * slab + place
        forget = tl.load(at, there, 0.0) + _product(of_head, square, forget_w, h, PRECISION)
        output = tl.load(at + slab, there, 0.0) + _product(of_head + whole, square, output_w, h, PRECISION)
        entry = tl.load(at + 2 * slab, there, 0.0)
        entry += _product(of_head + 2 * whole, square, input_w, h, PRECISION)
        candidate = tl.load(at + 3 * slab, there, 0.0)
        candidate += _product(of_head + 3 * whole, square, candidate_w, h, PRECISION)
        decayed = norm + _log_sigmoid(forget)
        largest = tl.maximum(decayed, entry)
        norm = largest + tl.log(tl.exp(decayed - largest) + tl.exp(entry - largest))
        share = tl.exp(entry - norm)
        output = tl.sigmoid(output)
        candidate = _tanh(candidate)
        r += share * (candidate - r)
        h = output * r
        tl.store(at, forget, there)
        tl.store(at + slab, output, there)
        tl.store(at + 2 * slab, share, there)
        tl.store(at + 3 * slab, candidate, there)
        state = ((step + 1) * heads + head).to(tl.int64) * slab + place
        tl.store(hidden + state, h, there)
        tl.store(memory + state, r, there)
    tl.store(log_norm + head * slab + place, norm, there)


@triton.jit
@no_type_check
def _back_kernel(
    grad, gates, weights, hidden, memory, raw, time, heads, batch,
    DIM: tl.constexpr, ITEMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, first = tl.program_id(0), tl.program_id(1) * ITEMS
    channel, item = tl.arange(0, DIM), first + tl.arange(0, ITEMS)
    place = channel[:, None] * batch + item[None, :]
    there = (item < batch)[None, :]
    slab = DIM * batch
    transposed = channel[None, :] * DIM + channel[:, None]
    of_head = weights + head * 4 * DIM * DIM
    whole = DIM * DIM
    forget_w = tl.load(of_head + transposed)
    output_w = tl.load(of_head + whole + transposed)
    input_w = tl.load(of_head + 2 * whole + transposed)
    candidate_w = tl.load(of_head + 3 * whole + transposed)
    of_hidden = tl.zeros((DIM, ITEMS), tl.float32)
    of_norm = tl.zeros((DIM, ITEMS), tl.float32)
    of_memory = tl.zeros((DIM, ITEMS), tl.float32)
    for back in range(time):
        step = time - 1 - back
        at = (step * heads + head).to(tl.int64) * 4 * slab + place
        state = (step * heads + head).to(tl.int64) * slab + place
        of_hidden += tl.load(grad + state, there, 0.0)
        forget, output = tl.load(gates + at, there, 0.0), tl.load(gates + at + slab, there, 0.0)
        share, candidate = tl.load(gates + at + 2 * slab, there, 0.0), tl.load(gates + at + 3 * slab, there, 0.0)
        before = tl.load(memory + state, there, 0.0)
        h = tl.load(hidden + state + heads * slab, there, 0.0)
        of_memory += of_hidden * output
        of_output = of_hidden * h * (1.0 - output)
        of_candidate = of_memory * share * (1.0 - candidate * candidate)
        of_entry = of_memory * (candidate - before) * share * (1.0 - share) + of_norm * share
        of_norm -= of_entry
        of_forget = of_norm * tl.sigmoid(-forget)
        of_memory *= 1.0 - share
        tl.store(raw + at, of_forget, there)
        tl.store(raw + at + slab, of_output, there)
        tl.store(raw + at + 2 * slab, of_entry, there)
        tl.store(raw + at + 3 * slab, of_candidate, there)
        of_hidden = _product(of_head, transposed, forget_w, of_forget, PRECISION)
        of_hidden += _product(of_head + whole, transposed, output_w, of_output, PRECISION)
        of_hidden += _product(of_head + 2 * whole, transposed, input_w, of_entry, PRECISION)
        of_hidden += _product(of_head + 3 * whole, transposed, candidate_w, of_candidate, PRECISION)


def run(
    gates: Float[Tensor, "time heads 4 dim batch"], weights: Float[Tensor, "heads 4*dim dim"], *, precision: str
) -> tuple[
    Float[Tensor, "time+1 heads dim batch"], Float[Tensor, "time+1 heads dim batch"], Float[Tensor, "heads dim batch"]
]:
    """As `run` of slstm.py; `precision` of the products is bf16, tf32, tf32x3 or ieee."""
    time, heads, _, dim, batch = gates.shape
    hidden, memory = gates.new_empty(2, time + 1, heads, dim, batch)
    hidden[0] = memory[0] = 0.0
    log_norm = gates.new_empty(heads, dim, batch)
    _run_kernel[_grid(heads, batch)](
        gates, _operand(weights, precision), hidden, memory, log_norm, time, heads, batch,
        DIM=dim, ITEMS=_ITEMS, PRECISION=precision, num_warps=_warps(dim), num_stages=1,
    )  # fmt: skip
    return hidden, memory, log_norm


def raw_gradients(
    grad: Float[Tensor, "time heads dim batch"],
    gates: Float[Tensor, "time heads 4 dim batch"],
    weights: Float[Tensor, "heads 4*dim dim"],
    hidden: Float[Tensor, "time+1 heads dim batch"],
    memory: Float[Tensor, "time+1 heads dim batch"],
    *,
    precision: str,
) -> Float[Tensor, "time heads 4 dim batch"]:
    """As `raw_gradients` of slstm.py; `precision` as in `run`."""
    time, heads, _, dim, batch = gates.shape
    raw = torch.empty_like(gates)
    _back_kernel[_grid(heads, batch)](
        grad.contiguous(), gates, _operand(weights, precision), hidden, memory, raw, time, heads, batch,
        DIM=dim, ITEMS=_ITEMS, PRECISION=precision, num_warps=_warps(dim), num_stages=1,
    )  # fmt: skip
    return raw


def _operand(weights: Tensor, precision: str) -> Tensor:
    return weights.to(torch.bfloat16 if precision == "bf16" else torch.float32).contiguous()


def _grid(heads: int, batch: int) -> tuple[int, int]:
    return heads, triton.cdiv(batch, _ITEMS)


def _warps(dim: int) -> int:
    return 8 if dim >= 64 else 4
