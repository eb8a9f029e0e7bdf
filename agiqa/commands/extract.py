"""`agiqa extract`: phase 1, from images, prompts and conversations to a sealed feature store."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.models import ASPECT, MODEL_OPTIONS, model_options, prepare_workers_option
from agiqa.commands.options import Automatic, OneOf, Share, StoreLocation, on_bad_item_option, shared_options
from agiqa.commands.output import print_result, table
from agiqa.extract.data.templates import VARIANTS, aspects_of
from agiqa.extract.filling.crew import Crew
from agiqa.extract.models.checkpoints import hashed_ahead
from agiqa.extract.models.compiling import COMPILING
from agiqa.progress import say
from agiqa.workers import MODULES_TO_PREPARE_ITEMS, start_fork_server


def _look_up_variant(variant: str) -> None:
    _, _, listed = variant.partition(":")
    aspects_of(variant, listed.partition("+")[0] or "quality")


_SIGNS_OF_A_GPU = [Path("/dev") / name for name in ("nvidiactl", "kfd", "dxg")]
"""Files of the drivers of NVIDIA, of AMD, and of Windows for its Linux."""

SECTIONS = {
    "Most used": (
        *("model", "adapter", "conversations", "variant", "aspect", "labels", "mos_range", "encoding", "rank"),
        "devices",
    ),
    "Model": MODEL_OPTIONS[2:],
    "What is stored": ("basis", "keep_logits"),
    "Items": ("max_tokens", "truncate", "on_bad_item"),
    "Speed": ("batch_size", "workers", "compile"),
    "Parts and clusters": ("plan_only", "part", "ray"),
}


@click.command("extract", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("store", type=click.Path(path_type=Path))
@model_options
@click.option(
    "--conversations",
    multiple=True,
    metavar="[ASPECT:][SPLIT=]FILE",
    help="M3-AGIQA conversation file; repeatable. ASPECT and SPLIT (train, val, test) override the file's name.",
)
@click.option(
    "--labels", type=click.Path(path_type=Path, exists=True), help="Table (csv) with the MOS of a conversation file."
)
@click.option(
    "--variant",
    type=OneOf("variant", VARIANTS, look_up=_look_up_variant),
    default="id",
    show_default=True,
    help="What the model reads: one question; a description too; the rating word too; or id:ASPECT+ASPECT "
    "(full:ASPECT+ASPECT), descriptions of several aspects.",
)
@click.option("--aspect", type=ASPECT, default="quality", show_default=True, help="Wording of the questions.")
@click.option("--mos-range", nargs=2, type=float, default=(0.0, 5.0), show_default=True, help="Lowest and highest MOS.")
@click.option(
    "--encoding",
    type=OneOf("encoding", ["hidden", "sketch", "int8", "logits"]),
    default="hidden",
    show_default=True,
    help="What to store: hidden states, a sketch of rank R, hidden states in 8 bits, or raw logits.",
)
@click.option(
    "--rank", type=click.IntRange(min=1), help="Rank of the sketch, whose basis is calibrated on training items."
)
@click.option("--basis", type=StoreLocation(), help="Sketch store whose basis to use instead.")
@click.option(
    "--keep-logits", is_flag=True, help="Keep the raw logits beside the hidden states (V/D times their bytes)."
)
@click.option(
    "--max-tokens", type=click.IntRange(min=1), help="Most tokens per conversation.  [default: the model's own limit]"
)
@click.option("--truncate", is_flag=True, help="Cut longer conversations, and count them, instead of refusing them.")
@on_bad_item_option
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
@click.option("--plan-only", is_flag=True, help="Check and tokenise all items, and stop before the model runs.")
@shared_options
def command(data: Path, store: Path, *, as_json: bool, **options: Any) -> None:
    """Run the model once over DATA and store what heads need in STORE. Run it again to resume.

    DATA is a folder with data.csv (and images/), a csv, or an M3-AGIQA conversation file with --labels.
    """
    with _other_processes(options) as crew:
        result = _extracted(data, store, crew=crew, **options)
    for line in result["skipped"]:
        say(f"skipped {line}")
    shown = {name: result[name] for name in ("store", "state", "items", "tokens", "units", "truncated")}
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
    if devices == 1 or options["ray"] is not None or options["plan_only"]:
        yield None
        return
    with Crew(devices, on_cpu=on_cpu, workers=bool(forks or workers)) as crew:
        yield crew


def _extracted(
    data: Path,
    store: Path,
    *,
    crew: Crew | None,
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
) -> dict[str, Any]:
    """The result in a JSON-able form."""
    with hashed_ahead(model):  # the imports take seconds
        from agiqa.extract import DataSet, ExtractionSettings, LengthRule, load_data_set, run_extraction
        from agiqa.extract.models.opening import opened, opener_of

        opener = opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices)
        # a model that cannot be opened is reported before the images are checked
        backbone = opened(opener, settings["device"])
        if not backbone.reads_images:
            alike = ", the same for all images of one prompt" if variant.startswith("no_id") else ""
            say(f"note: {model} reads no images; these features are of the text alone{alike}")

        def read() -> DataSet:
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
            return data_set

        length = LengthRule(max_tokens=max_tokens, truncate=settings.pop("truncate"), on_bad_item=on_bad_item)
        wanted = ExtractionSettings(variant=variant, aspect=aspect, length=length, **settings)
        return run_extraction(read, backbone, store, wanted, opener=opener, crew=crew).as_dict()


def _rate(filled: Mapping[str, Any]) -> dict[str, str]:
    """Images per second of this run, and how long the device waited, for what. Empty if nothing was filled."""
    if not filled["items"]:
        return {}
    waits = {"items": filled["waited_for_items"], "the disk": filled["waited_for_writers"]}
    waited = " and ".join(f"{seconds:.0f} s for {what}" for what, seconds in waits.items())
    return {"rate": f"{filled['items'] / filled['seconds']:.1f} items/s (waited {waited})"}
