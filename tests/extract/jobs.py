"""Phase 1 as a test runs it: a folder, a checkpoint and a store path, on the CPU."""

from functools import partial
from pathlib import Path

from agiqa.extract import (
    Backbone,
    DataSet,
    ExtractionResult,
    ExtractionSettings,
    LengthRule,
    load_data_set,
    open_backbone,
    run_extraction,
)


def inputs(folder: Path, checkpoint: Path, *, variant: str = "id") -> tuple[DataSet, Backbone]:
    """The data set in `folder` (with its talks.json, if there is one) and the backbone at `checkpoint`."""
    backbone = open_backbone(str(checkpoint), device="cpu")
    talks = folder / "talks.json"
    conversations = [str(talks)] if talks.exists() else []
    return load_data_set(folder, conversations=conversations, variant=variant, images=backbone.reads_images), backbone


def extract(
    folder: Path, checkpoint: Path, path: Path, *, variant: str = "id", length: LengthRule | None = None, **settings
) -> ExtractionResult:
    """Run the job as `agiqa extract` does."""
    data_set, backbone = inputs(folder, checkpoint, variant=variant)
    chosen = ExtractionSettings(variant=variant, length=length or LengthRule(), device="cpu", **settings)
    opener = partial(open_backbone, str(checkpoint))
    return run_extraction(data_set, backbone, path, chosen, opener=opener)
