"""Open a store wherever it is: a folder on this machine, or a URL where it is read in place.

Opening a URL fetches the manifest, the metadata, the index and the item table. The rest comes when an array is read,
whole objects at a time, each checked by the sha256 that the manifest records. For features that is one unit. While
items are read in order the next units are fetched ahead.

Fetched objects are kept in `~/.cache/agiqa/stores/CONTENT`, or below the folder that AGIQA_CACHE names, and Zarr reads
them there. CONTENT is a hash of all paths and hashes that the manifest lists, so only URLs with the same bytes share a
folder; item tables, which may differ between such URLs, lie there by their own hashes. A process hashes a kept object
before it reads it for the first time, and again when the file was touched; one with other bytes is fetched again.

Several processes may share the folder, and a folder that cannot be written is still read. agiqa never empties it:
delete it to free its space.
"""

import asyncio
import json
import os
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore, WrapperStore

from agiqa.errors import AgiqaError, ConfigError, DamagedStore
from agiqa.store.disk.files import sha256_of_file
from agiqa.store.disk.locks import waiting_lock
from agiqa.store.format.items import Items, read_items
from agiqa.store.format.layout import ITEM_TABLE, StoreLayout, array_of, cache_root
from agiqa.store.format.manifest import Manifest, units_of_objects
from agiqa.store.reading.store import Store, open_local_store
from agiqa.store.reading.token_rows import TokenRows, item_positions
from agiqa.store.sharing.fetching import fetch_manifest, fetch_object
from agiqa.store.sharing.remotes import LocalFolder, Remote, is_url, remote_at
from agiqa.store.sharing.transfers import JOBS, Tally, in_parallel

_AHEAD = 4
"""Units that are fetched ahead."""
_AHEAD_THREADS = 4


@dataclass(frozen=True)
class _CacheLayout(StoreLayout):
    """A cache has no MANIFEST.json, so that it does not pass for a store: what was not fetched would read as zeros."""

    table: str
    """sha256 of the item table."""

    @property
    def items(self) -> Path:
        return self.root / "tables" / f"{self.table}.parquet"


class ObjectCache:
    """The objects of the store at `remote`, fetched once, by whichever thread or process asks first."""

    def __init__(self, remote: Remote, manifest: Manifest) -> None:
        """Nothing is fetched yet."""
        self.remote = remote
        self.manifest = manifest
        self.folder = cache_root() / "stores" / manifest.content
        self.layout = _CacheLayout(root=self.folder, table=manifest.labels.sha256)
        self._entries = {entry.path: entry for entry in manifest.entries}
        self._sound: dict[str, _Stamp] = {}

    def knows(self, path: str) -> bool:
        """Whether the manifest lists `path`."""
        return path in self._entries

    def is_here(self, path: str) -> bool:
        """Whether `path` needs no fetch: this process has checked its bytes, or the store has no such object."""
        if path not in self._entries:
            return True
        known = self._sound.get(path)
        return known is not None and known == _stamp(self._place(path))

    def fetch(self, path: str) -> None:
        """Bring the object `path` into the folder, with the bytes that the manifest lists.

        Raises as `fetch_object`, with the folder's name in a note, and ConfigError where it cannot be kept.
        """
        if self.is_here(path):
            return
        entry, locks = self._entries[path], self.layout.locks
        with self._explaining():
            if self._is_sound(path):
                return
            locks.mkdir(parents=True, exist_ok=True)
            with waiting_lock(locks / entry.sha256):
                if not self._is_sound(path):
                    fetch_object(self.remote, entry, self._place(path), Tally())
                    self._is_sound(path)

    def _place(self, path: str) -> Path:
        return self.layout.items if path == ITEM_TABLE else self.folder / path

    def _is_sound(self, path: str) -> bool:
        place, entry = self._place(path), self._entries[path]
        stamp = _stamp(place)
        if stamp is None or stamp[-1] != entry.bytes or sha256_of_file(place) != entry.sha256:
            return False
        self._sound[path] = stamp  # of before it was hashed, so a change meanwhile shows
        return True

    @contextmanager
    def _explaining(self) -> Generator[None]:
        """Add the cache folder to errors from inside and, if it cannot be written, how to do without it."""
        try:
            yield
        except AgiqaError as error:
            error.add_note(f"while fetching it to the cache {self.folder}, which is never emptied (see AGIQA_CACHE)")
            raise
        except OSError as error:
            needed = sum(entry.bytes for entry in self.manifest.entries)
            message = (
                f"The cache {self.folder} cannot be written ({error}). Set AGIQA_CACHE to a folder that can take up to "
                f"{needed:,} bytes, or `agiqa store pull {self.remote.url}` and give the path of the copy."
            )
            raise ConfigError(message) from error


_Stamp = tuple[int, int, int, int]
"""Inode, times of the last write (mtime) and the last change of the inode (ctime) in nanoseconds, size of a file.

A copy may set mtime back, as rsync does; ctime shows that.
"""


