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
from agiqa.commands.options import columns_option, labels_option, on_bad_item_option, prompt_option, shared_options
from agiqa.commands.output import print_result, table

SECTIONS = {
    "Model": MODEL_OPTIONS,
    "Server": ("server", "key_env", "jobs"),
    "Questions and answers": ("aspect", "settings", "seed", "max_new_tokens"),
    "Data": ("labels", "columns", "prompt", "on_bad_item"),
    "Speed": ("batch_size", "workers"),
}
_OF_A_SERVER = ("key_env", "jobs")
_OF_A_MODEL_HERE = ("adapter", "max_slices", "dtype", "device", "batch_size", "workers")


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
    **options: Any,
) -> None:
    """Let the model describe every image of DATA and rate it in one word. Run it again to resume.

    DATA is a folder with data.csv (and images/), a table (csv, xlsx, json, parquet), a folder of images with --prompt,
    or an M3-AGIQA conversation file with --labels. MOS are not needed. `agiqa extract DATA STORE --conversations
    OUT.jsonl` and `agiqa words OUT.jsonl --labels data.csv` read OUT. With --server a server answers. agiqa does not
    know its weights, and OUT.provenance.json says so.
    """
    from agiqa.describing import describe
    from agiqa.progress import say

    _refuse_options_without_effect(_OF_A_MODEL_HERE if server is not None else _OF_A_SERVER, server)
    result = describe(data, out, server=server, **options)
    for line in result.skipped:
        say(f"skipped {line}")
    print_result(result.as_dict(), _text(result.as_dict()), as_json=as_json)


def _refuse_options_without_effect(names: Sequence[str], server: str | None) -> None:
    """Wrong usage if one of the options `names` was given."""
    context = click.get_current_context()
    given = [name for name in names if context.get_parameter_source(name) != ParameterSource.DEFAULT]
    options = {option.name: option.opts[0] for option in context.command.params}
    if given:
        why = "is for a model that agiqa runs itself" if server is not None else "needs --server"
        message = f"{options[given[0]]} {why}; leave it out{'' if server is not None else ', or give --server'}."
        raise click.UsageError(message, context)


def _text(result: Mapping[str, Any]) -> str:
    """The result for people: words as counts in one line."""
    words = ", ".join(f"{word} {count}" for word, count in result["ratings"].items())
    shown = {name: result[name] for name in ("out", "items", "described", "cut")}
    return table(shown | {"ratings": words or "none", "unknown": result["unknown"], "skipped": len(result["skipped"])})
