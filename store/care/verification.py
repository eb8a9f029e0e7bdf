"""Verify: find every damaged or missing object and say which units and items it costs."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from agiqa.errors import DamagedStore, UnknownName
from agiqa.store.care.probing import check_probe
from agiqa.store.format.manifest import table_problem
from agiqa.store.reading.store import Store
from agiqa.store.writing.records import (
    Owner,
    content_problem,
    is_readable,
    objects_by_owner,
    owners,
    record_path,
    record_problems,
    recorded_objects_of,
    size_problem,
    unit_of,
    unlisted_files,
)

Level = Literal["quick", "full", "numeric"]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a store."""

    where: str
    """Path of the damaged file in the store, or `probe`."""
    problem: str
    unit: int | None = None
    items: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Report:
    """What `verify` found; `sound` is the verdict."""

    level: str
    state: str
    objects: int
    missing_units: tuple[int, ...]
    damage: tuple[Damage, ...]
    probe_error: float | None
    """Largest relative error of a probe row's logits, or states of a layer, at level numeric."""

    @property
    def sound(self) -> bool:
        """Sealed, or pulled in part, and undamaged at the level asked for."""
        return self.state != "unfinished" and not self.damage

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"sound": self.sound, **asdict(self)}


def verify(store: Store, level: str = "quick") -> Report:
    """Check `store`: `quick` records and sizes, `full` every sha256, `numeric` also the probe.

    Raises UnknownName for another level.
    """
    if level not in get_args(Level):
        raise UnknownName.of(kind="verification level", name=level, known=get_args(Level))
    manifest = store.manifest if store.is_sealed else None
    entries = list(_entries(store, manifest))
    damage = [found for entry in entries if (found := object_damage(store, entry, level=level))]
    if changed := table_problem(store.layout):
        damage.append(Damage(where=store.layout.items.name, problem=changed))
    damage += [record_damage(store, owner, problem) for owner, problem in record_problems(store, manifest)]
    if manifest is not None:  # readers would take unlisted files without any proof
        strays = unlisted_files(store, {entry["path"] for entry in manifest["objects"]})
        damage += [Damage(where=path, problem=f"{path} is not in the manifest") for path in strays]
    probe_error = None
    if level == "numeric" and not damage and store.is_sealed:
        probe_error, problems = check_probe(store)
        damage += [Damage(where="probe", problem=problem) for problem in problems]
    done = set(store.committed_units())
    return Report(
        level=level,
        state=store.state,
        objects=len(entries) + 1,  # the item table
        missing_units=tuple(unit for unit in range(store.geometry.units) if unit not in done),
        damage=tuple(damage),
        probe_error=probe_error,
    )


def object_damage(store: Store, entry: Mapping[str, Any], *, level: str) -> Damage | None:
    """What is wrong with a recorded object: its size at the level quick, all its bytes at the others."""
    problem = (size_problem if level == "quick" else content_problem)(store, dict(entry))
    if problem is None:
        return None
    unit = unit_of(store, entry["path"])
    return Damage(where=entry["path"], problem=problem, unit=unit, items=_names(store, unit))


def record_damage(store: Store, owner: Owner, problem: str | None = None) -> Damage:
    """The damage that the record of `owner` has a `problem`, or cannot be read."""
    where = record_path(store, owner).relative_to(store.path).as_posix()
    unit = owner if isinstance(owner, int) else None
    return Damage(where=where, problem=problem or f"{where} is no record", unit=unit, items=_names(store, unit))


def _names(store: Store, unit: int | None) -> tuple[str, ...]:
    try:
        return () if unit is None else tuple(store.items.names[item] for item in store.items_of(unit))
    except DamagedStore:  # of the index or the item table, which has its own line
        return ()


def _entries(store: Store, manifest: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    if manifest is not None:
        objects_by_owner(store, manifest)  # refuses what is no object of a store
        yield from manifest["objects"]
        return
    for owner in owners(store):
        if is_readable(store, owner):
            yield from recorded_objects_of(store, owner) or []
