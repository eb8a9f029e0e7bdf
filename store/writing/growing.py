"""Grow: a finished store gets more items, and the rows that it has are not computed again.

The larger store is planned beside the finished one, in the hidden folder `growing_path`. It gets the old rows as
copies, is filled and sealed like any other store, and then takes the place of the old one, which is whole until then.
"""

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import AgiqaError, SettingsConflict
from agiqa.store.disk.files import sync_file, telling_disk_errors
from agiqa.store.disk.locks import is_held
from agiqa.store.format.items import Items
from agiqa.store.format.layers import layer_array, token_scale_array
from agiqa.store.format.layout import SEAL_LOCK, StoreLayout
from agiqa.store.format.metadata import store_id
from agiqa.store.reading.store import Store, is_planned, open_local_store
from agiqa.store.writing.creating import create_store, has_items, require_extended
from agiqa.store.writing.filling import UnitWriter
from agiqa.store.writing.planning import StorePlan
from agiqa.store.writing.sealing import seal_lock

_WRITERS = 4
"""Threads that copy units."""


def growing_path(path: Path) -> Path:
    """Where the store that will replace the one at `path` is made."""
    target = path.resolve()
    return target.with_name(f".{target.name}.growing")


def _old_path(path: Path) -> Path:
    """Where the store at `path` is while the larger one is renamed."""
    target = path.resolve()
    return target.with_name(f".{target.name}.before-growing")


def begin_growth(store: Store, plan: StorePlan) -> Store:
    """Plan the larger store beside the finished `store`, or resume it; `plan` has the items of `store` first.

    Labels that `store` has and `plan` does not, such as those of `agiqa store labels`, are kept. Raises as
    `require_extended` and `create_store`, and SettingsConflict where a growth to other items is unfinished.
    """
    plan = replace(plan, items=_with_labels_of(store.items, plan.items))
    require_extended(store, plan)
    path = growing_path(store.path)
    if is_planned(path) and open_local_store(path, allow_partial=True).id != store_id(plan.full_provenance()):
        message = (
            f"{store.path} was being extended to other items, and {path} has what was computed of them. Run that "
            f"command again first, or remove {path}."
        )
        raise SettingsConflict(message)
    return create_store(path, plan)


def _with_labels_of(old: Items, items: Items) -> Items:
    """`items`, the first of which are `old`, with the labels, splits and generators of `old` where they have none."""
    count = len(old)

    def texts(new: list[str | None], there: list[str | None]) -> list[str | None]:
        head = [before if one is None else one for one, before in zip(new[:count], there, strict=True)]
        return [*head, *new[count:]]

    def numbers(
        new: Mapping[str, NDArray[np.float64]], there: Mapping[str, NDArray[np.float64]]
    ) -> dict[str, NDArray[np.float64]]:
        found = {aspect: np.array(values, np.float64) for aspect, values in new.items()}
        for aspect, values in there.items():
            column = found.setdefault(aspect, np.full(len(items), np.nan))
            column[:count] = np.where(np.isnan(column[:count]), values, column[:count])
        return found

    return replace(
        items,
        splits=texts(items.splits, old.splits),
        generators=texts(items.generators, old.generators),
        labels=numbers(items.labels, old.labels),
        deviations=numbers(items.deviations, old.deviations),
        counts=numbers(items.counts, old.counts),
        mos_ranges={**old.mos_ranges, **items.mos_ranges},
    )


