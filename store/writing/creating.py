"""Create a store from a plan, or resume an existing store that was planned in the same way.

Before any work is done, paths, links, mount points, rights and locks are checked.
"""

import asyncio
import errno
import glob
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from zarr.core.sync import sync

from agiqa.errors import ConfigError, DamagedStore, IncompleteStore, SettingsConflict, listed
from agiqa.store.disk.files import sha256_of_file, sync_file, telling_disk_errors
from agiqa.store.disk.locks import abandoned_lock, exclusive_lock, is_held, new_lock
from agiqa.store.format.items import COUNT_PREFIX, DEVIATION_PREFIX, LABEL_PREFIX, Items
from agiqa.store.format.labels import range_text
from agiqa.store.format.layout import PLAN_LOCK, PULL_LOCK, PULL_RECORD, StoreLayout
from agiqa.store.format.manifest import check_object, read_record, replace_recorded_items
from agiqa.store.format.metadata import store_id
from agiqa.store.reading.store import Store, is_planned, open_local_store
from agiqa.store.writing.conflicts import other_settings, require_same_settings
from agiqa.store.writing.planning import StorePlan, write_plan
from agiqa.store.writing.records import size_problem
from agiqa.store.writing.sealing import seal_lock

_SECONDS_TO_LOCK = 5.0
"""Far longer than a run takes between the folder of a plan and its lock file."""
_LONGEST_NAME, _TOKEN_BYTES = 255, 4
"""Most bytes of a file name on nearly all file systems, and bytes of the random part of a plan's name (in hex)."""
_URL = re.compile(r"[a-z][a-z0-9+.-]+:/")
"""How a path begins that was a URL: it has lost a slash."""


def _target_folder(path: Path) -> Path:
    """`path`, or the target of the link at `path`. Raises ConfigError if no store can have this path."""
    try:
        str(path).encode()
        target = path.resolve()
    except UnicodeEncodeError as error:
        message = f"The path {os.fsencode(path)!r} is not UTF-8, as the names of a store must be. Choose another name."
        raise ConfigError(message) from error
    except RuntimeError as error:
        message = f"{path} is a link that leads to itself. Remove it, or give another path."
        raise ConfigError(message) from error
    with suppress(OSError):  # the name is too long for the file system
        if _is_taken(target):
            return target
    if _URL.match(str(path)) and not Path(path.parts[0]).exists():
        message = (
            f"{path} looks like a URL, and stores are made in folders. Give a path; `agiqa store push PATH URL` copies "
            "the finished store."
        )
        raise ConfigError(message)
    spare = len(_plan_prefix(Path())) + 2 * _TOKEN_BYTES
    if len(os.fsencode(target.name)) > _LONGEST_NAME - spare:
        message = (
            f"The name {target.name!r} has {len(os.fsencode(target.name))} bytes, and that of a store may have "
            f"{_LONGEST_NAME - spare} at most. Choose a shorter one."
        )
        raise ConfigError(message)
    if target.is_mount():
        message = f"{path} is a mount point, which a new store cannot replace. Give a path in it: {path}/features.agiqa"
        raise ConfigError(message)
    if target == Path.cwd():
        message = (
            f"{path} is the folder that this command runs in, which a new store would replace. Give a path in it: "
            "features.agiqa"
        )
        raise ConfigError(message)
    return target


