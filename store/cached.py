"""Reading a remote store in place: its objects are fetched when they are first read, and kept.

`open_remote(url)` fetches the manifest, the metadata, the index and the item table; the rest comes when an array is
read, whole objects at a time, each checked by the sha256 that the manifest records. For features that is one unit.
They are kept in `~/.cache/agiqa/stores/ID`, or below the folder that AGIQA_CACHE names, and Zarr reads them there.
Several processes may share that folder. agiqa never empties it: delete it to free its space. While items are read in
order the next units are fetched ahead.
"""

import asyncio
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from agiqa.errors import DamagedStore
from agiqa.store.fetching import fetch_manifest, fetch_object
from agiqa.store.files import read_json, waiting_lock, write_text_atomically
from agiqa.store.items import item_positions
from agiqa.store.layout import StoreLayout, cache_root
from agiqa.store.manifests import Manifest, array_of, units_of_objects
from agiqa.store.reading import Store, TokenRows, open_store
from agiqa.store.remotes import LocalFolder, Remote, remote_at
from agiqa.store.transfers import JOBS, Tally, in_parallel

_AHEAD = 4
"""Units that are fetched ahead."""
_AHEAD_THREADS = 4


class _CacheLayout(StoreLayout):
    """A cache is no store: what was not fetched would read as zeros. So its manifest has a name of its own."""

    @property
    def manifest(self) -> Path:
        return self.root / "REMOTE.json"


class ObjectCache:
    """The objects of the store at `remote`, fetched into `folder` once, by whichever thread or process asks first."""

    def __init__(self, remote: Remote, manifest: Manifest, folder: Path) -> None:
        """Nothing is fetched yet."""
        self.remote = remote
        self.folder = folder
        self._entries = {entry.path: entry for entry in manifest.entries}

    def knows(self, path: str) -> bool:
        """Whether the manifest lists `path`."""
        return path in self._entries

    def is_here(self, path: str) -> bool:
        """Whether `path` needs no fetching: it was fetched, or the store has no such object.

        By its size alone, since an object gets its name only after its hash was found right.
        """
        if path not in self._entries:
            return True
        place = self.folder / path
        return place.is_file() and place.stat().st_size == self._entries[path].bytes

    def fetch(self, path: str) -> None:
        """Have the object `path` in the folder. Raises as `fetch_object`, with the folder's name in a note."""
        if self.is_here(path):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with waiting_lock(self.folder / "locks" / path.replace("/", ".")):
                if not self.is_here(path):
                    fetch_object(self.remote, self._entries[path], self.folder / path, Tally())
        except OSError as error:
            error.add_note(f"while fetching it to the cache {self.folder}, which is never emptied (see AGIQA_CACHE)")
            raise


