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
from agiqa.store.arrays import create_whole_array
from agiqa.store.filling import UnitWriter
from agiqa.store.layout import ITEM_STATUS
from agiqa.store.planning import StorePlan, create_store
from agiqa.store.reading import Store
from agiqa.store.sealing import seal


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
    made = create_store(out, _plan(source, derivation))
    if made.is_complete:
        return made
    writer = UnitWriter(made)
    writer.write_model_arrays(lambda group: _write_model_arrays(group, source, made, derivation))
    for unit in writer.pending():
        with writer.claim(unit) as mine:
            if mine:
                started = time.perf_counter()
                rows, scale = derivation.encode(source.read(made.items_of(unit)).float32())
                writer.write_unit(unit, rows, scale=scale, seconds=time.perf_counter() - started)
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
        unit_ids, unit_roles = source.unit_rows(unit, "tokens/ids"), source.unit_rows(unit, "tokens/roles")
        for item in source.items_of(unit).tolist():
            start = int(source.row_starts[item]) - unit * source.geometry.unit_rows
            rows = slice(start, start + int(source.n_tokens[item]))
            token_ids[item], roles[item] = unit_ids[rows], unit_roles[rows]
    shape = ("encoding", "logical_dtype", "width", "kept_logits")
    kept = {name: value for name, value in source.provenance.items() if name not in shape}
    return StorePlan(
        encoding=derivation.encoding,
        logical_dtype=derivation.logical_dtype,
        width=derivation.width,
        provenance={**kept, "source": source.id, **derivation.provenance},
        items=source.items,
        token_ids=token_ids,
        roles=roles,
        item_keys=[key.tobytes() for key in source.item_keys],
        truncated=(source.status == ITEM_STATUS["truncated"]).tolist(),
    )


def _write_model_arrays(group: zarr.Group, source: Store, made: Store, derivation: Derivation) -> None:
    derivation.write_model(group)
    rows = np.asarray(source.array("probe/rows")[...])
    logits = source.array("probe/logits")
    create_whole_array(group, "probe/rows", _same_tokens(rows, source, made))
    attributes = {"logical_dtype": logits.attrs["logical_dtype"], **derivation.probe_attributes}
    create_whole_array(group, "probe/logits", np.asarray(logits[...]), attributes=attributes)


def _same_tokens(rows: NDArray[np.int64], source: Store, made: Store) -> NDArray[np.int64]:
    """Row addresses in `made` of the tokens that stand in `rows` of `source`; their units differ in size."""
    items = np.searchsorted(source.row_starts, rows, side="right") - 1
    return np.asarray(rows - source.row_starts[items] + made.row_starts[items], np.int64)
