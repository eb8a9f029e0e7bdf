"""Verify: find every damaged or missing object and say which units and items it costs."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DamagedStore, StoreError, UnknownName
from agiqa.store.format.arrays import to_float32
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

_TOLERANCE = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.15, "int8": 0.15}
"""Largest accepted relative error of the probe logits: a forward pass of one item alone against the stored batch. We
measured up to .05 in bfloat16 over 30 layers; hidden states from before the final norm would give about 1."""


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
    """Largest relative error of a probe row's logits, at level numeric."""

    @property
    def sound(self) -> bool:
        """Sealed, or pulled in part, and undamaged at the level asked for."""
        return self.state != "unfinished" and not self.damage

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"sound": self.sound, **asdict(self)}


def verify(store: Store, level: str = "quick") -> Report:
    """Check `store`: `quick` records and sizes, `full` every sha256, `numeric` also the probe logits.

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
        probe_error, problem = _check_probe(store)
        damage += problem
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


def _check_probe(store: Store) -> tuple[float | None, list[Damage]]:
    attributes, rows, logits = store.array("probe/logits").attrs, store.whole("probe/rows"), store.whole("probe/logits")
    here = np.isin(rows // store.geometry.unit_rows, store.committed_units())  # some are missing in a pulled part
    rows = rows[here]
    expected = to_float32(logits[here], str(attributes["logical_dtype"]))
    if not len(rows):
        return None, []
    rounded = [str(attributes["logical_dtype"]), *_rounded_again(store)]
    tolerance = max(_TOLERANCE[name] for name in rounded)
    try:
        rebuilt, expected = _rebuilt(store, rows, expected)
    except (StoreError, ValueError, RuntimeError) as failure:
        return None, [Damage(where="probe", problem=f"the probe rows cannot be rebuilt: {failure}")]
    error = float((np.linalg.norm(rebuilt - expected, axis=1) / np.linalg.norm(expected, axis=1)).max())
    if error <= tolerance:
        return error, []
    problem = f"logits rebuilt from the features are off by {error:.3g} of their norm (allowed {tolerance:.3g})"
    return error, [Damage(where="probe", problem=problem)]


def _rounded_again(store: Store) -> list[str]:
    """The dtypes, other than the model's own, in which the store holds what the probe is compared with."""
    if store.encoding == "int8":
        return ["int8"]
    return [store.logical_dtype] if store.encoding == "logits" or store.keeps_logits else []


def _rebuilt(
    store: Store, rows: NDArray[np.int64], logits: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The values of the probe rows in the store, and the values expected from the model's own `logits` (rows, V)."""
    features = to_float32(np.concatenate([store.rows_at(row, row + 1) for row in rows.tolist()]), store.logical_dtype)
    if store.encoding == "logits":
        return features, logits
    if store.encoding == "sketch":  # the frame is orthonormal, so coordinates are what logits project to at any rank
        return features, logits @ store.basis().q
    rebuilt = features @ store.lm_head().T
    if not store.keeps_logits:
        return rebuilt, logits
    kept = [store.rows_at(row, row + 1, array="logits") for row in rows.tolist()]
    return np.concatenate([rebuilt, to_float32(np.concatenate(kept), store.logical_dtype)]), np.tile(logits, (2, 1))
