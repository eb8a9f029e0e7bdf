"""Fetch single objects from a remote: each is checked by its sha256, and whole or absent under its name."""

import hashlib
from pathlib import Path
from typing import Any

from agiqa.errors import DamagedStore, RemoteError, SchemaError
from agiqa.store.disk.files import naming, sync_file
from agiqa.store.format.layout import MANIFEST
from agiqa.store.format.manifest import MANIFEST_BYTES, Entry, Manifest, parse_manifest
from agiqa.store.sharing.remotes import BLOCK, Remote
from agiqa.store.sharing.transfers import Tally, wait_after


def fetch_manifest(remote: Remote) -> Manifest:
    """The manifest of the finished store at `remote`.

    Raises SchemaError where there is none, and DamagedStore where it is longer than MANIFEST_BYTES or is none.
    """
    text = remote.read(MANIFEST, limit=MANIFEST_BYTES)
    if text is None:
        message = f"{remote.url} is not a finished feature store: it has no {MANIFEST}. Push the store (again)."
        raise SchemaError(message)
    return parse_manifest(text.decode("utf-8", errors="replace"), remote.url_of(MANIFEST))


def partial_of(place: Path) -> Path:
    """Where the beginning of the object that goes to the file `place` lies until the rest has come."""
    return place.with_name(f".{place.name}.partial")


def fetch_object(remote: Remote, entry: Entry, place: Path, tally: Tally) -> None:
    """Fetch one object to the file `place`, checked by its sha256, whole or not at all.

    The beginning that an earlier run fetched is kept. At most one byte more than the manifest lists is read. Raises
    DamagedStore when its bytes are wrong twice, and RemoteError when the remote cannot be reached.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_of(place)
    size = 0
    for _ in range(2):
        if _download(remote, entry, temporary, tally) == entry.sha256:
            sync_file(temporary)
            temporary.replace(place)
            sync_file(place.parent)
            tally.count(objects=1)
            return
        size = temporary.stat().st_size
        temporary.unlink()
        tally.count(progress=-size)
    came = f"more than {entry.bytes} bytes" if size > entry.bytes else f"{size} bytes"
    message = (
        f"{remote.url_of(entry.path)} is damaged: {came} came, twice, that do not have the sha256 recorded for "
        f"{entry.path} ({entry.bytes} bytes). Push the store there again."
    )
    raise DamagedStore(message)


def _download(remote: Remote, entry: Entry, temporary: Path, tally: Tally) -> str:
    """Complete the file `temporary`; returns the hex sha256 of what it holds then."""
    digest = hashlib.sha256()
    done = _resume(temporary, entry, digest, tally)
    failures = 0
    with naming(temporary), temporary.open("ab") as file:
        while done < entry.bytes:
            try:
                for block in remote.blocks(entry.path, size=entry.bytes, start=done):
                    file.write(block)
                    digest.update(block)
                    done += len(block)
                    failures = 0
                    tally.count(size=len(block), progress=len(block))
                break
            except FileNotFoundError as error:
                message = f"{remote.url_of(entry.path)} is missing, though the manifest lists it. Push the store again."
                raise DamagedStore(message) from error
            except RemoteError as error:
                failures += 1  # in a row: no byte came between them
                wait_after(failures, error, halt=tally.halt)
    return digest.hexdigest()


def _resume(temporary: Path, entry: Entry, digest: Any, tally: Tally) -> int:
    """Add the beginning of the object that is in `temporary` to `digest`; returns its length in bytes."""
    if not temporary.exists():
        return 0
    if temporary.stat().st_size > entry.bytes:
        temporary.unlink()
        return 0
    with temporary.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    size = temporary.stat().st_size
    tally.count(progress=size)
    return size
