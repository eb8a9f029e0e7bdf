"""The encoder `transformer`: self-attention (Vaswani et al. 2017, arXiv 1706.03762) in pre-norm layers.

Torch's nn.TransformerEncoderLayer is not used: it predicts with other kernels than it trains with, and its key bias
never gets a gradient.
"""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention

from agiqa.errors import ConfigError
from agiqa.heads.model.encoders.base import ENCODERS, Encoded, Encoder, Mask, Tokens
from agiqa.heads.model.encoders.kernels.dispatch import norm
from agiqa.heads.settings.config import HeadConfig

_FEED_FORWARD_FACTOR = 4
_LONGEST_WAVE = 10_000.0


@ENCODERS.register("transformer")
class TransformerEncoder(Encoder):
    """`layers` pre-norm layers over tokens plus sinusoidal positions, and a norm at the end.

    Causal, or with `bidirectional` one stack in which every token attends to the whole item. What the layers add is
    summed in the dtype of the weights, under autocast too.

    Dropout acts within the layers only. On the tokens themselves, a share p would multiply their mean square by
    1 / (1 - p) in training alone, which the last norm divides out: at p = .5 pooled values would vary 1.5 times as much
    between items in evaluation as in training.
    """

    graphable = True
    settings = frozenset({"num_heads", "layers", "dropout"})

    def __init__(self, config: HeadConfig) -> None:
        """Raises ConfigError when the heads do not divide the width."""
        super().__init__(config.width)
        if config.width % config.num_heads:
            message = (
                f"A transformer of width {config.width} cannot have {config.num_heads} heads: "
                f"the width must be a multiple of the heads."
            )
            raise ConfigError(message)
        self.layers = nn.ModuleList(TransformerLayer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    @property
    def compiled_blocks(self) -> Iterable[nn.Module]:
        """The layers."""
        return self.layers

    @property
    def kernels(self) -> str:
        """Torch's choice among its attention kernels."""
        return "torch, scaled_dot_product_attention"

    def forward(self, tokens: Tokens, mask: Mask) -> Encoded:
        """The normed output of the last layer, with zeros in the padding."""
        padding = ~mask[..., None]
        states = tokens.masked_fill(padding, 0.0).to(self.norm.weight.dtype)
        states = states + sinusoids(states)
        for layer in self.layers:
            states = layer(states, mask)
        outputs = norm(states, self.norm.weight, self.norm.bias, eps=self.norm.eps, dtype=states.dtype)
        return outputs.masked_fill(padding, 0.0)


class TransformerLayer(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)), with a GELU between 4 x width channels."""

    def __init__(self, config: HeadConfig) -> None:
        """`config` gives width, heads, direction and dropout."""
        super().__init__()
        inner = _FEED_FORWARD_FACTOR * config.width
        self.attention_norm = nn.LayerNorm(config.width)
        self.query_key_value = nn.Linear(config.width, 3 * config.width, bias=False)
        self.merge = nn.Linear(config.width, config.width)
        self.feed_forward_norm = nn.LayerNorm(config.width)
        self.expand = nn.Linear(config.width, inner)
        self.contract = nn.Linear(inner, config.width)
        self.attention_dropout, self.inner_dropout, self.outer_dropout = (nn.Dropout(config.dropout) for _ in range(3))
        self._num_heads = config.num_heads
        self._bidirectional = config.bidirectional
        self._dropout = config.dropout

    def forward(self, tokens: Tokens, mask: Mask) -> Tokens:
        """`mask` hides padded keys; outputs at padding are arbitrary."""
        attended = self.merge(self._attend(_normed(self.attention_norm, tokens), mask))
        tokens = tokens + self.attention_dropout(attended)
        inner = self.inner_dropout(gelu(self.expand(_normed(self.feed_forward_norm, tokens))))
        outputs: Tensor = tokens + self.outer_dropout(self.contract(inner))
        return outputs

    def _attend(self, tokens: Tokens, mask: Mask) -> Tokens:
        """Softmax(Q K^T / sqrt(d)) V per head. Padding comes last: the causal mask hides it from every real token."""
        split = self.query_key_value(tokens).unflatten(-1, (3, self._num_heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        heads = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask[:, None, None] if self._bidirectional else None,
            dropout_p=self._dropout if self.training else 0.0,
            is_causal=not self._bidirectional,
        )
        return heads.transpose(1, 2).flatten(2)


def _normed(part: nn.LayerNorm, tokens: Tokens) -> Tokens:
    return norm(tokens, part.weight, part.bias, eps=part.eps)


def sinusoids(tokens: Tokens) -> Float[Tensor, "token width"]:
    """The paper's positions: sine in even channels, cosine in odd ones, waves from 2 pi to 10,000 x 2 pi tokens."""
    length, width = tokens.shape[1:]
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    channels = torch.arange(0, width, 2, device=tokens.device, dtype=dtype)
    steps = torch.arange(length, device=tokens.device, dtype=dtype)
    angles = steps[:, None] * torch.exp(channels * (-math.log(_LONGEST_WAVE) / width))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :width].to(tokens.dtype)
