"""The mLSTM of whole sequences from the zero state (Beck et al. 2024): by Triton kernels, or in torch.

In torch and in the kernels of the package mlstm_kernels, every token of a chunk reads the tokens before it, and a state
carries all earlier chunks (Beck et al. 2025, arXiv 2503.14376). The kernels of this package have no state, which is
faster for items that are not long. None makes matrices of (tokens, tokens) as the torch form of the xlstm package does.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from agiqa.cuda import kernels_missing
from agiqa.heads.model.encoders.kernels.dispatch import (
    LONGEST,
    is_power_of_two,
    product_dtype,
    uncompiled,
    widest_rows,
)

_KERNEL_CHUNK = 128
"""Tokens per chunk of mlstm_kernels."""
_TORCH_CHUNK = 64
"""Most tokens per chunk in torch; the fastest of 32, 64 and 128 at heads of 64 channels on a CPU."""
_LEAST_DIM = 16
"""Fewest channels per head of any kernel."""
_EPS = 1e-6
"""As in the package's torch form."""

Rows = Float[Tensor, "batch heads token dim"]
Gates = Float[Tensor, "batch heads token 1"]


@uncompiled
def mlstm(queries: Rows, keys: Rows, values: Rows, igate_preact: Gates, fgate_preact: Gates) -> Rows:
    """The hidden states, by Triton kernels where they run, else in torch.

    The kernels of mlstm_kernels compute wide heads, and long items where they are installed. Their gradient leaves out
    the part through the normaliser, which is zero before a norm of each head, as in `MLSTMCell`.
    """
    tokens, dim = queries.shape[2:]
    if mlstm_torch_reason(queries.device, dim) is not None or queries.dtype == torch.float64:
        return mlstm_in_torch(queries, keys, values, igate_preact, fgate_preact)
    rows = [part.to(product_dtype(queries)) for part in (queries, keys, values)]
    if dim > widest_rows(queries.device) or (
        tokens > LONGEST and kernels_missing(queries.device, ("mlstm_kernels",)) is None
    ):
        return mlstm_with_states(rows, [igate_preact, fgate_preact])
    from agiqa.heads.model.encoders.kernels.decayed_products_triton import KernelMLSTM  # triton is absent without a GPU

    gates = [gate.squeeze(-1).transpose(1, 2) for gate in (igate_preact, fgate_preact)]
    hidden: Tensor = KernelMLSTM.apply(*(part.transpose(1, 2) for part in rows), *gates, _EPS)
    return hidden.transpose(1, 2)


def mlstm_with_states(rows: list[Tensor], gates: list[Tensor]) -> Rows:
    """`mlstm` by mlstm_kernels."""
    tokens = rows[0].shape[2]
    missing = -tokens % _KERNEL_CHUNK  # causal, so the padding reaches no token

    def padded(values: Tensor) -> Tensor:
        return pad(values, (0, 0, 0, missing))

    exact = [padded(gate).squeeze(-1).float() for gate in gates]
    with torch.autocast("cuda", enabled=False):  # it would round the gates, whose sums run over all tokens
        hidden: Tensor = _kernel()(
            *map(padded, rows), *exact, eps=_EPS, chunk_size=_KERNEL_CHUNK, autocast_kernel_dtype=rows[0].dtype
        )
    return hidden[:, :, :tokens]


