"""The encoder `mamba2`: selective state spaces (Dao & Gu 2024, arXiv 2405.21060), causal.

Parameters have the names and shapes of transformers' Mamba2Model with one group, so that weights fit both. Per head,
with a state h of (state, dim), a scalar decay and a step size dt, the recurrence is

    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T        y_t = C_t^T h_t

Unrolled, y_t = sum over s <= t of (C_t . B_s) exp(A (dt_{s+1} + ... + dt_t)) dt_s x_s. `ssd` computes it in chunks
(section 6 of the paper): within a chunk the sum is a masked matrix product; earlier chunks enter through the state at
the start of the chunk.
"""

import math
from collections.abc import Iterable
from functools import cache
from importlib import import_module

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import pad, silu, softplus

from agiqa.cuda import kernels_missing
from agiqa.heads.model.encoders.base import ENCODERS, EitherWay, Encoded, Encoder, Mask, Tokens, refuse_bidirectional
from agiqa.heads.model.encoders.kernels.dispatch import (
    LONGEST,
    causal_conv_silu,
    is_power_of_two,
    norm,
    product_dtype,
    uncompiled,
    widest_rows,
)
from agiqa.heads.settings.config import HeadConfig

_EXPAND = 2
_KERNEL = 4
_HEAD_DIM = 64
_EPSILON = 1e-5
_RATES = (1.0, 16.0)
_STEP_SIZES = (1e-3, 1e-1)
"""Initial -A (uniform) and dt (uniform in the logarithm), as in the authors' code."""
CHUNK = 32
"""Most tokens per chunk: time and memory within chunks grow with it, those of the states shrink with it."""
_LEAST_DIM = 16
"""Least size of heads and states that the Triton kernels compute."""
_FUSED_MODULE = "mamba_ssm.ops.triton.ssd_combined"
_FUSED_CHUNK = 256


class Mamba2Encoder(Encoder):
    """`layers` pre-norm residual blocks, and a norm at the end. Every part is causal.

    Padding is set to zero first: matrix products multiply it by zero, which would keep a NaN. What the blocks add is
    summed in the dtype of the weights, under autocast too.
    """

    graphable = True
    settings = frozenset({"layers", "state_size", "dropout"})

    def __init__(self, config: HeadConfig) -> None:
        """Raises ConfigError for `bidirectional`, for which `ENCODERS.get("mamba2")` builds two of these."""
        refuse_bidirectional(config, Mamba2Encoder, entry="mamba2")
        super().__init__(config.width)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.layers))
        self.norm_f = nn.RMSNorm(config.width, eps=_EPSILON)
        self._scan_sizes = (head_dim_for(_EXPAND * config.width), config.state_size)

    @property
    def compiled_blocks(self) -> Iterable[nn.Module]:
        """The layers."""
        return self.layers

    @property
    def kernels(self) -> str:
        """Which scan runs on the device of the weights."""
        if ssd_torch_reason(self.norm_f.weight.device, *self._scan_sizes) is None:
            return "Triton kernels"
        fused = self.norm_f.weight.is_cuda and has_fused_ssd()
        return "mamba_ssm scan" if fused else "torch, chunked scan"

    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """The normed output of the last block, with zeros in the padding."""
        padding = ~mask[..., None]
        states = tokens.masked_fill(padding, 0.0).to(self.norm_f.weight.dtype)
        for block in self.layers:
            states = block(states)
        outputs = norm(states, self.norm_f.weight, eps=_EPSILON, centred=False, dtype=states.dtype)
        return outputs.masked_fill(padding, 0.0)


ENCODERS.add("mamba2", EitherWay(Mamba2Encoder))


class Mamba2Block(nn.Module):
    """x + dropout(mixer(norm(x)))."""

    def __init__(self, config: HeadConfig) -> None:
        """`config` gives width, state size and dropout."""
        super().__init__()
        self.norm = nn.RMSNorm(config.width, eps=_EPSILON)
        self.mixer = Mamba2Mixer(config.width, config.state_size, head_dim_for(_EXPAND * config.width))
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        """The tokens, and what the mixer adds."""
        added: Tensor = self.dropout(self.mixer(norm(tokens, self.norm.weight, eps=_EPSILON, centred=False)))
        return tokens + added


