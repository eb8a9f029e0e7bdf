"""The decoded rows of some items, and the positions by which they are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.store.format.arrays import to_float32


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """The rows of several items, one item after the other, in the bits of the store."""

    rows: NDArray[Any]
    """(tokens, width); uint16 for the logical dtype bfloat16."""
    roles: NDArray[np.uint8]
    """(tokens,), values of TOKEN_ROLES."""
    offsets: NDArray[np.int64]
    """(items + 1,): item k of the request is rows[offsets[k] : offsets[k + 1]]."""
    logical_dtype: str

    def float32(self) -> NDArray[np.float32]:
        """The rows as float32, (tokens, width)."""
        return to_float32(self.rows, self.logical_dtype)


def item_positions(items: Sequence[int] | NDArray[Any], *, count: int, where: str) -> NDArray[np.int64]:
    """`items` as positions in a store at `where` with `count` items, (items,). Raises DataError for invalid ones."""
    wanted = np.asarray(items)
    if wanted.size == 0:
        return np.zeros(0, np.int64)
    if wanted.ndim != 1 or wanted.dtype.kind not in "iu" or wanted.min() < 0 or wanted.max() >= count:
        message = (
            f"{where} has {count} items, read by their positions, whole numbers from 0 to {count - 1}; got "
            f"{np.array2string(wanted, threshold=5)}. `items.names` of the store has their names, in that order."
        )
        raise DataError(message)
    return wanted.astype(np.int64)
