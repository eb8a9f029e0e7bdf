"""Sketch a store of hidden states: the same items and tokens, r coordinates per token."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.store.deriving.deriving import Derivation, derive_store, require_hidden
from agiqa.store.format.arrays import from_float32, to_float32
from agiqa.store.format.artefacts import METHODS, Basis, Moments, isotropic_moments, make_basis, moments_of, save_basis
from agiqa.store.reading.store import Store

_MEASURED_TOKENS = 256
_MEASURED_OUTPUTS = 64


@dataclass(frozen=True, kw_only=True)
class SketchResult:
    """A finished sketch and how well it keeps the logits."""

    store: Store
    energy_kept: float
    """Share of the calibration tokens' squared logits, 0 to 1; for the method `lm_head` of isotropic hidden states."""
    logit_error: float
    """Measured relative Frobenius error of the logits over 256 tokens spread over all items."""
    projection_error: float
    """The same of `W_proj E` for a random Gaussian W_proj with 64 outputs."""


def basis_from(store: Store, rank: int, *, method: str = "second-moment") -> Basis:
    """The rank-`rank` basis of the logits of `store`.

    `second-moment` is calibrated on the training split, or on all items if there are no splits, and never on test or
    validation items; `lm_head` looks at W_lm alone, as if hidden states were isotropic. Raises ConfigError for a rank
    outside 1..D or a store whose splits include no training items, UnknownName for another method, and ViewRefused
    when `store` holds no hidden states.
    """
    require_hidden(store)
    if method not in METHODS:
        raise UnknownName.of(kind="basis method", name=method, known=METHODS)
    if not 1 <= rank <= store.width:
        message = (
            f"Sketch rank {rank} is outside 1..{store.width} (the hidden size of {store.path}). Give another --rank."
        )
        raise ConfigError(message)
    if method == "lm_head":
        moments, calibration = isotropic_moments(store.width), "none"
    else:
        moments, calibration = calibration_moments(store)
    return make_basis(
        store.lm_head(),
        moments,
        rank=rank,
        method=method,
        lm_head_sha256=store.lm_head_sha256,
        calibration=calibration,
    )


def calibration_moments(store: Store) -> tuple[Moments, str]:
    """Moments of the hidden states of the calibration items, and what they were taken over."""
    items = calibration_items(store)
    return moments_of(_hidden_blocks(store, items), store.width), f"{store.id}:{len(items)} items"


def calibration_items(store: Store) -> NDArray[np.int64]:
    """Positions of the items that a calibration may be computed from: the training split, or all without splits."""
    if not any(store.items.splits):
        return np.arange(len(store.items))
    training = np.array(store.items.in_split("train"), np.int64)
    if not len(training):
        message = (
            f"{store.path} has splits but no item in 'train', and sketch and int8 are never calibrated on test items. "
            "Join a split column with `agiqa store labels`."
        )
        raise ConfigError(message)
    return training


def sketch_store(
    source: Store,
    out: Path,
    *,
    basis: Basis,
    advance: Callable[[int], None] = lambda _tokens: None,
) -> SketchResult:
    """Write the sketch of `source` in `basis` to `out`, or finish the one begun there; then seal it.

    `advance` is called with the tokens of every finished unit. Raises HeadError when `basis` belongs to another W_lm,
    SettingsConflict when `out` is a store made otherwise.
    """
    require_hidden(source)
    if basis.lm_head_sha256 != source.lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, {source.path} "
            f"to {source.lm_head_sha256[:12]}: their logits live in different spaces. Use a basis of the same model."
        )
        raise HeadError(message)

    def encode(hidden: NDArray[np.float32]) -> tuple[NDArray[np.generic], None]:
        return from_float32(basis.coordinates(hidden), basis.logical_dtype), None

    def write_model(group: zarr.Group) -> None:
        save_basis(group, basis)

    derivation = Derivation(
        encoding="sketch",
        logical_dtype=basis.logical_dtype,
        width=basis.rank,
        provenance={"basis": basis.id},
        encode=encode,
        write_model=write_model,
        probe_attributes={},
    )
    sketch = derive_store(source, out, derivation, advance=advance)
    logit_error, projection_error = measure_errors(source, sketch)
    return SketchResult(
        store=sketch, energy_kept=basis.energy_kept, logit_error=logit_error, projection_error=projection_error
    )


def measure_errors(source: Store, sketch: Store) -> tuple[float, float]:
    """Relative Frobenius errors of the logits, and of a random projection of them, over 256 tokens, both explicit."""
    items = np.unique(np.linspace(0, len(source.items) - 1, 64).astype(int))
    hidden, coordinates = source.read(items), sketch.read(items)
    rows = np.unique(np.linspace(0, len(hidden.rows) - 1, _MEASURED_TOKENS).astype(int))
    exact = to_float32(hidden.rows[rows], source.logical_dtype) @ source.lm_head().T
    error = exact - to_float32(coordinates.rows[rows], sketch.logical_dtype) @ sketch.basis().q.T
    projection = np.random.default_rng(0).standard_normal((exact.shape[1], _MEASURED_OUTPUTS), np.float32)
    return _share(error, exact), _share(error @ projection, exact @ projection)


def _share(error: NDArray[Any], of: NDArray[Any]) -> float:
    return float(np.linalg.norm(error) / np.linalg.norm(of))


def _hidden_blocks(store: Store, items: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    for unit in np.unique(store.units[items]).tolist():
        yield store.read(items[store.units[items] == unit]).float32()