def _is_taken(target: Path) -> bool:
    """Whether there is anything but an empty folder at `target`."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _require_planned(path: Path) -> None:
    """Raise SettingsConflict unless `path` holds a store, finished or not, that no pull is replacing."""
    if (path / PULL_RECORD).exists() or is_held(StoreLayout(path).locks / PULL_LOCK):
        message = (
            f"A pull into {path} is running or was cut off. Finish it with `agiqa store pull`, or give another path."
        )
        raise SettingsConflict(message)
    if not is_planned(path):
        message = f"{path} exists and is not a feature store. Choose another path, or move it away."
        raise SettingsConflict(message)


def check_writable(path: Path) -> None:
    """Check that a store can be created or resumed at `path`; leaves nothing behind.

    Raises ConfigError as `_target_folder`, and if locks do not work there; SettingsConflict as `_require_planned`; and
    OSError, with the remedy, if this user cannot write there.
    """
    target = _target_folder(path)
    if _is_taken(target):
        _require_planned(path)
    with telling_disk_errors(f"checking that a store can be written at {path}", "nothing was changed"):
        if not _is_taken(target):
            folder = next(above for above in target.parents if above.is_dir())
            probe = _plan_folder(folder / target.name)
            try:
                probe.mkdir()
                with new_lock(StoreLayout(probe).locks / PLAN_LOCK):
                    pass
            finally:
                shutil.rmtree(probe, ignore_errors=True)
        elif not StoreLayout(target).manifest.exists():
            with exclusive_lock(StoreLayout(target).locks / PLAN_LOCK):
                pass


def _plan_folder(path: Path) -> Path:
    """A new name, beside `path`, for a folder to plan the store at `path` in."""
    return path.with_name(_plan_prefix(path) + secrets.token_hex(_TOKEN_BYTES))


def _plan_prefix(path: Path) -> str:
    return f".{path.name}.plan-"


def plans_beside(path: Path) -> list[Path]:
    """The folders of plans of the store at `path` that runs are writing, or were writing when they were killed."""
    found = path.parent.glob(f"{glob.escape(_plan_prefix(path))}*/")
    return sorted(folder for folder in found if not folder.is_symlink())


def _copy_rights(folder: Path, other: Path) -> None:
    """Give the folder `other` the group and the mode of `folder`, which a team may have set up."""
    status = folder.stat()
    with suppress(PermissionError):  # this user is not in that group
        os.chown(other, -1, status.st_gid)
    other.chmod(stat.S_IMODE(status.st_mode))


def _write_new(path: Path, plan: StorePlan) -> bool:
    """Write the plan into a folder beside `path` and rename it; False if another run was first."""
    try:
        with _planned_beside(path, plan) as layout:
            layout.root.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    sync_file(path.parent)
    return True


@contextmanager
def _planned_beside(path: Path, plan: StorePlan) -> Generator[StoreLayout]:
    """The plan, written into a folder beside `path`, which is locked while inside and removed then unless renamed."""
    layout = StoreLayout(_plan_folder(path))
    try:
        layout.root.mkdir()
        if path.is_dir():
            _copy_rights(path, layout.root)
        with new_lock(layout.locks / PLAN_LOCK):
            write_plan(layout, plan)
            yield layout
    finally:
        if layout.root.exists():
            _remove_for_good(layout.root)


def _remove_for_good(folder: Path) -> None:
    """Remove `folder`, after zarr's other writes to it have ended: a failed write does not stop them."""
    sync(_other_writes())
    shutil.rmtree(folder, ignore_errors=True)


async def _other_writes() -> None:
    """Wait for all tasks of zarr's event loop, and ignore their results."""
    await asyncio.gather(*asyncio.all_tasks() - {asyncio.current_task()}, return_exceptions=True)


def create_store(path: Path, plan: StorePlan) -> Store:
    """Write the plan at `path`, or resume the store at `path` if it was planned in the same way.

    Writes the plan beside `path` (or the target of a link there) and renames it, so a killed plan leaves no store. A
    new store has the rights of the empty folder that it replaces, or those of the umask. An unfinished store gets the
    labels of `plan`, and its missing files of the plan (as tokens that a repair removed). Returns the store, opened
    even if it is unfinished.

    Raises SettingsConflict, with all differences, if `path` holds a store made with other settings, a finished store
    with other labels, or something else; IncompleteStore if it holds a pulled part; DamagedStore if objects are missing
    and `plan` gives other bytes for them; ConfigError as `_target_folder`.
    """
    target = _target_folder(path)
    if _is_taken(target):
        return _resume(path, plan)
    with telling_disk_errors(f"writing the plan of {path}", "no files are left behind"):
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_killed_plans(target)
        first = _write_new(target, plan)
    return open_local_store(path, allow_partial=True) if first else _resume(path, plan)


