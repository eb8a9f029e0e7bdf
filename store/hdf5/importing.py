"""A store made again from the HDF5 file that it was exported to, through the same plan, fill and seal as any other."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from agiqa.store.deriving.deriving import same_tokens, write_store
from agiqa.store.format.arrays import create_whole_array
from agiqa.store.format.layers import layer_array, token_scale_array
from agiqa.store.format.layout import ITEM_STATUS, MODEL_GROUPS, PROBE_ROWS
from agiqa.store.hdf5.checking import StoreFile, check_store_file
from agiqa.store.hdf5.files import open_hdf5, read_attributes, reading
from agiqa.store.reading.store import Store
from agiqa.store.writing.filling import UnitWriter
from agiqa.store.writing.planning import StorePlan, content_fields, without_shape


def import_hdf5(source: Path, out: Path, *, advance: Callable[[int], None] = lambda _tokens: None) -> Store:
    """Make the store at `out` that the HDF5 file `source` was exported from, or finish the one begun there; seal it.

    The store has the same id, rows, tokens, items and model arrays; its units may be cut otherwise. `advance` is called
    with the tokens of every finished unit. Nothing is written before the whole file but its rows has been checked.

    Raises as `check_store_file`; SettingsConflict when `out` is a store made otherwise; BusyStore while another process
    fills it.
    """
    with open_hdf5(source) as file:
        return import_checked(check_store_file(source, file), out, advance=advance)


def import_checked(source: StoreFile, out: Path, *, advance: Callable[[int], None] = lambda _tokens: None) -> Store:
    """`import_hdf5` of a file that is open and checked already."""
    plan = StorePlan(
        encoding=source.encoding,
        logical_dtype=source.logical_dtype,
        width=source.geometry.width,
        provenance=without_shape(source.provenance),
        items=source.items,
        token_ids=_per_item(source, "tokens/ids"),
        roles=_per_item(source, "tokens/roles"),
        item_keys=[key.tobytes() for key in source.item_keys],
        truncated=(source.status == ITEM_STATUS["truncated"]).tolist(),
        kept_logits=source.provenance.get("kept_logits"),
        **content_fields(source.provenance),
        prefixes=source.prefixes,
    )
    return write_store(
        out,
        plan,
        write_model=lambda group, made: _write_model_arrays(group, source, made),
        write_unit=lambda writer, unit: _write_unit(source, writer, unit),
        advance=advance,
    )


def _per_item(source: StoreFile, name: str) -> list[NDArray[Any]]:
    parts: list[NDArray[Any]] = []
    for unit in range(source.geometry.units):
        items = np.flatnonzero(source.units == unit)
        values = _take(source, name, _addresses(source, items))
        parts += np.split(values, np.cumsum(source.n_tokens[items], dtype=np.int64))[:-1]
    return parts


def _addresses(source: StoreFile, items: NDArray[np.int64]) -> NDArray[np.int64]:
    """Row addresses in the file of all tokens of `items`, one item after the other."""
    ranges = [
        np.arange(start, start + length, dtype=np.int64)
        for start, length in zip(source.row_starts[items].tolist(), source.n_tokens[items].tolist(), strict=True)
    ]
    return np.concatenate([np.zeros(0, np.int64), *ranges])


def _take(source: StoreFile, name: str, addresses: NDArray[np.int64]) -> NDArray[Any]:
    """The rows of the array `name` at ascending `addresses`, one read per run of neighbours."""
    dataset = source.arrays[name]
    runs = np.split(addresses, np.flatnonzero(np.diff(addresses) != 1) + 1) if len(addresses) else []
    where = f" rows {runs[0][0]} to {runs[-1][-1]}" if runs else ""
    with reading(source.path, f"{name!r}{where}"):
        parts = [np.asarray(dataset[int(run[0]) : int(run[-1]) + 1]) for run in runs]
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([np.zeros((0, *dataset.shape[1:]), dataset.dtype), *parts])


def _write_model_arrays(group: zarr.Group, source: StoreFile, made: Store) -> None:
    for name, dataset in source.arrays.items():
        if name.split("/")[0] not in MODEL_GROUPS:
            continue
        with reading(source.path, f"{name!r}"):
            values = np.asarray(dataset[...])
        if name == PROBE_ROWS:
            values = same_tokens(values, source.row_starts, made.row_starts)
        create_whole_array(group, name, values, attributes=read_attributes(dataset))


def _write_unit(source: StoreFile, writer: UnitWriter, unit: int) -> None:
    started = time.perf_counter()
    addresses = _addresses(source, writer.store.items_of(unit))
    rows = _take(source, "features", addresses)
    is_int8, others = source.encoding == "int8", writer.store.layers[:-1]
    scales = {layer: _take(source, token_scale_array(layer), addresses) for layer in others if is_int8}

    def logits(start: int, stop: int) -> NDArray[Any]:
        return _take(source, "logits", addresses[start:stop])

    kept = logits if "kept_logits" in source.provenance else None
    writer.write_unit(
        unit,
        rows,
        scale=_take(source, token_scale_array(None), addresses) if is_int8 else None,
        logits=kept,
        layers={layer: _take(source, layer_array(layer), addresses) for layer in others},
        layer_scales=scales if is_int8 else None,
        seconds=time.perf_counter() - started,
    )
