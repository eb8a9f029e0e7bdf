"""`agiqa extract`: phase 1, from images, prompts and conversations to a sealed feature store."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from agiqa.commands.data_options import data_options, length_rule, load
from agiqa.commands.data_text import print_summary
from agiqa.commands.help import SectionedCommand
from agiqa.commands.models import (
    IMAGE_ENCODER_OPTIONS,
    MODEL_OPTIONS,
    image_encoder_options,
    model_or_encoder_options,
    prepare_workers_option,
)
from agiqa.commands.options import (
    Automatic,
    OneOf,
    Share,
    shared_options,
)
from agiqa.commands.output import print_result, table
from agiqa.commands.stored import stored_options
from agiqa.extract.filling.crew import Crew
from agiqa.extract.models.checkpoints import hashed_ahead
from agiqa.extract.models.compiling import COMPILING
from agiqa.progress import say
from agiqa.workers import MODULES_TO_PREPARE_ITEMS, start_fork_server

_SIGNS_OF_A_GPU = [Path("/dev") / name for name in ("nvidiactl", "kfd", "dxg")]
"""Files of the drivers of NVIDIA, of AMD, and of Windows for its Linux."""

SECTIONS = {
    "Most used": (
        *("model", "adapter", "conversations", "variant", "aspect", "labels", "mos_range", "encoding", "rank"),
        "devices",
    ),
    "Model": (*MODEL_OPTIONS[2:], *IMAGE_ENCODER_OPTIONS),
    "What is stored": ("layers", "pool_tokens", "basis", "keep_logits"),
    "Items": ("columns", "prompt", "max_tokens", "truncate", "on_bad_item"),
    "Speed": ("batch_size", "workers", "compile"),
    "Parts and clusters": ("plan_only", "part", "ray"),
}


@click.command("extract", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=click.Path(path_type=Path))
@model_or_encoder_options
@image_encoder_options
@data_options
@stored_options
@click.option(
    "--batch-size",
    type=Automatic(lowest=1),
    default="auto",
    show_default=True,
    help="Most items per forward pass; auto chooses it by the free memory.",
)
@prepare_workers_option
@click.option(
    "--compile",
    type=OneOf("choice of compile", COMPILING),
    default="auto",
    show_default=True,
    help="Compile the model's layers by torch.compile: auto does on a GPU where it saves more time than it takes.",
)
@click.option("--devices", type=click.IntRange(min=1), help="GPUs of this host to use (processes, on a CPU).")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="auto",
    metavar="[ADDRESS]",
    help="Run on a Ray cluster, one actor per GPU (or --devices many).",
)
@click.option(
    "--part",
    type=Share(),
    default="1/1",
    show_default=True,
    help="Fill only this share of the store, as for one job of a SLURM array.",
)
@click.option("--plan-only", is_flag=True, help="Say what would be stored, with its disk and GPU hours, and stop.")
@shared_options
def command(data: Path, store: Path, *, as_json: bool, **options: Any) -> None:
    """Run the model once over DATA and store what heads need in STORE. Run it again to resume.

    DATA is a folder with data.csv (and images/), a table (csv, xlsx, json, parquet), a folder of images with --prompt
    and --variant no_id, or an M3-AGIQA conversation file with --labels. If DATA got more rows, only their items are
    computed and added to STORE. A store of a longer conversation is also read as the shorter ones with which it
    begins, by --variant of train, evaluate, ablate and the others: extract full rather than id.
    """
    options["pool_tokens"] = options["pool_tokens"] or ()
    if options.pop("plan_only"):
        print_summary(_summarised(data, store, options), as_json=as_json)
        return
    options["mos_range"] = options["mos_range"] or "recorded"
    with _other_processes(options) as crew, hashed_ahead(options["model"]):  # the imports take seconds
        from agiqa.extract.filling.extraction import extract

        result = extract(data, store, crew=crew, **options).as_dict()
    for line in result["skipped"]:
        say(f"skipped {line}")
    names = ("store", "state", "items", "layers", "tokens", "units", "truncated")
    shown = {name: ", ".join(found) if isinstance(found := result[name], list) else found for name in names}
    if result["pooled"]:
        shown["tokens"] = f"pooled into {', '.join(result['pooled'])}"
    shown["skipped"] = len(result["skipped"])
    if result["filled"] is not None:
        shown["batch size"] = result["filled"]["batch_size"]
        shown |= _rate(result["filled"])
    print_result(result, table(shown), as_json=as_json)


@contextmanager
def _other_processes(options: Mapping[str, Any]) -> Generator[Crew | None]:
    """Start other processes before anything is imported, so that all import at the same time.

    These are the processes of `--devices`, and the server whose forks prepare items. Without a sign of a GPU, or for a
    GGUF file, which reads no images, the server starts once it is needed: the process itself prepares the items.
    """
    workers, model, device = options["workers"], options["model"], options["device"]
    on_cpu = device == "cpu" or (device == "auto" and not any(path.exists() for path in _SIGNS_OF_A_GPU))
    forks = workers is None and not on_cpu and not model.startswith("pkg:") and not model.endswith(".gguf")
    if forks or workers:
        start_fork_server(MODULES_TO_PREPARE_ITEMS)
    devices = options["devices"] or 1
    if devices == 1 or options["ray"] is not None:
        yield None
        return
    with Crew(devices, on_cpu=on_cpu, workers=bool(forks or workers)) as crew:
        yield crew


def _summarised(data: Path, store: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a run would store, JSON-able. Raises what a run raises before it reads DATA."""
    from agiqa.data_summary import costs_summary, summary_of, tokens_summary
    from agiqa.extract.filling.extraction import opened_for
    from agiqa.extract.filling.footprints import ModelShape, RowsOfItems, footprints
    from agiqa.extract.filling.job import check_settings
    from agiqa.extract.filling.settings import ExtractionSettings
    from agiqa.extract.filling.token_counts import counted

    named = {
        name: options[name] for name in ("adapter", "dtype", "device", "max_slices", "variant", *IMAGE_ENCODER_OPTIONS)
    }
    opener, backbone = opened_for(options["model"], **named)
    names = ("encoding", "rank", "basis", "keep_logits", "compile", "layers", "pool_tokens")
    settings = ExtractionSettings(**{name: options[name] for name in names})
    wanted = check_settings(settings, store, backbone, opener)
    variant = options["variant"] if backbone.reads_conversations else "no_id"
    data_set = load(data, {**options, "variant": variant}, images=backbone.reads_images)
    counts = counted(data_set, backbone, length_rule(options), poolings=wanted.poolings, layers=wanted.layers)
    shape = ModelShape.of(backbone, options["model"], wanted.layers)
    content = RowsOfItems(layers=wanted.layers, poolings=wanted.poolings)
    costs = costs_summary(shape, footprints(counts, shape, rank=options["rank"], content=content), content)
    return {**summary_of(data_set), "tokens": tokens_summary(counts), "cost": costs}


def _rate(filled: Mapping[str, Any]) -> dict[str, str]:
    """Images per second of this run, and how long the device waited, for what. Empty if nothing was filled."""
    if not filled["items"]:
        return {}
    waits = {"items": filled["waited_for_items"], "the disk": filled["waited_for_writers"]}
    waited = " and ".join(f"{seconds:.0f} s for {what}" for what, seconds in waits.items())
    return {"rate": f"{filled['items'] / filled['seconds']:.1f} items/s (waited {waited})"}
