"""Garbage collection: what killed runs and strangers left in a store that no record and no manifest lists."""

import contextlib
import shutil
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agiqa.errors import BusyStore, DamagedStore
from agiqa.store.disk.files import files_below
from agiqa.store.disk.locks import abandoned_lock, exclusive_lock, is_held
from agiqa.store.format.layout import PLAN_LOCK, PULL_LOCK, PULL_RECORD, ROOT_METADATA, SEAL_LOCK, StoreLayout
from agiqa.store.format.manifest import check_inside, read_record
from agiqa.store.reading.store import Store
from agiqa.store.writing.creating import plans_beside
from agiqa.store.writing.records import Owner, killed_records, owner_of, owners, recorded_objects_of
from agiqa.store.writing.sealing import seal_lock


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


def collect_garbage(store: Store, *, dry_run: bool = False) -> GcReport:
    """Remove from `store` what nothing lists; with `dry_run` only say what.

    That is: files below store.zarr, temporary files of killed writes, lock files that no run will want, and killed
    plans beside the store. What a run is at work on stays, told by its locks; what is listed is never removed. `locks`
    and `commits` may be links to other folders; there, too, only files with the names of ours are removed.

    Raises DamagedStore where a record or the manifest cannot be read, or store.zarr is a link out of the store, and
    BusyStore where a pull is not finished.
    """
    if (store.path / PULL_RECORD).exists() or is_held(store.layout.locks / PULL_LOCK):
        message = f"{store.path} is being pulled, or a pull was cut off: finish it with the same `agiqa store pull`."
        raise BusyStore(message)
    with contextlib.nullcontext() if dry_run else seal_lock(store.layout):
        collector = _Collector(store, dry_run=dry_run)
        collector.collect()
    return GcReport(garbage=tuple(collector.garbage), in_use=tuple(collector.in_use), dry_run=dry_run)


class _Collector:
    """One run of the collection; files are listed before locks are looked at, so a new run's files are not seen."""

    def __init__(self, store: Store, *, dry_run: bool) -> None:
        self.store = store
        self.layout = store.layout
        self.finished = store.layout.manifest.exists()
        self.dry_run = dry_run
        self.garbage: list[Garbage] = []
        self.in_use: list[str] = []

    def collect(self) -> None:
        """Find and remove, kind by kind."""
        self._unlisted_objects()
        self._temporary_files()
        self._locks()
        self._killed_plans()

    def _unlisted_objects(self) -> None:
        check_inside(self.store.path, self.layout.zarr)
        files = files_below(self.layout.zarr)
        listed = self._listed()
        by_owner: dict[Owner, list[Path]] = {}
        for path in files:
            name = path.relative_to(self.store.path).as_posix()
            if name not in listed:
                by_owner.setdefault(owner_of(self.store, name), []).append(path)
        for owner, paths in by_owner.items():
            with self._nobody_writes(owner) as free:
                unlisted = [path for path in paths if path.exists() and not self._listed_now(owner, path)]
                if free:
                    self._remove(unlisted, "no record lists it")
                else:
                    self.in_use += [str(path) for path in unlisted]
        if not self.dry_run:
            _remove_empty_folders(self.layout.zarr, by_owner.values())

    def _listed(self) -> set[str]:
        if self.finished:
            return {entry["path"] for entry in read_record(self.layout.manifest)}
        if not self.layout.plan_commit.exists():
            message = f"{self.layout.plan_commit} is missing, so nothing tells garbage from data. Copy the store again."
            raise DamagedStore(message)
        records = (recorded_objects_of(self.store, owner) or [] for owner in owners(self.store))
        return {ROOT_METADATA, *(entry["path"] for entries in records for entry in entries)}

    def _listed_now(self, owner: Owner, path: Path) -> bool:
        """Whether a run has recorded the file since the records were read."""
        if self.finished:
            return False
        name = path.relative_to(self.store.path).as_posix()
        return any(entry["path"] == name for entry in recorded_objects_of(self.store, owner) or [])

    @contextmanager
    def _nobody_writes(self, owner: Owner) -> Generator[bool]:
        """Hold what `owner` writes under while inside (with a dry run only look); False when a run is at work."""
        if self.finished:
            yield True
            return
        with self._held(f"{owner:08d}" if isinstance(owner, int) else "model") as held:
            yield held

    @contextmanager
    def _held(self, name: str) -> Generator[bool]:
        """Hold the lock of this name while inside (with a dry run only look); False when another process does."""
        lock = self.layout.locks / name
        if self.dry_run:
            yield not is_held(lock)
        else:
            with exclusive_lock(lock) as held:
                yield held

    def _temporary_files(self) -> None:
        """Of writes to commits/, which any run may be at, and to the files that only upkeep and the seal write."""
        root, why = self.store.path, "a write that was killed"
        commits = killed_records(self.layout)
        mine = [*root.glob(f".{self.layout.manifest.name}.*"), *root.glob(f".{self.layout.card.name}.*")]
        if self.finished:
            mine += root.glob(f".{self.layout.items.name}.*")
        self._remove(sorted(mine), why)
        if self.layout.pulled.is_dir() and not self.layout.pulled.is_symlink():
            self._fetched_objects()
        if any(is_held(lock) for lock in self._lock_files()):
            self.in_use += map(str, commits)
        else:
            self._remove(commits, why)

    def _fetched_objects(self) -> None:
        """Those that wait for the rest of a pull, unless one has begun meanwhile."""
        with self._held(PULL_LOCK) as free:
            if not free:
                self.in_use.append(str(self.layout.pulled))
                return
            self._remove(files_below(self.layout.pulled), "fetched by a pull that was cut off")
            if not self.dry_run:
                shutil.rmtree(self.layout.pulled, ignore_errors=True)

    def _locks(self) -> None:
        """All locks of a finished store; of an unfinished one, those whose work is done for good.

        The lock file of a pending unit stays: a run may just have opened it.
        """
        done = {PLAN_LOCK}
        if not self.finished:
            done |= {f"{unit:08d}" for unit in self.store.committed_units()}
            done |= {"model"} if self.layout.model_commit.exists() else set()
        removable = [lock for lock in self._lock_files() if self.finished or lock.name in done]
        self._remove([lock for lock in removable if not is_held(lock)], "the lock of a run that has ended")

    def _lock_files(self) -> list[Path]:
        """All but the one that this collection holds."""
        return [lock for lock in self.layout.lock_files() if lock.name != SEAL_LOCK]

    def _killed_plans(self) -> None:
        """As `create_store` would remove them when it is called for this path again."""
        for plan in plans_beside(self.store.path.resolve()):
            lock = StoreLayout(plan).locks / PLAN_LOCK
            if not lock.is_file():
                continue
            with contextlib.nullcontext(not is_held(lock)) if self.dry_run else abandoned_lock(lock) as ended:
                if not ended:
                    self.in_use.append(str(plan))
                    continue
                size = sum(file.lstat().st_size for file in files_below(plan))
                self.garbage.append(Garbage(path=str(plan), bytes=size, why="a plan that was killed"))
                if not self.dry_run:
                    shutil.rmtree(plan)

    def _remove(self, paths: Sequence[Path], why: str) -> None:
        for path in paths:
            self.garbage.append(Garbage(path=str(path), bytes=path.lstat().st_size, why=why))
            if not self.dry_run:
                path.unlink()


def _remove_empty_folders(root: Path, files: Iterable[Sequence[Path]]) -> None:
    """The folders that removed `files` leave empty, up to `root`."""
    for path in (path for group in files for path in group):
        folder = path.parent
        while folder != root and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent
