"""The resampler: 96 learned queries that read the patches of a slice with two-dimensional positions."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from agiqa.extract.models.batches import uploaded

_HEAD_WIDTH = 128
_EPSILON = 1e-6
_TABLES_KEPT = 64
"""Tables of positions, one for each size of a slice: at most about 9 MB each."""


class Resampler(nn.Module):
    """One layer of cross-attention; parameter names as published."""

    def __init__(self, *, queries: int, width: int, vision_width: int) -> None:
        """`width` is the language model's hidden size."""
        super().__init__()
        self.query = nn.Parameter(torch.zeros(queries, width))
        self.kv_proj = nn.Linear(vision_width, width, bias=False) if vision_width != width else nn.Identity()
        self.attn = nn.MultiheadAttention(width, width // _HEAD_WIDTH)
        self.ln_q = nn.LayerNorm(width, eps=_EPSILON)
        self.ln_kv = nn.LayerNorm(width, eps=_EPSILON)
        self.ln_post = nn.LayerNorm(width, eps=_EPSILON)
        self.proj = nn.Parameter(torch.zeros(width, width))
        self._tables: dict[tuple[int, int, torch.device], Tensor] = {}

    def forward(self, patches: Tensor, sizes: NDArray[np.int64]) -> Tensor:
        """Patches (slices, longest, vision width) of slices of `sizes` (slices, [rows, columns]), as tokens.

        Returns (slices, queries, width). Patches behind rows x columns of a slice are not looked at.
        """
        counts = uploaded(sizes.prod(axis=1), patches.device)
        longest = int(sizes.prod(axis=1).max())
        keys = self.ln_kv(self.kv_proj(patches[:, :longest]))
        positions = self._positions(sizes, longest, keys)
        hidden = torch.arange(longest, device=patches.device) >= counts[:, None]
        queries = self.ln_q(self.query)[:, None].expand(-1, len(patches), -1)
        values = keys.transpose(0, 1)
        read, _ = self.attn(
            queries, values + positions.transpose(0, 1), values, key_padding_mask=hidden, need_weights=False
        )
        tokens: Tensor = self.ln_post(read.transpose(0, 1)) @ self.proj
        return tokens

    def _positions(self, sizes: NDArray[np.int64], longest: int, like: Tensor) -> Tensor:
        """(slices, longest, width) in the dtype and on the device of `like`, zeros behind the patches of a slice."""
        found, width = like.new_zeros(len(sizes), longest, like.shape[-1]), like.shape[-1]
        for size in {tuple(size) for size in sizes.tolist()}:
            table = self._tables.get((*size, like.device))
            if table is None or table.dtype != like.dtype:
                table = sine_positions(width, *size).to(like.device, like.dtype)
                if len(self._tables) == _TABLES_KEPT:
                    self._tables.clear()
                self._tables[(*size, like.device)] = table
            places = uploaded(np.flatnonzero((sizes == size).all(axis=1)), like.device)
            found[places, : len(table)] = table
        return found


def sine_positions(width: int, rows: int, columns: int) -> Tensor:
    """(rows * columns, width): sines and cosines of the column in the first half, of the row in the second."""
    column, row = np.meshgrid(np.arange(columns, dtype=np.float32), np.arange(rows, dtype=np.float32))
    halves = [_sines(width // 2, place.reshape(-1)) for place in (column, row)]
    return torch.from_numpy(np.concatenate(halves, axis=1)).float()


def _sines(width: int, places: NDArray[np.float32]) -> NDArray[np.float32]:
    rates = 1.0 / 10000 ** (np.arange(width // 2, dtype=np.float32) / (width / 2.0))
    angles = np.outer(places, rates)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
