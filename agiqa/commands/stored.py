"""Options of the commands that fill a store: what it keeps of every item."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from agiqa.commands.options import OneOf, StoreLocation, added, layers_option, pool_tokens_option
from agiqa.extract.data.templates import VARIANTS, aspects_of

Command = TypeVar("Command", bound=Callable[..., Any])
STORED_OPTIONS = ("layers", "pool_tokens", "encoding", "rank", "basis", "keep_logits")
"""What `stored_options` adds."""


def look_up_variant(variant: str) -> None:
    """Raise UnknownName or ConfigError for a variant that does not exist."""
    _, _, listed = variant.partition(":")
    aspects_of(variant, listed.partition("+")[0] or "quality")


conversation_option = click.option(
    "--variant",
    type=OneOf("variant", VARIANTS, look_up=look_up_variant),
    default="id",
    show_default=True,
    help="What the model reads: one question (no_id), or a conversation that ends at one of its parts; "
    "id:ASPECT+ASPECT holds several descriptions.",
)
"""Adds `--variant`, for commands that run the model over conversations."""


def stored_options(command: Command) -> Command:
    """Add the fields of ExtractionSettings that say what a store keeps; `pool_tokens` is None without."""
    options = [
        click.option(
            "--encoding",
            type=OneOf("encoding", ["hidden", "sketch", "int8", "logits"]),
            default="hidden",
            show_default=True,
            help="What to store: hidden states, a sketch of rank R, hidden states in 8 bits, or raw logits.",
        ),
        layers_option,
        pool_tokens_option,
        click.option(
            "--rank",
            type=click.IntRange(min=1),
            help="Rank of the sketch, whose basis is calibrated on training items.",
        ),
        click.option("--basis", type=StoreLocation(), help="Sketch store whose basis to use instead."),
        click.option(
            "--keep-logits", is_flag=True, help="Keep the raw logits beside the hidden states (V/D times their bytes)."
        ),
    ]
    return added(options, command)
