"""`agiqa transfer`: what a head of one data set is worth on another."""

from pathlib import Path
from typing import Any

import click

from agiqa.commands.common import StoreLocation, fail_if_any, one_of, output_options, print_result
from agiqa.commands.train import PRESET


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
    help="YAML with the sections `head` and `train` of `agiqa train`, and `few_shot`: settings of `train` that "
    "few-shot trainings have instead. Where neither it nor a preset sets the `projection`, heads read two sketches by "
    "`sketch`.",
)
@click.option("--preset", type=PRESET, help="Settings to start from, as of `agiqa train`: paper or published.")
@click.option("--label", help="Aspect whose MOS is predicted.  [default: quality]")
@click.option(
    "--split",
    type=one_of("split", ["published", "grouped"]),
    help="published (of each data set) or grouped (by prompt).  [default: published]",
)
@click.option("--names", help="What to call SOURCE and TARGET, as in 3k,2023.  [default: from their provenance]")
@click.option("--seeds", type=click.IntRange(min=1), default=5, show_default=True, help="Heads of each kind.")
@click.option(
    "--shots",
    type=Counts(),
    help="Training items of the few-shot curve, which always ends with all of them.  [default: those of 10,30,100,300 "
    "that each data set has]",
)
@click.option("--one-way", is_flag=True, help="From SOURCE to TARGET only.")
@click.option("--workers", type=click.IntRange(min=1), help="As of `agiqa ablate`.")
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
    names: str | None,
    seeds: int,
    shots: tuple[int, ...] | None,
    one_way: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Carry heads from SOURCE to TARGET and back, and write OUT/results.jsonl (a line per head) and OUT/rows.jsonl.

    A head of one data set is applied to the other as it is, set beside one that is trained on the other (w/ TP), and
    trained on with few items of it, beside fresh heads on the same items. Stores must share what their features mean:
    one W_lm and, of sketches, one basis. Each data set is tested on its own test part, on which nothing is chosen.
    The same command again trains what is missing or failed.
    """
    from agiqa.bench.recording.result_folders import RESULTS
    from agiqa.bench.transfer.plan import read_transfer_settings
    from agiqa.bench.transfer.results import transfer_text
    from agiqa.bench.transfer.sides import named
    from agiqa.bench.transfer.transfer import run_transfer
    from agiqa.heads.model.projection import usual_projection
    from agiqa.store import open_store

    stores = named(open_store(source), open_store(target), names)
    usual = usual_projection(*stores.values())
    settings = read_transfer_settings(config, {"label": label, "split": split}, preset=preset, projection=usual)
    done = run_transfer(stores, settings, out, seeds=seeds, shots=shots, one_way=one_way, workers=workers)
    result = {
        "results": str(out / RESULTS),
        "lines": done.lines,
        "trained": done.trained,
        "failed": [{"name": name, "error": error} for name, error in done.failed.items()],
        "rows": done.rows,
    }
    print_result(result, transfer_text(done.rows), as_json=as_json)
    fail_if_any(done.failed, total=done.lines, what="results")
