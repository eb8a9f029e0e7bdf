"""Stores made from a store of hidden states: the same items and tokens, other rows.

A sketch has r coordinates per token, `int8` takes less disk, `logits` are raw logits for tools that know no W_lm.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, HeadError, SettingsConflict, UnknownName
from agiqa.store.deriving.calibrating import layer_bases_from, require_hidden, scale_from
from agiqa.store.format.arrays import create_whole_array, from_float32, to_float32
from agiqa.store.format.artefacts import SCALED_DTYPE, Basis, Scale, save_basis, save_scale
from agiqa.store.format.layout import ITEM_STATUS, PROBE_LOGITS, PROBE_ROWS
from agiqa.store.reading.prefixes import stored_prefixes
from agiqa.store.reading.store import Store
from agiqa.store.writing.creating import check_writable, create_store
from agiqa.store.writing.filling import UnitWriter
from agiqa.store.writing.planning import StorePlan, without_shape
from agiqa.store.writing.sealing import seal

Advance = Callable[[int], None]
"""Called with the tokens of every finished unit."""

_Artefacts = Mapping[str, Basis] | Mapping[str, Scale]
"""By layer."""

_MEASURED_TOKENS = 256
_MEASURED_OUTPUTS = 64


@dataclass(frozen=True, kw_only=True)
class SketchResult:
    """A finished sketch and how well it keeps the logits."""

    store: Store
    energy_kept: float
    """Share of the calibration tokens' squared logits, 0 to 1; for the method `lm_head` of isotropic hidden states."""
    logit_error: float
    """Measured relative Frobenius error of the logits over 256 tokens spread over all items; of the states without
    W_lm."""
    projection_error: float
    """The same of `W_proj E` for a random Gaussian W_proj with 64 outputs."""
    layers: Mapping[str, "LayerSketch"]
    """How well it keeps the states of every other layer."""


@dataclass(frozen=True, kw_only=True)
class LayerSketch:
    """How well a sketch keeps the states of a layer."""

    rank: int
    energy_kept: float
    """Share of the calibration tokens' squared states, 0 to 1."""
    state_error: float
    """Measured relative Frobenius error of the states over 256 tokens spread over all items."""


def sketch_store(
    source: Store,
    out: Path,
    *,
    basis: Basis,
    layer_bases: Mapping[str, Basis] | None = None,
    advance: Advance = lambda _tokens: None,
) -> SketchResult:
    """Write the sketch of `source` in `basis` to `out`, or finish the one begun there; then seal it.

    Other layers of `source` are sketched in `layer_bases`, or in bases of the same rank made from `source`. Raises
    HeadError when `basis` belongs to another W_lm, or a basis to another layer, and as `convert_store`.
    """
    require_hidden(source)
    if basis.lm_head_sha256 != source.lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to {_head(basis.lm_head_sha256)}, {source.path} to "
            f"{_head(source.lm_head_sha256)}: their rows live in different spaces. Use a basis of the same model."
        )
        raise HeadError(message)
    others = layer_bases_from(source, basis.rank) if layer_bases is None else layer_bases
    bases = {source.layer_name: basis, **{layer: others[layer] for layer in source.layers[:-1] if layer in others}}
    for layer in source.layers:
        _require_fitting(source, layer, bases.get(layer))
    derivation = _Derivation(
        encoding="sketch",
        layers={layer: _sketched(one) for layer, one in bases.items()},
        provenance={"basis": basis.id, **_ids("layer_bases", source, bases)},
        write_model=lambda group: _save(group, source, bases, save_basis),
    )
    sketch = _derive(source, out, derivation, advance)
    logit_error, projection_error = _measure_errors(source, sketch)
    return SketchResult(
        store=sketch,
        energy_kept=basis.energy_kept,
        logit_error=logit_error,
        projection_error=projection_error,
        layers={
            layer: LayerSketch(
                rank=bases[layer].rank,
                energy_kept=bases[layer].energy_kept,
                state_error=_relative(*_states(source, sketch, layer)),
            )
            for layer in source.layers[:-1]
        },
    )


def _head(sha256: str) -> str:
    return f"the language-model head {sha256[:12]}" if sha256 else "no language-model head"