def _stamp(path: Path) -> _Stamp | None:
    """The stamp of the file at `path`; None where there is none."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class ReadAhead:
    """Fetches the next units in a few background threads, which end when nothing is left to do."""

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
        """Take note of the units that are going to be read, ascending."""
        if self._process != os.getpid():  # forked: the threads and the holder of the lock stayed in the parent
            self._start()
        self._announced = list(units)

    def reads(self, path: str) -> None:
        """Fetch what follows the object `path`, which is read now."""
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
            except (AgiqaError, OSError):  # the reader meets the same failure itself when it comes to this object
                continue
            finally:
                with self._lock:
                    self._fetching.discard(path)


class _FetchingStore(WrapperStore[LocalStore]):
    """Zarr's view of the cache folder: each object is fetched before Zarr looks for it."""

    def __init__(self, store: LocalStore, cache: ObjectCache, ahead: ReadAhead) -> None:
        super().__init__(store)
        self._cache = cache
        self._ahead = ahead

    def _with_store(self, store: LocalStore) -> "_FetchingStore":
        return type(self)(store, self._cache, self._ahead)

    async def _fetch(self, key: str) -> bool:
        """Bring the object `key` here; False where the store has none, even if a file lies in its place."""
        path = f"store.zarr/{key}"
        self._ahead.reads(path)
        if not self._cache.is_here(path):
            await asyncio.to_thread(self._cache.fetch, path)
        return self._cache.knows(path)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        return await super().get(key, prototype, byte_range) if await self._fetch(key) else None

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, byte_range in requests:
            yield key, await self.get(key, prototype, byte_range)

    async def exists(self, key: str) -> bool:
        return self._cache.knows(f"store.zarr/{key}")


class RemoteStore(Store):
    """A store read in place; open one with `open_remote`. Its `path` is the cache folder."""

    def __init__(self, cache: ObjectCache) -> None:
        """The metadata of the store must be in the cache already. Raises as Store."""
        self.url, manifest = cache.remote.url, cache.manifest
        super().__init__(cache.folder, layout=cache.layout, manifest=json.loads(manifest.text))
        self._cache = cache
        self._ahead = ReadAhead(cache, units_of_objects(cache.folder, manifest))
        store = _FetchingStore(LocalStore(self.layout.zarr, read_only=True), cache, self._ahead)
        self.group = zarr.open_group(store, mode="r")
        self._arrays.clear()  # opened with the group that fetches nothing

    @property
    def location(self) -> str:
        """The URL of the store."""
        return self.url

    def read_layer(self, items: Sequence[int] | NDArray[Any], layer: str) -> TokenRows:
        """As Store, with the units of `items` fetched ahead. Raises RemoteError too."""
        wanted = item_positions(items, count=len(self.n_tokens), where=self.location)
        self._ahead.announce(np.unique(self.units[wanted]).tolist())
        return super().read_layer(wanted, layer)

    def _read_items(self) -> Items:
        self._cache.fetch(ITEM_TABLE)
        return read_items(self.layout.items)

    def _count_items(self) -> int:
        self._cache.fetch(ITEM_TABLE)
        return super()._count_items()

    def require_in_place(self) -> None:
        """Nothing: a folder of the cache is of one store for ever, and what it lost is fetched again."""

    def _ensure_here(self, path: Path) -> None:
        name = path.relative_to(self.path).as_posix()
        self._ahead.reads(name)
        self._cache.fetch(name)

    @contextmanager
    def _decoding(self, what: str) -> Generator[None]:
        try:
            with super()._decoding(what):
                yield
        except DamagedStore as error:
            if isinstance(error.__cause__, (AgiqaError, OSError)):  # it could not be fetched or kept
                raise error.__cause__ from None
            message = f"{self.url}: {what} was damaged before it was pushed ({error.__cause__}). Push a sound store."
            raise DamagedStore(message) from error


def open_store(location: str | Path, *, allow_partial: bool = False) -> Store:
    """Open the feature store at `location`, a path or a URL (`s3://`, `gs://`, `hf://`, `https://`, `file://`).

    Raises SchemaError where there is no store or one of an unknown version, IncompleteStore for a store that was never
    sealed unless `allow_partial` is set, and for a URL as `open_remote` does.
    """
    if is_url(location):
        return open_remote(location)
    return open_local_store(location, allow_partial=allow_partial)


def open_remote(url: str) -> Store:
    """The store at `url`, to be read in place; that at a `file://` URL is opened where it is.

    Raises SchemaError where there is no finished store, RemoteError where it cannot be reached, ConfigError for a
    missing driver or a cache that cannot be written, and UnknownName for a scheme that is not read here.
    """
    remote = remote_at(url)
    if isinstance(remote, LocalFolder):
        return open_local_store(Path(remote.root))
    cache = ObjectCache(remote, fetch_manifest(remote))
    in_parallel(cache.fetch, [entry.path for entry in cache.manifest.metadata], threads=JOBS)
    return RemoteStore(cache)
