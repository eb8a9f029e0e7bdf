"""Plan: everything of a store but the features, written in one step before the first unit is computed."""

import asyncio
import errno
import glob
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.sync import sync

from agiqa.errors import ConfigError, SettingsConflict, listed
from agiqa.store.arrays import (
    Geometry,
    choose_geometry,
    create_features,
    create_kept_logits,
    create_token_array,
    create_whole_array,
)
from agiqa.store.bits import rows_dtype
from agiqa.store.files import (
    canonical_json,
    describe_object,
    files_below,
    left_lock,
    new_lock,
    sync_file,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.items import Items, write_items
from agiqa.store.layout import FORMAT, ITEM_STATUS, PULL_RECORD, VERSION, StoreLayout
from agiqa.store.provenance import differences, store_id
from agiqa.store.reading import Store, is_planned, open_store
from agiqa.store.upkeep import upkeep_lock

PLAN_LOCK = "plan"
"""Held while a plan is written."""
_SHAPE = ("encoding", "logical_dtype", "width", "kept_logits")
"""What decides the shape of the features."""


@dataclass(frozen=True, kw_only=True)
class StorePlan:
    """What a store will hold, known before any feature is computed."""

    encoding: str
    """One of ENCODINGS."""
    logical_dtype: str
    """Of the rows as they are read; `int8` rows are stored as int8."""
    width: int
    """Hidden size D (`hidden`, `int8`), rank r (`sketch`) or vocabulary V (`logits`)."""
    provenance: Mapping[str, Any]
    items: Items
    token_ids: Sequence[NDArray[np.int32]]
    """Per item, (tokens,)."""
    roles: Sequence[NDArray[np.uint8]]
    """Per item, (tokens,), values of TOKEN_ROLES."""
    item_keys: Sequence[bytes]
    """Per item, sha256 of the image bytes and the conversation."""
    truncated: Sequence[bool]
    kept_logits: int | None = None
    """Size of the vocabulary, where the raw logits are kept beside hidden states."""

    def __post_init__(self) -> None:
        """Raises ConfigError where raw logits are to be kept beside anything but hidden states."""
        if self.kept_logits is not None and self.encoding != "hidden":
            message = f"Raw logits are kept beside hidden states only, not beside {self.encoding!r}."
            raise ConfigError(message)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype of the stored rows."""
        return rows_dtype(self.encoding, self.logical_dtype)

    def full_provenance(self) -> dict[str, Any]:
        """The provenance with what decides the shape of the features; its hash is the store id."""
        shape = {name: getattr(self, name) for name in _SHAPE}
        return {**self.provenance, **{name: value for name, value in shape.items() if value is not None}}


def without_shape(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance that a plan began with, of a store's `full_provenance`."""
    return {name: value for name, value in provenance.items() if name not in _SHAPE}


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where each item's rows lie: unit and first row, both (items,)."""

    geometry: Geometry
    units: NDArray[np.int32]
    row_starts: NDArray[np.int64]


def place_items(n_tokens: NDArray[np.int32], geometry: Geometry) -> Placement:
    """Bin items into units in their own order; no item crosses a unit."""
    units = np.zeros(len(n_tokens), np.int32)
    starts = np.zeros(len(n_tokens), np.int64)
    unit, used = 0, 0
    for position, length in enumerate(n_tokens.tolist()):
        if used + length > geometry.unit_rows:
            unit, used = unit + 1, 0
        units[position] = unit
        starts[position] = unit * geometry.unit_rows + used
        used += length
    placed = Geometry(
        units=unit + 1, unit_rows=geometry.unit_rows, chunk_rows=geometry.chunk_rows, width=geometry.width
    )
    return Placement(geometry=placed, units=units, row_starts=starts)


def place(n_tokens: NDArray[np.int32], *, width: int, itemsize: int) -> Placement:
    """Choose the geometry for items of these lengths and bin them."""
    geometry = choose_geometry(
        total_rows=int(n_tokens.sum()), longest=int(n_tokens.max(initial=0)), width=width, itemsize=itemsize
    )
    return place_items(n_tokens, geometry)


def create_store(path: Path, plan: StorePlan) -> Store:
    """Write the plan at `path`, or take up the store that is there if it was planned alike.

    The plan is written beside `path` and renamed, so a killed plan leaves no store. An unfinished store takes
    over the labels of `plan`. Returns the store, opened with what is there of it.

    Raises SettingsConflict, naming every difference, when `path` holds a store made with other settings, a
    finished store with other labels, or something that is no store.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        return _take_up(path, plan)
    with telling_disk_errors(f"writing the plan of {path}", "nothing of it is left"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_killed_plans(path)
        first = _write_beside(path, plan)
    return open_store(path, allow_partial=True) if first else _take_up(path, plan)


def _write_beside(path: Path, plan: StorePlan) -> bool:
    """Write the plan into a folder beside `path` and rename it; False where another run was first."""
    temporary = Path(tempfile.mkdtemp(prefix=_plan_prefix(path), dir=path.parent))
    layout = StoreLayout(temporary)
    try:
        with new_lock(layout.locks / PLAN_LOCK):
            _write_plan(layout, plan)
            temporary.chmod(0o755)
            temporary.replace(path)
    except OSError as error:
        _remove_for_good(temporary)
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    except BaseException:
        _remove_for_good(temporary)
        raise
    sync_file(path.parent)
    return True


def _remove_for_good(folder: Path) -> None:
    """Remove `folder`, into which zarr may still write: where one of its writes fails, others run to their end."""
    sync(_others_of_the_loop())
    shutil.rmtree(folder, ignore_errors=True)


async def _others_of_the_loop() -> None:
    """Wait for everything that zarr's event loop is at work on, and leave it to others how it ends."""
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def _plan_prefix(path: Path) -> str:
    return f".{path.name}.plan-"


def plans_beside(path: Path) -> list[Path]:
    """The folders in which plans of the store at `path` are being written, or were when their runs were killed."""
    return sorted(path.parent.glob(f"{glob.escape(_plan_prefix(path))}*/"))


def _remove_killed_plans(path: Path) -> None:
    for left_over in plans_beside(path):
        with left_lock(StoreLayout(left_over).locks / PLAN_LOCK) as ended:
            if ended:
                shutil.rmtree(left_over, ignore_errors=True)  # it may be another user's, or be removed by two at once


def _take_up(path: Path, plan: StorePlan) -> Store:
    if (path / PULL_RECORD).exists():
        message = (
            f"A pull into {path} is at work or was cut off. Finish it with `agiqa store pull`, or give another path."
        )
        raise SettingsConflict(message)
    if not is_planned(path):
        message = f"{path} exists and is not a feature store. Choose another path, or move it away."
        raise SettingsConflict(message)
    store = open_store(path, allow_partial=True)
    asked = plan.full_provenance()
    if store_id(asked) != store.id:
        found = [*differences(store.provenance, asked), *_changed_items(store, plan)]
        lines = "\n".join(f"  {line}" for line in found)
        message = (
            f"{path} exists and was made with other settings:\n{lines}\n"
            "Give the settings that it was made with, or another path."
        )
        raise SettingsConflict(message)
    if not store.items.same_as(_comparable(plan.items, store)):
        if store.is_complete:
            message = (
                f"{path} is finished and its labels, splits or prompts differ from those given now. "
                "Extract to another path, or give the labels that it was made with."
            )
            raise SettingsConflict(message)
        with upkeep_lock(store.layout, doing="writing the labels of", kept="finished units are kept"):
            if not store.is_complete:  # else a seal has listed the old ones since
                write_items(store.layout.items, plan.items)
        return _take_up(path, plan)
    return store


def _comparable(asked: Items, store: Store) -> Items:
    """The items asked for; without the authors of their texts where a finished store does not record any."""
    return replace(asked, text_authors=[]) if store.is_complete and not store.items.text_authors else asked


def _changed_items(store: Store, plan: StorePlan) -> list[str]:
    """Which items differ in image, conversation or presence, five of each kind by name."""
    there = {name: key.tobytes() for name, key in zip(store.items.names, store.item_keys, strict=True)}
    here = dict(zip(plan.items.names, plan.item_keys, strict=True))
    kinds = {
        "changed items": [name for name in here if name in there and here[name] != there[name]],
        "items only asked": [name for name in here if name not in there],
        "items only stored": [name for name in there if name not in here],
    }
    return [f"{kind}: {listed(names)}" for kind, names in kinds.items() if names]


def _write_plan(layout: StoreLayout, plan: StorePlan) -> None:
    n_tokens = np.array([len(ids) for ids in plan.token_ids], np.int32)
    placement = place(n_tokens, width=plan.width, itemsize=plan.dtype.itemsize)
    geometry = placement.geometry
    group = zarr.create_group(store=layout.zarr, attributes=_attributes(plan, geometry))
    create_features(group, geometry, dtype=plan.dtype, logical_dtype=plan.logical_dtype)
    if plan.kept_logits is not None:
        create_kept_logits(group, geometry, vocabulary=plan.kept_logits, logical_dtype=plan.logical_dtype)
    if plan.encoding == "int8":
        create_token_array(group, "tokens/scale", geometry, "float32")
    _write_tokens(group, plan, placement)
    index: dict[str, np.ndarray[Any, Any]] = {
        "row_start": placement.row_starts,
        "n_tokens": n_tokens,
        "unit": placement.units,
        "item_key": np.frombuffer(b"".join(plan.item_keys), np.uint8).reshape(len(n_tokens), -1),
        "status": np.array([ITEM_STATUS["truncated" if cut else "whole"] for cut in plan.truncated], np.uint8),
    }
    for name, values in index.items():
        create_whole_array(group, f"index/{name}", values)
    write_items(layout.items, plan.items)
    layout.commits.mkdir()
    root_metadata = layout.zarr / "zarr.json"  # rewritten by the seal, so no part of the record
    files = files_below(layout.zarr)
    for path in files:
        sync_file(path)
    objects = [describe_object(layout.root, path) for path in files if path != root_metadata]
    write_text_atomically(layout.plan_commit, canonical_json({"objects": objects}))


def _attributes(plan: StorePlan, geometry: Geometry) -> dict[str, Any]:
    provenance = plan.full_provenance()
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": store_id(provenance),
        "encoding": plan.encoding,
        "logical_dtype": plan.logical_dtype,
        "units": geometry.units,
        "unit_rows": geometry.unit_rows,
        "chunk_rows": geometry.chunk_rows,
        "width": geometry.width,
        "provenance": provenance,
    }


def _write_tokens(group: zarr.Group, plan: StorePlan, placement: Placement) -> None:
    geometry = placement.geometry
    per_token: dict[str, tuple[Sequence[NDArray[Any]], str]] = {
        "ids": (plan.token_ids, "int32"),
        "roles": (plan.roles, "uint8"),
    }
    for name, (per_item, dtype) in per_token.items():
        array = create_token_array(group, f"tokens/{name}", geometry, dtype)
        for unit in range(geometry.units):
            block = np.zeros(geometry.unit_rows, dtype)
            for position in np.flatnonzero(placement.units == unit).tolist():
                start = int(placement.row_starts[position]) - unit * geometry.unit_rows
                values = per_item[position]
                block[start : start + len(values)] = values
            first = unit * geometry.unit_rows
            array[first : first + geometry.unit_rows] = block
