"""Pull: copy a store, or the units that hold some of its items, from a URL; every byte is checked on its way.

While a pull is at work the folder holds `PULLING.json`, the manifest of what is being pulled; MANIFEST.json comes last.
A part of a store has `"state": "partial"` in its manifest, and lists the `units` that are there.
"""

import hashlib
import shutil
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from agiqa.errors import BusyStore, ConfigError, DamagedStore, DataError, RemoteError, SchemaError, SettingsConflict
from agiqa.store.files import exclusive_lock, sha256_of_file, sync_file, write_text_atomically
from agiqa.store.layout import MANIFEST, PULL_RECORD, StoreLayout
from agiqa.store.listings import read_manifest
from agiqa.store.manifests import Entry, Manifest, parse_manifest, units_of_objects
from agiqa.store.reading import Store
from agiqa.store.remotes import BLOCK, Remote, remote_at, wait_after
from agiqa.store.transfers import JOBS, Tally, Transfer, in_parallel
from agiqa.store.upkeep import is_held, lock_files, remove_locks

_SET_ASIDE = "items.before-pull.parquet"
_PULL_LOCK = "pull"


class _PullLayout(StoreLayout):
    """The objects of a folder that a pull is at work in count by what the pull's record lists."""

    @property
    def manifest(self) -> Path:
        return self.root / PULL_RECORD


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
    are there already are hashed and kept; an item table that differs from the remote's is set aside as
    `items.before-pull.parquet`. `advance` is called with bytes that are done. Raises as `plan_pull` and
    `run_pull` do.
    """
    return run_pull(plan_pull(url, path, items=items, jobs=jobs), jobs=jobs, advance=advance)


def plan_pull(url: str, path: Path, *, items: Sequence[str] | None = None, jobs: int = JOBS) -> PullPlan:
    """Find out what must be fetched; with `items` this fetches the index and the item table.

    Raises SchemaError where there is no finished store at `url`, SettingsConflict where `path` holds anything else
    than this store (an unfinished one is completed), DamagedStore where its manifest cannot be read, DataError naming
    the items that the store does not have, and BusyStore where another pull or run is at work on `path`.
    """
    if items is not None and not items:
        message = f"No items are named, so there is nothing to pull from {url}. Name some, or pull the whole store."
        raise ConfigError(message)
    remote = remote_at(url)
    manifest = fetch_manifest(remote)
    had = _claim(path, manifest)
    if items is None or had is None:
        return PullPlan(remote=remote, path=path, manifest=manifest)
    with _only_pull(path):
        tally = Tally()
        _drop_outdated(path, manifest)
        _fetch_missing(remote, manifest.metadata, path, tally, jobs)
    store = Store(path, layout=_PullLayout(path))
    unit_of = units_of_objects(path, manifest)
    units = {*had, *_units_of_items(store, items)}
    part = manifest if len(units) == store.geometry.units else manifest.part(units, unit_of)
    return PullPlan(remote=remote, path=path, manifest=part)


def run_pull(plan: PullPlan, *, jobs: int = JOBS, advance: Callable[[int], None] = lambda _bytes: None) -> Transfer:
    """Fetch what `plan` names in `jobs` threads; MANIFEST.json is written when all of it is there.

    Raises DamagedStore naming the object and its URL where the remote twice gave other bytes than its manifest
    records, RemoteError where it cannot be reached, and BusyStore where another pull is at work.
    """
    layout = StoreLayout(plan.path)
    with _only_pull(plan.path):
        tally = Tally(advance)
        _drop_outdated(plan.path, plan.manifest)
        _fetch_missing(plan.remote, plan.manifest.entries, plan.path, tally, jobs)
        _check_identity(plan.remote, plan.manifest, plan.path)
        card = plan.remote.read(layout.card.name)
        if card is not None:
            write_text_atomically(layout.card, card.decode("utf-8", errors="replace"))
        write_text_atomically(layout.manifest, plan.manifest.text)
        (plan.path / PULL_RECORD).unlink(missing_ok=True)
        remove_locks(layout, mine=_PULL_LOCK)
    return tally.result()


def fetch_manifest(remote: Remote) -> Manifest:
    """The manifest of the finished store at `remote`. Raises SchemaError where there is none."""
    text = remote.read(MANIFEST)
    if text is None:
        message = f"{remote.url} is not a finished feature store: it has no {MANIFEST}. Push the store (again)."
        raise SchemaError(message)
    return parse_manifest(text.decode("utf-8", errors="replace"), remote.url_of(MANIFEST))


def fetch_object(remote: Remote, entry: Entry, folder: Path, tally: Tally) -> None:
    """Fetch one object into the store `folder`, checked by its sha256, whole or not at all.

    What an earlier run had fetched of it is kept. Raises DamagedStore when its bytes are wrong twice over, and
    RemoteError when the remote cannot be reached.
    """
    target = folder / entry.path
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    size = 0
    for _ in range(2):
        if _download(remote, entry, temporary, tally) == entry.sha256:
            sync_file(temporary)
            temporary.replace(target)
            sync_file(target.parent)
            tally.finished()
            return
        size = temporary.stat().st_size
        temporary.unlink()
        tally.found(-size)
    message = (
        f"{remote.url_of(entry.path)} is damaged: {size} bytes came, twice, that do not have the sha256 recorded for "
        f"{entry.path} ({entry.bytes} bytes). Push the store there again."
    )
    raise DamagedStore(message)


def _download(remote: Remote, entry: Entry, temporary: Path, tally: Tally) -> str:
    """Complete the file `temporary`; returns the hex sha256 of what it holds then."""
    digest = hashlib.sha256()
    done = _resume(temporary, entry, digest, tally)
    failures = 0
    with temporary.open("ab") as file:
        while done < entry.bytes:
            try:
                for block in remote.blocks(entry.path, size=entry.bytes, start=done):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    failures = 0
                    tally.moved(len(block))
                break
            except FileNotFoundError as error:
                message = f"{remote.url_of(entry.path)} is missing, though the manifest lists it. Push the store again."
                raise DamagedStore(message) from error
            except RemoteError as error:
                failures += 1  # without a byte between them
                wait_after(failures, error)
    return digest.hexdigest()


def _resume(temporary: Path, entry: Entry, digest: Any, tally: Tally) -> int:
    """Take what is there of the object into `digest`; returns its bytes."""
    if not temporary.exists():
        return 0
    if temporary.stat().st_size > entry.bytes:
        temporary.unlink()
        return 0
    with temporary.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    size = temporary.stat().st_size
    tally.found(size)
    return size


def _fetch_missing(remote: Remote, entries: Iterable[Entry], path: Path, tally: Tally, jobs: int) -> None:
    def fetch(entry: Entry) -> None:
        target = path / entry.path
        if target.is_file() and target.stat().st_size == entry.bytes and sha256_of_file(target) == entry.sha256:
            tally.skipped(entry.bytes)
        else:
            fetch_object(remote, entry, path, tally)

    in_parallel(fetch, entries, threads=jobs, halt=tally.halt)


def _claim(path: Path, manifest: Manifest) -> list[int] | None:
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
    path.mkdir(parents=True, exist_ok=True)
    if unfinished:
        _require_idle(layout)
    write_text_atomically(record, manifest.text)
    if unfinished:  # as a repair leaves it; from here on its objects count by what the manifest lists
        shutil.rmtree(layout.commits)
    if local is None:
        return []
    return None if local["state"] == "complete" else [int(unit) for unit in local["units"]]


def _require_idle(layout: StoreLayout) -> None:
    if any(is_held(lock) for lock in lock_files(layout)):
        message = f"Another run is at work on the unfinished store {layout.root}. Wait for it, or pull to another path."
        raise BusyStore(message)


def _drop_outdated(path: Path, manifest: Manifest) -> None:
    """Take down a local manifest that lists what will be replaced, before any of it is.

    Labels may have been replaced here rather than there, so the item table is set aside.
    """
    layout = StoreLayout(path)
    if not layout.manifest.exists():
        return
    local = read_manifest(layout.manifest)
    wanted = {entry.path: entry.sha256 for entry in manifest.entries}
    listed = [*local["objects"], local["labels"]]
    if any(wanted.get(entry["path"]) != entry["sha256"] for entry in listed):
        layout.manifest.unlink()
        if wanted[layout.items.name] != local["labels"]["sha256"] and layout.items.exists():
            layout.items.replace(path / _SET_ASIDE)
        sync_file(path)


def _check_identity(remote: Remote, manifest: Manifest, path: Path) -> None:
    if Store(path).id != manifest.id:
        message = f"{remote.url}: its manifest is of the store {manifest.id[:12]}, its metadata is not. Push it again."
        raise DamagedStore(message)


def _units_of_items(store: Store, items: Sequence[str]) -> list[int]:
    names = store.items.names
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
def _only_pull(path: Path) -> Generator[None]:
    with exclusive_lock(StoreLayout(path).locks / _PULL_LOCK) as held:
        if not held:
            message = f"Another pull is at work on {path}. Wait for it, or pull to another path."
            raise BusyStore(message)
        yield
