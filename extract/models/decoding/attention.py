"""Attention to a cache in slots.

transformers' own sdpa attention may copy keys and values once per query head when there is a mask. Here the query heads
of one key-value head become rows of one product instead, and nothing is copied. torch's own `enable_gqa` takes a mask
without a copy in cuDNN alone, for 16-bit numbers; it took .126 ms per layer of an 8B model where this takes .137.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "agiqa_slots"
"""Name of this attention in transformers."""
_IGNORED = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "output_attentions"})
"""Arguments that change nothing here."""
_BACKENDS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class UnsupportedAttention(RuntimeError):
    """The model's attention does more than this one."""


def visible_bias(visible: torch.Tensor, reach: int, dtype: torch.dtype) -> torch.Tensor:
    """(n, 1, q, reach): 0 for the first `visible` (n, q) places of each query, minus infinity for the others."""
    places = torch.arange(reach, device=visible.device)
    hidden = places >= visible[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=visible.device).masked_fill_(hidden, float("-inf"))


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """(n, q, heads, width) from queries (n, heads, q, width), keys and values (n, key heads, places, width).

    `attention_mask` is of `visible_bias`. Raises UnsupportedAttention for models with sinks, windows, soft caps or
    biases.
    """
    more = [name for name, given in others.items() if name not in _IGNORED and given is not None and given is not False]
    if more and any(name in more for name in ("softcap", "s_aux", "sliding_window", "position_bias")):
        message = f"{type(module).__name__} passes {', '.join(more)} to its attention"
        raise UnsupportedAttention(message)
    rows, heads, count, width = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        query = query.reshape(rows, key.shape[1], groups * count, width)
        shape = (rows, 1, groups, count, key.shape[2])
        attention_mask = attention_mask[:, :, None].expand(shape).reshape(rows, 1, groups * count, key.shape[2])
    found = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return found.reshape(rows, heads, count, value.shape[-1]).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def configs_of(model: Any) -> list[Any]:
    """The configurations that the parts of `model` read."""
    return list({id(part.config): part.config for part in model.modules() if hasattr(part, "config")}.values())


@contextmanager
def slot_attention(configs: Sequence[Any]) -> Generator[None]:
    """Let the model with these `configs` attend by `attend` inside."""
    usual = [(config, config._attn_implementation) for config in configs]
    try:
        for config, _ in usual:
            config._attn_implementation = NAME
        with sdpa_kernel(_BACKENDS):
            yield
    finally:
        for config, name in usual:
            config._attn_implementation = name
