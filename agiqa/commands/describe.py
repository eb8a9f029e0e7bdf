"""`agiqa describe`: stage 2, the model's description and rating word of every image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from agiqa.commands.help import SectionedCommand
from agiqa.commands.models import (
    ASPECT,
    MODEL_OPTIONS,
    generation_options,
    model_options,
    prepare_workers_option,
)
from agiqa.commands.options import (
    OneOf,
    columns_option,
    labels_option,
    mos_range_option,
    on_bad_item_option,
    prompt_option,
    shared_options,
)
from agiqa.commands.output import print_result, table
from agiqa.commands.stored import STORED_OPTIONS, look_up_variant, stored_options
from agiqa.extract.data.templates import DESCRIBING

_OF_A_STORE = ("variant", "mos_range", *STORED_OPTIONS)
SECTIONS = {
    "Model": MODEL_OPTIONS,
    "Server": ("server", "key_env", "jobs"),
    "Questions and answers": ("aspect", "settings", "seed", "max_new_tokens"),
    "Data": ("labels", "columns", "prompt", "on_bad_item"),
    "Store": ("store", *_OF_A_STORE),
    "Speed": ("batch_size", "workers"),
}
_OF_A_SERVER = ("key_env", "jobs")
_OF_A_MODEL_HERE = ("adapter", "max_slices", "dtype", "device", "batch_size", "workers", "store")


@click.command("describe", cls=SectionedCommand, sections=SECTIONS)
@click.argument("data", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
@model_options
@click.option(
    "--server",
    metavar="URL",
    help="Server of OpenAI's format that runs the model, such as http://localhost:8000/v1; --model is its name there.",
)
@click.option(
    "--key-env",
    metavar="NAME",
    help="Environment variable with the server's key.  [default: OPENAI_API_KEY for OpenAI itself, else no key]",
)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Images that the server works on at the same time.",
)
@labels_option
@columns_option
@prompt_option
@click.option("--aspect", type=ASPECT, default="quality", show_default=True, help="Wording of the questions.")
@generation_options
@on_bad_item_option
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Store to fill in the same pass with the conversations, as `agiqa extract --conversations OUT.jsonl` does.",
)
@click.option(
    "--variant",
    type=OneOf("variant", DESCRIBING, look_up=look_up_variant),
    default="id",
    show_default=True,
    help="Part of the conversation with which the store ends: the rating question (id), the rating word (full), ...",
)
@mos_range_option
@stored_options
@click.option(
    "--batch-size",
    type=click.IntRange(min=1),
    help="Images in work at the same time.  [default: what a GPU's memory allows, 256 at most; 8 on a CPU]",
)
@prepare_workers_option
@shared_options
def command(
    data: Path,
    out: Path,
    *,
    as_json: bool,
    server: str | None,
    store: Path | None,
    **options: Any,
) -> None:
    """Let the model describe every image of DATA and rate it in one word. Run it again to resume.

    DATA is a folder with data.csv (and images/), a table (csv, xlsx, json, parquet), a folder of images with --prompt,
    or an M3-AGIQA conversation file with --labels. MOS are not needed. `agiqa extract DATA STORE --conversations
    OUT.jsonl` and `agiqa words OUT.jsonl --labels data.csv` read OUT. With --store the same pass fills a store, too.
    With --server a server answers. agiqa does not know its weights, and OUT.provenance.json says so.
    """
    from agiqa.describing import describe
    from agiqa.progress import say

    if server is not None:
        _refuse_options_without_effect(_OF_A_MODEL_HERE, "is for a model that agiqa runs itself", "leave it out")
    else:
        _refuse_options_without_effect(_OF_A_SERVER, "needs --server", "leave it out, or give --server")
    if store is None:
        _refuse_options_without_effect(_OF_A_STORE, "is for a store", "leave it out, or give --store")
        options = {name: value for name, value in options.items() if name not in _OF_A_STORE}
    else:
        options |= {"store": store, "mos_range": options["mos_range"] or "recorded"}
        options["pool_tokens"] = options["pool_tokens"] or ()
    result = describe(data, out, server=server, **options).as_dict()
    extraction = result.get("extraction", {})
    for line in dict.fromkeys([*result["skipped"], *extraction.get("skipped", ())]):
        say(f"skipped {line}")
    print_result(result, _text(result), as_json=as_json)


def _refuse_options_without_effect(names: Sequence[str], why: str, remedy: str) -> None:
    """Wrong usage if one of the options `names` was given."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    options = {option.name: max(option.opts, key=len) for option in context.command.params}
    if given:
        message = f"{options[given[0]]} {why}; {remedy}."
        raise click.UsageError(message, context)


def _text(result: Mapping[str, Any]) -> str:
    """The result for people: words as counts in one line."""
    words = ", ".join(f"{word} {count}" for word, count in result["ratings"].items())
    shown = {name: result[name] for name in ("out", "items", "described", "cut")}
    shown |= {"ratings": words or "none", "unknown": result["unknown"], "skipped": len(result["skipped"])}
    if "extraction" in result:
        stored = result["extraction"]
        shown |= {name: stored[name] for name in ("store", "state", "tokens")} | {"items stored": stored["items"]}
        if stored["filled"] is not None:
            shown["kept"] = f"{stored['filled']['reused']} of {stored['filled']['items']} items filled by this run"
    return table(shown)