def _remove_killed_plans(path: Path) -> None:
    for left_over in plans_beside(path):
        with abandoned_lock(StoreLayout(left_over).locks / PLAN_LOCK) as ended:
            if ended or stays_without_lock(left_over):
                shutil.rmtree(
                    left_over, ignore_errors=True
                )  # it may belong to another user, or another run may be removing it


def stays_without_lock(plan: Path) -> bool:
    """Whether the folder of a plan has no lock file, and gets none: its run was killed between making the two."""
    lock, deadline = StoreLayout(plan).locks / PLAN_LOCK, time.monotonic() + _SECONDS_TO_LOCK
    while plan.exists() and not lock.exists():
        if time.monotonic() > deadline:
            return True
        time.sleep(0.01)
    return False


def require_extended(store: Store, plan: StorePlan) -> None:
    """Check that `plan` is that of the finished `store` with more items after its own.

    Raises SettingsConflict for other settings, or other labels or texts of the items that it has; and as
    `require_whole`.
    """
    require_whole(store)
    require_same_settings(store, plan, extends=True)
    asked = replace(plan, items=plan.items.first(len(store.items)))
    if not has_items(store, asked.items):
        raise SettingsConflict(_other_labels(store, asked))


def _resume(path: Path, plan: StorePlan) -> Store:
    _require_planned(path)
    store = open_local_store(path, allow_partial=True)
    if store_id(plan.full_provenance()) != store.id:
        raise other_settings(store, plan, store.provenance, plan.full_provenance())
    if not has_items(store, plan.items):
        if store.is_sealed:
            raise SettingsConflict(_other_labels(store, plan))
        with seal_lock(store.layout, doing="writing the labels of", kept="finished units are kept"):
            if not store.layout.manifest.exists():  # else a seal has listed the old ones in between
                replace_recorded_items(store.layout, plan.items)
        return _resume(path, plan)
    if store.is_sealed:
        require_whole(store)
    else:
        _write_missing(store, plan)
        _require_same_tokens(store, plan)
    return store


def require_whole(store: Store) -> None:
    """Raise IncompleteStore if the store is the pulled part of one, and DamagedStore if objects are missing."""
    if store.pulled_units is not None:
        message = f"{store.path} holds {len(store.pulled_units)} of {store.geometry.units} units. {store.remedy}"
        raise IncompleteStore(message)
    problems = [problem for entry in store.manifest["objects"] if (problem := size_problem(store, entry))]
    if problems:
        message = (
            f"{store.path} was finished, and is damaged since: {listed(problems)}. `agiqa store repair {store.path}` "
            "removes what is damaged, and then the same command computes it again."
        )
        raise DamagedStore(message)


def _write_missing(store: Store, plan: StorePlan) -> None:
    """Write the missing objects of the plan's record, as after a repair, with the recorded bytes.

    Raises DamagedStore if `plan` gives other bytes.
    """
    layout = store.layout
    missing = [entry for entry in read_record(layout.plan_commit) if _is_missing(store, entry["path"])]
    if not missing:
        return
    folder, doing = _target_folder(store.path), "writing token ids and roles of"
    with seal_lock(layout, doing=doing, kept="finished units are kept"), _planned_beside(folder, plan) as made:
        for entry in missing:
            source, target = made.root / entry["path"], store.path / entry["path"]
            if not source.is_file() or sha256_of_file(source) != entry["sha256"]:
                message = (
                    f"{store.path}: {entry['path']} is missing, and would now be written with other bytes than were "
                    "recorded: the items have other tokens, or a library encodes them otherwise. Copy the store again, "
                    "or make it at another path."
                )
                raise DamagedStore(message)
            target.parent.mkdir(parents=True, exist_ok=True)
            source.replace(target)
            sync_file(target.parent)