def mlstm_in_torch(queries: Rows, keys: Rows, values: Rows, igate_preact: Gates, fgate_preact: Gates) -> Rows:
    """As `mlstm`, in torch: the function of the package's `parallel_stabilized_simple`, gradients included.

    All weights are exponentials of sums of gates, minus the largest sum that a token reads, as there. A last column of
    ones in the values gives the normaliser.
    """
    tokens, dim = queries.shape[2:]
    chunk = math.ceil(tokens / math.ceil(tokens / _TORCH_CHUNK))  # equal chunks leave the least padding
    missing = -tokens % chunk  # causal, so the padding reaches no token
    rows = (queries, keys / math.sqrt(dim), torch.cat([values, torch.ones_like(values[..., :1])], dim=-1))
    asked, offered, given = (pad(part, (0, 0, 0, missing)).unflatten(2, (-1, chunk)) for part in rows)
    gates = (igate_preact, logsigmoid(fgate_preact))
    entry, forget = (pad(gate.squeeze(-1), (0, missing)).unflatten(2, (-1, chunk)) for gate in gates)
    kept = forget.cumsum(dim=-1)  # logarithm of what is left of the chunk's beginning, at each token
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=queries.device).triu(1)
    inside = (kept[..., None] + (entry - kept)[..., None, :]).masked_fill(later, -torch.inf)
    level = inside.amax(dim=-1)
    carried: Tensor | None = None
    if asked.shape[2] > 1:
        states, state_level = _states(offered, given, entry, kept)
        reach = kept + torch.cat([torch.full_like(state_level[:, :, :1], -torch.inf), state_level], dim=2)[..., None]
        level = torch.maximum(level, reach)
        carried = torch.exp(reach - level)[:, :, 1:, :, None] * (asked[:, :, 1:] @ states)
    read = (asked @ offered.transpose(-2, -1) * torch.exp(inside - level[..., None])) @ given
    if carried is not None:
        read = torch.cat([read[:, :, :1], read[:, :, 1:] + carried], dim=2)
    normaliser = torch.maximum(read[..., -1:].abs(), torch.exp(-level)[..., None])
    hidden: Tensor = read[..., :-1] / (normaliser + _EPS)
    return hidden.flatten(2, 3)[:, :, :tokens]


def _states(
    keys: Float[Tensor, "batch heads chunk token dim"],
    values: Float[Tensor, "batch heads chunk token wide"],
    entry: Float[Tensor, "batch heads chunk token"],
    kept: Float[Tensor, "batch heads chunk token"],
) -> tuple[Float[Tensor, "batch heads former dim wide"], Float[Tensor, "batch heads former"]]:
    """The state after each chunk but the last, divided by the exponential of its level, and these levels."""
    left = kept[..., -1]
    entering = (left[..., None] - kept + entry)[:, :, :-1]
    tops, levels = entering.amax(dim=-1), list[Tensor]()
    for chunk in range(entering.shape[2]):
        top = tops[:, :, chunk]
        levels.append(torch.maximum(levels[-1] + left[:, :, chunk], top) if levels else top)
    level = torch.stack(levels, dim=2)
    weights = torch.exp(entering - level[..., None])
    added = (keys[:, :, :-1] * weights[..., None]).transpose(-2, -1) @ values[:, :, :-1]
    faded = torch.exp(level[:, :, :-1] + left[:, :, 1:-1] - level[:, :, 1:])[..., None, None]
    states = [added[:, :, 0]]
    for chunk in range(1, entering.shape[2]):
        states.append(added[:, :, chunk] + faded[:, :, chunk - 1] * states[-1])
    return torch.stack(states, dim=2), level


def mlstm_torch_reason(device: torch.device, dim: int) -> str | None:
    """Why torch computes heads of `dim` channels on `device`; None where kernels do."""
    packages = ("triton",) if dim <= widest_rows(device) else ("triton", "mlstm_kernels")
    unavailable = kernels_missing(device, packages)
    if unavailable is None and not (dim >= _LEAST_DIM and is_power_of_two(dim)):
        return f"the kernels need heads of 2^k channels, {_LEAST_DIM} or more, not {dim}"
    return unavailable


def _kernel() -> Callable[..., Any]:
    from mlstm_kernels.torch.chunkwise import triton_xl_chunk  # imports triton, which is absent without a GPU

    kernel: Callable[..., Any] = triton_xl_chunk.mlstm_chunkwise__xl_chunk
    return kernel
