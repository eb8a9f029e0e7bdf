"""Verify: find every damaged or missing object and say which units and items it costs."""

from collections.abc import Iterable
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
"""Relative error of the probe logits, the forward of one item against the batch that was stored: up to .05 was
measured in bfloat16 over 30 layers, where hidden states of before the final norm are off by about 1."""


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong with a store."""

    where: str
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
    damage = [found for entry, unit in entries if (found := _check_object(store, entry, unit, level))]
    if changed := table_problem(store.layout):
        damage.append(Damage(where=store.layout.items.name, problem=changed))
    damage += [_damaged_record(store, owner, problem) for owner, problem in record_problems(store, manifest)]
    if manifest is not None:  # what it does not list would be read without any proof
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


def _entries(store: Store, manifest: dict[str, Any] | None) -> Iterable[tuple[dict[str, Any], int | None]]:
    if manifest is not None:
        objects_by_owner(store, manifest)  # refuses what is no object of a store
        yield from ((entry, unit_of(store, entry["path"])) for entry in manifest["objects"])
        return
    for owner in owners(store):
        if is_readable(store, owner):
            yield from ((entry, unit_of(store, entry["path"])) for entry in recorded_objects_of(store, owner) or [])


def _check_object(store: Store, entry: dict[str, Any], unit: int | None, level: str) -> Damage | None:
    problem = size_problem(store, entry) if level == "quick" else content_problem(store, entry)
    if problem is None:
        return None
    return Damage(where=entry["path"], problem=problem, unit=unit, items=_names(store, unit))


def _damaged_record(store: Store, owner: Owner, problem: str) -> Damage:
    where = record_path(store, owner).relative_to(store.path).as_posix()
    unit = owner if isinstance(owner, int) else None
    return Damage(where=where, problem=problem, unit=unit, items=_names(store, unit))


def _names(store: Store, unit: int | None) -> tuple[str, ...]:
    try:
        return () if unit is None else tuple(store.items.names[item] for item in store.items_of(unit))
    except DamagedStore:  # of the index or the item table, which is told apart
        return ()


def _check_probe(store: Store) -> tuple[float | None, list[Damage]]:
    attributes, rows, logits = store.array("probe/logits").attrs, store.whole("probe/rows"), store.whole("probe/logits")
    here = np.isin(rows // store.geometry.unit_rows, store.committed_units())  # not all, where only a part was pulled
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
    """The dtypes in which the store holds what the probe is compared with, where that is not what the model made."""
    if store.encoding == "int8":
        return ["int8"]
    return [store.logical_dtype] if store.encoding == "logits" or store.keeps_logits else []


def _rebuilt(
    store: Store, rows: NDArray[np.int64], logits: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """What the store makes of the probe rows, and what the model's own `logits` (rows, V) say it should be."""
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
