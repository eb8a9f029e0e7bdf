"""Pull: copy a store, or the units that hold some of its items, from a URL; every byte is checked on its way.

An object goes to its place as soon as it is here, unless that would change a store which the folder holds: an
unfinished one, or one whose manifest lists another object there. Then it waits in the folder `.pulled`. When everything
is here, `_install` moves all that waits to its place and writes MANIFEST.json. Before that a failure or a kill leaves
the store that was there as it was.

`PULLING.json`, the manifest of what is being pulled, marks a folder that is no store yet; a part of a store has
`"state": "partial"` in its manifest, and lists the `units` that are there.
"""

import json
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import count
from pathlib import Path
from typing import Any

from agiqa.errors import BusyStore, ConfigError, DamagedStore, DataError, SettingsConflict
from agiqa.store.disk.files import read_json, sha256_of_file, sync_file, telling_disk_errors, write_text_atomically
from agiqa.store.disk.locks import exclusive_lock, is_held
from agiqa.store.format.items import read_items
from agiqa.store.format.layout import ITEM_TABLE, PULL_LOCK, PULL_RECORD, ROOT_METADATA, SEAL_LOCK, StoreLayout
from agiqa.store.format.manifest import CARD_BYTES, Entry, Manifest, check_inside, read_manifest, units_of_objects
from agiqa.store.format.metadata import check_attributes
from agiqa.store.reading.store import Store
from agiqa.store.sharing.fetching import fetch_manifest, fetch_object
from agiqa.store.sharing.remotes import Remote, remote_at
from agiqa.store.sharing.transfers import JOBS, Tally, Transfer, in_parallel
from agiqa.store.writing.records import remove_records
from agiqa.store.writing.sealing import remove_locks, seal_lock


@dataclass(frozen=True, kw_only=True)
class PullPlan:
    """What a pull is going to bring to `path`."""

    remote: Remote
    path: Path
    manifest: Manifest
    """What the local MANIFEST.json will say."""

    @property
    def bytes(self) -> int:
        """Bytes of all its objects, those that are there already included."""
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
    """Find out what must be fetched; with `items` this fetches the index and the item table.

    Raises SchemaError where there is no finished store at `url`, SettingsConflict where `path` holds anything else
    than this store (an unfinished one is completed, unless `items` are given), DamagedStore where its manifest cannot
    be read, DataError naming the items that the store does not have, and BusyStore where another pull or run is at work
    on `path`.
    """
    if items is not None and not items:
        message = f"No items are named, so there is nothing to pull from {url}. Name some, or pull the whole store."
        raise ConfigError(message)
    remote = remote_at(url)
    manifest = fetch_manifest(remote)
    had = _claim(path, manifest, some=items is not None)
    if items is None or had is None:
        return PullPlan(remote=remote, path=path, manifest=manifest)
    with _only_pull(path, url):
        _fetch_missing(remote, manifest.metadata, _Local.at(path), Tally(), jobs)
    if any(_waiting(path, entry).exists() for entry in manifest.metadata if entry.path != ITEM_TABLE):
        message = f"The store at {url} was made anew since {path} was pulled. Pull it without --items, or elsewhere."
        raise SettingsConflict(message)
    store = Store(path, manifest=json.loads(manifest.text))
    units = {*had, *_units_of_items(store, _names(path, manifest), items)}
    part = manifest
    if len(units) < store.geometry.units:
        part = manifest.part(units, units_of_objects(path, manifest))
    return PullPlan(remote=remote, path=path, manifest=part)


