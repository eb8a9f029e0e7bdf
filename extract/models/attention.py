"""Attention over packed sequences: all tokens of a batch in one row, without padding.

torch sees one opaque operation, so that compiled code around it depends on the number of tokens alone, not on how many
sequences they belong to.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from agiqa.extract.models.batches import uploaded

_FLASH = (torch.bfloat16, torch.float16)
"""Dtypes of the flash kernel for sequences of different lengths."""
_FLASH_CAPABILITY = (8, 0)
_FEW_RUNS = 4
"""Up to this many runs of neighbours of one length, the kernels for equal lengths are faster, called for each run."""
_WIDEST_HEAD = 256
"""Of the flash kernel."""


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """Where the sequences of a packed row begin and end."""

    host: Tensor
    """(sequences + 1,) int32 on the CPU: row 0, and the end of each sequence."""
    device: Tensor
    """The same on the device."""

    @classmethod
    def of(cls, lengths: NDArray[np.int64], device: torch.device) -> "Bounds":
        """The bounds of sequences of these `lengths` (sequences,)."""
        ends = np.concatenate([np.zeros(1, np.int32), np.cumsum(lengths, dtype=np.int32)])
        host = torch.from_numpy(ends)
        return cls(host=host, device=uploaded(host, device))


def attention(
    query: Tensor, key: Tensor, value: Tensor, queries: Bounds, keys: Bounds, *, causal: bool, scale: float
) -> Tensor:
    """Each sequence of queries reads its own sequence of keys; (tokens, heads, width).

    `query` is (tokens, heads, width), `key` and `value` are (their tokens, key heads, width); with `causal` a query
    reads no later key. Has no gradients.
    """
    ends = queries.host, keys.host, queries.device, keys.device
    read: Tensor = _attend(query, key, value, *ends, causal, scale)
    return read


@torch.library.custom_op("agiqa::attend", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_host: Tensor,
    key_host: Tensor,
    query_ends: Tensor,
    key_ends: Tensor,
    causal: bool,  # noqa: FBT001 - the schema of an operation has positional arguments
    scale: float,
) -> Tensor:
    lengths = list(zip(query_host.diff().tolist(), key_host.diff().tolist(), strict=True))
    alike = list(runs(lengths))
    if len(alike) > _FEW_RUNS and _has_flash_kernel(query):
        longest = (max(length) for length in zip(*lengths, strict=True))
        found: Any = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            query_ends,
            key_ends,
            *longest,
            dropout_p=0.0,
            is_causal=causal,
            return_debug_mask=False,
            scale=scale,
        )
        out: Tensor = found[0].contiguous()
        return out
    parts: list[Tensor] = []
    first = first_key = 0
    for count, (length, key_length) in alike:
        stop, stop_key = first + count * length, first_key + count * key_length
        queries = _apart(query[first:stop], count, length)
        keys, values = (_apart(rows[first_key:stop_key], count, key_length) for rows in (key, value))
        parts.append(_of_one_length(queries, keys, values, causal=causal, scale=scale))
        first, first_key = stop, stop_key
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@_attend.register_fake
def _(query: Tensor, _key: Tensor, value: Tensor, *_settings: Any) -> Tensor:
    shaped: Tensor = query.new_empty(query.shape[0], query.shape[1], value.shape[2])
    return shaped


def runs(lengths: list[tuple[int, int]]) -> Iterator[tuple[int, tuple[int, int]]]:
    """How many neighbours have the same pair of lengths, and the pair."""
    for one, run in groupby(lengths):
        yield sum(1 for _ in run), one


def _apart(packed: Tensor, count: int, length: int) -> Tensor:
    """(count, heads, length, width) of (count * length, heads, width)."""
    apart: Tensor = packed.unflatten(0, (count, length)).transpose(1, 2)
    return apart


def _of_one_length(query: Tensor, key: Tensor, value: Tensor, *, causal: bool, scale: float) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    read: Tensor = scaled_dot_product_attention(query, key, value, is_causal=causal, scale=scale, enable_gqa=grouped)
    packed: Tensor = read.transpose(1, 2).flatten(0, 1).contiguous()
    return packed


def _has_flash_kernel(query: Tensor) -> bool:
    return (
        query.device.type == "cuda"
        and query.dtype in _FLASH
        and query.shape[2] <= _WIDEST_HEAD
        and query.shape[2] % 8 == 0
        and torch.cuda.get_device_capability(query.device) >= _FLASH_CAPABILITY
    )
