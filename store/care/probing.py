"""The probe of a store: what its rows give, compared with what the model itself gave for some of them."""

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import StoreError
from agiqa.store.format.arrays import to_float32
from agiqa.store.format.layers import layer_of_array
from agiqa.store.format.layout import PROBE_ROWS
from agiqa.store.reading.store import Store

_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.15, "int8": 0.15}
"""Largest accepted relative error of the probe logits: a forward pass of one item alone against the stored batch. We
measured up to .05 in bfloat16 over 30 layers; hidden states from before the final norm would give about 1."""


def check_probe(store: Store) -> tuple[float | None, list[str]]:
    """The largest relative error of a probe row of a finished store, and what is wrong; None without probe rows."""
    if not store.probe_arrays:
        return None, []
    rows = store.whole(PROBE_ROWS)
    here = np.isin(rows // store.geometry.unit_rows, store.committed_units())  # some are missing in a pulled part
    if not here.any():
        return None, []
    errors: list[float] = []
    problems: list[str] = []
    for name in store.probe_arrays:
        layer = layer_of_array(name.removeprefix("probe/"))
        dtype = str(store.array(name).attrs["logical_dtype"])
        tolerance = max(_TOLERANCE[one] for one in [dtype, *_rounded_again(store, layer)])
        what = "logits" if layer is None else f"states of layer {layer}"
        try:
            expected = to_float32(store.whole(name)[here], dtype)
            rebuilt, expected = (_logits if layer is None else _states)(store, layer or "", rows[here], expected)
        except (StoreError, ValueError, RuntimeError) as failure:
            return None, [f"the probe rows cannot be rebuilt: {failure}"]
        errors.append(_relative(rebuilt, expected))
        if not errors[-1] <= tolerance:
            told = f"off by {errors[-1]:.3g} of their norm (allowed {tolerance:.3g})"
            problems.append(f"{what} rebuilt from the features are {told}")
    return max(errors), problems


def _relative(rebuilt: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest error of a row, relative to its norm. For a row of zeros: 0 if it is rebuilt as zeros, else 1."""
    error, size = np.linalg.norm(rebuilt - expected, axis=1), np.linalg.norm(expected, axis=1)
    return float(np.divide(error, size, out=(error > 0.0).astype(np.float64), where=size > 0.0).max())


def _rounded_again(store: Store, layer: str | None) -> list[str]:
    """The dtypes, other than the model's own, in which the store holds what the probe is compared with."""
    if store.encoding == "int8":
        return ["int8"]
    if layer is not None:
        return [store.layer_shape(layer)[1]]
    return [store.logical_dtype] if store.encoding == "logits" or store.keeps_logits else []


def _stored(store: Store, rows: NDArray[np.int64], array: str, dtype: str) -> NDArray[np.float32]:
    """The values (rows, width) of an array at these addresses."""
    return to_float32(np.concatenate([store.rows_at(row, row + 1, array=array) for row in rows.tolist()]), dtype)


def _states(
    store: Store, layer: str, rows: NDArray[np.int64], states: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The values of a layer at the probe rows, and those expected from the model's own `states` (rows, D)."""
    found = _stored(store, rows, store.array_of_layer(layer), store.layer_shape(layer)[1])
    if store.encoding == "sketch":
        return found, store.layer_basis(layer).coordinates(states)
    if store.encoding == "logits" and layer == store.layer_name:
        return states, states  # their logits are compared with those of the probe
    return found, states


def _logits(
    store: Store, _layer: str, rows: NDArray[np.int64], logits: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The values of the probe rows in the store, and the values expected from the model's own `logits` (rows, V)."""
    features = _stored(store, rows, "features", store.logical_dtype)
    if store.encoding == "logits":
        return features, logits
    if store.encoding == "sketch":  # the frame is orthonormal, so coordinates are what logits project to at any rank
        return features, logits @ store.basis().q
    rebuilt = features @ store.lm_head().T
    if not store.keeps_logits:
        return rebuilt, logits
    kept = _stored(store, rows, "logits", store.logical_dtype)
    return np.concatenate([rebuilt, kept]), np.tile(logits, (2, 1))
