"""Sketch a store of hidden states: the same items and tokens, r coordinates per token."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import ConfigError, HeadError, SettingsConflict, ViewRefused
from agiqa.store.arrays import create_whole_array
from agiqa.store.basis import Basis, make_basis, moments_of, save_basis
from agiqa.store.bits import from_float32, to_float32
from agiqa.store.filling import UnitWriter
from agiqa.store.layout import ITEM_STATUS
from agiqa.store.planning import StorePlan, create_store
from agiqa.store.reading import Store
from agiqa.store.sealing import seal

_MEASURED_TOKENS = 256


@dataclass(frozen=True, kw_only=True)
class SketchResult:
    """A finished sketch and how well it keeps the logits."""

    store: Store
    energy_kept: float
    """Share of the calibration tokens' squared logits, 0 to 1."""
    logit_error: float
    """Measured relative Frobenius error of the logits over 256 tokens spread over all items."""


def basis_from(store: Store, rank: int) -> Basis:
    """The rank-`rank` basis calibrated on the training split of `store`, or on all items if it has no splits.

    Test and validation items are never used. Raises ConfigError for a rank outside 1..D or a store whose
    splits include no training items, and ViewRefused when `store` holds no hidden states.
    """
    _require_hidden(store)
    if not 1 <= rank <= store.width:
        message = (
            f"Sketch rank {rank} is outside 1..{store.width} (the hidden size of {store.path}). Give another --rank."
        )
        raise ConfigError(message)
    items = calibration_items(store)
    moments = moments_of(_hidden_blocks(store, items), store.width)
    calibration = f"{store.id}:{len(items)} items"
    return make_basis(store.lm_head(), moments, rank=rank, lm_head_sha256=store.lm_head_sha256, calibration=calibration)


def calibration_items(store: Store) -> NDArray[np.int64]:
    """Positions of the items that a basis may be computed from: the training split, or all without splits."""
    if not any(store.items.splits):
        return np.arange(len(store.items))
    training = np.array(store.items.in_split("train"), np.int64)
    if not len(training):
        message = f"{store.path} has splits but no item in 'train'; a basis is never calibrated on test items."
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
    _require_hidden(source)
    if basis.lm_head_sha256 != source.lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, {source.path} "
            f"to {source.lm_head_sha256[:12]}: their logits live in different spaces. Use a basis of the same model."
        )
        raise HeadError(message)
    if out.resolve() == source.path.resolve():
        message = f"{out} is the store to be sketched; give another path for the sketch."
        raise SettingsConflict(message)
    sketch = create_store(out, _plan(source, basis))
    if not sketch.is_complete:
        writer = UnitWriter(sketch)
        writer.write_model_arrays(lambda group: _write_model_arrays(group, source, sketch, basis))
        for unit in writer.pending():
            with writer.claim(unit) as mine:
                if mine:
                    _sketch_unit(source, writer, basis, unit)
            advance(sketch.rows_used(unit))
        sketch = seal(sketch)
    return SketchResult(store=sketch, energy_kept=basis.energy_kept, logit_error=measure_logit_error(source, sketch))


def measure_logit_error(source: Store, sketch: Store) -> float:
    """Relative Frobenius error of the sketch's logits against `H W_lm^T`, both explicit, over 256 tokens."""
    items = np.unique(np.linspace(0, len(source.items) - 1, 64).astype(int))
    hidden, coordinates = source.read(items), sketch.read(items)
    rows = np.unique(np.linspace(0, len(hidden.rows) - 1, _MEASURED_TOKENS).astype(int))
    exact = to_float32(hidden.rows[rows], source.logical_dtype) @ source.lm_head().T
    kept = to_float32(coordinates.rows[rows], sketch.logical_dtype) @ sketch.basis().q.T
    return float(np.linalg.norm(exact - kept) / np.linalg.norm(exact))


def _require_hidden(store: Store) -> None:
    if store.encoding != "hidden":
        message = f"{store.path} holds a {store.encoding}; only a store of hidden states can be sketched."
        raise ViewRefused(message)


def _hidden_blocks(store: Store, items: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
    for unit in np.unique(store.units[items]).tolist():
        yield store.read(items[store.units[items] == unit]).float32()


def _plan(source: Store, basis: Basis) -> StorePlan:
    token_ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(source.items)
    roles: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)] * len(source.items)
    for unit in range(source.geometry.units):
        unit_ids, unit_roles = source.unit_rows(unit, "tokens/ids"), source.unit_rows(unit, "tokens/roles")
        for item in source.items_of(unit).tolist():
            start = int(source.row_starts[item]) - unit * source.geometry.unit_rows
            rows = slice(start, start + int(source.n_tokens[item]))
            token_ids[item], roles[item] = unit_ids[rows], unit_roles[rows]
    return StorePlan(
        encoding="sketch",
        logical_dtype=basis.logical_dtype,
        width=basis.rank,
        provenance={**_without_shape(source.provenance), "source": source.id, "basis": basis.id},
        items=source.items,
        token_ids=token_ids,
        roles=roles,
        item_keys=[key.tobytes() for key in source.item_keys],
        truncated=(source.status == ITEM_STATUS["truncated"]).tolist(),
    )


def _without_shape(provenance: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in provenance.items() if key not in {"encoding", "logical_dtype", "width"}}


def _write_model_arrays(group: zarr.Group, source: Store, sketch: Store, basis: Basis) -> None:
    save_basis(group, basis)
    probe = source.array("probe/logits")
    rows = np.asarray(source.array("probe/rows")[...])
    items = [int(np.flatnonzero((source.row_starts <= row) & (row < source.row_ends))[0]) for row in rows]
    create_whole_array(group, "probe/logits", np.asarray(probe[...]), attributes=dict(probe.attrs))
    create_whole_array(group, "probe/rows", rows - source.row_starts[items] + sketch.row_starts[items])


def _sketch_unit(source: Store, writer: UnitWriter, basis: Basis, unit: int) -> None:
    started = time.perf_counter()
    items = writer.store.items_of(unit)
    coordinates = basis.coordinates(source.read(items).float32())
    rows = from_float32(coordinates, writer.store.logical_dtype)
    writer.write_unit(unit, rows, seconds=time.perf_counter() - started)
