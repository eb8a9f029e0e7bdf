"""The encoder `mamba2`: selective state spaces (Dao & Gu 2024, arXiv 2405.21060), causal.

Parameters have the names and shapes of transformers' Mamba2Model with one group, so that weights can go either way.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from agiqa.heads.model.encoders.base import ENCODERS, Encoder
from agiqa.heads.model.encoders.bidirectional import EitherWay, check_one_way
from agiqa.heads.model.encoders.causal_conv import causal_conv_silu
from agiqa.heads.model.encoders.ssd import fused_ssd, has_fused_ssd, ssd
from agiqa.heads.settings.config import HeadConfig

_EXPAND = 2
_KERNEL = 4
_HEAD_DIM = 64
_EPSILON = 1e-5
_RATES = (1.0, 16.0)
_STEP_SIZES = (1e-3, 1e-1)
"""What -A and dt start from, as in the paper's own code: uniform, and uniform in the logarithm."""


class Mamba2Encoder(Encoder):
    """`layers` pre-norm residual blocks, and a norm at the end. Every part is causal.

    Padding is zeroed on the way in: matrix products multiply it by zero, which NaN survives. What the blocks add is
    summed in the dtype of the weights, under autocast too.
    """

    graphable = True
    reads = frozenset({"layers", "state_size", "dropout"})

    def __init__(self, config: HeadConfig) -> None:
        """Raises ConfigError for `bidirectional`, for which `ENCODERS.get("mamba2")` builds two of these."""
        check_one_way(config, Mamba2Encoder, entry="mamba2")
        super().__init__(config.width)
        self.layers = nn.ModuleList(Mamba2Block(config) for _ in range(config.layers))
        self.norm_f = nn.RMSNorm(config.width, eps=_EPSILON)

    @property
    def repeated(self) -> Iterable[nn.Module]:
        """The layers."""
        return self.layers

    @property
    def kernels(self) -> str:
        """Which scan runs where the weights are."""
        fused = self.norm_f.weight.is_cuda and has_fused_ssd()
        return "mamba_ssm scan" if fused else "torch, chunked scan"

    def forward(
        self, tokens: Float[Tensor, "batch token width"], mask: Bool[Tensor, "batch token"]
    ) -> Float[Tensor, "batch token width"]:
        """The normed output of the last block, with zeros in the padding."""
        padding = ~mask[..., None]
        states = tokens.masked_fill(padding, 0.0).to(self.norm_f.weight.dtype)
        for block in self.layers:
            states = block(states)
        outputs: Tensor = self.norm_f(states)
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

    def forward(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """The tokens, and what the mixer adds."""
        added: Tensor = self.dropout(self.mixer(self.norm(tokens)))
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
        self._has_fused = has_fused_ssd()

    def forward(self, tokens: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        """Mix the tokens forwards. Step sizes and decays are in the dtype of the weights, under autocast too."""
        gate, mixed, raw_steps = self.in_proj(tokens).split(self._parts, dim=-1)
        convolved = causal_conv_silu(mixed, self.conv1d.weight, self.conv1d.bias)
        values, writes, reads = convolved.split(self._mixed_parts, dim=-1)
        values = values.unflatten(-1, (len(self.D), -1))
        step_sizes = softplus(raw_steps + self.dt_bias)
        fused = self._has_fused and values.is_cuda and values.dtype != torch.float64
        scanned = (fused_ssd if fused else ssd)(values, step_sizes, -self.A_log.exp(), writes, reads)
        outputs = (scanned + self.D[:, None] * values).flatten(2)
        mixed_tokens: Tensor = self.out_proj(self.norm(outputs * silu(gate)))
        return mixed_tokens


def head_dim_for(inner: int) -> int:
    """The divisor of `inner` nearest to 64 in ratio, the smaller of two that are as near."""
    divisors = (size for size in range(1, inner + 1) if inner % size == 0)
    return min(divisors, key=lambda size: abs(math.log(size / _HEAD_DIM)))


def _log_uniform(heads: int) -> Float[Tensor, " head"]:
    """Step sizes spread evenly in the logarithm."""
    low, high = _STEP_SIZES
    return torch.empty(heads).uniform_(math.log(low), math.log(high)).exp()


def _inverse_softplus(values: Float[Tensor, " head"]) -> Float[Tensor, " head"]:
    """What softplus makes `values` of: log(exp(v) - 1), without cancellation."""
    return values + torch.log(-torch.expm1(-values))