def _require_fitting(source: Store, layer: str, basis: Basis | None) -> None:
    """Raise HeadError unless there is a basis for the states of the layer."""
    width, _ = source.layer_shape(layer)
    if basis is None:
        message = (
            f"{source.path} has the layer {layer}, and the sketch whose basis was given does not. Make its own bases "
            "with --rank, or give a sketch that has this layer."
        )
        raise HeadError(message)
    if basis.map.shape[1] != width:
        message = (
            f"The basis {basis.id[:12]} reads {basis.map.shape[1]} channels, the layer {layer} of {source.path} has "
            f"{width}. Use a basis of the same model."
        )
        raise HeadError(message)


def convert_store(source: Store, out: Path, encoding: str, *, advance: Advance = lambda _tokens: None) -> Store:
    """Write `source` as `int8` or `logits` to `out`, or finish the one begun there; then seal it.

    The scale of `int8` is calibrated as a basis is, never on test items. Raises UnknownName for another encoding,
    ViewRefused where `source` holds no hidden states, SettingsConflict when `out` is a store made otherwise.
    """
    require_hidden(source)
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
class _LayerDerivation:
    """How the rows of a layer of the new store are made."""

    logical_dtype: str
    width: int
    encode: Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[np.float32] | None]]
    """Hidden states (tokens, D) to rows (tokens, width) and, for `int8`, the scale of each token."""


