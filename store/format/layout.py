"""Names of the format, and paths in a store folder. `../FORMAT.md` specifies them; no other module spells them out."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

from agiqa.errors import ConfigError

FORMAT = "agiqa.features"
VERSIONS = (1, 2)
"""The versions that this agiqa reads. A store has version 2 only if version 1 cannot hold it, see `layers.py`."""
ENCODINGS = ("hidden", "sketch", "int8", "logits")

MODEL_GROUPS = ("lm_head", "basis", "scale", "probe", "layers_basis", "layers_scale")
"""Groups whose arrays come from the model."""

MANIFEST, CARD, ITEM_TABLE = "MANIFEST.json", "README.md", "items.parquet"
ROOT_METADATA = "store.zarr/zarr.json"
"""Written last, by the seal, so no commit record lists it."""

PROBE_ROWS, PROBE_LOGITS = "probe/rows", "probe/logits"
"""Row addresses, and the model's own logits there."""

LM_HEAD_NAMED_IN = {
    "hidden": "lm_head/weight",
    "int8": "lm_head/weight",
    "sketch": "basis/q",
    "logits": "probe/logits",
}
"""By encoding, the array whose attribute `lm_head_sha256` names the language-model head of the features, if any."""

PULL_RECORD = "PULLING.json"
"""The manifest of the store that a pull is copying to this folder."""

SEAL_LOCK, PLAN_LOCK, PULL_LOCK, MODEL_LOCK, RECORDS_LOCK = "seal", "plan", "pull", "model", "records"
"""Names of lock files; the lock of a unit is its number, see `StoreLayout.unit_lock`."""
_LOCK = re.compile(r"[0-9]{8,}|model|plan|pull|records|seal")

_ROW_ARRAY = "features|logits|tokens/ids|tokens/roles|tokens/scale|(?:tokens/layers_scale|layers)/[0-9]{1,4}"
PLANNED_ROW_ARRAYS = ("tokens/ids", "tokens/roles")
"""The row arrays that the plan writes, before any unit is filled."""

_OBJECT_PATH = re.compile(r"store\.zarr(/[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254})+")
_LONGEST_PATH = 1000
_ROW_OBJECT = re.compile(rf"store\.zarr/({_ROW_ARRAY})/c/([0-9]{{1,12}})(?:[./].*)?")

TOKEN_ROLES = {"special": 0, "image": 1, "question": 2, "answer": 3}
ITEM_STATUS = {"whole": 0, "truncated": 1}


def cache_root() -> Path:
    """The folder for what agiqa can fetch or compute again: AGIQA_CACHE, or `~/.cache/agiqa`.

    The path is absolute, so it stays valid when the process changes its working folder. Raises ConfigError if the home
    folder is unknown.
    """
    named = os.environ.get("AGIQA_CACHE") or "~/.cache/agiqa"
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        message = f"The cache folder {named} is unknown ({error}). Set AGIQA_CACHE to a folder that can be written."
        raise ConfigError(message) from error


def is_object_path(text: str) -> bool:
    """Whether `text` is the path of an object by FORMAT.md, so that it leads nowhere else unless through a link."""
    return len(text) <= _LONGEST_PATH and _OBJECT_PATH.fullmatch(text) is not None


def is_row_array(name: str) -> bool:
    """Whether the array `name` has one row per token (or pooling), with the row addresses of `features`."""
    return re.fullmatch(_ROW_ARRAY, name) is not None


def row_object(path: str) -> tuple[str, int] | None:
    """The array with a row per token, and the number of the object in it, of the object at `path`; None for others.

    A temporary file of a write counts as its object.
    """
    found = _ROW_OBJECT.fullmatch(path)
    return (found[1], int(found[2])) if found else None


def array_of(path: str) -> str | None:
    """The array with a row per token that the object at `path` belongs to; None for other objects."""
    found = row_object(path)
    return found[0] if found else None


def object_path(array: Path, position: int, *, dimensions: int) -> Path:
    """The file of object number `position` in the folder of an array, which is cut along its first axis only."""
    return array.joinpath("c", str(position), *["0"] * (dimensions - 1))


@dataclass(frozen=True)
class StoreLayout:
    """Paths of the parts of the store folder `root`."""

    root: Path

    @property
    def zarr(self) -> Path:
        """The Zarr v3 group with all arrays."""
        return self.root / "store.zarr"

    @property
    def items(self) -> Path:
        """The item table: one row per item."""
        return self.root / ITEM_TABLE

    @property
    def commits(self) -> Path:
        """The folder of commit records: one per finished unit, one of the plan, one of the model's arrays."""
        return self.root / "commits"

    @property
    def locks(self) -> Path:
        """The folder of lock files; no part of a finished store."""
        return self.root / "locks"

    def unit_lock(self, unit: int) -> Path:
        """The lock file of a unit."""
        return self.locks / f"{unit:08d}"

    def lock_files(self) -> list[Path]:
        """The lock files that exist, sorted. `locks` may be a link to a folder with other files, which are left out."""
        return sorted(path for path in self.locks.glob("*") if _LOCK.fullmatch(path.name) and _is_empty_file(path))

    @property
    def pulled(self) -> Path:
        """Objects that a pull has fetched and not yet moved to their places; no part of the store."""
        return self.root / ".pulled"

    @property
    def manifest(self) -> Path:
        """The list of all objects; written last, so it exists only in a sealed store."""
        return self.root / MANIFEST

    @property
    def card(self) -> Path:
        """The generated data card."""
        return self.root / CARD

    def commit(self, unit: int) -> Path:
        """The commit record of a unit of features."""
        return self.commits / f"{unit:08d}.json"

    @property
    def plan_commit(self) -> Path:
        """The commit record of the plan."""
        return self.commits / "plan.json"

    @property
    def model_commit(self) -> Path:
        """The commit record of the model's arrays."""
        return self.commits / "model.json"

    def features_object(self, unit: int) -> Path:
        """The object (shard) with the features of a unit."""
        return self.object_of("features", unit, dimensions=2)

    def object_of(self, array: str, position: int, *, dimensions: int) -> Path:
        """The file of object number `position` of the named array."""
        return object_path(self.zarr / array, position, dimensions=dimensions)


def _is_empty_file(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_size == 0
