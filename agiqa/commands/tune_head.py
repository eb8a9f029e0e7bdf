"""`agiqa tune-head`: which settings make the best head for a store?"""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.help import SectionedCommand
from agiqa.commands.options import OneOf, StoreLocation, layer_option, shared_options, variant_option
from agiqa.commands.output import fail_if_any, print_parts, print_result, table
from agiqa.commands.train import preset_option

if TYPE_CHECKING:
    from agiqa.heads.searching.search import SearchSettings
    from agiqa.store import Store

_SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}
SECTIONS = {
    "Most used": ("trials", "timeout", "space", "workers", "dry_run"),
    "Settings of all trials": (
        *("config", "preset", "label", "split", "layer", "variant"),
        *("validation", "epochs", "device"),
    ),
    "Search": ("pruner", "seed", "devices"),
    "Final heads": ("seeds",),
}


class Duration(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A time such as 90s, 30m, 2h or 1.5h, in seconds."""

    name = "TIME"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse it; a number alone is in seconds."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(value))
        if found is None or found[2] not in _SECONDS or not float(found[1]):
            self.fail(f"{value!r} is no time such as 90s, 30m or 2h.", param, ctx)
        return float(found[1]) * _SECONDS[found[2]]


@click.command("tune-head", cls=SectionedCommand, sections=SECTIONS)
@click.argument("store", type=StoreLocation())
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--trials", type=click.IntRange(min=1), default=50, show_default=True, help="Trials in all.")
@click.option("--timeout", type=Duration(), help="Time after which no further trial begins, as in 30m or 2h.")
@click.option(
    "--space",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.yaml",
    help="Settings to search and their values.  [default: encoder, pooling, projection, width, depth, learning rate, "
    "dropout, average of weights, weights of losses]",
)
@click.option(
    "--jobs",
    "--train-workers",
    "workers",
    type=click.IntRange(min=1),
    help="Heads to train at the same time.  [default: one per CPU core, up to 3 on a GPU]",
)
@click.option("--dry-run", is_flag=True, help="Time some steps of each encoder, say how long it will take, and stop.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.yaml",
    help="Settings that the space does not vary, in sections `head` and `train`.",
)
@preset_option
@layer_option
@click.option("--label", help="Aspect whose MOS is learned.  [default: quality]")
@click.option(
    "--split",
    type=OneOf("split", ["grouped", "published"]),
    help="Items that are never read: whole prompts, or the store's own test part.  [default: grouped]",
)
@variant_option
@click.option(
    "--validation",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of the other items that compares trials.  [default: 0.1]",
)
@click.option("--epochs", type=click.IntRange(min=1), help="Epochs of every trial.  [default: 20]")
@click.option("--device", type=OneOf("device", ["auto", "cpu", "cuda"]), help="Device.  [default: auto]")
@click.option(
    "--pruner",
    type=OneOf("pruner", ["median", "hyperband", "none"]),
    default="median",
    show_default=True,
    help="Rule that stops weak trials early, by their validation curves.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the sampler (TPE).")
@click.option("--devices", type=click.IntRange(min=1), default=1, show_default=True, help="GPUs to spread heads over.")
@click.option(
    "--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Heads to train with the best settings."
)
@shared_options
def command(store: str | Path, out: Path, *, seeds: int, dry_run: bool, as_json: bool, **options: Any) -> None:
    """Search for the settings of the best head on STORE, then train and test it. Run it again to resume.

    Optuna proposes settings (TPE), trials are compared by validation SRCC, and weak ones stop early. The test part is
    not read during the search. At the end the best settings are trained with several seeds, beside those of the first
    trial (the defaults, as far as the space holds them), and both are tested once. Needs `pip install 'agiqa[search]'`.

    It writes OUT/trials.jsonl (a line per trial), OUT/best.yaml (for `agiqa train --config`), OUT/search.json and
    OUT/final, which `agiqa report OUT/final` makes a page of.
    """
    from agiqa.heads.searching.study import check_optuna
    from agiqa.store import open_store

    check_optuna()
    opened = open_store(store)
    settings = _settings(opened, options)
    if dry_run:
        _print_estimate(opened, settings, seeds=seeds, as_json=as_json)
        return
    from agiqa.bench.ablation.rows import rows_parts
    from agiqa.head_search import search_text, tune_head

    done = tune_head(opened, out, settings, seeds=seeds, workers=options["workers"])
    parts = ["\n".join(search_text(done, out)), *rows_parts(done.final.rows)]
    print_parts({"out": str(out), **done.record}, parts, as_json=as_json)
    total = len(done.final.failed) + done.final.trained
    fail_if_any(done.final.failed, total=total, what="final heads")


def _settings(store: "Store", options: dict[str, Any]) -> "SearchSettings":
    """The settings of the search. Those on the command line beat the file, which beats the preset."""
    from agiqa.heads.data.variants import as_variant
    from agiqa.heads.model.reading import features_for, usual_settings
    from agiqa.heads.searching.search import SearchSettings
    from agiqa.heads.searching.space import SHIPPED, read_space
    from agiqa.heads.settings.config import load_settings
    from agiqa.heads.settings.device import resolve_device

    shared = ("label", "split", "layer", "variant", "validation", "epochs", "device")
    named = {name: options[name] for name in shared}
    file, preset = options["config"], options["preset"]
    head, train = load_settings(file, named, preset=preset, usual=usual_settings(store))
    if options["split"] is None and "split" not in train.model_fields_set:
        train = train.model_copy(update={"split": "grouped"})
    if train.threads is None and resolve_device(train.device).type == "cpu":
        train = train.model_copy(update={"threads": 1})  # as many heads at once as there are cores
    read = features_for(as_variant(store, train.variant), head, train.layer)
    return SearchSettings(
        head=head,
        train=train,
        space=read_space(options["space"] or SHIPPED, read, head, train),
        **{name: options[name] for name in ("trials", "timeout", "seed", "pruner", "workers", "devices")},
    )


def _print_estimate(store: "Store", settings: "SearchSettings", *, seeds: int, as_json: bool) -> None:
    from agiqa.heads.searching.estimating import estimate_search
    from agiqa.progress import duration_text, say

    found = estimate_search(store, settings)
    for line in found.warnings:
        say(f"warning: {line}")
    result = {
        "trials": found.trials,
        "workers": found.workers,
        "seconds_per_trial": {name: round(value, 2) for name, value in found.seconds_per_trial.items()},
        "reading_seconds": round(found.reading, 2),
        "expected_seconds": round(found.seconds, 1),
        "timeout": settings.timeout,
        "final_heads": 2 * seeds,
    }
    rows = {name: f"{duration_text(value)} per trial" for name, value in found.seconds_per_trial.items()}
    lines = [
        table(rows),
        f"{found.trials} trials, {found.workers} at a time: about {duration_text(found.seconds)} if none is stopped "
        f"early{'' if settings.timeout is None else f', and at most {duration_text(settings.timeout)} by --timeout'}; "
        f"then {2 * seeds} final heads",
    ]
    print_result(result, "\n".join(lines), as_json=as_json)