def copy_rows(old: Store, new: Store, advance: Callable[[int], None]) -> None:
    """Write the units of `new` whose items are all in `old`, which are its first items; `advance` gets the items.

    Units that another run holds or has finished are passed over.
    """
    writer, known = UnitWriter(new), len(old.n_tokens)

    def copy(unit: int) -> int:
        started = time.perf_counter()
        items = new.items_of(unit)
        with writer.claim(unit) as mine:
            if mine:
                runs = _runs(old, items)
                is_int8, others = old.encoding == "int8", old.layers[:-1]
                scales = {layer: _rows(old, token_scale_array(layer), runs) for layer in others if is_int8}
                seconds = time.perf_counter() - started
                writer.write_unit(
                    unit,
                    _rows(old, "features", runs),
                    seconds=seconds,
                    scale=_rows(old, token_scale_array(None), runs) if is_int8 else None,
                    logits=(lambda start, stop: _rows(old, "logits", runs, start, stop)) if old.keeps_logits else None,
                    layers={layer: _rows(old, layer_array(layer), runs) for layer in others},
                    layer_scales=scales if is_int8 else None,
                )
        return len(items)

    units = [unit for unit in writer.pending() if int(new.items_of(unit)[-1]) < known]
    with ThreadPoolExecutor(_WRITERS, thread_name_prefix="agiqa-copy") as pool:
        for count in pool.map(copy, units):
            advance(count)


def _runs(store: Store, items: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The row addresses of consecutive `items`, as (first, last + 1) of each run without a gap."""
    runs: list[tuple[int, int]] = []
    starts, ends = store.row_starts[items].tolist(), store.row_ends[items].tolist()
    for start, end in zip(starts, ends, strict=True):
        if runs and runs[-1][1] == start:
            runs[-1] = runs[-1][0], end
        else:
            runs.append((start, end))
    return runs


def _rows(
    store: Store, array: str, runs: list[tuple[int, int]], start: int = 0, stop: int | None = None
) -> NDArray[Any]:
    """The rows of `runs` one after the other, of these the rows `start` to `stop`, in the bits of the store."""
    blocks: list[NDArray[Any]] = []
    before = 0
    for first, last in runs:
        here = first + max(0, start - before), min(last, first - before + stop) if stop is not None else last
        if here[0] < here[1]:
            blocks.append(store.stored_rows(array, *here))
        before += last - first
    return np.concatenate(blocks) if blocks else store.stored_rows(array, 0, 0)


def install_growth(path: Path) -> Store:
    """Put the sealed larger store in the place of the one at `path`, which is removed; returns it, opened.

    A kill between the two renames leaves no store at `path`: `recover_growth` puts it there. A program that is reading
    the old store at this moment must open it again. Raises SettingsConflict where the labels of the old store were
    replaced in the meantime.
    """
    target, old = path.resolve(), _old_path(path)
    doing = f"replacing {path} by the extended store"
    with telling_disk_errors(doing, "both are kept"), seal_lock(StoreLayout(target)):
        _require_same_labels(open_local_store(target), open_local_store(growing_path(path)))
        target.replace(old)
        growing_path(path).replace(target)
        sync_file(target.parent)
    shutil.rmtree(old, ignore_errors=True)
    return open_local_store(path)


def installed(path: Path, store: Store) -> Store | None:
    """The store at `path`, if it is the larger `store`, complete: another run has put it there. None if it is not."""
    with suppress(AgiqaError, OSError):
        found = open_local_store(path)
        return found if found.id == store.id else None
    return None


def _require_same_labels(old: Store, grown: Store) -> None:
    if not has_items(old, grown.items.first(len(old.items))):
        message = (
            f"The labels of {old.path} were replaced while it was being extended. Join them to the extended store, "
            f"`agiqa store labels {grown.path} TABLE`, and run the same command again."
        )
        raise SettingsConflict(message)


def recover_growth(path: Path) -> None:
    """Finish an `install_growth` of the store at `path` that was killed; without the larger store, undo it."""
    target, old, grown = path.resolve(), _old_path(path), growing_path(path)
    if not old.exists() or is_held(StoreLayout(old).locks / SEAL_LOCK):
        return
    if not target.exists():
        (grown if StoreLayout(grown).manifest.exists() else old).replace(target)
        sync_file(target.parent)
    if old.exists():
        shutil.rmtree(old, ignore_errors=True)
