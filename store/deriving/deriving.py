"""Stores made from a store: the same items and tokens, other rows."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.errors import BusyStore, SettingsConflict, ViewRefused
from agiqa.store.format.arrays import create_whole_array
from agiqa.store.format.layout import ITEM_STATUS
from agiqa.store.reading.store import Store
from agiqa.store.writing.creating import create_store
from agiqa.store.writing.filling import UnitWriter
from agiqa.store.writing.planning import StorePlan, without_shape
from agiqa.store.writing.sealing import seal


@dataclass(frozen=True, kw_only=True)
class Derivation:
    """What makes the rows of the new store."""

    encoding: str
    logical_dtype: str
    width: int
    provenance: dict[str, Any]
    """What is added to that of the source."""
    encode: Callable[[NDArray[np.float32]], tuple[NDArray[Any], NDArray[np.float32] | None]]
    """Hidden states (tokens, D) to rows (tokens, width) and, for `int8`, the scale of each token."""
    write_model: Callable[[zarr.Group], None]
    """Creates the model's own arrays, all but `probe`."""
    probe_attributes: dict[str, Any]
    """Added to those of `probe/logits`."""


def derive_store(
    source: Store, out: Path, derivation: Derivation, *, advance: Callable[[int], None] = lambda _tokens: None
) -> Store:
    """Write the store that `derivation` makes of the hidden states of `source`, or finish the one begun; seal it.

    `advance` is called with the tokens of every finished unit. Raises ViewRefused when `source` holds no hidden
    states as the model made them, SettingsConflict when `out` is a store made otherwise.
    """
    require_hidden(source)
    if out.resolve() == source.path.resolve():
        message = f"{out} is the store to be read; give another path for what is made of it."
        raise SettingsConflict(message)

    def write_model(group: zarr.Group, made: Store) -> None:
        _write_model_arrays(group, source, made, derivation)

    def write_unit(writer: UnitWriter, unit: int) -> None:
        started = time.perf_counter()
        rows, scale = derivation.encode(source.read(writer.store.items_of(unit)).float32())
        writer.write_unit(unit, rows, scale=scale, seconds=time.perf_counter() - started)

    return write_store(out, _plan(source, derivation), write_model=write_model, write_unit=write_unit, advance=advance)


def write_store(
    out: Path,
    plan: StorePlan,
    *,
    write_model: Callable[[zarr.Group, Store], None],
    write_unit: Callable[[UnitWriter, int], None],
    advance: Callable[[int], None],
) -> Store:
    """Make the planned store at `out`, or finish the one begun there; seal it.

    `write_model` creates the model's own arrays of the store that it is given, `write_unit` computes and writes a unit,
    `advance` is called with the tokens of every unit that is done. Raises as `create_store`, and BusyStore where
    another process is at work on a unit that is left.
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


def require_hidden(store: Store) -> None:
    """Raise ViewRefused unless `store` holds hidden states in the bits of the model."""
    if store.encoding != "hidden":
        message = f"{store.path} holds {store.encoding} features; this needs the store of hidden states they came from."
        raise ViewRefused(message)


def _plan(source: Store, derivation: Derivation) -> StorePlan:
    token_ids: list[NDArray[np.int32]] = [np.zeros(0, np.int32)] * len(source.items)
    roles: list[NDArray[np.uint8]] = [np.zeros(0, np.uint8)] * len(source.items)
    for unit in range(source.geometry.units):
        unit_ids, unit_roles = source.read_unit(unit, "tokens/ids"), source.read_unit(unit, "tokens/roles")
        for item in source.items_of(unit).tolist():
            start = int(source.row_starts[item]) - unit * source.geometry.unit_rows
            rows = slice(start, start + int(source.n_tokens[item]))
            token_ids[item], roles[item] = unit_ids[rows], unit_roles[rows]
    return StorePlan(
        encoding=derivation.encoding,
        logical_dtype=derivation.logical_dtype,
        width=derivation.width,
        provenance={**without_shape(source.provenance), "source": source.id, **derivation.provenance},
        items=source.items,
        token_ids=token_ids,
        roles=roles,
        item_keys=[key.tobytes() for key in source.item_keys],
        truncated=(source.status == ITEM_STATUS["truncated"]).tolist(),
    )


def _write_model_arrays(group: zarr.Group, source: Store, made: Store, derivation: Derivation) -> None:
    derivation.write_model(group)
    rows, logits = source.whole("probe/rows"), source.whole("probe/logits")
    create_whole_array(group, "probe/rows", same_tokens(rows, source.row_starts, made.row_starts))
    dtype = source.array("probe/logits").attrs["logical_dtype"]
    attributes = {"logical_dtype": dtype, **derivation.probe_attributes}
    create_whole_array(group, "probe/logits", logits, attributes=attributes)


def same_tokens(rows: NDArray[np.int64], there: NDArray[np.int64], here: NDArray[np.int64]) -> NDArray[np.int64]:
    """Addresses (rows,) of the tokens at `rows` of another store, whose units differ in size.

    `there` and `here` are the first rows of the items in the other store and in this one, (items,).
    """
    items = np.searchsorted(there, rows, side="right") - 1
    return np.asarray(rows - there[items] + here[items], np.int64)