class Mamba2Mixer(nn.Module):
    """A gate, and x, B, C and dt from one projection; a short causal convolution; the scan; a gated norm (Figure 6)."""

    def __init__(self, width: int, state_size: int, head_dim: int) -> None:
        """`head_dim` must divide 2 x `width`, the channels inside."""
        super().__init__()
        inner = _EXPAND * width
        mixed, heads = inner + 2 * state_size, inner // head_dim
        self.in_proj = nn.Linear(width, inner + mixed + heads, bias=False)
        self.conv1d = nn.Conv1d(mixed, mixed, _KERNEL, groups=mixed, padding=_KERNEL - 1)
        self.dt_bias = nn.Parameter(_inverse_softplus(_log_uniform(heads)))
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(*_RATES).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=_EPSILON)
        self.out_proj = nn.Linear(inner, width, bias=False)
        self._parts = (inner, mixed, heads)
        self._mixed_parts = (inner, state_size, state_size)

    def forward(self, tokens: Tokens) -> Tokens:
        """Step sizes and decays are in the dtype of the weights, under autocast too."""
        gate, mixed, raw_steps = self.in_proj(tokens).split(self._parts, dim=-1)
        convolved = causal_conv_silu(mixed, self.conv1d.weight, self.conv1d.bias)
        values, writes, reads = convolved.split(self._mixed_parts, dim=-1)
        values = values.unflatten(-1, (len(self.D), -1))
        step_sizes = softplus(raw_steps + self.dt_bias)
        scanned = scan(values, step_sizes, -self.A_log.exp(), writes, reads)
        outputs = (scanned + self.D[:, None] * values).flatten(2)
        normed = norm(outputs * silu(gate), self.norm.weight, eps=_EPSILON, centred=False)
        mixed_tokens: Tensor = self.out_proj(normed)
        return mixed_tokens


def head_dim_for(inner: int) -> int:
    """The divisor of `inner` nearest to 64 in ratio, the smaller of two that are as near."""
    divisors = (size for size in range(1, inner + 1) if inner % size == 0)
    return min(divisors, key=lambda size: abs(math.log(size / _HEAD_DIM)))


def _log_uniform(heads: int) -> Float[Tensor, " head"]:
    """Random step sizes, uniform in the logarithm."""
    low, high = _STEP_SIZES
    return torch.empty(heads).uniform_(math.log(low), math.log(high)).exp()


