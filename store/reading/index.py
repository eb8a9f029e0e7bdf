"""Where the items of a store lie: their rows, units, keys and status, checked before any row is read."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.store.format.arrays import Geometry
from agiqa.store.format.items import count_items
from agiqa.store.format.layers import RowContent
from agiqa.store.format.metadata import damaged
from agiqa.store.reading.stored_arrays import StoredArrays


class IndexedArrays(StoredArrays):
    """The arrays of a store, and the addresses of its items in them."""

    def _count_items(self) -> int:
        return count_items(self.layout.items)

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Tokens per item, (items,)."""
        return self._checked_index["n_tokens"]

    @cached_property
    def row_starts(self) -> NDArray[np.int64]:
        """First row of each item, (items,)."""
        return self._index("row_start")

    @property
    def row_ends(self) -> NDArray[np.int64]:
        """One past the last row of each item, (items,)."""
        return self.row_starts + self.n_tokens

    @cached_property
    def units(self) -> NDArray[np.int32]:
        """Unit of each item, (items,)."""
        return self._index("unit")

    @cached_property
    def item_keys(self) -> NDArray[np.uint8]:
        """sha256 of each item's image and conversation, (items, 32)."""
        return self._index("item_key")

    @cached_property
    def status(self) -> NDArray[np.uint8]:
        """Per item, a value of ITEM_STATUS, (items,)."""
        return self._index("status")

    def _index(self, name: str) -> NDArray[Any]:
        arrays = self._checked_index
        return arrays[name] if name in arrays else self.whole(f"index/{name}")

    @cached_property
    def _checked_index(self) -> dict[str, NDArray[Any]]:
        """The three arrays with the addresses of items; read only if all arrays of the index have a row per item."""
        count = self._count_items()
        for name in ("n_tokens", "row_start", "unit", "item_key", "status"):
            if self.array(f"index/{name}").shape[:1] != (count,):
                self.require_in_place()
                raise damaged(self.path, f"index/{name} does not have one entry for each of {count} items")
        arrays = {name: self.whole(f"index/{name}") for name in ("n_tokens", "row_start", "unit")}
        _check_index(self.path, self.geometry, **arrays)
        pooled = self.content_of_rows.pooled
        if pooled and not (arrays["n_tokens"] == len(pooled)).all():
            item = int(np.argmin(arrays["n_tokens"] == len(pooled)))
            what = f"item {item} has {arrays['n_tokens'][item]} rows, and {len(pooled)} poolings"
            raise damaged(self.path, f"its index says that {what}")
        return arrays

    @cached_property
    def content_of_rows(self) -> RowContent:
        """What the rows are, as the root attributes record it."""
        return RowContent.of(self.attributes)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the stored layers, ascending; `("last",)` for a store of the final states alone."""
        return self.content_of_rows.layers

    @property
    def pooled(self) -> tuple[str, ...]:
        """The pooling of each row of an item, such as `mean@image`; `()` where rows are tokens."""
        return self.content_of_rows.pooled

    @property
    def tap(self) -> str | None:
        """Where in the model the rows come from, such as `vision:12`; None for the language model's own states."""
        return self.content_of_rows.tap

    def committed_units(self) -> list[int]:
        """Units whose features are finished, ascending: those with a commit record, or all that a sealed store has."""
        if self.is_sealed:
            pulled = self.pulled_units
            return list(range(self.geometry.units)) if pulled is None else pulled
        return [unit for unit in range(self.geometry.units) if self.layout.commit(unit).exists()]

    def items_of(self, unit: int) -> NDArray[np.int64]:
        """Positions of the items in `unit`."""
        return np.flatnonzero(self.units == unit)

    def rows_used(self, unit: int) -> int:
        """Number of rows of `unit` that belong to items."""
        return int(self.n_tokens[self.units == unit].sum())


def _check_index(
    path: Path,
    geometry: Geometry,
    *,
    n_tokens: NDArray[np.int32],
    row_start: NDArray[np.int64],
    unit: NDArray[np.int32],
) -> None:
    """Raise DamagedStore unless items follow each other in units without gap or overlap; names the first wrong item.

    The three arrays are (items,).
    """
    lengths = n_tokens.astype(np.int64)
    begin = np.clip(unit, 0, geometry.units).astype(np.int64) * geometry.unit_rows
    inside = (lengths >= 0) & (unit >= 0) & (unit < geometry.units)
    inside &= (row_start >= begin) & (row_start <= begin + geometry.unit_rows)
    inside &= lengths <= geometry.unit_rows - (row_start - begin) * inside
    if not inside.all():
        item = int(np.argmin(inside))
        what = f"{lengths[item]} rows from {row_start[item]} in unit {unit[item]}"
        raise damaged(path, f"its index says that item {item} has {what}, which is outside of that unit")
    same = np.diff(unit, prepend=-1) == 0
    expected = np.where(same, np.concatenate([[0], (row_start + lengths)[:-1]]), begin) if len(unit) else begin
    placed = (expected == row_start) & (np.diff(unit, prepend=0) >= 0)
    if not placed.all():
        item = int(np.argmin(placed))
        what = f"item {item} begins at row {row_start[item]} of unit {unit[item]}, where {expected[item]} was next"
        raise damaged(path, f"its index says that {what}")
