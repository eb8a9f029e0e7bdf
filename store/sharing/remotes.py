"""Folders at URLs, through fsspec: the file system of each URL scheme, and the few operations that a store needs.

| URL | file system | push |
|---|---|---|
| `file:///folder` | the local disk | yes |
| `s3://bucket/folder` | s3fs; credentials, `AWS_ENDPOINT_URL` as botocore reads them; `FSSPEC_S3_ANON=true` | yes |
| `gs://bucket/folder` | gcsfs | yes |
| `hf://datasets/owner/name[@revision]/folder` | huggingface_hub; `HF_TOKEN`, `HF_ENDPOINT` | yes, in commits |
| `https://host/folder`, `http://...` | aiohttp | no |
"""

import base64
import hashlib
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, TypeGuard

from agiqa.errors import ConfigError, DamagedStore, RemoteError, StoreError, UnknownName
from agiqa.store.disk.files import naming, sha256_of_file, sync_file, telling_disk_errors
from agiqa.store.sharing.transfers import describe_failure, in_parallel, retrying, status_of

BLOCK = 4 << 20
"""Bytes of one request: a cut connection loses no more."""
_HUB_COMMIT_FILES = 64
_PLAIN = {"Accept-Encoding": "identity"}


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A local file and the name that it gets in the remote folder."""

    local: Path
    name: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """A file in a remote folder, with the size and hash that the listing has."""

    name: str
    size: int
    digest: tuple[str, str] | None = None
    """Kind (`sha256`, `md5`, or `git` for a git blob) and hex digest; None where the listing has none."""


class Remote:
    """A folder in an fsspec file system; this class itself serves object stores, whose writes are atomic."""

    read_only: ClassVar[bool] = False
    waits: ClassVar[bool] = True
    """Whether its failures may be temporary, so that agiqa tries again."""

    def __init__(self, url: str, connect: Callable[[], tuple[Any, str]], failures: tuple[type[Exception], ...]) -> None:
        """`connect` gives the file system and its name for the folder; its driver raises `failures`."""
        self.url = url.rstrip("/")
        self._connect = connect
        self._file_system, root = connect()
        self._process = os.getpid()
        self.root = root.rstrip("/")
        self._failures: tuple[type[Exception], ...] = (OSError, *failures)

    @property
    def file_system(self) -> Any:
        """The fsspec file system; a forked child opens its own, since the threads stay in the parent."""
        if self._process != os.getpid():
            self._file_system, _ = self._connect()
            self._process = os.getpid()
        return self._file_system

    def url_of(self, name: str) -> str:
        """The URL of the file `name`."""
        return f"{self.url}/{name}"

    def blocks(self, name: str, *, size: int, start: int = 0) -> Iterator[bytes]:
        """The bytes of the file `name` from `start` on, in blocks of at most BLOCK.

        At most one byte more than `size` is read. Raises FileNotFoundError where there is no such file, and RemoteError
        where it cannot be read.
        """
        with self.translating_errors(name), self._opened(name, size=size, start=start) as file:
            yield from _blocks_of(file, size - start + 1)

    def read(self, name: str, *, limit: int) -> bytes | None:
        """The whole of the small file `name`, or None where there is none.

        Raises DamagedStore where it has more than `limit` bytes, and RemoteError where it cannot be read.
        """

        def whole() -> bytes:
            with self.translating_errors(name), self._opened(name) as file:
                return b"".join(_blocks_of(file, limit + 1))

        try:
            content = retrying(whole)
        except FileNotFoundError:
            return None
        if len(content) > limit:
            message = f"{self.url_of(name)} has more than {limit:,} bytes, the most that agiqa reads of such a file."
            raise DamagedStore(message)
        return content

    def listing(self) -> dict[str, Found]:
        """Every file below the folder, by name; empty where there is no folder. Raises RemoteError."""

        def found() -> dict[str, Any]:
            with self.translating_errors(""):
                infos: dict[str, Any] = self.file_system.find(self.root, detail=True)
            return infos

        try:
            infos = retrying(found)
        except FileNotFoundError:
            return {}
        names = {path: path[len(self.root) + 1 :] for path in infos}
        return {name: self._found(name, infos[path]) for path, name in names.items()}

    def holds(self, found: Found, local: Path) -> bool:
        """Whether the file listed as `found` has the size of the file `local`, and its hash if the listing has one."""
        if found.size != local.stat().st_size:
            return False
        return found.digest is None or _digest(local, found.digest[0]) == found.digest[1]

    def put_all(self, uploads: Sequence[Upload], *, threads: int, sent: Callable[[Upload], None]) -> None:
        """Write files, replacing what is there; `sent` is called after each. Raises RemoteError."""
        halt = threading.Event()

        def put(upload: Upload) -> None:
            def once() -> None:
                with self.translating_errors(upload.name):
                    self._put(upload)

            try:
                retrying(once, halt=halt)
            except FileNotFoundError as error:
                message = f"{self.url_of(upload.name)} cannot be written: its bucket does not exist ({error})."
                raise RemoteError(message) from error
            sent(upload)

        in_parallel(put, uploads, threads=threads, halt=halt)

    def remove(self, name: str) -> None:
        """Remove the file `name`. Raises RemoteError."""
        with self.translating_errors(name):
            self.file_system.rm(self._path(name))

    @contextmanager
    def translating_errors(self, name: str) -> Generator[None]:
        """Turn what the driver raises into RemoteError, or FileNotFoundError for a file that is not there."""
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(self.url_of(name)) from error
        except self._failures as error:
            if status_of(error) in (404, 410):
                raise FileNotFoundError(self.url_of(name)) from error
            message = f"{self.url_of(name)}: {type(error).__name__}: {str(error) or 'no answer'}"
            failure = RemoteError(message)
            describe_failure(failure, error)
            failure.refused |= not self.waits
            for note in getattr(error, "__notes__", ()):
                failure.add_note(note)
            raise failure from error

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def _opened(self, name: str, *, size: int | None = None, start: int = 0) -> Generator[Any]:
        """The file `name`, of `size` bytes where that is known, open for reading from `start` on."""
        options: dict[str, Any] = {"block_size": BLOCK, "cache_type": "none"}
        if size is not None:
            options["size"] = size
        with self.file_system.open(self._path(name), "rb", **options) as file:
            file.seek(start)
            yield file

    def _put(self, upload: Upload) -> None:
        self.file_system.put_file(str(upload.local), self._path(upload.name))

    def _found(self, name: str, info: dict[str, Any]) -> Found:
        etag, md5 = str(info.get("ETag", "")).strip('"'), info.get("md5Hash")
        digest = None
        if len(etag) == 32:  # of an upload in one part; S3 with KMS keys has other ETags, so it is sent again
            digest = ("md5", etag)
        elif md5:
            digest = ("md5", base64.b64decode(md5).hex())
        return Found(name=name, size=int(info["size"]), digest=digest)


class LocalFolder(Remote):
    """A folder on this machine, perhaps a mounted share: each file appears whole, and files are compared by sha256."""

    waits = False

    def holds(self, found: Found, local: Path) -> bool:
        """Whether both files have the same sha256: here reading costs no more than copying."""
        return super().holds(found, local) and sha256_of_file(Path(self._path(found.name))) == sha256_of_file(local)

    def _put(self, upload: Upload) -> None:
        target = Path(self._path(upload.name))
        temporary = target.with_name(f".{target.name}.partial")  # the next push replaces what a kill left of it
        with telling_disk_errors(f"pushing to {self.url}", "what was sent is kept"), naming(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with upload.local.open("rb") as source, temporary.open("wb") as copy:
                while block := source.read(BLOCK):
                    copy.write(block)
            sync_file(temporary)
            temporary.replace(target)
            sync_file(target.parent)


class WebFolder(Remote):
    """A folder of a web server. From one without ranges, the bytes before the start are read and dropped."""

    read_only = True

    @contextmanager
    def _opened(self, name: str, *, size: int | None = None, start: int = 0) -> Generator[Any]:
        """As in Remote, as a stream, so that an endless answer is read only up to the size asked for."""
        headers = {**_PLAIN, "Range": f"bytes={start}-"} if start else _PLAIN
        with self.file_system.open(self._path(name), "rb", block_size=0, size=size or 1, headers=headers) as file:
            coding = file.r.headers.get("Content-Encoding", "identity").strip().lower()
            if coding != "identity":
                message = f"{self.url_of(name)}: the server sends it compressed ({coding}), though asked not to."
                failure = RemoteError(message)
                failure.refused = True
                raise failure
            if file.r.status != 206:
                for _ in _blocks_of(file, start):
                    pass
            yield file


class HubFolder(Remote):
    """A folder in a repository of the Hugging Face Hub, written in few commits of many files each."""

    def listing(self) -> dict[str, Found]:
        """As in Remote; the Hub's listing has a hash of every file. Raises RemoteError where there is no repository."""
        try:
            with self.translating_errors(""):
                self.root = self._resolved.unresolve().rstrip("/")
        except FileNotFoundError as error:
            message = f"{self.url}: there is no such repository or revision, or your token may not see it."
            raise RemoteError(message) from error
        return super().listing()

    def put_all(self, uploads: Sequence[Upload], *, threads: int, sent: Callable[[Upload], None]) -> None:
        """As in Remote, in commits of up to 64 files; the files of one commit are sent by `threads` threads."""
        from huggingface_hub import CommitOperationAdd, HfApi

        place = self._resolved
        api = HfApi(endpoint=self.file_system.endpoint, token=self.file_system.token)
        folder = f"{place.path_in_repo}/" if place.path_in_repo else ""
        for first in range(0, len(uploads), _HUB_COMMIT_FILES):
            batch = uploads[first : first + _HUB_COMMIT_FILES]

            def commit(batch: Sequence[Upload] = batch) -> None:
                with self.translating_errors(batch[0].name):
                    api.create_commit(
                        place.repo_id,
                        [CommitOperationAdd(folder + upload.name, upload.local) for upload in batch],
                        commit_message=f"agiqa store push: {len(batch)} files",
                        repo_type=place.repo_type,
                        revision=place.revision,
                        num_threads=threads,
                    )

            retrying(commit)
            for upload in batch:
                sent(upload)

    @cached_property
    def _resolved(self) -> Any:
        return self.file_system.resolve_path(self.root)

    def _found(self, name: str, info: dict[str, Any]) -> Found:
        lfs, blob = info.get("lfs"), info.get("blob_id")
        digest = ("sha256", str(lfs["sha256"])) if lfs else ("git", str(blob)) if blob else None
        return Found(name=name, size=int(info["size"]), digest=digest)


