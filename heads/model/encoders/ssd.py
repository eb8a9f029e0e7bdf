"""The state-space recurrence of Mamba2 (Dao & Gu 2024, arXiv 2405.21060), in chunks (its section 6).

Per head, with a state h of (state, dim), a scalar decay and a step size dt:

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        y_t = C_t^T h_t

Unrolled, y_t = sum over s <= t of (C_t . B_s) exp(A (dt_{s+1} + ... + dt_t)) dt_s x_s. Within a chunk that sum is a
masked matrix product; what lies before the chunk comes in through the state at its start.
"""

from functools import cache
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

CHUNK = 64
"""Tokens per chunk: time and memory within chunks grow with it, those of the states shrink with it."""
_FUSED_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_FUSED_CHUNK = 256


def ssd(
    inputs: Float[Tensor, "batch time head dim"],
    step_sizes: Float[Tensor, "batch time head"],
    rates: Float[Tensor, " head"],
    writes: Float[Tensor, "batch time state"],
    reads: Float[Tensor, "batch time state"],
    *,
    chunk: int = CHUNK,
) -> Float[Tensor, "batch time head dim"]:
    """y of every step, from the zero state: `inputs` are x, `step_sizes` dt, `rates` A < 0, `writes` B, `reads` C.

    B and C are shared by the heads. The sums of dt A are taken in the dtype of `step_sizes`, which should be float32
    at least; matrix products follow autocast.
    """
    length = inputs.shape[1]
    chunk = min(chunk, length)
    short = -length % chunk
    written = _in_chunks(inputs * step_sizes[..., None], short, chunk).transpose(2, 3)
    decay_sums = _in_chunks(step_sizes * rates, short, chunk).transpose(2, 3).cumsum(-1)
    writes, reads = (_in_chunks(part, short, chunk)[:, :, None] for part in (writes, reads))

    within = _decays(decay_sums) * (reads @ writes.transpose(-1, -2))
    to_end = torch.exp(decay_sums[..., -1:] - decay_sums)
    added = (writes * to_end[..., None]).transpose(-1, -2) @ written
    at_start = _states_at_start(added, decay_sums[..., -1])
    outputs = within @ written + (reads * decay_sums.exp()[..., None]) @ at_start
    return outputs.transpose(2, 3).flatten(1, 2)[:, :length]


def _in_chunks(part: Float[Tensor, "batch time *rest"], short: int, chunk: int) -> Float[Tensor, "batch c step *rest"]:
    """Cut the time into chunks, after `short` zeros at its end, which write nothing and do not decay."""
    padded = pad(part, (0, 0) * (part.ndim - 2) + (0, short)) if short else part
    chunks: Tensor = padded.unflatten(1, (-1, chunk))
    return chunks


def _decays(sums: Float[Tensor, "*rest time"]) -> Float[Tensor, "*rest time time"]:
    """exp(sums[t] - sums[s]) where s <= t, else 0; masked before the exp, whose gradient could be infinite there."""
    later = torch.ones(sums.shape[-1], sums.shape[-1], dtype=torch.bool, device=sums.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()


def _states_at_start(
    added: Float[Tensor, "batch c head state dim"], totals: Float[Tensor, "batch c head"]
) -> Float[Tensor, "batch c head state dim"]:
    """The state before each chunk: what the earlier ones `added`, decayed by the `totals` of those between.

    Sums over a whole item are too long to be subtracted in float32; there are few of them.
    """
    decays = _decays(totals.double().cumsum(1).transpose(1, 2)).to(totals.dtype)
    at_end = torch.einsum("bhji,bihnp->bjhnp", decays, added)
    return torch.cat([torch.zeros_like(at_end[:, :1]), at_end[:, :-1]], dim=1)


def fused_ssd(
    inputs: Float[Tensor, "batch time head dim"],
    step_sizes: Float[Tensor, "batch time head"],
    rates: Float[Tensor, " head"],
    writes: Float[Tensor, "batch time state"],
    reads: Float[Tensor, "batch time state"],
) -> Float[Tensor, "batch time head dim"]:
    """`ssd` by the Triton kernels of the package mamba_ssm, for CUDA and below float64; see `has_fused_ssd`."""
    kernel = import_module(_FUSED_MODULE).mamba_chunk_scan_combined
    outputs: Tensor = kernel(inputs, step_sizes, rates, writes[:, :, None], reads[:, :, None], _FUSED_CHUNK)
    return outputs


@cache
def has_fused_ssd() -> bool:
    """Whether mamba_ssm can be imported."""
    try:
        import_module(_FUSED_MODULE)
    except ImportError:
        return False
    return True
