"""The decoded copy: rows of a store on disk in the bits that they have in memory, to be mapped by any process.

Copies lie in `~/.cache/agiqa/decoded`, or below the folder that AGIQA_CACHE names: one folder for each set of items of
a store with these bytes. A copy is written once, is whole or absent, and serves every later run on the same items in
any order. agiqa never deletes copies: delete a folder to free its space.

rows.bin      the rows of the items in the order of the store, one after the other, in the bits of the store
roles.bin     a byte per row
decoded.json  format, version, store, hash of its bytes, identity of the items, dtype and shape; sha256 of both files

A training hashes both files before it reads them, which costs one more pass over the bytes that every epoch reads.
"""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import AgiqaError, ConfigError, DataError
from agiqa.heads.data.features import (
    FeatureSet,
    FeatureSource,
    content_of,
    items_identity,
    location_of,
    read_checked,
    row_bytes,
    row_dtype,
    token_offsets,
)
from agiqa.progress import say, track
from agiqa.store.disk.files import sha256_of_file, sync_file
from agiqa.store.disk.locks import waiting_lock
from agiqa.store.format.layout import cache_root

FORMAT = "agiqa.decoded"
FORMAT_VERSION = 2
ROWS, ROLES, ABOUT, HASHES = "rows.bin", "roles.bin", "decoded.json", "sha256"
_SHARE_OF_DISK = 0.9
_ITEMS_COMPARED = 3


@dataclass(frozen=True, kw_only=True)
class _Copy:
    """Identity and place of the decoded copy of some items, whether it exists or not."""

    source: FeatureSource
    items: NDArray[np.int64]
    """Ascending, each once."""
    about: dict[str, Any]
    """decoded.json without the hashes."""

    @classmethod
    def of(cls, source: FeatureSource, items: NDArray[np.int64]) -> "_Copy":
        once = np.unique(items)
        about = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "store": source.id,
            "content": content_of(source),
            "items": items_identity(source, once),
            "logical_dtype": source.logical_dtype,
            "shape": [int(np.asarray(source.n_tokens)[once].sum()), source.width],
        }
        return cls(source=source, items=once, about=about)

    @property
    def folder(self) -> Path:
        return decoded_folder() / f"{self.about['content'][:16]}-{self.about['items'][:16]}-v{FORMAT_VERSION}"

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.source) * int(self.about["shape"][0])


def decoded_folder() -> Path:
    """Where decoded copies are kept: `decoded` below the cache root."""
    return cache_root() / "decoded"


def mapped_features(
    source: FeatureSource, items: NDArray[np.int64], *, checked: bool = False
) -> tuple[FeatureSet, Path]:
    """The features of `items` from their decoded copy, which is written first where it is absent, and its folder.

    `checked` skips the hashes, which another process has just compared. Raises ConfigError where the copy cannot be
    written, DataError where it is damaged or something else has its place, and as `FeatureSet.from_store`.
    """
    offsets = token_offsets(source, items)
    copy = _Copy.of(source, items)
    _write_once(copy)
    rows, copied_roles = _open(copy, checked=checked)
    lengths = np.asarray(source.n_tokens, dtype=np.int64)
    begins = np.concatenate([[0], np.cumsum(lengths[copy.items])])
    starts = begins[np.searchsorted(copy.items, items)]
    roles = torch.cat([copied_roles[a : a + n] for a, n in zip(starts.tolist(), lengths[items].tolist(), strict=True)])
    features = FeatureSet(
        rows=rows,
        starts=starts,
        roles=roles,
        offsets=torch.from_numpy(offsets),
        items=items,
        source=source,
    )
    _compare(copy, features)
    return features, copy.folder


def _write_once(copy: _Copy) -> None:
    """Write the copy unless it exists. If several processes need it, one writes and the others wait."""
    folder = copy.folder
    try:
        if folder.exists():
            return
        say(f"decoding {copy.row_bytes:,} bytes to {folder}, once for all runs on these items")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with waiting_lock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                _require_room(copy)
                _write(copy)
    except OSError as error:
        if isinstance(error, AgiqaError):  # an error of the store, not of the copy
            raise
        message = (
            f"The decoded copy {folder} cannot be written ({error}). Set AGIQA_CACHE to a folder that can take "
            f"{copy.row_bytes:,} bytes, or choose keep 'stream'."
        )
        raise ConfigError(message) from error