@dataclass(frozen=True, kw_only=True)
class _Scheme:
    folder: type[Remote]
    package: str
    """What must be installed."""
    failures: tuple[str, ...] = ()
    """What the driver raises besides OSError, as module:name."""


_WEB = _Scheme(folder=WebFolder, package="aiohttp", failures=("aiohttp:ClientError", "asyncio:TimeoutError"))
_SCHEMES = {
    "file": _Scheme(folder=LocalFolder, package="fsspec"),
    "s3": _Scheme(
        folder=Remote,
        package="s3fs",
        failures=("botocore.exceptions:BotoCoreError", "botocore.exceptions:ClientError", "aiohttp:ClientError"),
    ),
    "gs": _Scheme(
        folder=Remote,
        package="gcsfs",
        failures=("gcsfs.retry:HttpError", "google.auth.exceptions:GoogleAuthError", "aiohttp:ClientError"),
    ),
    "hf": _Scheme(folder=HubFolder, package="huggingface_hub", failures=("huggingface_hub.errors:HTTPError",)),
    "http": _WEB,
    "https": _WEB,
}


def is_url(place: str | os.PathLike[str]) -> TypeGuard[str]:
    """Whether `place` is a URL and no path."""
    return isinstance(place, str) and "://" in place


def remote_at(url: str) -> Remote:
    """The remote folder at `url`, without any request yet.

    Raises UnknownName for a scheme that is not read here, and ConfigError where its driver is not installed.
    """
    name = url.partition("://")[0].lower()
    if not is_url(url):
        message = f"{url} is a path, not a URL. Write file://{Path(url).absolute()} for a folder on this machine."
        raise ConfigError(message)
    if name not in _SCHEMES:
        raise UnknownName.of(kind="URL scheme", name=name, known=_SCHEMES)
    if "?" in url or "#" in url or url.startswith("hf://buckets/"):
        message = f"{url}: a store is a folder; a URL with ? or #, or a bucket of the Hub, cannot be one."
        raise ConfigError(message)
    scheme = _SCHEMES[name]
    try:
        import_module(scheme.package)
        failures = tuple(_class(failure) for failure in scheme.failures)
        return scheme.folder(url, lambda: _open_file_system(url, name), failures)
    except ImportError as error:
        message = f"{name}:// needs the package {scheme.package}: pip install 'agiqa[remote]' ({error})."
        raise ConfigError(message) from error


def _open_file_system(url: str, scheme: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        # no limit on the total time, which a large object on a slow line would exceed; a limit on silence
        timeout = ClientTimeout(total=None, sock_connect=30, sock_read=60)
        # nothing is unpacked: a small answer can be made to unpack to any size
        options["client_kwargs"] = {"timeout": timeout, "auto_decompress": False}
        options["headers"] = _PLAIN
    file_system, root = url_to_fs(url, **options)
    return file_system, str(root)


def _class(name: str) -> type[Exception]:
    module, _, attribute = name.partition(":")
    found = getattr(import_module(module), attribute)
    assert isinstance(found, type)
    assert issubclass(found, Exception)
    return found


def _blocks_of(file: Any, most: int) -> Iterator[bytes]:
    """The rest of an open file, but no more than `most` bytes, in blocks of at most BLOCK."""
    while most > 0 and (block := file.read(min(BLOCK, most))):
        most -= len(block)
        yield block


def _digest(path: Path, kind: str) -> str:
    if kind == "sha256":
        return sha256_of_file(path)
    digest = hashlib.md5(usedforsecurity=False)
    if kind == "git":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
