"""Describing and extracting in one pass over the images: `agiqa describe --store`.

While the model describes, the final hidden states of prompts and generated tokens wait in a spool. Then an ordinary
extraction of the conversations takes its rows from there, and runs the model for those that are missing.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError, SettingsConflict
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.templates import DESCRIBING, aspects_of
from agiqa.extract.describing.describing import DescriptionResult, RatingOf, run_descriptions
from agiqa.extract.describing.items import described_items
from agiqa.extract.describing.rounds import DescriptionSettings
from agiqa.extract.describing.spool import Spool
from agiqa.extract.filling.footprints import ModelShape
from agiqa.extract.filling.job import ExtractionResult, check_settings, run_extraction
from agiqa.extract.filling.kept import takes_kept_rows
from agiqa.extract.filling.settings import ExtractionSettings
from agiqa.extract.models import Backbone
from agiqa.extract.models.devices import DTYPES
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers
from agiqa.progress import say
from agiqa.store import is_planned, open_store
from agiqa.store.format.layers import LAST
from agiqa.store.format.layout import StoreLayout
from agiqa.store.format.metadata import differences

_SECONDS_TO_DESCRIBE, _SECONDS_TO_EXTRACT = 1 / 20.8, 1 / 55.7
"""Per image: bench/LOG.md, MiniCPM-Llama3-V-2.5 on one H100, descriptions of 128 tokens."""
_TOKENS = 550
"""Of such a conversation, for the size of the spool."""
_APART = "Describe without --store, then run `agiqa extract DATA STORE --conversations OUT.jsonl{}`"
"""With room for more options."""


@dataclass(frozen=True, kw_only=True, repr=False)
class StoredDescriptions(DescriptionResult):
    """The file, and the store of its conversations."""

    extraction: ExtractionResult

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**super().as_dict(), "extraction": self.extraction.as_dict()}


def run_stored_descriptions(
    data_set: DataSet,
    backbone: Backbone,
    out: Path,
    path: Path,
    settings: DescriptionSettings,
    extraction: ExtractionSettings,
    *,
    rating_of: RatingOf,
    opener: Opener | None = None,
) -> StoredDescriptions:
    """Describe the items of `data_set` into the file `out`, as `run_descriptions`, and fill the store at `path`.

    The store holds what `run_extraction` of `extraction` would hold, but for rounding. Run it again to resume: both
    lines and hidden states of earlier runs are used. A store that `run_extraction` began is finished by it, and nothing
    is kept. Raises as both, and as `check_one_pass`; and SettingsConflict, before it describes, for a store of another
    model, conversation or encoding.
    """
    check_one_pass(extraction, path, backbone, opener)
    _refuse_other_store(path, backbone, extraction)
    if extraction.compile == "auto":
        extraction = replace(extraction, compile="never")  # few rows, if any, are left to compute
    left_over = Spool(path, backbone, extraction.variant)
    spool = left_over if takes_kept_rows(path, offered=True) else None
    unread = _unread(len(data_set.items), out, left_over)
    if spool is not None and unread and not StoreLayout(path).manifest.exists():
        say(_estimate(unread, backbone, spool))
    count = chosen_workers(extraction.workers, backbone, len(data_set.items), opener=opener)
    with Preparation(backbone, workers=count, opener=opener) as preparation:
        ready: Any = {"preparation": preparation, "spool": spool}
        found = run_descriptions(data_set, backbone, out, settings, rating_of=rating_of, **ready)
        about: Any = {"variant": extraction.variant, "aspect": extraction.aspect, "on_bad_item": settings.on_bad_item}
        items = described_items(data_set, out, **about)
        filled = run_extraction(items, backbone, path, extraction, opener=opener, **ready)
    if filled.store.is_sealed:
        left_over.remove()
    return StoredDescriptions(**{one.name: getattr(found, one.name) for one in fields(found)}, extraction=filled)


def check_one_pass(settings: ExtractionSettings, path: Path, backbone: Backbone, opener: Opener | None) -> None:
    """Raise ConfigError for a store that a describing pass cannot fill, UnknownName, and as `check_settings`."""
    if settings.variant not in DESCRIBING:
        aspects_of(settings.variant, settings.aspect)  # which names the nearest variant
        message = (
            f"--store keeps what the model reads and says while it describes one aspect, and --variant "
            f"{settings.variant} is another conversation; {', '.join(DESCRIBING)} are not. "
            f"{_APART.format(f' --variant {settings.variant}')}."
        )
        raise ConfigError(message)
    wanted = check_settings(settings, path, backbone, opener)
    if wanted.layers != (LAST,):
        layers = ",".join(wanted.layers)
        message = (
            f"--store keeps the hidden states of the last layer while the model describes, and --layers names "
            f"{layers}. {_APART.format(f' --layers {layers}')}."
        )
        raise ConfigError(message)
    if settings.elsewhere or settings.part != (1, 1) or settings.plan_only:
        message = (
            f"--store is filled by the process that describes, on one device. {_APART.format('')}, which takes several."
        )
        raise ConfigError(message)


def _refuse_other_store(path: Path, backbone: Backbone, settings: ExtractionSettings) -> None:
    """Raise SettingsConflict if there is a store at `path` that these settings cannot fill, whatever the model says."""
    if not is_planned(path):
        return
    recorded = open_store(path, allow_partial=True).provenance
    asked: dict[str, Any] = {
        "model": backbone.provenance(),
        "conversation": {"variant": settings.variant, "aspect": settings.aspect},
        "encoding": settings.encoding,
    }
    if settings.rank is not None:
        rank = recorded.get("sketch", {}).get("rank")
        recorded, asked = {**recorded, "rank": rank}, {**asked, "rank": settings.rank}
    different = list(differences({name: recorded.get(name) for name in asked}, asked))
    if different:
        lines = "".join(f"  {line}\n" for line in different)
        message = (
            f"{path} exists and was made with other settings:\n{lines}Nothing was described. Give the settings that it "
            "was made with, or another path."
        )
        raise SettingsConflict(message)


def _unread(items: int, out: Path, spool: Spool) -> int:
    """About how many of `items` the model need not read again: those not described yet, and those that are kept."""
    described = out.read_bytes().count(b"\n") if out.is_file() else 0
    return min(items, max(0, items - described) + len(spool))


def _estimate(items: int, backbone: Backbone, spool: Spool) -> str:
    """A line about what is saved, and the disk that it takes meanwhile."""
    shape = ModelShape.of(backbone, "")
    size = items * _TOKENS * shape.width * DTYPES[shape.dtype].itemsize / 1e6
    waiting = f"their rows wait in {spool.folder}, about {size:,.0f} MB, until the store is full"
    if not shape.is_measured:
        return (
            f"one pass: {items} conversations are not read again for the store (what that saves was not measured for "
            f"this model); {waiting}"
        )
    share = _SECONDS_TO_EXTRACT / (_SECONDS_TO_DESCRIBE + _SECONDS_TO_EXTRACT)
    return (
        f"one pass: by measured rates, reading {items} conversations again for the store would take "
        f"{items * _SECONDS_TO_EXTRACT / 60:.2g} minutes of one H100, {share:.0%} of describing and extracting; "
        f"{waiting}"
    )
