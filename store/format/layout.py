"""Where everything lies inside a store folder, and what the format is called.

The prose specification is `FORMAT.md` beside this file; names here are the only place where code spells them.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from agiqa.errors import ConfigError

FORMAT = "agiqa.features"
VERSION = 1
ENCODINGS = ("hidden", "sketch", "int8", "logits")

MODEL_GROUPS = ("lm_head", "basis", "scale", "probe")
"""Groups of the store whose arrays come from the model."""

MANIFEST, CARD, ITEM_TABLE = "MANIFEST.json", "README.md", "items.parquet"
ROOT_METADATA = "store.zarr/zarr.json"
"""Written last by the seal, so no record lists it."""

LM_HEAD_NAMED_IN = {
    "hidden": "lm_head/weight",
    "int8": "lm_head/weight",
    "sketch": "basis/q",
    "logits": "probe/logits",
}
"""By encoding, the array whose attribute `lm_head_sha256` says which language-model head the features belong to."""

PULL_RECORD = "PULLING.json"
"""In a folder that a pull is at work in: the manifest of what is being pulled."""

PULL_LOCK = "pull"
"""The lock that a pull at work holds."""

ROW_ARRAYS = ("features", "logits", "tokens/ids", "tokens/roles", "tokens/scale")
"""Arrays with a row, or an entry, per token; all have the same row addresses."""
PLANNED_ROW_ARRAYS = ("tokens/ids", "tokens/roles")
"""Those of them that the plan writes, before any unit is filled."""

TOKEN_ROLES = {"special": 0, "image": 1, "question": 2, "answer": 3}
ITEM_STATUS = {"whole": 0, "truncated": 1}


def cache_root() -> Path:
    """Where agiqa keeps what it can fetch or compute again: `~/.cache/agiqa`, or what AGIQA_CACHE names.

    The path is absolute, so that what is open stays where it is when the process goes to another folder.
    Raises ConfigError where that is in a home that nobody knows.
    """
    named = os.environ.get("AGIQA_CACHE") or "~/.cache/agiqa"
    try:
        return Path(named).expanduser().absolute()
    except RuntimeError as error:
        message = f"There is no cache folder {named} ({error}). Set AGIQA_CACHE to a folder that can be written."
        raise ConfigError(message) from error


def object_path(array: Path, position: int, *, dimensions: int) -> Path:
    """Object number `position` in the folder of an array that is cut along its first axis only."""
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
        """One row per item: name, prompt, labels, split, generator."""
        return self.root / ITEM_TABLE

    @property
    def commits(self) -> Path:
        """One JSON record per finished unit, and one each for the plan and the model's own arrays."""
        return self.root / "commits"

    @property
    def locks(self) -> Path:
        """Empty files that the runs at work hold locked; no part of a finished store."""
        return self.root / "locks"

    @property
    def pulled(self) -> Path:
        """Objects that a pull has fetched and that wait until all are here; no part of the store."""
        return self.root / ".pulled"

    @property
    def manifest(self) -> Path:
        """Every object with its bytes and sha256; written last, so its presence means a complete store."""
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
        """The record of what the plan wrote."""
        return self.commits / "plan.json"

    @property
    def model_commit(self) -> Path:
        """The record of the arrays that come from the model: `lm_head`, `basis` and `probe`."""
        return self.commits / "model.json"

    def features_object(self, unit: int) -> Path:
        """The one object (shard) that holds the features of a unit."""
        return self.object_of("features", unit, dimensions=2)

    def object_of(self, array: str, position: int, *, dimensions: int) -> Path:
        """`object_path` of the array of that name."""
        return object_path(self.zarr / array, position, dimensions=dimensions)
