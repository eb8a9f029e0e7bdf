"""Pull: copy a store, or the units that hold some of its items, from a URL; every byte is checked on its way.

`plan_pull` only looks, `run_pull` acts. An object goes to its place as soon as it is fetched, unless that would change
a store that the folder holds: an unfinished one, or one whose manifest lists another object there. Then it waits in the
folder `.pulled`. When all objects are here, `_install` moves the waiting ones to their places and writes MANIFEST.json.
Before that a failure or a kill leaves the old store as it was.

`PULLING.json`, the manifest of what is being pulled, marks a folder that is no store yet; a part of a store has
`"state": "partial"` in its manifest, and lists the `units` that it has.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from itertools import count
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal
from weakref import finalize

from agiqa.errors import AgiqaError, BusyStore, ConfigError, DamagedStore, DataError, SettingsConflict
from agiqa.store.disk.files import (
    naming,
    read_json,
    sha256_of_file,
    sync_file,
    telling_disk_errors,
    write_text_atomically,
)
from agiqa.store.disk.locks import exclusive_lock, is_held
from agiqa.store.format.items import read_items
from agiqa.store.format.layout import ITEM_TABLE, PULL_LOCK, PULL_RECORD, ROOT_METADATA, SEAL_LOCK, StoreLayout
from agiqa.store.format.manifest import CARD_BYTES, Entry, Manifest, check_inside, read_manifest, units_of_objects
from agiqa.store.format.metadata import check_attributes
from agiqa.store.reading.store import Store
from agiqa.store.sharing.fetching import fetch_manifest, fetch_object, partial_of
from agiqa.store.sharing.remotes import Remote, remote_at
from agiqa.store.sharing.transfers import JOBS, Tally, Transfer, in_parallel
from agiqa.store.writing.records import remove_records
from agiqa.store.writing.sealing import remove_locks, seal_lock


@dataclass(frozen=True, kw_only=True)
class PullPlan:
    """What a pull would bring to `path`."""

    remote: Remote
    path: Path
    manifest: Manifest
    """What the local MANIFEST.json will say."""
    fetched: Path | None = None
    """A temporary folder with the objects that the plan had to read; it goes with the plan."""

    @property
    def bytes(self) -> int:
        """Bytes of all its objects, including those that are already in the folder."""
        return sum(entry.bytes for entry in self.manifest.entries)

    @property
    def state(self) -> str:
        """`complete`, or `partial` where only some units are fetched."""
        return self.manifest.state


def pull(
    url: str,
    path: Path,
    *,
    items: Sequence[str] | None = None,
    jobs: int = JOBS,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Transfer:
    """Copy the store at `url` to the folder `path`, or take up a pull that was cut off there.

    With `items` (names) only the units that hold them are fetched, beside what other pulls brought before. Objects that
    are there already are hashed and kept; an item table or a card that differs from the remote's is set aside as
    `items.before-pull.parquet` or `README.before-pull.md`, the next as `items.before-pull-2.parquet` and so on.
    `advance` is called with bytes that are done. Raises as `plan_pull` and `run_pull` do.
    """
    return run_pull(plan_pull(url, path, items=items, jobs=jobs), jobs=jobs, advance=advance)


def plan_pull(url: str, path: Path, *, items: Sequence[str] | None = None, jobs: int = JOBS) -> PullPlan:
    """Find out what a pull would fetch; nothing at `path` is changed.

    With `items` the index and the item table are fetched to a temporary folder, in `jobs` threads.

    Raises SchemaError where there is no finished store at `url`, SettingsConflict where `path` holds anything else
    than this store (an unfinished one is completed, unless `items` are given), DamagedStore where its manifest cannot
    be read, DataError naming the items that the store does not have, and BusyStore where a run is at work on `path`.
    """
    if items is not None and not items:
        message = f"No items are named, so there is nothing to pull from {url}. Name some, or pull the whole store."
        raise ConfigError(message)
    remote = remote_at(url)
    manifest = fetch_manifest(remote)
    local = _look(path, manifest)
    if items is not None and local.holds == "unfinished":
        message = (
            f"{path} is an unfinished store; some items of the store at the URL would take the place of all its units. "
            "Pull to another path, or without --items."
        )
        raise SettingsConflict(message)
    if items is not None and (local.manifest is None or local.manifest["state"] != "complete"):
        return _plan_part(remote, manifest, local, items, jobs)
    return PullPlan(remote=remote, path=path, manifest=manifest)


def run_pull(plan: PullPlan, *, jobs: int = JOBS, advance: Callable[[int], None] = lambda _bytes: None) -> Transfer:
    """Fetch what `plan` names in `jobs` threads, and write MANIFEST.json when all of it is there.

    Raises DamagedStore naming the object and its URL where the remote twice gave other bytes than its manifest
    records, RemoteError where it cannot be reached, ConfigError where the disk has too little room, BusyStore where
    another pull or a run is at work or the store was changed meanwhile, and SettingsConflict as `plan_pull`. An OSError
    gets a note that says what is kept.
    """
    path, manifest = plan.path, plan.manifest
    with telling_disk_errors(f"pulling {plan.remote.url} to {path}", "what was fetched is kept"):
        if _look(path, manifest).holds == "nothing":
            path.mkdir(parents=True, exist_ok=True)
            write_text_atomically(path / PULL_RECORD, manifest.text)
        with exclusive_lock(StoreLayout(path).locks / PULL_LOCK) as held:
            if not held:
                message = f"Another pull is at work on {path}. Wait for it, or pull to another path."
                raise BusyStore(message)
            tally, local = Tally(advance), _Local.at(path)
            _require_all_units(plan, local)
            _require_room(plan)
            _fetch_missing(plan, local, tally, jobs)
            _check_identity(plan)
            card = plan.remote.read(local.layout.card.name, limit=CARD_BYTES)
            _install(manifest, local, card)
            remove_locks(local.layout, mine=PULL_LOCK)
    return tally.result()


@dataclass(frozen=True, kw_only=True)
class _Local:
    """What the target folder of a pull holds when the pull begins."""

    layout: StoreLayout
    manifest: dict[str, Any] | None
    """That of a complete store or a part; None where there is none."""

    @classmethod
    def at(cls, path: Path) -> "_Local":
        layout = StoreLayout(path)
        return cls(layout=layout, manifest=read_manifest(layout.manifest) if layout.manifest.exists() else None)

    @property
    def holds(self) -> Literal["store", "unfinished", "nothing"]:
        """`store` with a manifest, `unfinished` where runs planned one, `nothing` before the first pull has ended."""
        if self.manifest is not None:
            return "store"
        return "unfinished" if self.is_planned and not (self.layout.root / PULL_RECORD).exists() else "nothing"

    @property
    def is_planned(self) -> bool:
        """Whether runs of this machine have planned the store and perhaps filled some of it."""
        return self.manifest is None and self.layout.plan_commit.exists()

    @cached_property
    def listed(self) -> dict[str, str]:
        """The sha256 of every object of its manifest, by path."""
        entries = [] if self.manifest is None else [*self.manifest["objects"], self.manifest["labels"]]
        return {entry["path"]: entry["sha256"] for entry in entries}

    def place_for(self, entry: Entry, found: str | None) -> Path:
        """Where the object of `entry` is fetched to; `found` is the sha256 of the file that has its place now."""
        counts = self.manifest is not None and self.listed.get(entry.path) == found
        if self.is_planned or (found is not None and (counts or entry.path == ITEM_TABLE)):
            return _waiting(self.layout.root, entry)
        return self.layout.root / entry.path


def _look(path: Path, manifest: Manifest) -> _Local:
    """What is at `path`. Raises SettingsConflict where it is not this store, and BusyStore where a run is at work."""
    local, record = _Local.at(path), path / PULL_RECORD
    started = read_manifest(record) if record.exists() else local.manifest
    found = None if started is None else started.get("id")
    if local.holds == "unfinished":
        found = Store(path).id
    elif found is None and path.exists() and (not path.is_dir() or any(map(_is_foreign, path.iterdir()))):
        message = f"{path} holds something else; nothing in it was changed. Pull to another path."
        raise SettingsConflict(message)
    if found not in (None, manifest.id):
        message = (
            f"{path} holds the store {str(found)[:12]}, the URL {manifest.id[:12]}; nothing was changed. "
            "Pull to another path."
        )
        raise SettingsConflict(message)
    if local.holds == "unfinished":
        _require_idle(local.layout)
    return local


def _is_foreign(path: Path) -> bool:
    """Whether `path` holds more than the leftovers of a pull that was killed while it wrote PULLING.json."""
    return not path.name.startswith(f".{PULL_RECORD}.")


def _plan_part(remote: Remote, manifest: Manifest, local: _Local, items: Sequence[str], jobs: int) -> PullPlan:
    """The plan of a pull of the units that hold `items`, beside those that are in the folder already."""
    path, listed = local.layout.root, local.listed
    if any(
        listed.get(entry.path, entry.sha256) != entry.sha256 for entry in manifest.metadata if entry.path != ITEM_TABLE
    ):
        message = (
            f"The store at {remote.url} was made anew since {path} was pulled. Pull without --items, or elsewhere."
        )
        raise SettingsConflict(message)
    folder, tally = Path(mkdtemp(prefix="agiqa-pull-")), Tally()

    def fetch(entry: Entry) -> None:
        here, there = path / entry.path, folder / entry.path
        if here.is_file() and sha256_of_file(here) == entry.sha256:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(here, there)
        else:
            fetch_object(remote, entry, there, tally)

    with telling_disk_errors(f"looking at {remote.url}", "nothing was changed"), ExitStack() as undo:
        undo.callback(shutil.rmtree, folder, ignore_errors=True)
        in_parallel(fetch, manifest.metadata, threads=jobs, halt=tally.halt)
        try:
            store, names = Store(folder, manifest=json.loads(manifest.text)), read_items(folder / ITEM_TABLE).names
            unit_of_item = store.units
        except AgiqaError as error:
            error.add_note(f"while reading the index and the item table of {remote.url}: push it again")
            raise
        units = set(unit_of_item[_positions(remote.url, names, items)].tolist())
        units |= set() if local.manifest is None else set(local.manifest["units"])
        if len(units) < store.geometry.units:
            manifest = manifest.part(units, units_of_objects(folder, manifest))
        plan = PullPlan(remote=remote, path=path, manifest=manifest, fetched=folder)
        finalize(plan, undo.pop_all().close)
    return plan


def _positions(where: str, names: Sequence[str], items: Sequence[str]) -> list[int]:
    """The positions of `items` among the `names` of all items. Raises DataError naming those that are not there."""
    position = {name: number for number, name in enumerate(names)}
    problems: list[str] = []
    for item in items:
        if item not in position:
            near = get_close_matches(item, names, n=1, cutoff=0.6)
            problems.append(f"no item is called {item!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise DataError.from_problems(where, problems)
    return [position[item] for item in items]


def _waiting(path: Path, entry: Entry) -> Path:
    """Where a fetched object waits until all are here."""
    return StoreLayout(path).pulled / entry.path


def _fetch_missing(plan: PullPlan, local: _Local, tally: Tally, jobs: int) -> None:
    path = plan.path

    def fetch(entry: Entry) -> None:
        target, waiting = path / entry.path, _waiting(path, entry)
        for place in (target, waiting):
            check_inside(path, place)
        found = sha256_of_file(target) if target.is_file() else None
        if entry.sha256 in (found, sha256_of_file(waiting) if waiting.is_file() else None):
            tally.count(skipped=1, progress=entry.bytes)
        else:
            place = local.place_for(entry, found)
            if plan.fetched is not None and (plan.fetched / entry.path).is_file():  # checked and finished like any rest
                place.parent.mkdir(parents=True, exist_ok=True)
                with naming(place):
                    shutil.copyfile(plan.fetched / entry.path, partial_of(place))
            fetch_object(plan.remote, entry, place, tally)
        if found == entry.sha256:
            waiting.unlink(missing_ok=True)  # of a pull of another version that was cut off

    in_parallel(fetch, plan.manifest.entries, threads=jobs, halt=tally.halt)


def _install(manifest: Manifest, local: _Local, card: bytes | None) -> None:
    """Move the waiting objects to their places and write MANIFEST.json; all that `manifest` lists is in the folder.

    From the first move on a kill leaves PULLING.json and no MANIFEST.json, and the next pull only moves the rest.
    """
    layout, path = local.layout, local.layout.root
    waiting = [entry for entry in manifest.entries if _waiting(path, entry).exists()]
    with seal_lock(layout):
        if _Local.at(path).manifest != local.manifest:
            message = f"{path} was sealed, or its labels were changed, while it was pulled. Run the same command again."
            raise BusyStore(message)
        if local.is_planned:
            _stop_runs(layout, manifest)
        if waiting:
            write_text_atomically(path / PULL_RECORD, manifest.text)
            layout.manifest.unlink(missing_ok=True)
            sync_file(path)
        if any(local.listed.get(entry.path) != entry.sha256 for entry in manifest.objects):
            remove_records(layout)  # they list objects that are replaced
        for entry in waiting:
            target = path / entry.path
            if entry.path == ITEM_TABLE:
                _set_aside(target)
            target.parent.mkdir(parents=True, exist_ok=True)
            _waiting(path, entry).replace(target)
        for folder in {(path / entry.path).parent for entry in waiting}:
            sync_file(folder)
        if card is not None and (not layout.card.exists() or layout.card.read_bytes() != card):
            _set_aside(layout.card)
            write_text_atomically(layout.card, card.decode("utf-8", errors="replace"))
        write_text_atomically(layout.manifest, manifest.text)
        shutil.rmtree(layout.pulled, ignore_errors=True)
        (path / PULL_RECORD).unlink(missing_ok=True)


def _stop_runs(layout: StoreLayout, manifest: Manifest) -> None:
    """Write PULLING.json, after which no run begins to write. Raises BusyStore, without it, where one is at work."""
    record = layout.root / PULL_RECORD
    _require_idle(layout)
    write_text_atomically(record, manifest.text)
    try:
        _require_idle(layout)  # one may have begun between the two steps, see UnitWriter
    except BusyStore:
        record.unlink()
        raise


def _set_aside(path: Path) -> None:
    """Give the file at `path`, if there is one, the first name `NAME.before-pull[-N].SUFFIX` that is free."""
    tails = ("" if number == 1 else f"-{number}" for number in count(1))
    names = (path.with_name(f"{path.stem}.before-pull{tail}{path.suffix}") for tail in tails)
    if path.exists():
        path.replace(next(name for name in names if not name.exists()))


def _require_all_units(plan: PullPlan, local: _Local) -> None:
    """Raise BusyStore where the plan of a part leaves out units that another pull has brought since it was made."""
    had = local.manifest
    if had is None or plan.state == "complete":
        return
    if had["state"] == "complete" or not set(had["units"]) <= set(json.loads(plan.manifest.text)["units"]):
        message = f"Another pull has brought more of the store to {plan.path} meanwhile. Run the same command again."
        raise BusyStore(message)


def _require_room(plan: PullPlan) -> None:
    """Raise ConfigError if the disk has too little room for the missing objects."""
    needed = 0
    for entry in plan.manifest.entries:
        places = (plan.path / entry.path, _waiting(plan.path, entry))
        there = any(place.is_file() and place.stat().st_size == entry.bytes for place in places)
        needed += 0 if there else entry.bytes
    free = shutil.disk_usage(plan.path).free
    if needed > free:
        message = (
            f"{plan.path} has {free:,} bytes free, and {needed:,} of the store at {plan.remote.url} are not there yet. "
            "Free some space, or pull to another disk; what was pulled before is kept."
        )
        raise ConfigError(message)


def _require_idle(layout: StoreLayout) -> None:
    """Raise BusyStore where a run is at work; other pulls and upkeep keep out by their own locks."""
    if any(is_held(lock) for lock in layout.lock_files() if lock.name not in (PULL_LOCK, SEAL_LOCK)):
        message = f"Another run is at work on the unfinished store {layout.root}. Wait for it, or pull to another path."
        raise BusyStore(message)


def _check_identity(plan: PullPlan) -> None:
    """Raise DamagedStore unless the metadata that was fetched are those of the store that the manifest names."""
    path, manifest = plan.path, plan.manifest
    root = next(entry for entry in manifest.objects if entry.path == ROOT_METADATA)
    waiting = _waiting(path, root)
    found = read_json(waiting if waiting.exists() else path / root.path)
    attributes: Any = found.get("attributes") if isinstance(found, dict) else None
    if not isinstance(attributes, dict) or attributes.get("id") != manifest.id:
        message = (
            f"{plan.remote.url}: its manifest is of the store {manifest.id[:12]}, its metadata is not. Push it again."
        )
        raise DamagedStore(message)
    check_attributes(path, attributes)