def run_pull(plan: PullPlan, *, jobs: int = JOBS, advance: Callable[[int], None] = lambda _bytes: None) -> Transfer:
    """Fetch what `plan` names in `jobs` threads; MANIFEST.json is written when all of it is there.

    Raises DamagedStore naming the object and its URL where the remote twice gave other bytes than its manifest
    records, RemoteError where it cannot be reached, ConfigError where the disk has too little room, and BusyStore where
    another pull is at work or the store was changed meanwhile. An OSError is told of as `telling_disk_errors` does.
    """
    with _only_pull(plan.path, plan.remote.url):
        tally, local = Tally(advance), _Local.at(plan.path)
        _require_room(plan)
        _fetch_missing(plan.remote, plan.manifest.entries, local, tally, jobs)
        _check_identity(plan.remote, plan.manifest, plan.path)
        card = plan.remote.read(local.layout.card.name, limit=CARD_BYTES)
        _install(plan.manifest, local, card)
        remove_locks(local.layout, mine=PULL_LOCK)
    return tally.result()


@dataclass(frozen=True, kw_only=True)
class _Local:
    """What the folder of a pull holds of the store when the pull begins."""

    layout: StoreLayout
    listed: dict[str, str] | None
    """The sha256 of every object of its manifest, by path; None where there is no manifest."""

    @classmethod
    def at(cls, path: Path) -> "_Local":
        layout = StoreLayout(path)
        return cls(layout=layout, listed=_listed(layout))

    @property
    def is_unfinished(self) -> bool:
        """Whether runs of this machine have planned the store and perhaps filled some of it."""
        return self.listed is None and self.layout.plan_commit.exists()

    def place_for(self, entry: Entry, found: str | None) -> Path:
        """Where the object of `entry` is fetched to; `found` is the sha256 of what has its place now."""
        counts = self.listed is not None and self.listed.get(entry.path) == found
        if self.is_unfinished or (found is not None and (counts or entry.path == ITEM_TABLE)):
            return _waiting(self.layout.root, entry)
        return self.layout.root / entry.path


def _listed(layout: StoreLayout) -> dict[str, str] | None:
    if not layout.manifest.exists():
        return None
    manifest = read_manifest(layout.manifest)
    return {entry["path"]: entry["sha256"] for entry in [*manifest["objects"], manifest["labels"]]}


def _waiting(path: Path, entry: Entry) -> Path:
    """Where a fetched object waits until all are here."""
    return StoreLayout(path).pulled / entry.path


def _fetch_missing(remote: Remote, entries: Iterable[Entry], local: _Local, tally: Tally, jobs: int) -> None:
    path = local.layout.root

    def fetch(entry: Entry) -> None:
        target, waiting = path / entry.path, _waiting(path, entry)
        for place in (target, waiting):
            check_inside(path, place)
        found = sha256_of_file(target) if target.is_file() else None
        if entry.sha256 in (found, sha256_of_file(waiting) if waiting.is_file() else None):
            tally.skipped(entry.bytes)
        else:
            fetch_object(remote, entry, local.place_for(entry, found), tally)
        if found == entry.sha256:
            waiting.unlink(missing_ok=True)  # of a pull of another version that was cut off

    in_parallel(fetch, entries, threads=jobs, halt=tally.halt)


def _install(manifest: Manifest, local: _Local, card: bytes | None) -> None:
    """Move what waits to its place and write MANIFEST.json; all that `manifest` lists is in the folder already.

    From the first move on a kill leaves PULLING.json and no MANIFEST.json, and the next pull only moves the rest.
    """
    layout, path = local.layout, local.layout.root
    waiting = [entry for entry in manifest.entries if _waiting(path, entry).exists()]
    with seal_lock(layout):
        if _listed(layout) != local.listed:
            message = f"{path} was sealed, or its labels were changed, while it was pulled. Run the same command again."
            raise BusyStore(message)
        if local.is_unfinished:
            _stop_runs(layout, manifest)
        if waiting:
            write_text_atomically(path / PULL_RECORD, manifest.text)
            layout.manifest.unlink(missing_ok=True)
            sync_file(path)
        listed = local.listed or {}
        if any(listed.get(entry.path) != entry.sha256 for entry in manifest.objects):
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


def _require_room(plan: PullPlan) -> None:
    """Raise ConfigError where what is not here yet is more than the disk has room for."""
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


