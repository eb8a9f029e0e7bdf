"""What the layers do between matrix products, in one pass over the memory of a GPU where there are kernels for it.

Compiled layers take the torch form, which the compiler joins by itself. None of it has gradients.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear, silu

from agiqa.cuda import kernels_missing


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """SiLU(gate) * up, which may overwrite `gate`."""
    if not _has_kernels(gate):
        return silu(gate) * up
    from agiqa.extract.models.minicpm.passes_triton import gate_in_place  # triton is absent without a GPU

    gate_in_place(gate, up)
    return gate


def rotated(read: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """The first `heads` of `read` (tokens, all heads, width), turned by their places; they may be overwritten.

    `cos` and `sin` are (tokens, 1, width); the first half of `sin` is negative, see `signed`.
    """
    turned = read[:, :heads]
    half = read.shape[2] // 2
    if not _has_kernels(read) or half & (half - 1):
        return turned * cos + turned.roll(half, -1) * sin
    from agiqa.extract.models.minicpm.passes_triton import rotate_in_place  # triton is absent without a GPU

    rotate_in_place(read, cos, sin, heads)
    return turned


def signed(sin: Tensor) -> Tensor:
    """`sin` (..., width) with a negative first half: the sign of the other half in a rotation."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat([-first, second], dim=-1)


def added(states: Tensor, values: Tensor, out: Any) -> Tensor:
    """`states` + the nn.Linear `out` of `values`, which may overwrite `states`."""
    if _is_compiling() or out.bias is not None:
        summed: Tensor = states + out(values)
        return summed
    return states.addmm_(values, out.weight.t())  # the product adds to what is there


@torch.library.custom_op("agiqa::linear_gelu", mutates_args=())
def linear_gelu(values: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (by tanh) of a linear map, on a GPU in one kernel."""
    if values.device.type == "cuda":
        activated: Tensor = torch.ops.aten._addmm_activation(bias, values, weight.t(), use_gelu=True)
        return activated
    return gelu(linear(values, weight, bias), approximate="tanh")


@linear_gelu.register_fake
def _(values: Tensor, weight: Tensor, _bias: Tensor) -> Tensor:
    shaped: Tensor = values.new_empty(values.shape[0], weight.shape[0])
    return shaped


def _has_kernels(values: Tensor) -> bool:
    """Whether `values` are on a GPU that the kernels run on, outside of compiled code."""
    return not _is_compiling() and kernels_missing(values.device, ("triton",)) is None


def _is_compiling() -> bool:
    return bool(torch.compiler.is_compiling())
