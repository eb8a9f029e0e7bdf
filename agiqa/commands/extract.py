"""`agiqa extract`: phase 1, from images, prompts and conversations to a sealed feature store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import click

from agiqa.commands.common import Automatic, Name, Share, StoreLocation, print_result, shared_options, table
from agiqa.commands.models import ASPECT, ASPECTS, model_options, opened, opener_of, workers_option


def _look_up_variant(variant: str) -> None:
    from agiqa.extract.data.templates import aspects_of

    aspects_of(variant, variant.removeprefix("id:").partition("+")[0] if variant.startswith("id:") else "quality")


@click.command("extract")
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=click.Path(path_type=Path))
@model_options
@click.option(
    "--conversations",
    multiple=True,
    metavar="[ASPECT:][SPLIT=]FILE",
    help="M3-AGIQA conversation file; repeatable. ASPECT and SPLIT (train, val or test) beat what the file's name "
    "tells, as in test=quality_val.json.",
)
@click.option("--labels", type=click.Path(path_type=Path, exists=True), help="Table of MOS for a conversation file.")
@click.option(
    "--variant",
    type=Name("variant", _look_up_variant),
    default="id",
    show_default=True,
    help="Rounds of the conversation: no_id (one question), id (with a description), full (and the rating word), or "
    "id:ASPECT+ASPECT[+ASPECT] (with descriptions of these aspects; the first is rated).",
)
@click.option("--aspect", type=ASPECT, default="quality", show_default=True, help=ASPECTS)
@click.option("--mos-range", nargs=2, type=float, default=(0.0, 5.0), show_default=True, help="Lowest and highest MOS.")
@click.option(
    "--encoding",
    type=click.Choice(["hidden", "sketch", "int8", "logits"]),
    default="hidden",
    show_default=True,
    help="Final hidden states, coordinates in a basis of the logits, hidden states in 8 bits, or raw logits.",
)
@click.option("--rank", type=click.IntRange(min=1), help="Rank of a sketch, calibrated on training items.")
@click.option("--basis", type=StoreLocation(), help="Sketch store whose basis is used.")
@click.option("--keep-logits", is_flag=True, help="Keep the raw logits beside hidden states (V/D times the bytes).")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest conversation; the model's own limit if absent.")
@click.option("--truncate", is_flag=True, help="Cut longer conversations, and count them.")
@click.option(
    "--on-bad-item",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Stop with the list of unusable items, or leave them out and say so.",
)
@click.option(
    "--batch-size", type=Automatic(lowest=1), default="auto", show_default=True, help="Items per forward pass at most."
)
@workers_option
@click.option("--devices", type=click.IntRange(min=1), help="GPUs of this host, or processes on its CPU, to run on.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Run on actors of a Ray cluster, one per GPU (or --devices many).",
)
@click.option("--part", type=Share(), default="1/1", show_default=True, help="Fill only this share of the units.")
@click.option("--plan-only", is_flag=True, help="Check and tokenise everything, compute nothing.")
@shared_options
def command(
    data: Path,
    store: Path,
    *,
    as_json: bool,
    model: str,
    adapter: str | None,
    max_slices: int | None,
    conversations: tuple[str, ...],
    labels: Path | None,
    variant: str,
    aspect: str,
    mos_range: tuple[float, float],
    max_tokens: int | None,
    on_bad_item: Literal["fail", "skip"],
    dtype: str,
    **settings: Any,
) -> None:
    """Run the model once over DATA and keep what heads need in STORE. Run it again to resume.

    DATA is a folder with data.csv (and images/), a csv, or an M3-AGIQA conversation file with --labels.
    """
    from agiqa.extract import ExtractionSettings, LengthRule, load_data_set, run_extraction
    from agiqa.progress import say

    opener = opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices)
    backbone = opened(opener, settings["device"])  # before every image is looked at
    if not backbone.reads_images:
        alike = ", the same for all images of one prompt" if variant.startswith("no_id") else ""
        say(f"note: {model} reads no images; these features are of the text alone{alike}")
    data_set = load_data_set(
        data,
        conversations=conversations,
        labels=labels,
        variant=variant,
        aspect=aspect,
        images=backbone.reads_images,
        mos_range=mos_range,
        on_bad_item=on_bad_item,
    )
    for note in (*data_set.notes, *(f"warning: {warning}" for warning in data_set.warnings)):
        say(note)
    length = LengthRule(max_tokens=max_tokens, truncate=settings.pop("truncate"), on_bad_item=on_bad_item)
    result = run_extraction(
        data_set,
        backbone,
        store,
        ExtractionSettings(variant=variant, aspect=aspect, length=length, **settings),
        opener=opener,
    ).as_dict()
    for line in result["skipped"]:
        say(f"skipped {line}")
    shown = {name: result[name] for name in ("store", "state", "items", "tokens", "units", "truncated")}
    shown["skipped"] = len(result["skipped"])
    if result["filled"] is not None:
        shown["batch size"] = result["filled"]["batch_size"]
        shown |= _rate(result["filled"])
    print_result(result, table(shown), as_json=as_json)


def _rate(filled: Mapping[str, Any]) -> dict[str, str]:
    """Images per second of this run, and what the device waited for; nothing where nothing was filled."""
    if not filled["items"]:
        return {}
    waits = {"items": filled["waited_for_items"], "the disk": filled["waited_for_writers"]}
    waited = " and ".join(f"{seconds:.0f} s for {what}" for what, seconds in waits.items())
    return {"rate": f"{filled['items'] / filled['seconds']:.1f} items/s (waited {waited})"}
