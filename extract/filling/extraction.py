"""Phase 1 in one call: read a data set, run the model over it once, and write the store."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.templates import reads_description
from agiqa.extract.filling.crew import Crew
from agiqa.extract.filling.job import ExtractionResult, run_extraction
from agiqa.extract.filling.plan import LengthRule
from agiqa.extract.filling.settings import ExtractionSettings
from agiqa.extract.models import Backbone
from agiqa.extract.models.opening import opened, opener_of
from agiqa.extract.models.preparing import Opener
from agiqa.progress import say


def extract(
    data: str | Path,
    store: str | Path,
    *,
    model: str | Path,
    adapter: str | None = None,
    max_slices: int | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
    tap: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    conversations: Sequence[str] = (),
    labels: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    prompt: str | None = None,
    variant: str = "id",
    aspect: str = "quality",
    mos_range: tuple[float, float] | Literal["recorded"] = "recorded",
    max_tokens: int | None = None,
    truncate: bool = False,
    on_bad_item: Literal["fail", "skip"] = "fail",
    crew: Crew | None = None,
    **settings: Any,
) -> ExtractionResult:
    """Run the model once over `data` and write the features to `store`; run it again to resume.

    `data` is a folder, a table or a conversation file, see `agiqa.extract.load_data_set`, which also explains
    `conversations`, `labels`, `columns`, `prompt`, `variant`, `aspect`, `mos_range` and `on_bad_item`. `model`,
    `adapter`, `dtype`, `device`, `max_slices`, `weights`, `image_size` and `tap` are those of
    `agiqa.extract.open_backbone`; an image encoder reads no conversation, so `variant` is `no_id` then. Conversations
    over `max_tokens` (the model's own limit if None) are refused, or cut with `truncate`. `settings` are fields of
    `agiqa.extract.ExtractionSettings`, such as `encoding="sketch"`, `rank=64`, `layers="8,16,last"`,
    `pool_tokens="mean@image,last"` and `batch_size`. `crew` are processes that were started before.

    Notes and warnings go to the error stream. The result has the open `store`. Raises DataError for items that cannot
    be used, ModelError for the model, SettingsConflict for a store of other settings, and ConfigError or UnknownName
    for options.
    """
    # a model that cannot be opened is reported before the images are checked
    opener, backbone = opened_for(
        str(model),
        adapter=adapter,
        dtype=dtype,
        device=device,
        max_slices=max_slices,
        variant=variant,
        weights=weights,
        image_size=image_size,
        tap=tap,
    )
    variant = variant if backbone.reads_conversations else "no_id"

    def read() -> DataSet:
        data_set = load_data_set(
            data,
            conversations=conversations,
            labels=labels,
            columns=columns,
            prompt=prompt,
            variant=variant,
            aspect=aspect,
            images=backbone.reads_images,
            mos_range=mos_range,
            on_bad_item=on_bad_item,
        )
        for note in (*data_set.notes, *(f"warning: {warning}" for warning in data_set.warnings)):
            say(note)
        return data_set

    length = LengthRule(max_tokens=max_tokens, truncate=truncate, on_bad_item=on_bad_item)
    wanted = ExtractionSettings(variant=variant, aspect=aspect, length=length, device=device, **settings)
    return run_extraction(read, backbone, Path(store), wanted, opener=opener, crew=crew)


def opened_for(model: str, *, device: str, variant: str, **options: Any) -> tuple[Opener, Backbone]:
    """A function that opens the model, and the model on `device`. Says what the model cannot see.

    `options` are the others of `open_backbone`.
    """
    opener = opener_of(model, **options)
    backbone = opened(opener, device)
    if not backbone.reads_images:
        alike = ", the same for all images of one prompt" if not reads_description(variant) else ""
        say(f"note: {model} reads no images; these features are of the text alone{alike}")
    if not backbone.reads_conversations:
        what = model if str(backbone.tap).startswith("timm") else f"{model} with --tap {backbone.tap}"
        say(f"note: {what} reads images only; these features are the same for every prompt and conversation")
    return opener, backbone
