"""Stores made from a store of hidden states: the same items and tokens, other rows.

A sketch has r coordinates per token, `int8` takes less disk, `logits` are raw logits for tools that know no W_lm.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, ConfigError, HeadError, SettingsConflict, UnknownName, ViewRefused
from agiqa.store.format.arrays import create_whole_array, from_float32, to_float32
from agiqa.store.format.artefacts import (
    METHODS,
    SCALED_DTYPE,
    Basis,
    Moments,
    Scale,
    isotropic_moments,
    make_basis,
    moments_of,
    save_basis,
    save_scale,
)
from agiqa.store.format.layout import ITEM_STATUS
from agiqa.store.reading.store import Store
from agiqa.store.writing.creating import check_writable, create_store
from agiqa.store.writing.filling import UnitWriter
from agiqa.store.writing.planning import StorePlan, without_shape
from agiqa.store.writing.sealing import seal

Advance = Callable[[int], None]
"""Called with the tokens of every finished unit."""

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
    validation items; `lm_head` uses W_lm alone, as if hidden states were isotropic. Raises ConfigError for a rank
    outside 1..D or a store whose splits include no training items, UnknownName for another method, and ViewRefused
    when `store` holds no hidden states.
    """
    _require_hidden(store)
    if method not in METHODS:
        raise UnknownName.of(kind="basis method", name=method, known=METHODS)
    if not 1 <= rank <= store.width:
        message = (
            f"Sketch rank {rank} is outside 1..{store.width} (the hidden size of {store.path}). Give another --rank."
        )
        raise ConfigError(message)
    isotropic = method == "lm_head"
    moments, calibration = (isotropic_moments(store.width), "none") if isotropic else _calibration(store)
    return make_basis(
        store.lm_head(),
        moments,
        rank=rank,
        method=method,
        lm_head_sha256=store.lm_head_sha256,
        calibration=calibration,
    )


def sketch_store(source: Store, out: Path, *, basis: Basis, advance: Advance = lambda _tokens: None) -> SketchResult:
    """Write the sketch of `source` in `basis` to `out`, or finish the one begun there; then seal it.

    Raises HeadError when `basis` belongs to another W_lm, and as `convert_store`.
    """
    _require_hidden(source)
    if basis.lm_head_sha256 != source.lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, {source.path} "
            f"to {source.lm_head_sha256[:12]}: their logits live in different spaces. Use a basis of the same model."
        )
        raise HeadError(message)
    derivation = _Derivation(
        encoding="sketch",
        logical_dtype=basis.logical_dtype,
        width=basis.rank,
        encode=lambda hidden: (from_float32(basis.coordinates(hidden), basis.logical_dtype), None),
        provenance={"basis": basis.id},
        write_model=lambda group: save_basis(group, basis),
    )
    sketch = _derive(source, out, derivation, advance)
    logit_error, projection_error = _measure_errors(source, sketch)
    return SketchResult(
        store=sketch, energy_kept=basis.energy_kept, logit_error=logit_error, projection_error=projection_error
    )


def convert_store(source: Store, out: Path, encoding: str, *, advance: Advance = lambda _tokens: None) -> Store:
    """Write `source` as `int8` or `logits` to `out`, or finish the one begun there; then seal it.

    The scale of `int8` is calibrated as a basis is, never on test items. Raises UnknownName for another encoding,
    ViewRefused where `source` holds no hidden states, SettingsConflict when `out` is a store made otherwise.
    """
    _require_hidden(source)
    makers = {"int8": _to_int8, "logits": _to_logits}
    if encoding not in makers:
        raise UnknownName.of(kind="encoding to convert to", name=encoding, known=makers)
    check_writable(out)
    return _derive(source, out, makers[encoding](source), advance)


def write_store(
    out: Path,
    plan: StorePlan,
    *,
    write_model: Callable[[zarr.Group, Store], None],
    write_unit: Callable[[UnitWriter, int], None],
    advance: Advance,
) -> Store:
    """Make the planned store at `out`, or finish the one begun there; seal it.

    `write_model` creates the model's own arrays of the store that it is given, `write_unit` computes and writes a unit.
    Raises as `create_store`, and BusyStore if another process is filling one of the missing units.
    """
    made = create_store(out, plan)
    if made.is_sealed:
        return made
    writer = UnitWriter(made)
    writer.write_model_arrays(lambda group: write_model(group, made))
    for unit in writer.pending():
        with writer.claim(unit) as mine:
            if mine:
                write_unit(writer, unit)
        advance(made.rows_used(unit))
    left = writer.pending()
    if left:
        message = f"{out}: another process is at work on unit {left[0]}. Run the same command again when it is done."
        raise BusyStore(message)
    return seal(made)


