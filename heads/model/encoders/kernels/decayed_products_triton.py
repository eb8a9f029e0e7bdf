"""The recurrences of mLSTM and Mamba2 over whole items as Triton kernels: causal products of queries, keys and values.

Both compute `o_i = sum over j <= i of w_ij (q_i . k_j) v_j` with w_ij = exp(reach_i + level_j) g_j; the exponent is
never above 0. A program owns some queries (backwards also: some keys) and visits the keys (queries) that it sees, as
FlashAttention does (Dao 2023, arXiv 2307.08691); no matrix of (tokens, tokens) reaches memory. The exponents are sums
over the whole item, so reach and level are each the sum of two float32 numbers.

mLSTM   reach_i = -A_i, level_j = I_j - F_j, with F the sum of log sigmoid(f) and A the largest level so far; g = 1;
        o_i is divided by max(|sum of w_ij (q_i . k_j)|, floor_i) + eps, with floor_i = exp(-A_i - F_i)
Mamba2  reach_i = s_i, level_j = -s_j, with s the sum of dt A; g_j = dt_j

The gradients of reach and level are sums over the rows and the columns of one matrix. Sums of their differences over
all later tokens are the gradients of gates, so both are taken from equal numbers, whose rounding errors then cancel.

Work grows with the square of the tokens; there are no states, which cost kernels in chunks most of their time. Equal
inputs give bitwise equal gradients: nothing is added atomically.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, misc, no-any-unimported"
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownParameterType=false
# pyright: reportMissingParameterType=false, reportUnknownArgumentType=false, reportUntypedFunctionDecorator=false
# pyright: reportMissingImports=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN202

from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Float64
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import logsigmoid

_OWNED = 64
"""Tokens that a program owns; half as many float32 rows of 256 channels fit on the chip."""
_WIDE = 128
"""From so many channels on, a program visits fewer tokens at a time, with more warps."""


@triton.jit
@no_type_check
def _own(time, heads, OWNED: tl.constexpr):
    """Block of tokens, item and head of this program. One axis holds all three, since the others end at 65,535."""
    blocks = tl.cdiv(time, OWNED)
    item = tl.program_id(0) // blocks
    return tl.program_id(0) % blocks, item // heads, item % heads


@triton.jit
@no_type_check
def _weights(reach, level, of_item, row, column, size, seen):
    """exp(reach + level) where `seen`, else 0; each has a second number, `size` further on, with its last digits."""
    reach, level = reach + of_item + row, level + of_item + column
    exponent = (tl.load(reach) + tl.load(level)) + (tl.load(reach + size) + tl.load(level + size))
    return tl.exp(tl.where(seen, exponent, float("-inf")))


@triton.jit
@no_type_check
def _rows(start, at, pitch, channel, time):
    """Rows `at` of a matrix whose rows are `pitch` apart; zero past the end."""
    return tl.load(start + at[:, None] * pitch + channel[None, :], (at < time)[:, None], 0.0)


@triton.jit
@no_type_check
def _start(tensor, batch, head, of_batch, of_head):
    return tensor + tl.cast(batch, tl.int64) * of_batch + tl.cast(head, tl.int64) * of_head


@triton.jit(do_not_specialize=["time", "size"])
@no_type_check
def _forward_kernel(
    queries, keys, values, outputs, reach, level, gain, floor, divisor, slope,
    time, heads, size, scale, eps,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    DIM: tl.constexpr, WIDTH: tl.constexpr, OWNED: tl.constexpr, VISITED: tl.constexpr,
    DIVIDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, batch, head = _own(time, heads, OWNED)
    of_item = (batch * heads + head) * time
    row = block * OWNED + tl.arange(0, OWNED)
    channel, wide = tl.arange(0, DIM), tl.arange(0, WIDTH)
    query = _rows(_start(queries, batch, head, q_batch, q_head), row, q_row, channel, time)
    key_start = _start(keys, batch, head, k_batch, k_head)
    value_start = _start(values, batch, head, v_batch, v_head)
    total = tl.zeros((OWNED, WIDTH), tl.float32)
    norm = tl.zeros((OWNED,), tl.float32)
    known = row < time
    for begin in range(0, tl.minimum((block + 1) * OWNED, time), VISITED):
        column = begin + tl.arange(0, VISITED)
        there = column < time
        seen = (row[:, None] >= column[None, :]) & known[:, None]
        key = _rows(key_start, column, k_row, channel, time)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        own = tl.where(known, row, 0)
        weights = _weights(reach, level, of_item, own[:, None], tl.where(there, column, 0)[None, :], size, seen)
        products *= weights
        if DIVIDED:
            norm += tl.sum(products, 1)
        else:
            products *= tl.load(gain + of_item + column, there, 0.0)[None, :]
        value = _rows(value_start, column, v_row, wide, time)
        total += tl.dot(products.to(value.dtype), value, input_precision=PRECISION)
    if DIVIDED:
        least = tl.load(floor + of_item + row, known, 1.0)
        over = tl.maximum(tl.abs(norm), least) + eps
        sign = tl.where(norm > 0.0, 1.0, -1.0)
        tl.store(divisor + of_item + row, over, known)
        tl.store(slope + of_item + row, tl.where(tl.abs(norm) > least, sign / over, 0.0), known)
        total /= over[:, None]
    place = _start(outputs, batch, head, o_batch, o_head) + row[:, None] * o_row + wide[None, :]
    tl.store(place, total.to(outputs.dtype.element_ty), known[:, None])


@triton.jit(do_not_specialize=["time", "size"])
@no_type_check
def _queries_kernel(
    queries, keys, values, outputs, grad, of_queries, reach, level, gain, divisor, slope, of_reach, of_norm,
    time, heads, size, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, o_batch, o_head, o_row,
    g_batch, g_head, g_row, d_batch, d_head, d_row,
    DIM: tl.constexpr, WIDTH: tl.constexpr, OWNED: tl.constexpr, VISITED: tl.constexpr,
    DIVIDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, batch, head = _own(time, heads, OWNED)
    of_item = (batch * heads + head) * time
    row = block * OWNED + tl.arange(0, OWNED)
    channel, wide = tl.arange(0, DIM), tl.arange(0, WIDTH)
    known = row < time
    own = tl.where(known, row, 0)
    query = _rows(_start(queries, batch, head, q_batch, q_head), row, q_row, channel, time)
    of_output = _rows(_start(grad, batch, head, g_batch, g_head), row, g_row, wide, time)
    inverse = tl.full((OWNED,), 1.0, tl.float32)
    pull = tl.zeros((OWNED,), tl.float32)
    if DIVIDED:
        inverse = 1.0 / tl.load(divisor + of_item + row, known, 1.0)
        output = _rows(_start(outputs, batch, head, o_batch, o_head), row, o_row, wide, time)
        along = tl.sum(of_output.to(tl.float32) * output.to(tl.float32), 1)
        pull = -along * tl.load(slope + of_item + row, known, 0.0)
        tl.store(of_norm + of_item + row, pull, known)
    key_start = _start(keys, batch, head, k_batch, k_head)
    value_start = _start(values, batch, head, v_batch, v_head)
    total = tl.zeros((OWNED, DIM), tl.float32)
    of_exponent = tl.zeros((OWNED,), tl.float32)
    for begin in range(0, tl.minimum((block + 1) * OWNED, time), VISITED):
        column = begin + tl.arange(0, VISITED)
        there = column < time
        seen = (row[:, None] >= column[None, :]) & known[:, None]
        value = _rows(value_start, column, v_row, wide, time)
        of_products = tl.dot(of_output, tl.trans(value), input_precision=PRECISION) * inverse[:, None] + pull[:, None]
        visited = tl.where(there, column, 0)[None, :]
        of_products *= _weights(reach, level, of_item, own[:, None], visited, size, seen)
        if not DIVIDED:
            of_products *= tl.load(gain + of_item + column, there, 0.0)[None, :]
        key = _rows(key_start, column, k_row, channel, time)
        products = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scale
        of_exponent += tl.sum(of_products * products, 1)
        total += tl.dot(of_products.to(key.dtype), key, input_precision=PRECISION)
    tl.store(of_reach + of_item + row, of_exponent, known)
    place = _start(of_queries, batch, head, d_batch, d_head) + row[:, None] * d_row + channel[None, :]
    tl.store(place, (total * scale).to(of_queries.dtype.element_ty), known[:, None])


@triton.jit(do_not_specialize=["time", "size"])
@no_type_check
def _keys_kernel(
    queries, keys, values, grad, of_keys, of_values, reach, level, gain, divisor, of_norm, of_level,
    time, heads, size, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, g_batch, g_head, g_row,
    dk_batch, dk_head, dk_row, dv_batch, dv_head, dv_row,
    DIM: tl.constexpr, WIDTH: tl.constexpr, OWNED: tl.constexpr, VISITED: tl.constexpr,
    DIVIDED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    block, batch, head = _own(time, heads, OWNED)
    of_item = (batch * heads + head) * time
    column = block * OWNED + tl.arange(0, OWNED)
    channel, wide = tl.arange(0, DIM), tl.arange(0, WIDTH)
    there = column < time
    own = tl.where(there, column, 0)
    key = _rows(_start(keys, batch, head, k_batch, k_head), column, k_row, channel, time)
    value = _rows(_start(values, batch, head, v_batch, v_head), column, v_row, wide, time)
    query_start = _start(queries, batch, head, q_batch, q_head)
    grad_start = _start(grad, batch, head, g_batch, g_head)
    of_key = tl.zeros((OWNED, DIM), tl.float32)
    of_value = tl.zeros((OWNED, WIDTH), tl.float32)
    of_exponent = tl.zeros((OWNED,), tl.float32)
    for begin in range(block * OWNED, time, VISITED):
        row = begin + tl.arange(0, VISITED)
        known = row < time
        seen = (row[None, :] >= column[:, None]) & known[None, :] & there[:, None]
        query = _rows(query_start, row, q_row, channel, time)
        products = tl.dot(key, tl.trans(query), input_precision=PRECISION) * scale
        weights = _weights(reach, level, of_item, tl.where(known, row, 0)[None, :], own[:, None], size, seen)
        of_output = _rows(grad_start, row, g_row, wide, time)
        of_products = tl.dot(value, tl.trans(of_output), input_precision=PRECISION)
        inverse = tl.full((VISITED,), 1.0, tl.float32)
        if DIVIDED:
            inverse = 1.0 / tl.load(divisor + of_item + row, known, 1.0)
            of_products = of_products * inverse[None, :] + tl.load(of_norm + of_item + row, known, 0.0)[None, :]
        read = (products * weights * inverse[None, :]).to(of_output.dtype)
        of_value += tl.dot(read, of_output, input_precision=PRECISION)
        of_products *= weights
        of_exponent += tl.sum(of_products * products, 1)
        of_key += tl.dot(of_products.to(query.dtype), query, input_precision=PRECISION)
    if not DIVIDED:
        factor = tl.load(gain + of_item + column, there, 0.0)[:, None]
        of_key *= factor
        of_value *= factor
    tl.store(of_level + of_item + column, of_exponent, there)
    place = _start(of_keys, batch, head, dk_batch, dk_head) + column[:, None] * dk_row + channel[None, :]
    tl.store(place, (of_key * scale).to(of_keys.dtype.element_ty), there[:, None])
    place = _start(of_values, batch, head, dv_batch, dv_head) + column[:, None] * dv_row + wide[None, :]
    tl.store(place, of_value.to(of_values.dtype.element_ty), there[:, None])


class _Exponents(NamedTuple):
    """What weighs the products; each (batch, head, token), float32."""

    reach: Float[Tensor, "2 batch head token"]
    level: Float[Tensor, "2 batch head token"]
    gain: Float[Tensor, "batch head token"] | None
    """g of Mamba2."""
    floor: Float[Tensor, "batch head token"] | None
    """Of the mLSTM."""


Rows = Float[Tensor, "batch token head channel"]
Codes = Float[Tensor, "batch token head state"]
"""Queries and keys, whose width may be another than that of the values."""
OfHead = Float[Tensor, "batch head token"]


class KernelMLSTM(torch.autograd.Function):
    """`mlstm` of mlstm.py by the kernels, with tokens before heads; gates are (batch, token, head)."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, queries: Codes, keys: Codes, values: Rows, entry: Tensor, forget: Tensor, eps: float
    ) -> Rows:
        """Rows are of one dtype, with channels next to each other."""
        entry, forget = (gate.transpose(1, 2).float() for gate in (entry, forget))
        kept = logsigmoid(forget).cumsum(-1, dtype=torch.float64)
        levels = entry - kept
        top = levels.cummax(-1).values
        exponents = _Exponents(_in_two(-top), _in_two(levels), None, torch.exp(-top - kept).float())
        outputs, divisor, slope = _run(queries, keys, values, exponents, queries.shape[-1] ** -0.5, eps)
        ctx.save_for_backward(queries, keys, values, forget, outputs, divisor, slope, *exponents[:2])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Rows) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of rows and gates."""
        *rows, forget, outputs, divisor, slope, reach, level = ctx.saved_tensors
        exponents = _Exponents(reach, level, None, divisor)
        *of_rows, of_reach, of_level = _run_back(rows, outputs, grad, exponents, slope, rows[0].shape[-1] ** -0.5)
        of_kept = _sum_of_later(of_reach - of_level)
        of_gates = [of_level, of_kept.float() * torch.sigmoid(-forget)]
        return *of_rows, *(gate.transpose(1, 2) for gate in of_gates), None


class KernelSSD(torch.autograd.Function):
    """`ssd` of mamba2.py by the kernels; `sums` are those of dt A up to each step, (batch, head, token) in float64."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        inputs: Rows,
        step_sizes: OfHead,
        sums: Float64[Tensor, "batch head token"],
        writes: Codes,
        reads: Codes,
    ) -> Rows:
        """`writes` and `reads` may be expanded over the heads; all rows are of one dtype."""
        exponents = _Exponents(_in_two(sums), _in_two(-sums), step_sizes.float().contiguous(), None)
        outputs, *_ = _run(reads, writes, inputs, exponents, 1.0, 0.0)
        ctx.save_for_backward(reads, writes, inputs, *exponents[:3])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Rows) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of rows, step sizes and sums."""
        *rows, reach, level, gain = ctx.saved_tensors
        exponents = _Exponents(reach, level, gain, None)
        of_reads, of_writes, of_inputs, of_reach, of_level = _run_back(rows, None, grad, exponents, None, 1.0)
        return of_inputs, of_level, of_reach.double() - of_level * gain, of_writes, of_reads


def _in_two(exact: Float64[Tensor, "batch head token"]) -> Float[Tensor, "2 batch head token"]:
    """The nearest float32 numbers, and what they lack."""
    nearest = exact.float()
    return torch.stack([nearest, (exact - nearest).float()])


def _sum_of_later(values: OfHead) -> Float64[Tensor, "batch head token"]:
    """The sum of each value and all later ones."""
    sums = values.cumsum(-1, dtype=torch.float64)
    return sums[..., -1:] - sums + values


def _run(
    queries: Codes, keys: Codes, values: Rows, exponents: _Exponents, scale: float, eps: float
) -> tuple[Rows, OfHead, OfHead]:
    """The outputs; for the mLSTM also their divisors, and 1 / divisor with the sign of the sum, 0 below the floor."""
    queries, keys, values = (_in_rows(part) for part in (queries, keys, values))
    batch, time, heads, _ = queries.shape
    outputs = values.new_empty(values.shape)
    divided = exponents.floor is not None
    divisor, slope = exponents.reach.new_empty(2, *exponents.reach.shape[1:])
    unused = exponents.reach
    _forward_kernel[_grid(queries, values)](
        queries, keys, values, outputs, exponents.reach, exponents.level,
        unused if exponents.gain is None else exponents.gain, unused if exponents.floor is None else exponents.floor,
        divisor, slope, time, heads, batch * heads * time, scale, eps,
        *_pitches(queries), *_pitches(keys), *_pitches(values), *_pitches(outputs),
        DIVIDED=divided, **_sizes(queries, values, backwards=False),
    )  # fmt: skip
    return outputs, divisor, slope


def _run_back(
    rows: list[Tensor], outputs: Rows | None, grad: Rows, exponents: _Exponents, slope: Tensor | None, scale: float
) -> tuple[Codes, Codes, Rows, OfHead, OfHead]:
    """Gradients of queries, keys, values, reach and level; of g in place of level for Mamba2.

    `outputs` and `slope` are those of the mLSTM.
    """
    queries, keys, values = (_in_rows(part) for part in rows)
    grad = _in_rows(grad.to(values.dtype))
    outputs = grad if outputs is None else outputs
    batch, time, heads, _ = queries.shape
    of_queries, of_keys, of_values = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in rows)
    of_reach, of_level, of_norm = exponents.reach.new_empty(3, *exponents.reach.shape[1:])
    unused = exponents.reach
    divided = slope is not None
    gain = unused if exponents.gain is None else exponents.gain
    divisor = unused if exponents.floor is None else exponents.floor
    sizes = {"DIVIDED": divided, **_sizes(queries, values, backwards=True)}
    _queries_kernel[_grid(queries, values)](
        queries, keys, values, outputs, grad, of_queries, exponents.reach, exponents.level, gain, divisor,
        unused if slope is None else slope, of_reach, of_norm, time, heads, batch * heads * time, scale,
        *_pitches(queries), *_pitches(keys), *_pitches(values), *_pitches(outputs), *_pitches(grad),
        *_pitches(of_queries), **sizes,
    )  # fmt: skip
    _keys_kernel[_grid(queries, values)](
        queries, keys, values, grad, of_keys, of_values, exponents.reach, exponents.level, gain, divisor, of_norm,
        of_level, time, heads, batch * heads * time, scale,
        *_pitches(queries), *_pitches(keys), *_pitches(values), *_pitches(grad), *_pitches(of_keys),
        *_pitches(of_values), **sizes,
    )  # fmt: skip
    return of_queries, of_keys, of_values, of_reach, of_level


def _in_rows(part: Rows) -> Rows:
    """The rows, copied unless the channels of a row lie next to each other."""
    return part if part.stride(-1) == 1 else part.contiguous()


def _pitches(part: Rows) -> tuple[int, int, int]:
    """Distances between batches, heads and rows."""
    batch, row, head, _ = part.stride()
    return batch, head, row


def _grid(queries: Codes, values: Rows) -> tuple[int]:
    batch, time, heads, dim = queries.shape
    return (triton.cdiv(time, _owned(max(dim, values.shape[-1]), queries.dtype)) * batch * heads,)


def _sizes(queries: Codes, values: Rows, *, backwards: bool) -> dict[str, Any]:
    """Sizes of the blocks. Tensor cores multiply float32 in three passes, wide rows in one (as mlstm_kernels do)."""
    dim, width = queries.shape[-1], values.shape[-1]
    widest, whole = max(dim, width), queries.dtype == torch.float32
    wide = widest >= _WIDE
    return {
        "DIM": dim,
        "WIDTH": width,
        "OWNED": _owned(widest, queries.dtype),
        "VISITED": 16 if wide and whole else 32 if wide and backwards else 64,
        "PRECISION": "tf32x3" if whole and not wide else "tf32",
        "num_warps": 8 if wide else 4,
        "num_stages": 1 if whole else 2,
    }


def _owned(channels: int, dtype: torch.dtype) -> int:
    return _OWNED // 2 if dtype == torch.float32 and channels > _WIDE else _OWNED
