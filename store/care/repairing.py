"""Repair: a damaged unit loses its record and its objects, so that the next run recomputes only that unit.

Damaged token ids and roles are removed, while the record of the plan still lists them. The next run knows all tokens
and writes the same bytes again (see `create_store`).

The records of damaged objects go first, then MANIFEST.json, and only then the objects. So the store never claims more
than it holds, and a repair that was killed at any moment can be repeated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store.care.verification import Damage, object_damage, record_damage
from agiqa.store.disk.files import read_json, sync_file
from agiqa.store.disk.locks import waiting_lock
from agiqa.store.format.layout import ROOT_METADATA, StoreLayout
from agiqa.store.format.manifest import settle_labels, table_problem
from agiqa.store.reading.store import Store
from agiqa.store.sharing.in_place import open_store
from agiqa.store.writing.records import (
    Owner,
    objects_by_owner,
    owners,
    record_path,
    recorded_objects_of,
    restore_records,
    unlisted_files,
    unreadable_records,
)
from agiqa.store.writing.sealing import require_no_cut_off_pull, seal_lock

_LINES = 20

Objects = Mapping[Owner, Sequence[Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class RepairReport:
    """What was damaged, and what the next run will recompute."""

    damage: tuple[Damage, ...]
    units: tuple[int, ...]
    """Units that lost their record."""
    items: int
    """Items in these units."""
    model: bool
    """Whether the model's own arrays (`lm_head`, `basis`, `scale`, `probe`) lost their record."""
    tokens: tuple[str, ...]
    """Objects of `tokens/ids` and `tokens/roles` that were removed."""
    strays: tuple[str, ...]
    """Files of a finished store that nothing lists; `collect_garbage` removes them."""

    @property
    def changed(self) -> bool:
        """Whether anything was dropped."""
        return bool(self.units or self.tokens) or self.model

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"changed": self.changed, **asdict(self)}


def repair(store: Store) -> RepairReport:
    """Drop damaged parts of `store` that can be recomputed; a finished store is then unfinished.

    Every object is read. Rows that mean nothing without the model's own arrays (those of a sketch whose basis the
    provenance does not name) go with them. The command that made the store computes what was dropped. Labels are
    kept, but `agiqa extract` sets those of its own table again while a store is unfinished. Open the store again.

    Raises DamagedStore, and changes nothing, when other objects of the plan than tokens (index, metadata, item table)
    are damaged; IncompleteStore for a store of which only a part was pulled, or whose pull was cut off.
    """
    with seal_lock(store.layout):
        require_no_cut_off_pull(store.layout)
        settle_labels(store.layout)
        store = open_store(store.path, allow_partial=True)
        if store.pulled_units is not None:
            message = (
                f"{store.path} holds a part of a store. Pull it again: `agiqa store pull` fetches what is damaged."
            )
            raise IncompleteStore(message)
        lost = set[Owner]() if store.is_sealed else set(unreadable_records(store))
        objects = _objects(store, lost)
        planned = _damage(store, _plan_objects(store, objects))
        tokens = [found for found in planned if found.unit is not None]
        broken = [found for found in planned if found.unit is None]
        if problem := table_problem(store.layout):
            broken.append(Damage(where=store.layout.items.name, problem=problem))
        if broken or "plan" in lost:
            raise DamagedStore(_not_repairable(store, [*broken, *(record_damage(store, owner) for owner in lost)]))
        damage = [*tokens, *(record_damage(store, owner) for owner in sorted(lost, key=str))]
        dropped = set(lost)
        for owner, entries in objects.items():
            if owner != "plan" and (found := _damage(store, entries)):
                dropped.add(owner)
                damage += found
        if "model" in dropped and _rows_need_their_model(store):
            dropped |= {owner for owner in objects if isinstance(owner, int)}
        strays: list[str] = []
        if store.is_sealed:
            strays = unlisted_files(store, {entry["path"] for entry in store.manifest["objects"]})
        if dropped or tokens:
            _drop(store, objects, dropped, tokens=[found.where for found in tokens])
    units = tuple(sorted(owner for owner in dropped if isinstance(owner, int)))
    return RepairReport(
        damage=tuple(damage),
        units=units,
        items=sum(len(store.items_of(unit)) for unit in units),
        model="model" in dropped,
        tokens=tuple(found.where for found in tokens),
        strays=tuple(strays),
    )


def _objects(store: Store, lost: set[Owner]) -> Objects:
    """The recorded objects, by the owner of their record."""
    if store.is_sealed:
        return objects_by_owner(store, store.manifest)
    found: dict[Owner, list[dict[str, Any]]] = {}
    for owner in owners(store):
        entries = None if owner in lost else recorded_objects_of(store, owner)
        if entries is not None:
            found[owner] = entries
    return found


def _plan_objects(store: Store, objects: Objects) -> list[Mapping[str, Any]]:
    """The objects of the plan, which filling units cannot restore; of a finished store also its root metadata."""
    planned = list(objects.get("plan", []))
    if store.is_sealed:
        planned += [entry for entry in store.manifest["objects"] if entry["path"] == ROOT_METADATA]
    return planned


def _damage(store: Store, entries: Sequence[Mapping[str, Any]]) -> list[Damage]:
    return [found for entry in entries if (found := object_damage(store, entry, level="full"))]


def _rows_need_their_model(store: Store) -> bool:
    """Whether rows are coordinates in a basis (or scale) that might differ when it is computed anew.

    Where the provenance names it, a different one makes another store and is refused.
    """
    return store.encoding in ("sketch", "int8") and not {"basis", "scale"} & store.provenance.keys()


def _drop(store: Store, objects: Objects, dropped: set[Owner], *, tokens: Sequence[str]) -> None:
    layout = store.layout
    if store.is_sealed:  # records serve resumption only, and a copy may have left them out
        restore_records(store, {owner: entries for owner, entries in objects.items() if owner not in dropped})
    for owner in dropped:
        record_path(store, owner).unlink(missing_ok=True)
    sync_file(layout.commits)
    if store.is_sealed:
        layout.manifest.unlink()
        sync_file(store.path)
    _forget_consolidated(layout)
    for path in tokens:
        (store.path / path).unlink(missing_ok=True)
    for owner in dropped:
        lock = f"{owner:08d}" if isinstance(owner, int) else owner
        with waiting_lock(layout.locks / lock):
            if not record_path(store, owner).exists():  # else a run has computed it anew already
                for entry in objects.get(owner, []):
                    (store.path / entry["path"]).unlink(missing_ok=True)


def _forget_consolidated(layout: StoreLayout) -> None:
    """Remove the consolidated metadata that the seal wrote: it copies those of arrays that may be dropped."""
    path = layout.zarr / "zarr.json"
    metadata = read_json(path)
    if metadata.pop("consolidated_metadata", None) is None:
        return
    temporary = layout.commits / f".{path.name}.new"  # not beside it: the seal lists all of store.zarr, and tidies here
    temporary.write_text(json.dumps(metadata, indent=2), encoding="utf-8")
    sync_file(temporary)
    temporary.replace(path)
    sync_file(path.parent)


def _not_repairable(store: Store, damage: Sequence[Damage]) -> str:
    lines = [f"  {found.problem}" for found in damage[:_LINES]]
    if len(damage) > _LINES:
        lines.append(f"  ... and {len(damage) - _LINES} more")
    what = "\n".join(lines)
    return (
        f"{store.path}: damage in what the plan wrote, which cannot be computed unit by unit:\n{what}\n"
        "Nothing was changed. Copy the store again from where it came, or make it again at another path."
    )