def same_tokens(rows: NDArray[np.int64], there: NDArray[np.int64], here: NDArray[np.int64]) -> NDArray[np.int64]:
    """Addresses (rows,) of the tokens at `rows` of another store, whose units differ in size.

    `there` and `here` are the first rows of the items in the other store and in this one, (items,).
    """
    items = np.searchsorted(there, rows, side="right") - 1
    return np.asarray(rows - there[items] + here[items], np.int64)


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """How the rows of the new store are made."""

    encoding: str
    logical_dtype: str
    width: int
    encode: Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[np.float32] | None]]
    """Hidden states (tokens, D) to rows (tokens, width) and, for `int8`, the scale of each token."""
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    """Entries to add to the provenance of the source."""
    write_model: Callable[[zarr.Group], None] = lambda _group: None
    """Creates the model's own arrays, all but `probe`."""
    probe_attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Attributes to add to `probe/logits`."""


def _to_int8(source: Store) -> _Derivation:
    moments, calibration = _calibration(source)
    scale = Scale.of(moments, calibration=calibration)

    def write_model(group: zarr.Group) -> None:
        save_scale(group, scale)
        bits, dtype = source.lm_head_bits()
        attributes = {"logical_dtype": dtype, "lm_head_sha256": source.lm_head_sha256}
        create_whole_array(group, "lm_head/weight", bits, attributes=attributes)

    return _Derivation(
        encoding="int8",
        logical_dtype=SCALED_DTYPE,
        width=source.width,
        encode=scale.encode,
        provenance={"scale": scale.id},
        write_model=write_model,
    )


def _to_logits(source: Store) -> _Derivation:
    weight = source.lm_head()
    return _Derivation(
        encoding="logits",
        logical_dtype=source.logical_dtype,
        width=len(weight),
        encode=lambda hidden: (from_float32(hidden @ weight.T, source.logical_dtype), None),
        probe_attributes={"lm_head_sha256": source.lm_head_sha256},
    )


def _derive(source: Store, out: Path, derivation: _Derivation, advance: Advance) -> Store:
    """Write the store that `derivation` makes of `source`, or finish the one begun at `out`; seal it."""
    if out.resolve() == source.path.resolve():
        message = f"{out} is the store to be read; give another path for what is made of it."
        raise SettingsConflict(message)

    def write_model(group: zarr.Group, made: Store) -> None:
        derivation.write_model(group)
        rows, logits = source.whole("probe/rows"), source.whole("probe/logits")
        create_whole_array(group, "probe/rows", same_tokens(rows, source.row_starts, made.row_starts))
        dtype = source.array("probe/logits").attrs["logical_dtype"]
        attributes = {"logical_dtype": dtype, **derivation.probe_attributes}
        create_whole_array(group, "probe/logits", logits, attributes=attributes)

    def write_unit(writer: UnitWriter, unit: int) -> None:
        started = time.perf_counter()
        rows, scale = derivation.encode(source.read(writer.store.items_of(unit)).float32())
        writer.write_unit(unit, rows, scale=scale, seconds=time.perf_counter() - started)

    return write_store(out, _plan(source, derivation), write_model=write_model, write_unit=write_unit, advance=advance)


def _plan(source: Store, derivation: _Derivation) -> StorePlan:
    return StorePlan(
        encoding=derivation.encoding,
        logical_dtype=derivation.logical_dtype,
        width=derivation.width,
        provenance={**without_shape(source.provenance), "source": source.id, **derivation.provenance},
        items=source.items,
        token_ids=_per_item(source, "tokens/ids"),
        roles=_per_item(source, "tokens/roles"),
        item_keys=[key.tobytes() for key in source.item_keys],
        truncated=(source.status == ITEM_STATUS["truncated"]).tolist(),
    )


def _per_item(source: Store, array: str) -> list[NDArray[Any]]:
    """The values of each item; items follow each other in their units, in order."""
    parts: list[NDArray[Any]] = []
    for unit in range(source.geometry.units):
        ends = np.cumsum(source.n_tokens[source.items_of(unit)], dtype=np.int64)
        parts += np.split(source.read_unit(unit, array), ends)[:-1]
    return parts


def _require_hidden(store: Store) -> None:
    """Raise ViewRefused unless `store` holds hidden states in the bits of the model."""
    if store.encoding != "hidden":
        message = f"{store.path} holds {store.encoding} features; this needs the store of hidden states they came from."
        raise ViewRefused(message)


def _calibration(store: Store) -> tuple[Moments, str]:
    """Moments of the hidden states of the training split (all items without splits), and what they were taken over.

    Raises ConfigError where there are splits and no training items.
    """
    items = np.arange(len(store.items))
    if any(store.items.splits):
        items = np.array(store.items.in_split("train"), np.int64)
    if not len(items):
        message = (
            f"{store.path} has splits but no item in 'train', and sketch and int8 are never calibrated on test items. "
            "Join a split column with `agiqa store labels`."
        )
        raise ConfigError(message)

    def blocks() -> Iterator[NDArray[np.float32]]:
        for unit in np.unique(store.units[items]).tolist():
            yield store.read(items[store.units[items] == unit]).float32()

    return moments_of(blocks(), store.width), f"{store.id}:{len(items)} items"


def _measure_errors(source: Store, sketch: Store) -> tuple[float, float]:
    """Relative Frobenius errors of the logits, and of a random projection of them, over 256 tokens, both explicit."""
    items = np.unique(np.linspace(0, len(source.items) - 1, 64).astype(int))
    hidden, coordinates = source.read(items), sketch.read(items)
    rows = np.unique(np.linspace(0, len(hidden.rows) - 1, _MEASURED_TOKENS).astype(int))
    exact = to_float32(hidden.rows[rows], source.logical_dtype) @ source.lm_head().T
    error = exact - to_float32(coordinates.rows[rows], sketch.logical_dtype) @ sketch.basis().q.T
    projection = np.random.default_rng(0).standard_normal((exact.shape[1], _MEASURED_OUTPUTS), np.float32)
    errors = (error, exact), (error @ projection, exact @ projection)
    logits, projected = (float(np.linalg.norm(wrong) / np.linalg.norm(right)) for wrong, right in errors)
    return logits, projected