def _claim(path: Path, manifest: Manifest, *, some: bool) -> list[int] | None:
    """Make `path` the place of this store; returns the units that are there already, None for a complete store."""
    layout, record = StoreLayout(path), path / PULL_RECORD
    local = read_manifest(layout.manifest) if layout.manifest.exists() else None
    started = read_manifest(record) if record.exists() else local
    found = None if started is None else started.get("id")
    unfinished = found is None and layout.plan_commit.exists()
    if unfinished:
        found = Store(path).id
    elif found is None and path.exists() and (not path.is_dir() or any(path.iterdir())):
        message = f"{path} holds something else; nothing in it was changed. Pull to another path."
        raise SettingsConflict(message)
    if found not in (None, manifest.id):
        message = (
            f"{path} holds the store {str(found)[:12]}, the URL {manifest.id[:12]}; nothing was changed. "
            "Pull to another path."
        )
        raise SettingsConflict(message)
    if unfinished and some:
        message = (
            f"{path} is an unfinished store; some items of the store at the URL would take the place of all its units. "
            "Pull to another path, or without --items."
        )
        raise SettingsConflict(message)
    path.mkdir(parents=True, exist_ok=True)
    if unfinished:  # stays one until all is here, so that its runs can go on where the pull fails
        _require_idle(layout)
        return []
    if local is None:
        write_text_atomically(record, manifest.text)
        return []
    return None if local["state"] == "complete" else [int(unit) for unit in local["units"]]


def _require_idle(layout: StoreLayout) -> None:
    """Raise BusyStore where a run is at work; other pulls and upkeep keep out by their own locks."""
    if any(is_held(lock) for lock in layout.lock_files() if lock.name not in (PULL_LOCK, SEAL_LOCK)):
        message = f"Another run is at work on the unfinished store {layout.root}. Wait for it, or pull to another path."
        raise BusyStore(message)


def _check_identity(remote: Remote, manifest: Manifest, path: Path) -> None:
    """Raise DamagedStore unless the metadata that was fetched are those of the store that the manifest names."""
    root = next(entry for entry in manifest.objects if entry.path == ROOT_METADATA)
    waiting = _waiting(path, root)
    found = read_json(waiting if waiting.exists() else path / root.path)
    attributes: Any = found.get("attributes") if isinstance(found, dict) else None
    if not isinstance(attributes, dict) or attributes.get("id") != manifest.id:
        message = f"{remote.url}: its manifest is of the store {manifest.id[:12]}, its metadata is not. Push it again."
        raise DamagedStore(message)
    check_attributes(path, attributes)


def _names(path: Path, manifest: Manifest) -> list[str]:
    """The names of all items, as the item table says that `manifest` lists."""
    waiting = _waiting(path, manifest.labels)
    table = waiting if waiting.exists() else path / ITEM_TABLE
    try:
        return list(read_items(table).names)
    except OSError as error:
        message = f"{table} cannot be read ({error}), though it has the sha256 that the manifest lists. Push it again."
        raise DamagedStore(message) from error


def _units_of_items(store: Store, names: Sequence[str], items: Sequence[str]) -> list[int]:
    """The units of the items of these names, where `names` are all that the store has."""
    position = {name: number for number, name in enumerate(names)}
    problems: list[str] = []
    for item in items:
        if item not in position:
            near = get_close_matches(item, names, n=1, cutoff=0.6)
            problems.append(f"no item is called {item!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    if problems:
        raise DataError.from_problems(str(store.path), problems)
    return [int(store.units[position[item]]) for item in items]


@contextmanager
def _only_pull(path: Path, url: str) -> Generator[None]:
    """Hold the folder against other pulls. An OSError of the disk gets a note with what is kept."""
    doing = telling_disk_errors(f"pulling {url} to {path}", "what was fetched is kept")
    with doing, exclusive_lock(StoreLayout(path).locks / PULL_LOCK) as held:
        if not held:
            message = f"Another pull is at work on {path}. Wait for it, or pull to another path."
            raise BusyStore(message)
        yield