class ReadAhead:
    """Fetches the units that come next in a few background threads, which end when nothing is left to do."""

    def __init__(self, cache: ObjectCache, unit_of: dict[str, int]) -> None:
        """`unit_of` gives the unit of every object that holds rows."""
        self._cache = cache
        self._unit_of = unit_of
        self._objects: dict[tuple[str | None, int], list[str]] = {}
        for path, unit in unit_of.items():
            self._objects.setdefault((array_of(path), unit), []).append(path)
        self._start()

    def _start(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._waiting: deque[str] = deque()
        self._fetching: set[str] = set()
        self._threads = 0
        self._announced: list[int] = []
        self._last: dict[str | None, int] = {}

    def announce(self, units: Iterable[int]) -> None:
        """Say which units are going to be read, ascending."""
        if self._process != os.getpid():  # forked: the threads, and whoever held the lock, stayed in the parent
            self._start()
        self._announced = list(units)

    def reads(self, path: str) -> None:
        """Say that the object `path` is read now, so that what follows it is fetched."""
        if path not in self._unit_of:
            return
        if self._process != os.getpid():
            self._start()
        array, unit = array_of(path), self._unit_of[path]
        with self._lock:
            coming = self._coming(array, unit)
            wanted = [path for other in coming for path in self._objects.get((array, other), [])]
            others = [path for path in self._waiting if array_of(path) != array]  # as the tokens of these rows
            ahead = [path for path in wanted if path not in self._fetching and not self._cache.is_here(path)]
            self._waiting = deque([*ahead, *others])
            for _ in range(min(len(self._waiting), _AHEAD_THREADS) - self._threads):
                self._threads += 1
                threading.Thread(target=self._work, name="agiqa-read-ahead", daemon=True).start()

    def _coming(self, array: str | None, unit: int) -> Sequence[int]:
        place = bisect_right(self._announced, unit)
        if place and self._announced[place - 1] == unit:
            return self._announced[place : place + _AHEAD]
        follows = self._last.get(array) == unit - 1
        self._last[array] = unit
        return range(unit + 1, unit + 1 + _AHEAD) if follows else ()

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                path = self._waiting.popleft()
                self._fetching.add(path)
            try:
                self._cache.fetch(path)
            except OSError:  # the reader meets the same failure itself when it comes to this object
                continue
            finally:
                with self._lock:
                    self._fetching.discard(path)


class _FetchingStore(WrapperStore[LocalStore]):
    """Zarr's view of the cache folder: whatever it asks for is fetched before it looks."""

    def __init__(self, store: LocalStore, cache: ObjectCache, ahead: ReadAhead) -> None:
        super().__init__(store)
        self._cache = cache
        self._ahead = ahead

    def _with_store(self, store: LocalStore) -> "_FetchingStore":
        return type(self)(store, self._cache, self._ahead)

    async def _fetch(self, key: str) -> None:
        path = f"store.zarr/{key}"
        self._ahead.reads(path)
        if not self._cache.is_here(path):
            await asyncio.to_thread(self._cache.fetch, path)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        await self._fetch(key)
        return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        ranges = list(key_ranges)
        for key, _ in ranges:
            await self._fetch(key)
        return await super().get_partial_values(prototype, ranges)

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return self._cache.knows(f"store.zarr/{key}") or await super().exists(key)


class RemoteStore(Store):
    """A store read in place; open one with `open_remote`. Its `path` is the cache folder."""

    def __init__(self, remote: Remote, manifest: Manifest, cache: ObjectCache) -> None:
        """The metadata of the store must be in the cache already. Raises as Store, and DamagedStore for another id."""
        super().__init__(cache.folder)
        if self.id != manifest.id:
            message = f"{remote.url}: the manifest is of the store {manifest.id[:12]}, the metadata of {self.id[:12]}."
            raise DamagedStore(message)
        self.url = remote.url
        self.layout = _CacheLayout(cache.folder)
        self._cache = cache
        self._ahead = ReadAhead(cache, units_of_objects(cache.folder, manifest))
        store = _FetchingStore(LocalStore(self.layout.zarr, read_only=True), cache, self._ahead)
        self.group = zarr.open_group(store, mode="r")
        self._arrays.clear()  # opened with the group that fetches nothing

    @property
    def location(self) -> str:
        """The URL of the store."""
        return self.url

    def read(self, items: Sequence[int] | NDArray[Any]) -> TokenRows:
        """As Store, with the units of `items` fetched ahead. Raises RemoteError too."""
        wanted = item_positions(items, count=len(self.n_tokens), where=self.location)
        self._ahead.announce(np.unique(self.units[wanted]).tolist())
        return super().read(wanted)

    def _have(self, path: Path) -> None:
        name = path.relative_to(self.path).as_posix()
        self._ahead.reads(name)
        self._cache.fetch(name)

    @contextmanager
    def _decoding(self, what: str) -> Generator[None]:
        try:
            with super()._decoding(what):
                yield
        except DamagedStore as error:
            if isinstance(error.__cause__, OSError):  # not decoded because it could not be fetched, or not kept
                raise error.__cause__ from None
            message = f"{self.url}: {what} is damaged in the cache. Delete {self.path}; it is fetched again."
            raise DamagedStore(message) from error


def open_remote(url: str) -> Store:
    """The store at `url`, to be read in place. A `file://` URL is opened where it is.

    Raises SchemaError where there is no finished store, RemoteError where it cannot be reached, ConfigError for a
    missing driver and UnknownName for a scheme that is not read here.
    """
    remote = remote_at(url)
    if isinstance(remote, LocalFolder):
        return open_store(Path(remote.root))
    manifest = fetch_manifest(remote)
    folder = cache_folder(manifest.id)
    folder.mkdir(parents=True, exist_ok=True)
    cache = ObjectCache(remote, manifest, folder)
    with waiting_lock(folder / "locks" / "open"):
        _adopt(manifest, folder)
        names = [entry.path for entry in manifest.metadata]
        in_parallel(cache.fetch, names, threads=JOBS)
    return RemoteStore(remote, manifest, cache)


def cache_folder(store_id: str) -> Path:
    """Where the objects of a remote store are kept: `stores/ID` below the cache root."""
    return cache_root() / "stores" / store_id


def _adopt(manifest: Manifest, folder: Path) -> None:
    """Drop from the cache what the remote has replaced since, as new labels."""
    record = _CacheLayout(folder).manifest
    if record.exists():
        known = read_json(record)
        wanted = {entry.path: entry.sha256 for entry in manifest.entries}
        for entry in [*known["objects"], known["labels"]]:
            if wanted.get(entry["path"]) != entry["sha256"]:
                (folder / entry["path"]).unlink(missing_ok=True)
    write_text_atomically(record, manifest.text)
