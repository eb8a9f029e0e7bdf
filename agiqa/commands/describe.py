"""`agiqa describe`: stage 2, the model's description and rating word of every image."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

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
from agiqa.commands.options import labels_option, on_bad_item_option, shared_options
from agiqa.commands.output import print_result, table

if TYPE_CHECKING:
    from agiqa.extract import DataSet, DescriptionResult, DescriptionSettings
    from agiqa.extract.models.preparing import Opener

SECTIONS = {
    "Model": MODEL_OPTIONS,
    "Server": ("server", "key_env", "jobs"),
    "Questions and answers": ("aspect", "settings", "seed", "max_new_tokens"),
    "Data": ("labels", "on_bad_item"),
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
    model: str,
    adapter: str | None,
    max_slices: int | None,
    dtype: str,
    device: str,
    server: str | None,
    key_env: str | None,
    jobs: int,
    labels: Path | None,
    aspect: str,
    settings: str,
    seed: int,
    max_new_tokens: int,
    on_bad_item: Literal["fail", "skip"],
    batch_size: int | None,
    workers: int | None,
) -> None:
    """Let the model describe every image of DATA and rate it in one word. Run it again to resume.

    DATA is a folder with data.csv (and images/), a csv, or an M3-AGIQA conversation file with --labels. MOS are
    not needed. `agiqa extract DATA STORE --conversations OUT.jsonl` and `agiqa words OUT.jsonl --labels data.csv` read
    OUT. With --server a server answers. agiqa does not know its weights, and OUT.provenance.json says so.
    """
    from agiqa.errors import ConfigError
    from agiqa.extract import DescriptionSettings, load_data_set
    from agiqa.extract.describing.rounds import preset
    from agiqa.extract.models.opening import opener_of
    from agiqa.progress import say

    _refuse_options_without_effect(_OF_A_MODEL_HERE if server is not None else _OF_A_SERVER, server)
    if out.suffix.lower() != ".jsonl":
        message = f"{out}: descriptions are JSON lines. Give a name that ends in .jsonl."
        raise ConfigError(message)
    describe, rate = preset(settings, max_new_tokens=max_new_tokens, seed=seed)
    chosen = DescriptionSettings(
        aspect=aspect, describe=describe, rate=rate, batch_size=batch_size, on_bad_item=on_bad_item
    )
    load = partial(
        load_data_set,
        data,
        labels=labels,
        variant="no_id",
        aspect=aspect,
        mos_range=None,  # MOS are not needed
        on_bad_item=on_bad_item,
    )
    if server is None:
        opener = opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices)
        result = _here(load, out, chosen, opener, device=device, workers=workers)
    else:
        result = _on_server(load, out, chosen, server=server, model=model, variable=key_env, jobs=jobs)
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


def _here(
    load: "Callable[..., DataSet]",
    out: Path,
    settings: "DescriptionSettings",
    opener: "Opener",
    *,
    device: str,
    workers: int | None,
) -> "DescriptionResult":
    from agiqa.extract import run_descriptions
    from agiqa.extract.models.opening import opened
    from agiqa.heads.evaluation.rating_words import parse_rating_word
    from agiqa.progress import say

    backbone = opened(opener, device)  # a model that cannot be opened is reported before the images are checked
    if not backbone.reads_images:
        say("warning: this model reads no images; it describes the prompts alone")
    data_set = _noted(load(images=backbone.reads_images))
    return run_descriptions(
        data_set, backbone, out, settings, rating_of=parse_rating_word, workers=workers, opener=opener
    )


def _on_server(
    load: "Callable[..., DataSet]",
    out: Path,
    settings: "DescriptionSettings",
    *,
    server: str,
    model: str,
    variable: str | None,
    jobs: int,
) -> "DescriptionResult":
    from agiqa.extract.describing.served import run_served_descriptions, sent
    from agiqa.extract.teaching.apis import api_of
    from agiqa.extract.teaching.client import Client, key_for
    from agiqa.heads.evaluation.rating_words import parse_rating_word
    from agiqa.progress import say

    api = api_of("openai", server)
    with Client(api, model, key=key_for(api, variable)) as client:
        data_set = _noted(load(images=True))
        if sent(settings).describe != settings.describe:
            say("note: OpenAI's format has no top_k and no repetition penalty, so the server uses its own")
        return run_served_descriptions(data_set, client, out, settings, rating_of=parse_rating_word, jobs=jobs)


def _noted(data_set: "DataSet") -> "DataSet":
    """`data_set`, after its notes are shown."""
    from agiqa.progress import say

    for note in data_set.notes:
        say(note)
    return data_set


def _text(result: Mapping[str, Any]) -> str:
    """The result for people: words as counts in one line."""
    words = ", ".join(f"{word} {count}" for word, count in result["ratings"].items())
    shown = {name: result[name] for name in ("out", "items", "described", "cut")}
    return table(shown | {"ratings": words or "none", "unknown": result["unknown"], "skipped": len(result["skipped"])})
