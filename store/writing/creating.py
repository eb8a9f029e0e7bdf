"""Create a store from a plan, or resume the one that is there after checking that it was planned in the same way."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, IncompleteStore, SettingsConflict, listed
from agiqa.store.disk.files import left_lock, sha256_of_file, sync_file, telling_disk_errors
from agiqa.store.format.items import LABEL_PREFIX, Items
from agiqa.store.format.layout import StoreLayout
from agiqa.store.format.listings import check_object_path, read_record
from agiqa.store.format.provenance import differences, store_id
from agiqa.store.format.recorded_items import replace_recorded_items
from agiqa.store.reading.store import Store, open_store
from agiqa.store.writing.places import PLAN_LOCK, is_taken, plans_beside, require_place, require_planned
from agiqa.store.writing.planning import StorePlan, plan_beside, write_beside
from agiqa.store.writing.sealing import size_problem
from agiqa.store.writing.upkeep import upkeep_lock


def create_store(path: Path, plan: StorePlan) -> Store:
    """Write the plan at `path`, or take up the store that is there if it was planned alike.

    The plan is written beside `path` (or what it is a link to) and renamed, so a killed plan leaves no store. It has
    the rights that the umask and the folder above give it, or those of the empty folder that it replaces. In an
    unfinished store, the labels become those of `plan`, and missing files of the plan (as tokens that a repair removed)
    are written again. Returns the store, opened even if it is unfinished.

    Raises SettingsConflict, naming every difference, when `path` holds a store made with other settings, a
    finished store with other labels, or something that is no store; IncompleteStore when it holds a part of the store;
    DamagedStore when objects of it are missing and `plan` does not write them as they were; ConfigError as
    `require_place`.
    """
    place = require_place(path)
    if is_taken(place):
        return _take_up(path, plan)
    with telling_disk_errors(f"writing the plan of {path}", "nothing of it is left"):
        place.parent.mkdir(parents=True, exist_ok=True)
        _remove_killed_plans(place)
        first = write_beside(place, plan)
    return open_store(path, allow_partial=True) if first else _take_up(path, plan)


def _remove_killed_plans(path: Path) -> None:
    for left_over in plans_beside(path):
        with left_lock(StoreLayout(left_over).locks / PLAN_LOCK) as ended:
            if ended:
                shutil.rmtree(left_over, ignore_errors=True)  # it may be another user's, or be removed by two at once


def _take_up(path: Path, plan: StorePlan) -> Store:
    require_planned(path)
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
    if not _has_items(store, plan.items):
        if store.is_complete:
            raise SettingsConflict(_other_labels(store, plan))
        with upkeep_lock(store.layout, doing="writing the labels of", kept="finished units are kept"):
            if not store.layout.manifest.exists():  # else a seal has listed the old ones since
                replace_recorded_items(store.layout, plan.items)
        return _take_up(path, plan)
    if store.is_complete:
        _require_whole(store)
    else:
        _write_missing(store, plan)
        _require_same_tokens(store, plan)
    return store


def _require_whole(store: Store) -> None:
    """Raise IncompleteStore where only a part of the store was pulled, DamagedStore where objects of it are missing."""
    if store.pulled_units is not None:
        message = f"{store.path} holds {len(store.pulled_units)} of {store.geometry.units} units. {store.remedy}"
        raise IncompleteStore(message)
    problems = [problem for entry in store.manifest["objects"] if (problem := size_problem(store, entry))]
    if problems:
        message = (
            f"{store.path} was finished, and is damaged since: {listed(problems)}. `agiqa store repair {store.path}` "
            "drops what is damaged, and the same command computes it anew then."
        )
        raise DamagedStore(message)


def _write_missing(store: Store, plan: StorePlan) -> None:
    """Write what the record of the plan lists and is not there, as after a repair, to the very bytes recorded.

    Raises DamagedStore where `plan` does not make these bytes.
    """
    layout = store.layout
    missing = [entry for entry in read_record(layout.plan_commit) if _is_missing(store, entry["path"])]
    if not missing:
        return
    place, doing = require_place(store.path), "writing token ids and roles of"
    with upkeep_lock(layout, doing=doing, kept="finished units are kept"), plan_beside(place, plan) as made:
        for entry in missing:
            source, target = made.root / entry["path"], store.path / entry["path"]
            if not source.is_file() or sha256_of_file(source) != entry["sha256"]:
                message = (
                    f"{store.path}: {entry['path']} is missing, and is written otherwise now than it was recorded: the "
                    "items have other tokens, or a library encodes them otherwise. Copy the store again, or make it at "
                    "another path."
                )
                raise DamagedStore(message)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            sync_file(target.parent)


def _require_same_tokens(store: Store, plan: StorePlan) -> None:
    """Raise SettingsConflict where the store was planned with other tokens, as from a source that was there in part."""
    planned: dict[str, Sequence[NDArray[Any]]] = {"tokens/ids": plan.token_ids, "tokens/roles": plan.roles}
    for unit in range(store.geometry.units):
        items = store.items_of(unit).tolist()
        for name, per_item in planned.items():
            expected = np.concatenate([np.zeros(0, np.int32), *(per_item[item] for item in items)])
            if not np.array_equal(store.unit_rows(unit, name), expected):
                message = (
                    f"{store.path} was planned with other {name} in unit {unit} (item {store.items.names[items[0]]!r} "
                    "and those after it). Remove it, or give another path."
                )
                raise SettingsConflict(message)


def _is_missing(store: Store, path: str) -> bool:
    return not (store.path / check_object_path(store.path, path, listed_in="commits/plan.json")).exists()


def _has_items(store: Store, items: Items) -> bool:
    """Whether the store has these labels, splits and prompts; a damaged table of an unfinished store has not."""
    try:
        return store.items.same_as(_comparable(items, store))
    except DamagedStore:
        if store.is_complete:
            raise
        return False


def _comparable(asked: Items, store: Store) -> Items:
    """The items asked for; without the authors of their texts where a finished store does not record any."""
    return replace(asked, text_authors=[]) if store.is_complete and not store.items.text_authors else asked


def _other_labels(store: Store, plan: StorePlan) -> str:
    """What differs between the item tables of a finished store and a plan, and how to store what is given now."""
    path, there, here = store.path, store.items.table(), _comparable(plan.items, store).table()
    columns = sorted({*there.column_names, *here.column_names})
    different = [name for name in columns if not _same_column(there, here, name)]
    message = f"{path} is finished and its labels or texts differ from those given now ({', '.join(different)})."
    labels = all(name in ("split", "generator") or name.startswith(LABEL_PREFIX) for name in different)
    if labels and all(name in here.column_names and _keeps_no_old(there, here, name) for name in different):
        table = plan.label_table or "TABLE.csv"
        return f"{message} `agiqa store labels {path} {table}` stores what {table} has of them, without the model."
    return f"{message} Extract to another path, or give those that it was made with."


def _same_column(there: pa.Table, here: pa.Table, name: str) -> bool:
    both = name in there.column_names and name in here.column_names
    return both and bool(there.column(name).equals(here.column(name)))


def _keeps_no_old(there: pa.Table, here: pa.Table, name: str) -> bool:
    """Whether no value is only in `there`: joining labels leaves what the table has no value for."""
    if name not in there.column_names:
        return True
    return not any(
        new is None and old is not None
        for old, new in zip(there.column(name).to_pylist(), here.column(name).to_pylist(), strict=True)
    )


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
