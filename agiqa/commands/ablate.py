"""`agiqa ablate`: a grid of heads over one store."""

from pathlib import Path

import click

from agiqa.commands.common import StoreLocation, output_options, print_result


@click.command("ablate")
@click.argument("store", type=StoreLocation())
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--config",
    "grid",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="YAML with `base` (settings of all runs, flat, and `preset`), `grid` (a setting and a list of values, every "
    "combination of which is run) and `runs` (a list of settings, added to the grid).",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that train one head each at a time.  [default: as many as cores (one thread each, unless `threads` "
    "is set); up to 3 on a GPU]",
)
@output_options
def command(store: str | Path, out: Path, grid: Path, *, workers: int | None, as_json: bool) -> None:
    """Train every head of a grid on STORE, and write OUT/results.jsonl (a line per run) and OUT/runs.

    Features are decoded once for all runs. A run that fails is kept with its error, and the rest goes on. The same
    command again trains what is missing or failed. At the end comes a table of the means over seeds, in the order of
    the grid; nothing is chosen by test results.
    """
    from agiqa.bench.ablation import RESULTS, run_ablation
    from agiqa.bench.ablation_results import as_text, summary
    from agiqa.bench.grids import read_grid
    from agiqa.errors import HeadError
    from agiqa.store import open_store

    plan = read_grid(grid)
    done = run_ablation(open_store(store), plan, out, workers=workers)
    rows = summary(plan, done.lines)
    result = {
        "results": str(out / RESULTS),
        "runs": len(plan),
        "trained": done.trained,
        "failed": [{"name": name, "error": error} for name, error in done.failed.items()],
        "table": rows,
    }
    print_result(result, as_text(rows), as_json=as_json)
    if done.failed:
        lines = "\n".join(f"  {name}: {error.splitlines()[0]}" for name, error in done.failed.items())
        message = f"{len(done.failed)} of {len(plan)} runs failed; the same command tries them again:\n{lines}"
        raise HeadError(message)
