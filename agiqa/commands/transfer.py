"""`agiqa transfer`: how good a head of one data set is on another."""

from pathlib import Path
from typing import Any

import click

from agiqa.commands.options import (
    OneOf,
    StoreLocation,
    layer_option,
    output_options,
    train_workers_option,
    variant_option,
)
from agiqa.commands.output import fail_if_any, print_parts
from agiqa.commands.train import preset_option


class Counts(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """Whole numbers from 1 with commas between them, as a tuple; an empty text is none."""

    name = "N,N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Parse the numbers."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        words = [word.strip() for word in str(value).split(",") if word.strip()]
        if not all(word.isdigit() and int(word) for word in words):
            self.fail(f"{value!r} is no list of numbers such as 10,30,100.", param, ctx)
        return tuple(int(word) for word in words)


@click.command("transfer")
@click.argument("source", type=StoreLocation())
@click.argument("target", type=StoreLocation())
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE.yaml",
    help="Settings of the head, in sections `head` and `train`, and `few_shot` for those of few-shot trainings.",
)
@preset_option
@click.option("--label", help="Aspect whose MOS is predicted.  [default: quality]")
@click.option(
    "--split",
    type=OneOf("split", ["published", "grouped"]),
    help="Protocol: the stores' own splits, or whole prompts.  [default: published]",
)
@variant_option
@layer_option
@click.option("--names", help="Names of SOURCE and TARGET, as in 3k,2023.  [default: from their provenance]")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Seeds; each trains one head of every kind.",
)
@click.option(
    "--shots",
    type=Counts(),
    help="Numbers of training items of the few-shot curve.  [default: 10,30,100,300 as far as each data set goes]",
)
@click.option("--one-way", is_flag=True, help="From SOURCE to TARGET only.")
@train_workers_option
@output_options
def command(
    source: str | Path,
    target: str | Path,
    out: Path,
    *,
    config: Path | None,
    preset: str | None,
    label: str | None,
    split: str | None,
    variant: str | None,
    layer: str | None,
    names: str | None,
    seeds: int,
    shots: tuple[int, ...] | None,
    one_way: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Carry heads from SOURCE to TARGET and back. Run it again to train what is missing or failed.

    A head of one data set is applied, unchanged, to the other, and compared with a head trained there (w/ TP). It is
    also trained further on few items there, and compared with heads that start from random weights. Each data set has
    its own test part, which is never used for selection. Both stores need the same W_lm and, if they are sketches, the
    same basis.

    It writes OUT/results.jsonl (a line per head) and OUT/rows.jsonl (a line per row of the tables).
    """
    from agiqa.bench.recording.result_folders import RESULTS
    from agiqa.bench.transfer.plan import read_transfer_settings
    from agiqa.bench.transfer.results import transfer_parts
    from agiqa.bench.transfer.sides import named
    from agiqa.bench.transfer.transfer import run_transfer
    from agiqa.heads.model.reading import usual_settings
    from agiqa.store import open_store

    stores = named(open_store(source), open_store(target), names)
    usual = usual_settings(*stores.values())
    given = {"label": label, "split": split, "layer": layer, "variant": variant}
    settings = read_transfer_settings(config, given, preset=preset, usual=usual)
    done = run_transfer(stores, settings, out, seeds=seeds, shots=shots, one_way=one_way, workers=workers)
    result = {
        "results": str(out / RESULTS),
        "lines": done.lines,
        "trained": done.trained,
        "failed": [{"name": name, "error": error} for name, error in done.failed.items()],
        "rows": done.rows,
    }
    print_parts(result, transfer_parts(done.rows), as_json=as_json)
    fail_if_any(done.failed, total=done.lines, what="results")
