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


def storage_dtype(logical_dtype: str) -> np.dtype[Any]:
    """The NumPy dtype that holds the bits of `logical_dtype`. Raises UnknownName for any other name."""
    try:
        return np.dtype(STORAGE_DTYPES[logical_dtype])
    except KeyError:
        raise UnknownName.of(kind="logical dtype", name=logical_dtype, known=STORAGE_DTYPES) from None


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
    bfloat16 = logical_dtype == "bfloat16"
    finite = (bits & _BFLOAT16_EXPONENT) != _BFLOAT16_EXPONENT if bfloat16 else np.isfinite(bits)
    return np.asarray(finite.all(axis=1), np.bool_)