@dataclass(frozen=True, kw_only=True)
class _Derivation:
    """How the rows of the new store are made."""

    encoding: str
    layers: Mapping[str, "_LayerDerivation"]
    """Of every layer of the source."""
    provenance: dict[str, Any] = field(default_factory=dict[str, Any])
    """Entries to add to the provenance of the source."""
    write_model: Callable[[zarr.Group], None] = lambda _group: None
    """Creates the model's own arrays, all but `probe`."""
    probe_attributes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Attributes to add to `probe/logits`."""


def _sketched(basis: Basis) -> _LayerDerivation:
    return _LayerDerivation(
        logical_dtype=basis.logical_dtype, width=basis.rank, encode=lambda hidden: (basis.encode(hidden), None)
    )


def _to_int8(source: Store) -> _Derivation:
    scales = {layer: scale_from(source, layer) for layer in source.layers}

    def write_model(group: zarr.Group) -> None:
        _save(group, source, scales, save_scale)
        if source.content_of_rows.has_lm_head:
            bits, dtype = source.lm_head_bits()
            attributes = {"logical_dtype": dtype, "lm_head_sha256": source.lm_head_sha256}
            create_whole_array(group, "lm_head/weight", bits, attributes=attributes)

    return _Derivation(
        encoding="int8",
        layers={
            layer: _LayerDerivation(logical_dtype=SCALED_DTYPE, width=source.layer_shape(layer)[0], encode=scale.encode)
            for layer, scale in scales.items()
        },
        provenance={"scale": scales[source.layer_name].id, **_ids("layer_scales", source, scales)},
        write_model=write_model,
    )


def _to_logits(source: Store) -> _Derivation:
    """Logits of the layer `last`; the others stay hidden states, since they have no logits."""
    weight = source.lm_head()

    def kept(layer: str) -> _LayerDerivation:
        width, dtype = source.layer_shape(layer)
        return _LayerDerivation(
            logical_dtype=dtype, width=width, encode=lambda hidden: (from_float32(hidden, dtype), None)
        )

    logits = _LayerDerivation(
        logical_dtype=source.logical_dtype,
        width=len(weight),
        encode=lambda hidden: (from_float32(hidden @ weight.T, source.logical_dtype), None),
    )
    return _Derivation(
        encoding="logits",
        layers={**{layer: kept(layer) for layer in source.layers[:-1]}, source.layer_name: logits},
        probe_attributes={"lm_head_sha256": source.lm_head_sha256},
    )


def _ids(name: str, source: Store, artefacts: _Artefacts) -> dict[str, Any]:
    """The entry `name` of the provenance: the ids by other layer; none for a store without."""
    ids = {layer: artefacts[layer].id for layer in source.layers[:-1]}
    return {name: ids} if ids else {}


def _save(group: zarr.Group, source: Store, artefacts: _Artefacts, save: Callable[..., None]) -> None:
    for layer, artefact in artefacts.items():
        save(group, artefact, layer=None if layer == source.layer_name else layer)


def _derive(source: Store, out: Path, derivation: _Derivation, advance: Advance) -> Store:
    """Write the store that `derivation` makes of `source`, or finish the one begun at `out`; seal it."""
    if out.resolve() == source.path.resolve():
        message = f"{out} is the store to be read; give another path for what is made of it."
        raise SettingsConflict(message)

    def write_model(group: zarr.Group, made: Store) -> None:
        derivation.write_model(group)
        if not source.probe_arrays:
            return
        rows = same_tokens(source.whole(PROBE_ROWS), source.row_starts, made.row_starts)
        create_whole_array(group, PROBE_ROWS, rows)
        for name in source.probe_arrays:
            attributes = {"logical_dtype": source.array(name).attrs["logical_dtype"]}
            attributes |= derivation.probe_attributes if name == PROBE_LOGITS else {}
            create_whole_array(group, name, source.whole(name), attributes=attributes)

    def write_unit(writer: UnitWriter, unit: int) -> None:
        started = time.perf_counter()
        items = writer.store.items_of(unit)
        made = {
            layer: one.encode(source.read_layer(items, layer).float32()) for layer, one in derivation.layers.items()
        }
        rows, scale = made.pop(source.layer_name)
        scales = {layer: found for layer, (_, found) in made.items() if found is not None}
        writer.write_unit(
            unit,
            rows,
            scale=scale,
            layers={layer: found for layer, (found, _) in made.items()},
            layer_scales=scales or None,
            seconds=time.perf_counter() - started,
        )

    return write_store(out, _plan(source, derivation), write_model=write_model, write_unit=write_unit, advance=advance)


def _plan(source: Store, derivation: _Derivation) -> StorePlan:
    of_features = derivation.layers[source.layer_name]
    return StorePlan(
        encoding=derivation.encoding,
        logical_dtype=of_features.logical_dtype,
        width=of_features.width,
        layers=source.layers,
        layer_widths={layer: derivation.layers[layer].width for layer in source.layers[:-1]},
        layer_dtypes={layer: derivation.layers[layer].logical_dtype for layer in source.layers[:-1]},
        layer_count=source.layer_count,
        pooled=source.pooled,
        tap=source.tap,
        provenance={**without_shape(source.provenance), "source": source.id, **derivation.provenance},
        items=source.items,
        token_ids=_per_item(source, "tokens/ids"),
        roles=_per_item(source, "tokens/roles"),
        item_keys=[key.tobytes() for key in source.item_keys],
        truncated=(source.status == ITEM_STATUS["truncated"]).tolist(),
        prefixes=stored_prefixes(source),
    )


def _per_item(source: Store, array: str) -> list[NDArray[Any]]:
    """The values of each item; items follow each other in their units, in order."""
    parts: list[NDArray[Any]] = []
    for unit in range(source.geometry.units):
        ends = np.cumsum(source.n_tokens[source.items_of(unit)], dtype=np.int64)
        parts += np.split(source.read_unit(unit, array), ends)[:-1]
    return parts


def _measure_errors(source: Store, sketch: Store) -> tuple[float, float]:
    """Relative Frobenius errors of the logits, and of a random projection of them, over 256 tokens, both explicit."""
    exact, rebuilt = _states(source, sketch, source.layer_name)
    projection = np.random.default_rng(0).standard_normal((exact.shape[1], _MEASURED_OUTPUTS), np.float32)
    return _relative(exact, rebuilt), _relative(exact @ projection, rebuilt @ projection)


def _relative(exact: NDArray[np.float32], rebuilt: NDArray[np.float32]) -> float:
    return float(np.linalg.norm(exact - rebuilt) / np.linalg.norm(exact))


def _states(source: Store, sketch: Store, layer: str) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """States of a layer, of the layer before W_lm their logits, of 256 tokens: exactly, and rebuilt from the sketch."""
    items = np.unique(np.linspace(0, len(source.items) - 1, 64).astype(int))
    hidden, coordinates = source.read_layer(items, layer), sketch.read_layer(items, layer)
    rows = np.unique(np.linspace(0, len(hidden.rows) - 1, _MEASURED_TOKENS).astype(int))
    basis = sketch.layer_basis(layer)
    exact = to_float32(hidden.rows[rows], hidden.logical_dtype)
    rebuilt = to_float32(coordinates.rows[rows], coordinates.logical_dtype) @ basis.q.T
    return (exact if basis.is_of_states else exact @ source.lm_head().T), rebuilt
