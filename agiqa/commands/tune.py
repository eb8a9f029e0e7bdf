"""`agiqa tune`: stage 1, the adapter of a model that is fine-tuned on a teacher's conversations."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.models import ASPECT, device_option, max_slices_option, prepare_workers_option
from agiqa.commands.options import OneOf, columns_option, labels_option, shared_options
from agiqa.commands.output import print_result, table
from agiqa.extract.data.templates import aspects_of, reads_rating_word

if TYPE_CHECKING:
    from agiqa.extract.data.items import DataSet
    from agiqa.extract.models.huggingface import HuggingFaceBackbone
    from agiqa.extract.models.preparing import Opener
    from agiqa.extract.tuning.recipes import Recipe
    from agiqa.extract.tuning.tuning import TuningPlan

SECTIONS = {
    "Most used": ("model", "conversations", "recipe", "changes", "steps", "epochs", "devices", "dry_run"),
    "Model": ("max_slices", "dtype", "device"),
    "Data": ("variant", "aspect", "labels", "columns", "val_share", "on_bad_item"),
    "Interruption and logs": ("checkpoint_minutes", "seed", "tensorboard"),
    "Speed": ("workers",),
}


def _look_up_variant(variant: str) -> None:
    aspects_of(variant, variant.partition(":")[2].partition("+")[0] or "quality")
    if not reads_rating_word(variant):
        from agiqa.errors import ConfigError

        message = f"the variant {variant} has no rating word to learn; use full or full:ASPECT+ASPECT."
        raise ConfigError(message)


@click.command("tune", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("adapter", type=click.Path(path_type=Path, file_okay=False))
@click.option("--model", required=True, help="Hub id OWNER/NAME[@REVISION], checkpoint folder, or pkg:PACKAGE[/FILE].")
@click.option(
    "--conversations",
    multiple=True,
    metavar="[ASPECT:][SPLIT=]FILE",
    help="Conversations to learn, as `agiqa teach` writes them; repeatable. ASPECT and SPLIT override the file's name.",
)
@click.option(
    "--recipe",
    default="published",
    show_default=True,
    metavar="NAME|FILE.yaml",
    help="What is trained, and how: published, no-embeddings, light, or a file.",
)
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="One setting of the recipe, such as lr=1e-5; repeatable.",
)
@click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps.  [default: the recipe's]")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Passes over the items, instead of steps.")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs of this host to use.")
@click.option("--dry-run", is_flag=True, help="Check everything, estimate memory by recipe, and stop.")
@max_slices_option
@click.option(
    "--dtype",
    type=OneOf("dtype", ["auto", "bfloat16", "float32"]),
    default="auto",
    show_default=True,
    help="Dtype of the forward pass; auto is the checkpoint's own, bfloat16 for float16.",
)
@device_option
@click.option(
    "--variant",
    type=OneOf("variant", ["full"], look_up=_look_up_variant),
    default="full",
    show_default=True,
    help="The conversation to learn: description and rating word; or full:ASPECT+ASPECT, several descriptions.",
)
@click.option("--aspect", type=ASPECT, default="quality", show_default=True, help="Aspect of the conversations.")
@labels_option
@columns_option
@click.option(
    "--val-share",
    type=click.FloatRange(min=0, max=1, max_open=True),
    default=0.1,
    show_default=True,
    help="Share of the prompts held out for validation if no item is in the split val; 0 for none.",
)
@click.option(
    "--on-bad-item",
    type=OneOf("choice", ["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Unusable or too long items: stop and list them, or leave them out and name them.",
)
@click.option(
    "--checkpoint-minutes",
    type=click.FloatRange(min=0),
    default=15.0,
    show_default=True,
    help="Minutes between checkpoints, from which a killed run resumes.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of order, dropout and adapter."
)
@click.option("--tensorboard", is_flag=True, help="Write event files for TensorBoard to ADAPTER/tensorboard.")
@prepare_workers_option
@shared_options
def command(data: Path, adapter: Path, *, as_json: bool, dry_run: bool, **options: Any) -> None:
    """Fine-tune a model on the conversations of DATA and write the folder ADAPTER. Run it again to resume.

    DATA is a folder with data.csv (and images/), a table (csv, xlsx, json, parquet), or an M3-AGIQA conversation file
    with --labels. Items of the split test are never used. `agiqa describe`, `extract` and `score` take the folder as
    --adapter ADAPTER.
    """
    from agiqa.extract.tuning.folder import refuse_adapter
    from agiqa.extract.tuning.recipes import recipe_of
    from agiqa.extract.tuning.tuning import TuningSettings, check_start, plan_tuning, run_tuning
    from agiqa.progress import say

    recipe = recipe_of(options["recipe"], _changes(options))
    refuse_adapter(adapter)  # before the images are checked
    opener, backbone = _opened(options)
    if not backbone.reads_images:
        say(f"note: {options['model']} reads no images; it learns from the text alone")
    data_set = _load(data, options, images=backbone.reads_images)
    for note in data_set.notes:
        say(note)
    names = ("seed", "val_share", "devices", "workers", "checkpoint_minutes", "tensorboard", "on_bad_item")
    settings = TuningSettings(recipe=recipe, **{name: options[name] for name in names})
    plan = plan_tuning(data_set, backbone, settings, opener)
    for line in plan.skipped:
        say(f"skipped {line}")
    if dry_run:
        check_start(adapter, backbone, settings, plan)
        print_result(*_estimates(backbone, recipe, plan, options["devices"]), as_json=as_json)
        return
    result = run_tuning(data_set, backbone, adapter, settings, opener=opener, plan=plan).as_dict()
    print_result(result, table(result | {"skipped": len(result["skipped"])}), as_json=as_json)


def _load(data: Path, options: Mapping[str, Any], *, images: bool) -> "DataSet":
    from agiqa.errors import DataError
    from agiqa.extract.data.datasets import load_data_set

    given = {name: options[name] for name in ("conversations", "labels", "columns", "variant", "aspect", "on_bad_item")}
    try:
        return load_data_set(data, images=images, mos_range=None, **given)  # the conversations hold the rating words
    except DataError as error:
        if "--variant" in str(error):
            error.add_note(
                "A model learns descriptions and rating words; `agiqa teach` writes both for items with MOS."
            )
        raise


def _changes(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of the recipe that the command line changes."""
    import yaml

    from agiqa.errors import ConfigError, first_line

    found: dict[str, Any] = {}
    for change in options["changes"]:
        key, equals, value = change.partition("=")
        if not equals:
            message = f"--set {change}: expected KEY=VALUE, such as lr=1e-5."
            raise ConfigError(message)
        try:
            found[key.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            message = f"--set {change}: the value cannot be read as YAML ({first_line(error)})."
            raise ConfigError(message) from error
    return found | {key: options[key] for key in ("steps", "epochs") if options[key] is not None}


def _opened(options: Mapping[str, Any]) -> "tuple[Opener, HuggingFaceBackbone]":
    """The model, in bfloat16 where the checkpoint is in float16."""
    from agiqa.extract.models.huggingface import HuggingFaceBackbone
    from agiqa.extract.models.opening import check_writes_text, opened, opener_of
    from agiqa.progress import say

    given: dict[str, Any] = {"adapter": None, "max_slices": options["max_slices"]}
    check_writes_text(options["model"])
    opener = opener_of(options["model"], dtype=options["dtype"], **given)
    backbone = opened(opener, options["device"])
    if backbone.logical_dtype == "float16":
        opener = opener_of(options["model"], dtype="bfloat16", **given)
        backbone = opener(device=options["device"])
        say(f"{options['model']} is in float16, in which gradients become 0 or infinite; training computes in bfloat16")
    assert isinstance(backbone, HuggingFaceBackbone)  # as all that can be opened by name
    return opener, backbone


def _estimates(
    backbone: "HuggingFaceBackbone", recipe: "Recipe", plan: "TuningPlan", devices: int
) -> tuple[dict[str, Any], str]:
    """The plan, with the memory of this recipe and of all others: JSON-able, and as text."""
    from agiqa.extract.tuning.estimates import GB, estimate, memory_of, recipes_that_fit, settled

    memory = memory_of(backbone.device)
    chosen = settled(backbone, recipe, plan.longest, steps=plan.steps, memory=memory, devices=devices)
    load = plan.longest.times(chosen.micro_batch or 1)
    own = estimate(backbone, chosen, load, checkpointing=chosen.checkpointing)
    others = recipes_that_fit(backbone, plan.longest, None)
    result = {
        **plan.as_dict(),
        "recipe": chosen.as_dict(),
        "estimate": own.as_dict(),
        "recipes": {name: one.as_dict() for name, one in others.items()},
    }
    counts = own.counts
    shown: dict[str, Any] = {name: result[name] for name in ("train", "validation", "longest", "steps")}
    shown |= {"skipped": len(plan.skipped), "trained": f"{counts.trained:,} of {counts.trained + counts.frozen:,}"}
    there = "" if memory is None else f" of {memory / GB:.0f} GB"
    shown["memory"] = (
        f"about {own.total / GB:.1f} GB{there} with {chosen.micro_batch} items per forward pass, activations "
        f"recomputed: {chosen.checkpointing}"
    )
    shown |= {f"  {name}": f"about {one.total / GB:.1f} GB with 1, all recomputed" for name, one in others.items()}
    return result, table(shown)