def _require_same_tokens(store: Store, plan: StorePlan) -> None:
    """Raise SettingsConflict if the store was planned with other tokens, as from an incomplete source."""
    planned: dict[str, Sequence[NDArray[Any]]] = {"tokens/ids": plan.token_ids, "tokens/roles": plan.roles}
    for unit in range(store.geometry.units):
        items = store.items_of(unit).tolist()
        for name, per_item in planned.items():
            expected = np.concatenate([np.zeros(0, np.int32), *(per_item[item] for item in items)])
            if not np.array_equal(store.read_unit(unit, name), expected):
                message = (
                    f"{store.path} was planned with other {name} in unit {unit} (item {store.items.names[items[0]]!r} "
                    "and those after it). Remove it, or give another path."
                )
                raise SettingsConflict(message)


def _is_missing(store: Store, path: str) -> bool:
    return not check_object(store.path, path, listed_in=store.layout.plan_commit).exists()


def has_items(store: Store, items: Items) -> bool:
    """Whether the store has these labels, splits and prompts; False for the damaged table of an unfinished store."""
    try:
        return store.items.same_as(_comparable(items, store))
    except DamagedStore:
        if store.is_sealed:
            raise
        return False


def _comparable(asked: Items, store: Store) -> Items:
    """`asked`, without the authors of texts, and deviations and counts of ratings, if a finished store has none."""
    if store.is_sealed and not store.items.text_authors:
        asked = replace(asked, text_authors=[])
    if store.is_sealed and not store.items.deviations:
        asked = replace(asked, deviations={})
    return replace(asked, counts={}) if store.is_sealed and not store.items.counts else asked


def _other_labels(store: Store, plan: StorePlan) -> str:
    """The differences between the item tables of a finished store and a plan, and how to store the new labels."""
    path, there, here = store.path, store.items.table(), _comparable(plan.items, store).table()
    columns = sorted({*there.column_names, *here.column_names})
    different = [name for name in columns if not _same_column(there, here, name)]
    scales = [
        f"the scale of {aspect}: {range_text(scale)} in the store, {range_text(plan.items.mos_ranges[aspect])} now"
        for aspect, scale in store.items.mos_ranges.items()
        if plan.items.mos_ranges.get(aspect, scale) != scale
    ]
    found = ", ".join(different + scales)
    message = f"{path} is finished and its labels or texts differ from those given now ({found})."
    if scales:
        return (
            f"{message} Give the scale of the store by --mos-range. If the other one is right, store all MOS on it "
            f"first: `agiqa store labels {path} TABLE.csv --mos-range LOW HIGH`."
        )
    prefixes = LABEL_PREFIX, DEVIATION_PREFIX, COUNT_PREFIX
    labels = all(name in ("split", "generator") or name.startswith(prefixes) for name in different)
    if labels and all(name in here.column_names and _keeps_no_old(there, here, name) for name in different):
        table = plan.label_table or "TABLE.csv"
        return f"{message} `agiqa store labels {path} {table}` stores what {table} has of them, without the model."
    return f"{message} Extract to another path, or give those that it was made with."


def _same_column(there: pa.Table, here: pa.Table, name: str) -> bool:
    both = name in there.column_names and name in here.column_names
    return both and bool(there.column(name).equals(here.column(name)))


def _keeps_no_old(there: pa.Table, here: pa.Table, name: str) -> bool:
    """Whether every value of `there` has one in `here`: joining labels leaves values that the table does not give."""
    if name not in there.column_names:
        return True
    return not any(
        new is None and old is not None
        for old, new in zip(there.column(name).to_pylist(), here.column(name).to_pylist(), strict=True)
    )
