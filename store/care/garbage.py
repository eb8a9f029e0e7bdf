"""Garbage collection: removes files that no record or manifest lists, left by killed runs or by other programs.

`_find` lists what would be removed and why, without changing anything. `collect_garbage` removes that list, under the
locks of the runs that write such files.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agiqa.errors import BusyStore, DamagedStore
from agiqa.store.disk.files import files_below
from agiqa.store.disk.locks import abandoned_lock, exclusive_lock, is_held
from agiqa.store.format.layout import PLAN_LOCK, PULL_LOCK, PULL_RECORD, ROOT_METADATA, SEAL_LOCK, StoreLayout
from agiqa.store.format.manifest import check_inside, read_record
from agiqa.store.reading.store import Store
from agiqa.store.writing.creating import plans_beside, stays_without_lock
from agiqa.store.writing.records import Owner, killed_records, owner_of, owners, recorded_objects_of
from agiqa.store.writing.sealing import remove_locks, seal_lock

_KILLED_WRITE = "a write that was killed"


@dataclass(frozen=True, kw_only=True)
class Garbage:
    """One file, or the folder of a killed plan."""

    path: str
    bytes: int
    why: str


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What was removed, or with `dry_run` would be."""

    garbage: tuple[Garbage, ...]
    in_use: tuple[str, ...]
    """Unlisted files left alone because a run is at work on them."""
    dry_run: bool

    @property
    def bytes(self) -> int:
        """Bytes of all the garbage."""
        return sum(found.bytes for found in self.garbage)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"files": len(self.garbage), "bytes": self.bytes, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Unlisted files with one reason and one lock."""

    why: str
    paths: Sequence[Path]
    in_use: bool = False
    """Whether a run was at work on them. Locks are looked at after the files are listed, so files of a run that began
    in between are not among `paths`."""
    lock: Path | None = None
    """Held by the run that writes such files; None where the upkeep lock keeps all such runs out."""
    hold: Callable[[Path], AbstractContextManager[bool]] = exclusive_lock
    owner: Owner | None = None
    """Whose record may list the files by the time they are removed."""
    folder: Path | None = None
    """Removed with all that is left in it, after the files."""

    @contextmanager
    def held(self, *, dry_run: bool) -> Generator[bool]:
        """Hold the lock while inside, or with `dry_run` only look at it; False when a run is at work."""
        if dry_run or self.in_use or self.lock is None:
            yield not self.in_use
            return
        with self.hold(self.lock) as free:
            yield free


def collect_garbage(store: Store, *, dry_run: bool = False) -> GcReport:
    """Remove unlisted files from `store`; with `dry_run` only list them.

    That is: files below store.zarr, temporary files of killed writes, lock files that no run needs, and killed plans
    beside the store. Files that a run is writing stay, as its locks show; listed files are never removed. `locks` and
    `commits` may be links to other folders; there, too, only files with the names of ours are removed.

    Raises DamagedStore where a record or the manifest cannot be read, or store.zarr is a link out of the store, and
    BusyStore where a pull is not finished.
    """
    layout = store.layout
    if (store.path / PULL_RECORD).exists() or is_held(layout.locks / PULL_LOCK):
        message = f"{store.path} is being pulled, or a pull was cut off: finish it with the same `agiqa store pull`."
        raise BusyStore(message)
    garbage: list[Garbage] = []
    in_use: list[str] = []
    with nullcontext() if dry_run else seal_lock(layout):
        for group in list(_find(store)):
            with group.held(dry_run=dry_run) as free:
                paths = [path for path in group.paths if os.path.lexists(path) and not _is_listed(store, group, path)]
                if not free:
                    in_use += map(str, paths)
                    continue
                garbage += [Garbage(path=str(path), bytes=_size(path), why=group.why) for path in paths]
                if not dry_run:
                    _remove(layout, paths, group.folder)
        if not dry_run and layout.manifest.exists():
            remove_locks(layout, mine=SEAL_LOCK)  # those that this collection made
    return GcReport(garbage=tuple(garbage), in_use=tuple(in_use), dry_run=dry_run)


def _find(store: Store) -> Iterator[_Group]:
    """All that may be garbage; nothing is changed, no lock is held."""
    layout, finished = store.layout, store.layout.manifest.exists()
    yield from _unlisted_objects(store, finished=finished)
    names = [layout.manifest.name, layout.card.name, PULL_RECORD, *([layout.items.name] if finished else [])]
    yield _Group(why=_KILLED_WRITE, paths=sorted(path for name in names for path in layout.root.glob(f".{name}.*")))
    if layout.pulled.is_dir() and not layout.pulled.is_symlink():
        fetched = files_below(layout.pulled)
        yield _group("fetched by a pull that was cut off", fetched, layout.locks / PULL_LOCK, folder=layout.pulled)
    records = killed_records(layout)  # any run may be writing them
    locks = [lock for lock in layout.lock_files() if lock.name != SEAL_LOCK]
    yield _Group(why=_KILLED_WRITE, paths=records, in_use=any(map(is_held, locks)))
    done = {PLAN_LOCK} | {f"{unit:08d}" for unit in store.committed_units()}
    done |= {"model"} if layout.model_commit.exists() else set()
    # the lock file of a pending unit stays: a run may just have opened it
    for lock in locks:
        if (finished or lock.name in done) and not is_held(lock):
            yield _Group(why="the lock of a run that has ended", paths=[lock], lock=lock, hold=abandoned_lock)
    for plan in plans_beside(store.path.resolve()):  # as `create_store` removes them
        lock = StoreLayout(plan).locks / PLAN_LOCK
        if lock.is_file():
            yield _group("a plan that was killed", [plan], lock, hold=abandoned_lock)
        elif stays_without_lock(plan):
            yield _Group(why="a plan that was killed", paths=[plan])


def _group(why: str, paths: Sequence[Path], lock: Path, **rest: Any) -> _Group:
    return _Group(why=why, paths=paths, lock=lock, in_use=is_held(lock), **rest)


def _unlisted_objects(store: Store, *, finished: bool) -> Iterator[_Group]:
    check_inside(store.path, store.layout.zarr)
    files = files_below(store.layout.zarr)
    listed = _listed(store, finished=finished)
    by_owner: dict[Owner, list[Path]] = {}
    for path in files:
        name = path.relative_to(store.path).as_posix()
        if name not in listed:
            by_owner.setdefault(owner_of(store, name), []).append(path)
    for owner, paths in by_owner.items():
        why = "no record lists it"
        if finished:  # only pulls write to it
            yield _group(why, paths, store.layout.locks / PULL_LOCK)
        else:
            lock = store.layout.locks / (f"{owner:08d}" if isinstance(owner, int) else "model")
            yield _group(why, paths, lock, owner=owner)


def _listed(store: Store, *, finished: bool) -> set[str]:
    if finished:
        return {entry["path"] for entry in read_record(store.layout.manifest)}
    if not store.layout.plan_commit.exists():
        message = (
            f"{store.layout.plan_commit} is missing: garbage cannot be distinguished from data. Copy the store again."
        )
        raise DamagedStore(message)
    records = (recorded_objects_of(store, owner) or [] for owner in owners(store))
    return {ROOT_METADATA, *(entry["path"] for entries in records for entry in entries)}


def _is_listed(store: Store, group: _Group, path: Path) -> bool:
    """Whether a run has recorded the file since it was found."""
    if group.owner is None:
        return False
    name = path.relative_to(store.path).as_posix()
    return any(entry["path"] == name for entry in recorded_objects_of(store, group.owner) or [])


def _size(path: Path) -> int:
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    return sum(file.lstat().st_size for file in files_below(path))


def _remove(layout: StoreLayout, paths: Sequence[Path], folder: Path | None) -> None:
    """Remove files, folders of plans, `folder`, and the folders of arrays that are empty then."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            continue
        path.unlink()
        above = path.parent
        while above != layout.zarr and above.is_relative_to(layout.zarr) and not any(above.iterdir()):
            above.rmdir()
            above = above.parent
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
