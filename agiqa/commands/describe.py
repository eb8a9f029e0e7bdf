"""`agiqa describe`: stage 2, the model's description and rating word of every image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.models import (
    ASPECT,
    MODEL_OPTIONS,
    generation_options,
    model_options,
    prepare_workers_option,
)
from agiqa.commands.options import OneOf, shared_options
from agiqa.commands.output import print_result, table

SECTIONS = {
    "Model": MODEL_OPTIONS,
    "Questions and answers": ("aspect", "settings", "seed", "max_new_tokens"),
    "Data": ("labels", "on_bad_item"),
    "Speed": ("batch_size", "workers"),
}


@click.command("describe", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@model_options
@click.option(
    "--labels", type=click.Path(path_type=Path, exists=True), help="Table (csv) of the items of a conversation file."
)
@click.option("--aspect", type=ASPECT, default="quality", show_default=True, help="Wording of the questions.")
@generation_options
@click.option(
    "--on-bad-item",
    type=OneOf("choice", ["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Unusable items: stop and list them, or leave them out and name them.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images per batch.")
@prepare_workers_option
@shared_options
def command(
    data: Path,
    out: Path,
    *,
    as_json: bool,
    model: str,
    adapter: str | None,
    max_slices: int | None,
    dtype: str,
    device: str,
    labels: Path | None,
    aspect: str,
    settings: str,
    seed: int,
    max_new_tokens: int,
    on_bad_item: Literal["fail", "skip"],
    batch_size: int,
    workers: int | None,
) -> None:
    """Let the model describe every image of DATA and rate it in one word. Run it again to resume.

    DATA is a folder with data.csv (and images/), a csv, or an M3-AGIQA conversation file with --labels. MOS are
    not needed. `agiqa extract DATA STORE --conversations OUT.jsonl` and `agiqa words OUT.jsonl --labels data.csv` read
    OUT.
    """
    from agiqa.errors import ConfigError
    from agiqa.extract import DescriptionSettings, load_data_set, run_descriptions
    from agiqa.extract.describing.asking import preset
    from agiqa.extract.models.opening import opened, opener_of
    from agiqa.heads.evaluation.rating_words import parse_rating_word
    from agiqa.progress import say

    if out.suffix.lower() != ".jsonl":
        message = f"{out}: descriptions are JSON lines. Give a name that ends in .jsonl."
        raise ConfigError(message)
    describe, rate = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
    chosen = DescriptionSettings(
        aspect=aspect, describe=describe, rate=rate, batch_size=batch_size, on_bad_item=on_bad_item
    )
    opener = opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices)
    backbone = opened(opener, device)  # a model that cannot be opened is reported before the images are checked
    data_set = load_data_set(
        data,
        labels=labels,
        variant="no_id",
        aspect=aspect,
        images=backbone.reads_images,
        mos_range=None,  # MOS are not needed
        on_bad_item=on_bad_item,
    )
    for note in data_set.notes:
        say(note)
    result = run_descriptions(
        data_set, backbone, out, chosen, rating_of=parse_rating_word, workers=workers, opener=opener
    ).as_dict()
    for line in result["skipped"]:
        say(f"skipped {line}")
    print_result(result, _text(result), as_json=as_json)


def _text(result: Mapping[str, Any]) -> str:
    """The result for people: words as counts in one line."""
    words = ", ".join(f"{word} {count}" for word, count in result["ratings"].items())
    shown = {name: result[name] for name in ("out", "items", "described", "cut")}
    return table(shown | {"ratings": words or "none", "unknown": result["unknown"], "skipped": len(result["skipped"])})
