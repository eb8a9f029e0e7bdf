"""Options that say which data set a model reads and how: those of `agiqa extract` and `agiqa data check`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from agiqa.commands.models import ASPECT
from agiqa.commands.options import added, columns_option, mos_range_option, on_bad_item_option, prompt_option
from agiqa.commands.stored import conversation_option
from agiqa.progress import say

if TYPE_CHECKING:
    from agiqa.extract import DataSet, LengthRule

Command = TypeVar("Command", bound=Callable[..., Any])
DATA_OPTIONS = (
    *("conversations", "labels", "columns", "prompt", "variant", "aspect", "mos_range"),
    *("max_tokens", "truncate", "on_bad_item"),
)
"""What `data_options` adds, for the sections of the help."""


def data_options(command: Command) -> Command:
    """Add the options of the data set to a command, see `load` and `length_rule`."""
    options = [
        click.option(
            "--conversations",
            multiple=True,
            metavar="[ASPECT:][SPLIT=]FILE",
            help="M3-AGIQA conversation file; repeatable. ASPECT and SPLIT (train, val, test) override the file's "
            "name.",
        ),
        click.option(
            "--labels",
            type=click.Path(path_type=Path, exists=True),
            help="Table with the MOS of a conversation file.",
        ),
        columns_option,
        prompt_option,
        conversation_option,
        click.option("--aspect", type=ASPECT, default="quality", show_default=True, help="Wording of the questions."),
        mos_range_option,
        click.option(
            "--max-tokens",
            type=click.IntRange(min=1),
            help="Most tokens per conversation.  [default: the model's own limit]",
        ),
        click.option(
            "--truncate", is_flag=True, help="Cut longer conversations, and count them, instead of refusing them."
        ),
        on_bad_item_option,
    ]
    return added(options, command)


def load(data: Path, options: Mapping[str, Any], *, images: bool, **changes: Any) -> "DataSet":
    """The data set that the options name, with `changes` to them. Says its notes and warnings."""
    from agiqa.extract import load_data_set

    names = ("conversations", "labels", "columns", "prompt", "variant", "aspect", "on_bad_item")
    given: dict[str, Any] = {name: options[name] for name in names}
    given |= {"mos_range": options["mos_range"] or "recorded"} | changes
    data_set = load_data_set(data, images=images, **given)
    for note in (*data_set.notes, *(f"warning: {warning}" for warning in data_set.warnings)):
        say(note)
    return data_set


def length_rule(options: Mapping[str, Any], **changes: Any) -> "LengthRule":
    """What the options do about long conversations, with `changes` to them."""
    from agiqa.extract import LengthRule

    names = ("max_tokens", "truncate", "on_bad_item")
    return LengthRule(**({name: options[name] for name in names} | changes))