def _inverse_softplus(values: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """log(exp(v) - 1), computed without cancellation."""
    return values + torch.log(-torch.expm1(-values))


def scan(
    inputs: Float[Tensor, "batch time head dim"],
    step_sizes: Float[Tensor, "batch time head"],
    rates: Float[Tensor, " head"],
    writes: Float[Tensor, "batch time state"],
    reads: Float[Tensor, "batch time state"],
) -> Float[Tensor, "batch time head dim"]:
    """`ssd` by the fastest form that runs: Triton kernels, those of mamba_ssm, or torch."""
    given = (inputs, step_sizes, rates, writes, reads)
    if not inputs.is_cuda or inputs.dtype == torch.float64:
        return ssd(*given)
    sizes = inputs.shape[-1], reads.shape[-1]
    if inputs.shape[1] <= LONGEST and ssd_torch_reason(inputs.device, *sizes) is None:
        return _by_kernels(*given)
    return (fused_ssd if has_fused_ssd() else ssd)(*given)


def ssd_torch_reason(device: torch.device, head_dim: int, state_size: int) -> str | None:
    """Why the Triton kernels of this package compute no scan of these sizes on `device`; None where they do."""
    unavailable = kernels_missing(device, ("triton",))
    if unavailable is not None:
        return unavailable
    most = widest_rows(device)
    if most < _LEAST_DIM:
        return "the kernels need a GPU with more shared memory per block"
    if all(is_power_of_two(size) and _LEAST_DIM <= size <= most for size in (head_dim, state_size)):
        return None
    return f"the kernels need heads and states of 2^k, {_LEAST_DIM} to {most}, not {head_dim} and {state_size}"


@uncompiled
def _by_kernels(inputs: Tensor, step_sizes: Tensor, rates: Tensor, writes: Tensor, reads: Tensor) -> Tensor:
    from agiqa.heads.model.encoders.kernels.decayed_products_triton import KernelSSD  # triton is absent without a GPU

    dtype, heads = product_dtype(inputs), inputs.shape[2]
    of_heads = step_sizes.transpose(1, 2)
    sums = (of_heads * rates[:, None]).cumsum(-1, dtype=torch.float64)
    shared = (part.to(dtype)[:, :, None].expand(-1, -1, heads, -1) for part in (writes, reads))
    outputs: Tensor = KernelSSD.apply(inputs.to(dtype), of_heads, sums, *shared)
    return outputs


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
    chunk = math.ceil(length / math.ceil(length / chunk))  # equal chunks leave the least padding
    values = _in_chunks(inputs.transpose(1, 2), chunk)
    steps = _in_chunks(step_sizes.transpose(1, 2), chunk)
    decay_sums = (steps * rates[:, None, None]).cumsum(-1)
    writes, reads = (_in_chunks(part[:, None], chunk) for part in (writes, reads))

    within = _decays(decay_sums) * (reads @ writes.transpose(-1, -2)) * steps[..., None, :]
    to_end = torch.exp(decay_sums[..., -1:] - decay_sums) * steps
    added = (writes * to_end[..., None]).transpose(-1, -2) @ values
    at_start = _states_at_start(added, decay_sums[..., -1])
    from_before = reads * decay_sums.exp()[..., None]
    inside, asked, states = (part.flatten(0, 2) for part in (within @ values, from_before, at_start))
    outputs: Tensor = torch.baddbmm(inside, asked, states)
    return outputs.view(values.shape).flatten(2, 3)[:, :, :length].transpose(1, 2)


def _in_chunks(part: Float[Tensor, "batch head time *rest"], chunk: int) -> Float[Tensor, "batch head c step *rest"]:
    """Cut the time into chunks, behind zero steps at its end, which write nothing and do not decay."""
    padded = pad(part, (0, 0) * (part.ndim - 3) + (0, -part.shape[2] % chunk))
    return torch.unflatten(padded, 2, (-1, chunk))


def _decays(sums: Float[Tensor, "*batch step"]) -> Float[Tensor, "*batch step step"]:
    """exp(sums[t] - sums[s]) for s <= t, else 0. The mask comes before exp, which would overflow above the diagonal."""
    later = torch.ones(sums.shape[-1], sums.shape[-1], dtype=torch.bool, device=sums.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).masked_fill(later, -torch.inf).exp()


def _states_at_start(
    added: Float[Tensor, "batch head c state dim"], totals: Float[Tensor, "batch head c"]
) -> Float[Tensor, "batch head c state dim"]:
    """The state before each chunk: what earlier chunks `added`, decayed by the `totals` of the chunks between.

    Decays are sums over a whole item, which lose too many digits in float32 when subtracted.
    """
    decays = _decays(totals.double().cumsum(2)).to(totals.dtype)
    at_end: Tensor = (decays @ added.flatten(3)).view(added.shape)
    return torch.cat([torch.zeros_like(at_end[:, :, :1]), at_end[:, :, :-1]], dim=2)


def fused_ssd(
    inputs: Float[Tensor, "batch time head dim"],
    step_sizes: Float[Tensor, "batch time head"],
    rates: Float[Tensor, " head"],
    writes: Float[Tensor, "batch time state"],
    reads: Float[Tensor, "batch time state"],
) -> Float[Tensor, "batch time head dim"]:
    """`ssd` by the Triton kernels of the package mamba_ssm, on CUDA and below float64; see `has_fused_ssd`."""
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