def _require_room(copy: _Copy) -> None:
    """Raise ConfigError unless the copy leaves a tenth of the disk's free space."""
    free = shutil.disk_usage(copy.folder.parent).free
    if copy.row_bytes > _SHARE_OF_DISK * free:
        message = (
            f"The decoded copy takes {copy.row_bytes:,} bytes, and {copy.folder.parent} has {free:,} free. Set "
            "AGIQA_CACHE to a folder with more room, or choose keep 'stream'."
        )
        raise ConfigError(message)


def _write(copy: _Copy) -> None:
    """Write the folder beside its place, then move it there. The rest of a killed run is removed first."""
    partial = copy.folder.with_name(f"{copy.folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    try:
        with (
            (partial / ROWS).open("wb") as rows,
            (partial / ROLES).open("wb") as roles,
            track("decode", len(copy.items), "items") as advance,
        ):
            digests = {ROWS: hashlib.sha256(), ROLES: hashlib.sha256()}
            for _, item in read_checked(copy.source, copy.items):
                for file, values in ((rows, item.rows.view(torch.uint8)), (roles, item.roles)):
                    content = values.numpy().ravel().data
                    file.write(content)
                    digests[Path(file.name).name].update(content)
                advance(1)
        about = {**copy.about, HASHES: {name: digest.hexdigest() for name, digest in digests.items()}}
        (partial / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        for name in (ROWS, ROLES, ABOUT):
            sync_file(partial / name)
        partial.rename(copy.folder)
        sync_file(copy.folder.parent)
    except BaseException:
        shutil.rmtree(partial)
        raise


def _open(copy: _Copy, *, checked: bool) -> tuple[Tensor, Tensor]:
    """The mapped rows, and the roles in RAM. Raises DataError where the files are not those of `copy`."""
    folder, (tokens, width) = copy.folder, copy.about["shape"]
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        sizes = [(folder / name).stat().st_size for name in (ROWS, ROLES)]
    except (OSError, ValueError) as error:
        message = f"{folder} is no decoded copy ({error}). Delete it, and it is written anew."
        raise DataError(message) from error
    if not isinstance(about, dict):
        about = {}
    different = ", ".join(key for key, value in copy.about.items() if about.get(key) != value)
    if different:
        message = f"{folder} is the decoded copy of other items ({different} differ). Delete it; it is written anew."
        raise DataError(message)
    if sizes != [copy.row_bytes, tokens]:
        message = f"{folder} is damaged: {sizes} bytes, expected {[copy.row_bytes, tokens]}. Delete it."
        raise DataError(message)
    if not checked and {name: sha256_of_file(folder / name) for name in (ROWS, ROLES)} != about.get(HASHES):
        message = f"{folder} is damaged: its bytes are not those that were written. Delete it."
        raise DataError(message)
    # copy on write, since torch warns of read-only memory; nothing is written
    mapped = np.memmap(folder / ROWS, dtype=np.uint8, mode="c")
    rows = torch.from_numpy(mapped).view(row_dtype(copy.source)).view(tokens, width)
    return rows, torch.from_numpy(np.fromfile(folder / ROLES, dtype=np.uint8))


def _compare(copy: _Copy, features: FeatureSet) -> None:
    """Raise DataError unless some items have the store's bits, which differ if the store was filled a second time."""
    some = np.unique(np.linspace(0, len(features) - 1, _ITEMS_COMPARED).astype(np.int64))
    for position, item in read_checked(copy.source, features.items[some]):
        kept = features.take(some[[position]])[0]
        same = torch.equal(kept.rows.view(torch.uint8), item.rows.view(torch.uint8))
        if not (same and torch.equal(kept.roles, item.roles)):
            where = location_of(copy.source)
            message = f"{copy.folder} holds other rows than the store {where}. Delete it; it is written anew."
            raise DataError(message)
