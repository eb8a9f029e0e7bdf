"""`agiqa describe`: stage 2, the model's description and rating word of every image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from agiqa.commands.common import print_result, shared_options, table
from agiqa.commands.models import ASPECT, ASPECTS, generation_options, model_options, opened, opener_of, workers_option


@click.command("describe")
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@model_options
@click.option("--labels", type=click.Path(path_type=Path, exists=True), help="Table of a conversation file's items.")
@click.option("--aspect", type=ASPECT, default="quality", show_default=True, help=ASPECTS)
@generation_options
@click.option(
    "--on-bad-item",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Stop with the list of items without an answer, or leave them out and say so.",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Answers at a time.")
@workers_option
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
    """Let the model describe every image of DATA and rate it in one word, into OUT.jsonl. Run it again to resume.

    DATA is a folder with data.csv (and images/), a csv, or an M3-AGIQA conversation file with --labels; it needs no
    MOS. OUT is what `agiqa extract DATA STORE --conversations OUT.jsonl` and `agiqa words OUT.jsonl --labels data.csv`
    read.
    """
    from agiqa.errors import ConfigError
    from agiqa.extract import DescriptionSettings, load_data_set, run_descriptions
    from agiqa.extract.describing.asking import preset
    from agiqa.heads.evaluation.rating_words import parse_rating_word
    from agiqa.progress import say

    if out.suffix.lower() != ".jsonl":
        message = f"{out}: descriptions are written as JSON lines; give a name that ends in .jsonl."
        raise ConfigError(message)
    describe, rate = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
    chosen = DescriptionSettings(
        aspect=aspect, describe=describe, rate=rate, batch_size=batch_size, on_bad_item=on_bad_item
    )
    opener = opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices)
    backbone = opened(opener, device)  # before every image is looked at
    data_set = load_data_set(
        data,
        labels=labels,
        variant="no_id",
        aspect=aspect,
        images=backbone.reads_images,
        mos_range=None,  # nobody is told them
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
