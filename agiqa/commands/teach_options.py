"""The options of `agiqa teach`, by the sections of its help."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from agiqa.commands.options import OneOf, added, columns_option, mos_range_option, on_bad_item_option

Command = TypeVar("Command", bound=Callable[..., Any])

SECTIONS = {
    "Teacher": ("api", "teacher", "base_url", "key_env"),
    "Fallback for what the teacher refuses": (*("fallback", "fallback_api", "fallback_base_url", "fallback_key_env"),),
    "Questions and answers": ("aspects", "blind", "wording", "schema", "max_new_tokens", "temperature", "retries"),
    "Money": ("budget", "prices", "dry_run"),
    "Batches": ("batch", "wait", "poll", "batch_requests"),
    "Speed and patience": ("jobs", "requests_per_minute", "tokens_per_minute", "timeout", "patience", "retry_failed"),
    "Data": ("labels", "columns", "mos_range", "on_bad_item"),
    "Splits of the conversations": ("split", "test_share", "val_share", "seed"),
}

APIS = ("openai", "gemini")
ASPECTS = ("quality", "correspondence", "authenticity")
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def teacher_options(command: Command) -> Command:
    """Add the options of the sections Teacher and Fallback."""
    options = [
        click.option("--api", type=OneOf("api", APIS), required=True, help="Wire format: OpenAI chat or Gemini's own."),
        click.option("--teacher", required=True, metavar="MODEL", help="Name of the model that explains."),
        click.option("--base-url", help="URL of another server, such as http://localhost:8000/v1."),
        click.option("--key-env", metavar="NAME", help="Environment variable that holds its key; see above."),
        click.option("--fallback", metavar="MODEL", help="Name of the model that gets what the teacher refuses."),
        click.option(
            "--fallback-api", type=OneOf("api", APIS), help="Its wire format.  [default: that of the teacher]"
        ),
        click.option(
            "--fallback-base-url",
            help="URL of its server.  [default: that of the teacher, or the provider of --fallback-api]",
        ),
        click.option("--fallback-key-env", metavar="NAME", help="Environment variable that holds its key."),
    ]
    return added(options, command)


def question_options(command: Command) -> Command:
    """Add the options of the sections Questions and Money."""
    options = [
        click.option(
            "--aspect",
            "aspects",
            type=OneOf("aspect", ASPECTS),
            multiple=True,
            help="Aspect to explain; may be repeated.  [default: those that DATA has MOS of]",
        ),
        click.option("--blind", is_flag=True, help="Leave the MOS out of the question."),
        click.option(
            "--wording", type=_FILE, help="Other words for the question, in the form of extract/teaching/wording.yaml."
        ),
        click.option(
            "--schema/--no-schema",
            default=True,
            show_default=True,
            help="Let the server enforce the JSON schema; old servers cannot.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=8192,
            show_default=True,
            help="Longest answer, thoughts included, in tokens.",
        ),
        click.option("--temperature", type=click.FloatRange(min=0.0), help="Of sampling.  [default: the model's own]"),
        click.option(
            "--retries",
            type=click.IntRange(min=0),
            default=2,
            show_default=True,
            help="Times that a broken answer is asked for again.",
        ),
        click.option(
            "--budget",
            type=click.FloatRange(min=0.0, min_open=True),
            help="Most USD to spend on OUT, earlier runs included.  [default: no limit]",
        ),
        click.option(
            "--prices", type=_FILE, help="Prices of models, instead of those in extract/teaching/prices.yaml."
        ),
        click.option("--dry-run", is_flag=True, help="Count tokens and prices; send and write nothing."),
    ]
    return added(options, command)


def patience_options(command: Command) -> Command:
    """Add the options of the section Speed and patience."""
    limit = click.IntRange(min=1)
    options = [
        click.option("--jobs", type=limit, default=8, show_default=True, help="Requests at the same time."),
        click.option("--requests-per-minute", type=limit, help="Most requests per minute.  [default: no limit]"),
        click.option("--tokens-per-minute", type=limit, help="Most tokens sent per minute.  [default: no limit]"),
        click.option(
            "--timeout",
            type=click.FloatRange(min=0.0, min_open=True),
            default=300.0,
            show_default=True,
            help="Seconds without a byte of an answer after which it is lost.",
        ),
        click.option(
            "--patience",
            type=click.FloatRange(min=0.0),
            default=30.0,
            show_default=True,
            help="Minutes to wait for a server that has stopped answering.",
        ),
        click.option("--retry-failed", is_flag=True, help="Ask again about items that were refused or failed."),
    ]
    return added(options, command)


def batch_options(command: Command) -> Command:
    """Add the options of the section Batches."""
    options = [
        click.option("--batch", is_flag=True, help="Send requests in batches: half the price, answers within a day."),
        click.option(
            "--wait/--no-wait",
            default=True,
            show_default=True,
            help="Wait for the answers, or leave after sending; the same command fetches them later.",
        ),
        click.option(
            "--poll",
            type=click.FloatRange(min=0.0, min_open=True),
            default=60.0,
            show_default=True,
            help="Seconds between two looks at the batches.",
        ),
        click.option(
            "--batch-requests",
            type=click.IntRange(min=1),
            help="Most requests per batch.  [default: the provider's limit]",
        ),
    ]
    return added(options, command)


def data_options(command: Command) -> Command:
    """Add the options of the sections Data and Splits."""
    share = click.FloatRange(min=0.0, max=1.0, max_open=True)
    options = [
        columns_option,
        click.option("--labels", type=_FILE, help="Table of the items of a conversation file."),
        mos_range_option,
        on_bad_item_option,
        click.option(
            "--split",
            type=OneOf("split", ["table", "prompts"]),
            help="Splits by the table, or drawn by prompt.  [default: table if DATA has splits]",
        ),
        click.option("--test-share", type=share, default=0.2, show_default=True, help="Share to test on, if drawn."),
        click.option(
            "--val-share", type=share, default=0.1, show_default=True, help="Share of the rest to validate on."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Seed of drawn splits."),
    ]
    return added(options, command)
