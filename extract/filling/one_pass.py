"""Describing and extracting in one pass over the images: `agiqa describe --store`.

While the model describes, the final hidden states of prompts and generated tokens wait in a spool. Then an ordinary
extraction of the conversations takes its rows from there, and runs the model for those that are missing.
"""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.templates import DESCRIBING
from agiqa.extract.describing.describing import DescriptionResult, RatingOf, run_descriptions
from agiqa.extract.describing.items import described_items
from agiqa.extract.describing.rounds import DescriptionSettings
from agiqa.extract.describing.spool import Spool
from agiqa.extract.filling.footprints import ModelShape
from agiqa.extract.filling.job import ExtractionResult, check_settings, run_extraction
from agiqa.extract.filling.settings import ExtractionSettings
from agiqa.extract.models import Backbone
from agiqa.extract.models.devices import DTYPES
from agiqa.extract.models.preparing import Opener, Preparation, chosen_workers
from agiqa.progress import say
from agiqa.store.format.layers import LAST
from agiqa.store.format.layout import StoreLayout

_SECONDS_TO_DESCRIBE, _SECONDS_TO_EXTRACT = 1 / 20.8, 1 / 55.7
"""Per image: bench/LOG.md, MiniCPM-Llama3-V-2.5 on one H100, descriptions of 128 tokens."""
_TOKENS = 550
"""Of such a conversation, for the size of the spool."""
_APART = "Describe without --store, then run `agiqa extract DATA STORE --conversations OUT.jsonl`"


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
    lines and hidden states of earlier runs are used. Raises as both, and as `check_one_pass`.
    """
    check_one_pass(extraction, path, backbone, opener)
    if extraction.compile == "auto":
        extraction = replace(extraction, compile="never")  # few rows, if any, are left to compute
    spool = Spool(path, backbone, extraction.variant)
    if not StoreLayout(path).manifest.exists():
        say(_estimate(len(data_set.items), backbone, spool))
    count = chosen_workers(extraction.workers, backbone, len(data_set.items), opener=opener)
    with Preparation(backbone, workers=count, opener=opener) as preparation:
        ready: Any = {"preparation": preparation, "spool": spool}
        found = run_descriptions(data_set, backbone, out, settings, rating_of=rating_of, **ready)
        about: Any = {"variant": extraction.variant, "aspect": extraction.aspect, "on_bad_item": settings.on_bad_item}
        items = described_items(data_set, out, **about)
        filled = run_extraction(items, backbone, path, extraction, opener=opener, **ready)
    if filled.store.is_sealed:
        spool.remove()
    return StoredDescriptions(**{one.name: getattr(found, one.name) for one in fields(found)}, extraction=filled)


def check_one_pass(settings: ExtractionSettings, path: Path, backbone: Backbone, opener: Opener | None) -> None:
    """Raise ConfigError for a store that a describing pass cannot fill, and as `check_settings`."""
    if settings.variant not in DESCRIBING:
        message = (
            f"--store keeps what the model reads and says while it describes one aspect, and --variant "
            f"{settings.variant} is another conversation; {', '.join(DESCRIBING)} are not. {_APART} --variant "
            f"{settings.variant}."
        )
        raise ConfigError(message)
    wanted = check_settings(settings, path, backbone, opener)
    if wanted.layers != (LAST,):
        message = (
            f"--store keeps the hidden states of the last layer while the model describes, and --layers names "
            f"{','.join(wanted.layers)}. {_APART} --layers {','.join(wanted.layers)}."
        )
        raise ConfigError(message)
    if settings.elsewhere or settings.part != (1, 1) or settings.plan_only:
        message = f"--store is filled by the process that describes, on one device. {_APART}, which takes several."
        raise ConfigError(message)


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
