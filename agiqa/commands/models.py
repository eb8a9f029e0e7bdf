"""The options that name a model, for the commands that ask one; and how it is opened."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agiqa.commands.common import Automatic, Name, one_of

if TYPE_CHECKING:
    from agiqa.extract import Backbone
    from agiqa.extract.models.preparing import Opener

ASPECTS = (
    "quality, correspondence, authenticity, or agiqa3k_quality_v0 (quality, as the adapter of AGIQA-3k was asked)."
)
"""Help of `--aspect`: the questions of templates.yaml."""
Command = TypeVar("Command", bound=Callable[..., Any])


def _look_up_aspect(name: str) -> None:
    from agiqa.extract.data.templates import template_of

    template_of(name)


ASPECT = Name("aspect", _look_up_aspect)
"""The type of `--aspect`: a wording of templates.yaml."""


def model_options(command: Command) -> Command:
    """Add `--model`, `--adapter`, `--max-slices`, `--dtype` and `--device` to a command."""
    for option in reversed(
        (
            click.option(
                "--model",
                required=True,
                help="Hub id (owner/name[@revision]), checkpoint folder, .gguf file, or pkg:PACKAGE[/FILE].",
            ),
            click.option(
                "--adapter", help="LoRA adapter that is merged into it: a PEFT folder, or owner/name[@revision]."
            ),
            click.option(
                "--max-slices",
                type=click.IntRange(min=1),
                help="Most slices of an image, for MiniCPM-Llama3-V-2.5.  [default: the checkpoint's, 9]",
            ),
            click.option(
                "--dtype",
                type=one_of("dtype", ["auto", "bfloat16", "float16", "float32"]),
                default="auto",
                show_default=True,
                help="bfloat16, float16, float32, or the checkpoint's own.",
            ),
            click.option(
                "--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, or the GPU if there is one."
            ),
        )
    ):
        command = option(command)
    return command


def generation_options(command: Command) -> Command:
    """Add `--settings`, `--seed` and `--max-new-tokens` to a command; see `agiqa.extract.describing.asking.preset`."""
    for option in reversed(
        (
            click.option(
                "--settings",
                type=click.Choice(["greedy", "published"]),
                default="greedy",
                show_default=True,
                help="The likeliest token each time, or the sampling of the published MiniCPM-Llama3-V-2.5.",
            ),
            click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the sampling."),
            click.option(
                "--max-new-tokens",
                type=click.IntRange(min=1),
                default=1024,
                show_default=True,
                help="Longest description; longer ones are cut, and counted.",
            ),
        )
    ):
        command = option(command)
    return command


def workers_option(command: Command) -> Command:
    """Add `--workers` to a command."""
    option = click.option(
        "--workers",
        type=Automatic(lowest=0),
        default="auto",
        show_default=True,
        help="Processes that decode and tokenise ahead of each device; 0 for none.",
    )
    return option(command)


def opener_of(model: str, *, adapter: str | None, dtype: str, max_slices: int | None) -> "Opener":
    """Opens the model of the options: `opener(device=DEVICE)`, as `open_backbone`. Picklable."""
    from agiqa.extract import open_backbone

    return partial(open_backbone, model, adapter=adapter, dtype=dtype, max_slices=max_slices)


def opened(opener: "Opener", device: str) -> "Backbone":
    """The backbone on `device`, the heads of its files compared; says so where `auto` found no GPU."""
    from agiqa.progress import say

    backbone = opener(device=device)
    if device == "auto" and backbone.device.type == "cpu":
        say("no GPU found: the model runs on the CPU")
    backbone.check_tensors()
    return backbone


def open_model(model: str, *, adapter: str | None, dtype: str, device: str, max_slices: int | None) -> "Backbone":
    """As `open_backbone`, checked as by `opened`."""
    return opened(opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices), device)
