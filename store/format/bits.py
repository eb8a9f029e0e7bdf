"""The bits of floating-point values: stored exactly as the model made them, bfloat16 as uint16.

NumPy and zarr-python have no bfloat16, so its bits travel as uint16 and the name of the real type is kept beside
them as `logical_dtype`.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import UnknownName

STORAGE_DTYPES = {"bfloat16": "uint16", "float16": "float16", "float32": "float32"}
_BFLOAT16_EXPONENT = np.uint16(0x7F80)
_BFLOAT16_MAGNITUDE = np.uint16(0x7FFF)
_ROWS_AT_ONCE = 256
"""What fits into a cache: ten times as fast as over a whole unit."""


def storage_dtype(logical_dtype: str) -> np.dtype[Any]:
    """The NumPy dtype that holds the bits of `logical_dtype`. Raises UnknownName for any other name."""
    try:
        return np.dtype(STORAGE_DTYPES[logical_dtype])
    except KeyError:
        raise UnknownName.of(kind="logical dtype", name=logical_dtype, known=STORAGE_DTYPES) from None


def rows_dtype(encoding: str, logical_dtype: str) -> np.dtype[Any]:
    """The NumPy dtype of stored rows. Raises as `storage_dtype`."""
    return np.dtype(np.int8) if encoding == "int8" else storage_dtype(logical_dtype)


def to_float32(bits: NDArray[Any], logical_dtype: str) -> NDArray[np.float32]:
    """The values behind `bits` (any shape) as float32; exact for all three logical dtypes."""
    if logical_dtype == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.astype(np.float32, copy=False)


def from_float32(values: NDArray[np.float32], logical_dtype: str) -> NDArray[Any]:
    """The nearest values of `logical_dtype` (ties to even) as storage bits, same shape as `values`."""
    if logical_dtype == "bfloat16":
        wide = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        rounding = np.uint32(0x7FFF) + ((wide >> np.uint32(16)) & np.uint32(1))
        rounded = ((wide + rounding) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)
    return values.astype(storage_dtype(logical_dtype))


def finite_rows(bits: NDArray[Any], logical_dtype: str) -> NDArray[np.bool_]:
    """Whether each row of `bits` (rows, width) is free of NaN and infinity; (rows,)."""
    finite = np.empty(len(bits), np.bool_)
    for start in range(0, len(bits), _ROWS_AT_ONCE):
        rows = bits[start : start + _ROWS_AT_ONCE]
        if logical_dtype == "bfloat16":
            finite[start : start + len(rows)] = (rows & _BFLOAT16_MAGNITUDE).max(axis=1, initial=0) < _BFLOAT16_EXPONENT
        else:
            finite[start : start + len(rows)] = np.isfinite(rows).all(axis=1)
    return finite
