"""A key-value cache in slots: each row of the cache holds one conversation, at its own length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """The sizes of one layer's keys and values."""

    heads: int
    """Of keys and values; there may be several query heads for each."""
    key_width: int
    value_width: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Bytes of one token."""
        return self.heads * (self.key_width + self.value_width) * self.dtype.itemsize


@dataclass
class Window:
    """Where the next forward pass writes, and what it reads. All layers share one, which is changed in place."""

    rows: torch.Tensor
    """(n, q) int64: the slot of each new token."""
    places: torch.Tensor
    """(n, q) int64: its place in the slot."""
    read: torch.Tensor | None
    """(n,) int64: the slots that are read; None for the first n, without a copy."""
    count: int
    """n"""
    reach: int
    """Places that are read, from the first one."""


class SlotLayer(CacheLayerMixin):
    """Keys and values (slots, heads, length, width) of one layer."""

    is_sliding = False

    def __init__(self, shape: LayerShape, slots: int, length: int, device: torch.device, window: Window) -> None:
        """All zeros."""
        super().__init__()
        size = (slots, shape.heads, length)
        self.dtype, self.device = shape.dtype, device
        self._stored = tuple(
            torch.zeros((*size, width), dtype=shape.dtype, device=device)
            for width in (shape.key_width, shape.value_width)
        )
        self.keys, self.values = self._stored
        self.is_initialized = True
        self._window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing: the constructor allocates."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (n, heads, q, width) at the window's places. Returns keys and values (n, heads, reach, width)."""
        window = self._window
        found: list[torch.Tensor] = []
        for stored, new in zip(self._stored, (key_states, value_states), strict=True):
            stored[window.rows, :, window.places] = new.transpose(1, 2)
            rows = stored[: window.count, :, : window.reach]
            found.append(rows if window.read is None else stored[:, :, : window.reach].index_select(0, window.read))
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """0: rows have lengths of their own, and every call states its positions."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(places, offset), which no mask is made from: every call brings its own."""
        del query_length
        return self._window.reach, 0

    def get_max_length(self) -> int:
        """The places of a slot."""
        return self._stored[0].shape[2]

    def fill(self, rows: torch.Tensor, states: Sequence[torch.Tensor]) -> None:
        """Copy keys and values (n, heads, length, width) into the slots `rows` (n,)."""
        for stored, new in zip(self._stored, states, strict=True):
            stored[rows, :, : new.shape[2]] = new

    def get_max_cache_shape(self) -> int:
        """As `get_max_length`, by the name that older releases call it."""
        return self.get_max_length()


class SlotStates:
    """The final hidden states (slots, length, D) of the tokens that slots hold, in the places of their keys and values.

    They take `D` values per token, where the keys and values of an 8B model take 16 times as many.
    """

    def __init__(self, width: int, dtype: torch.dtype, cache: "SlotCache", device: torch.device) -> None:
        """All zeros."""
        self._stored = torch.zeros(cache.slots, cache.length, width, dtype=dtype, device=device)
        self._window = cache.window

    def put(self, states: torch.Tensor) -> None:
        """Keep the states (n, q, D) of a forward pass, at the window's places."""
        window = self._window
        self._stored[window.rows, window.places] = states.to(self._stored.dtype)

    def fill(self, rows: torch.Tensor, states: torch.Tensor) -> None:
        """Copy states (n, length, D) into the slots `rows` (n,)."""
        self._stored[rows, : states.shape[1]] = states.to(self._stored.dtype)

    def of(self, row: int, count: int) -> torch.Tensor:
        """(count, D): a copy of those of the first tokens of the slot `row`."""
        return self._stored[row, :count].clone()


class SlotCache(Cache):
    """The cache of all layers. Call `look` before each forward pass."""

    def __init__(self, shapes: Sequence[LayerShape], slots: int, length: int, device: torch.device) -> None:
        """`slots` of `length` tokens."""
        self.slots, self.length = slots, length
        nothing = torch.zeros(0, 1, dtype=torch.int64, device=device)
        self.window = Window(rows=nothing, places=nothing, read=None, count=0, reach=0)
        self._slot_layers = [SlotLayer(shape, slots, length, device, self.window) for shape in shapes]
        super().__init__(layers=[*self._slot_layers])

    def look(
        self, *, rows: torch.Tensor, places: torch.Tensor, read: torch.Tensor | None, count: int, reach: int
    ) -> None:
        """Change the window; see Window for the values."""
        window = self.window
        window.rows, window.places, window.read, window.count, window.reach = rows, places, read, count, reach

    def fill(self, rows: torch.Tensor, source: Sequence[Sequence[torch.Tensor]]) -> None:
        """Copy keys and values of every layer into the slots `rows` (n,)."""
        for layer, states in zip(self._slot_layers, source, strict=True):
            layer.fill(rows, states)
