"""Options of the commands that run a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from agiqa.commands.options import Automatic, OneOf, added
from agiqa.extract.data.templates import templates

Command = TypeVar("Command", bound=Callable[..., Any])
ASPECT = OneOf("aspect", list(templates()))
"""The type of `--aspect`: a wording of the questions in extract/data/templates.yaml."""
MODEL_OPTIONS = ("model", "adapter", "max_slices", "dtype", "device")
"""What `model_options` adds, for the sections of the help."""
IMAGE_ENCODER_OPTIONS = ("tap", "weights", "image_size")
"""What `image_encoder_options` adds."""

_MODELS = "Hub id OWNER/NAME[@REVISION], checkpoint folder, .gguf file, pkg:PACKAGE[/FILE]"

max_slices_option = click.option(
    "--max-slices",
    type=click.IntRange(min=1),
    help="Most slices per image, for MiniCPM-Llama3-V-2.5.  [default: the checkpoint's, 9]",
)
device_option = click.option(
    "--device", default="auto", show_default=True, help="cpu, cuda or cuda:1; auto is the GPU if there is one."
)


def model_options(command: Command, *, models: str = f"{_MODELS}.") -> Command:
    """Add `--model`, `--adapter`, `--max-slices`, `--dtype` and `--device` to a command: `models` says which."""
    options = [
        click.option("--model", required=True, help=models),
        click.option(
            "--adapter", help="LoRA adapter to merge into the model: a PEFT folder, or OWNER/NAME[@REVISION]."
        ),
        max_slices_option,
        click.option(
            "--dtype",
            type=OneOf("dtype", ["auto", "bfloat16", "float16", "float32"]),
            default="auto",
            show_default=True,
            help="Dtype of the weights; auto is the checkpoint's own.",
        ),
        device_option,
    ]
    return added(options, command)


def model_or_encoder_options(command: Command) -> Command:
    """As `model_options`, for a command that reads image encoders, too."""
    return model_options(command, models=f"{_MODELS}, or timm:NAME.")


weights_option = click.option(
    "--weights",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Weights of timm:NAME, a .safetensors or .pth file.  [default: those that timm names]",
)


def image_encoder_options(command: Command) -> Command:
    """Add `--tap`, `--weights` and `--image-size` to a command."""
    options = [
        click.option(
            "--tap",
            metavar="vision[:BLOCK]|projector|blocks",
            help="Read a model's vision tower, what its language model reads of the image, or blocks of timm's CNNs.",
        ),
        weights_option,
        click.option(
            "--image-size",
            type=click.IntRange(min=1),
            help="Side in pixels of the images that timm:NAME reads.  [default: that of the weights]",
        ),
    ]
    return added(options, command)


def generation_options(command: Command) -> Command:
    """Add `--settings`, `--seed` and `--max-new-tokens` to a command; see `agiqa.extract.describing.rounds.preset`."""
    options = [
        click.option(
            "--settings",
            type=OneOf("settings", ["greedy", "published"]),
            default="greedy",
            show_default=True,
            help="Greedy decoding, or the sampling published with MiniCPM-Llama3-V-2.5.",
        ),
        click.option(
            "--seed",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Seed of the sampling; each image and question has draws of its own.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=1024,
            show_default=True,
            help="Tokens of the longest description; longer ones are cut, and counted.",
        ),
    ]
    return added(options, command)


def prepare_workers_option(command: Command) -> Command:
    """Add `--prepare-workers` to a command; it receives `workers`."""
    option = click.option(
        "--prepare-workers",
        "workers",
        type=Automatic(lowest=0),
        default="auto",
        show_default=True,
        help="Processes per device that decode images and tokenise ahead of the model; 0 for none.",
    )
    return option(command)
