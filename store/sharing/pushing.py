"""Push: copy a finished store to a URL. Its manifest goes last, so a folder with a manifest holds a whole store."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from agiqa.errors import ConfigError, DamagedStore, IncompleteStore, SettingsConflict
from agiqa.store.disk.files import sha256_of_file
from agiqa.store.format.layout import CARD, ITEM_TABLE, MANIFEST, ROOT_METADATA
from agiqa.store.format.manifest import CARD_BYTES, MANIFEST_BYTES, Entry, Manifest, parse_manifest
from agiqa.store.reading.store import Store
from agiqa.store.sharing.remotes import Found, Remote, Upload, remote_at
from agiqa.store.sharing.transfers import JOBS, Tally, Transfer, in_parallel


def push(
    store: Store,
    url: str,
    *,
    jobs: int = JOBS,
    advance: Callable[[int], None] = lambda _bytes: None,
) -> Transfer:
    """Copy the finished `store` to the folder `url`, in `jobs` threads; objects that are there are not sent again.

    An object is there when the listing of the remote has its size, and its hash if it lists hashes. `advance` is called
    with the bytes of every object that is done; they add up to `push_bytes(store)`. Nothing is sent from a store whose
    objects are not what its manifest records.

    Raises IncompleteStore for an unfinished or partial store, DamagedStore naming the object that is damaged here,
    ConfigError for a URL that cannot be written to, SettingsConflict where it holds another store, and RemoteError.
    """
    manifest = _manifest_of(store)
    remote = remote_at(url)
    if remote.read_only:
        message = f"{url} can only be read; push to an s3://, gs://, hf:// or file:// URL."
        raise ConfigError(message)
    there = remote.listing()
    held = _require_same_store(remote, there, store)
    tally = Tally(advance)
    uploads = _uploads(store, manifest)
    if CARD in there and store.id.encode() not in (remote.read(CARD, limit=CARD_BYTES) or b""):
        uploads = [upload for upload in uploads if upload.name != CARD]  # the repository's own card stays
    missing = _missing(remote, there, uploads, tally, jobs)
    _check_local(store, manifest.entries, {upload.name for upload in missing}, jobs)
    if held is not None and held != manifest.text:
        remote.remove(MANIFEST)
    first = [upload for upload in missing if upload.name == ROOT_METADATA]  # marks the folder as that of this store
    rest = [upload for upload in missing if upload.name != ROOT_METADATA]
    last = [] if held == manifest.text else [Upload(local=store.layout.manifest, name=MANIFEST)]
    for stage in (first, rest, last):
        _send(remote, stage, tally, jobs)
    return tally.result()


def push_bytes(store: Store) -> int:
    """Bytes of all objects of the finished `store`."""
    return sum(entry.bytes for entry in _manifest_of(store).entries)


def _manifest_of(store: Store) -> Manifest:
    layout = store.layout
    if not layout.manifest.exists():
        message = f"{store.path} is not finished, so it cannot be pushed. {store.remedy}"
        raise IncompleteStore(message)
    return parse_manifest(layout.manifest.read_text(encoding="utf-8"), str(layout.manifest))


def _require_same_store(remote: Remote, there: dict[str, Found], store: Store) -> str | None:
    """The manifest in the remote folder. Raises SettingsConflict if the folder holds another store, whole or begun."""
    held = remote.read(MANIFEST, limit=MANIFEST_BYTES) if MANIFEST in there else None
    root = remote.read(ROOT_METADATA, limit=MANIFEST_BYTES) if ROOT_METADATA in there else None
    for name, text in ((MANIFEST, held), (ROOT_METADATA, root)):
        if text is not None and (found := _id_in(text, remote.url_of(name))) != store.id:
            message = (
                f"{remote.url} holds the store {str(found)[:12]}, {store.path} is {store.id[:12]}; nothing was sent. "
                "Push to another folder."
            )
            raise SettingsConflict(message)
    return None if held is None else held.decode("utf-8", errors="replace")


def _id_in(text: bytes, where: str) -> str | None:
    try:
        found: Any = json.loads(text)
        return str(found["attributes"]["id"] if "attributes" in found else found["id"])
    except (ValueError, KeyError, TypeError) as error:
        message = f"{where} is damaged, or no part of a store ({error}). Remove it, or push to another folder."
        raise DamagedStore(message) from error


def _uploads(store: Store, manifest: Manifest) -> list[Upload]:
    names = [entry.path for entry in manifest.entries]
    extras = [*sorted(store.layout.commits.glob("*.json")), store.layout.card]
    names += [path.relative_to(store.path).as_posix() for path in extras if path.is_file()]
    return [Upload(local=store.path / name, name=name) for name in names]


def _missing(
    remote: Remote, there: dict[str, Found], uploads: Iterable[Upload], tally: Tally, jobs: int
) -> list[Upload]:
    """The files that the remote lacks or holds with other bytes."""
    absent: list[Upload] = []

    def look(upload: Upload) -> None:
        found = there.get(upload.name)
        if found is not None and upload.local.is_file() and remote.holds(found, upload.local):
            tally.count(skipped=1, progress=_counted(upload))
        else:
            absent.append(upload)

    in_parallel(look, uploads, threads=jobs)
    return sorted(absent, key=lambda upload: upload.name)


def _check_local(store: Store, entries: Iterable[Entry], names: set[str], jobs: int) -> None:
    def check(entry: Entry) -> None:
        path = store.path / entry.path
        if not path.is_file() or sha256_of_file(path) != entry.sha256:
            message = (
                f"{path} is missing or not what the manifest records; nothing was sent. "
                f"`agiqa store verify --level full {store.path}` names all that is damaged."
            )
            raise DamagedStore(message)

    wanted = [entry for entry in entries if entry.path in names]
    in_parallel(check, wanted, threads=jobs)


def _send(remote: Remote, uploads: list[Upload], tally: Tally, jobs: int) -> None:
    def sent(upload: Upload) -> None:
        tally.count(objects=1, size=upload.local.stat().st_size, progress=_counted(upload))

    remote.put_all(uploads, threads=jobs, sent=sent)


def _counted(upload: Upload) -> int:
    """The bytes by which the upload advances the progress, which counts only objects of the manifest."""
    counted = upload.name.startswith("store.zarr/") or upload.name == ITEM_TABLE
    return upload.local.stat().st_size if counted else 0
