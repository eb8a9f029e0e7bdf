"""`agiqa ablate`: a grid of heads over one store."""

from pathlib import Path
from typing import Any

import click

from agiqa.commands.common import StoreLocation, fail_if_any, output_options, print_result


class NamedStore(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """`NAME=STORE` as (name, location)."""

    name = "NAME=STORE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str | Path]:
        """Split at the first equals sign."""
        if isinstance(value, tuple):
            return value  # pyright: ignore[reportUnknownVariableType]
        name, equals, location = str(value).partition("=")
        if not (name and equals and location):
            self.fail(f"{value!r} is not NAME=STORE.", param, ctx)
        return name, StoreLocation().convert(location, param, ctx)


@click.command("ablate")
@click.argument("store", type=StoreLocation())
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--config",
    "grid",
    required=True,
    metavar="FILE|NAME",
    help="A grid that agiqa brings (quick, heads, table-iv, table-iii, losses, roles, ranks), or YAML with `base` "
    "(settings of all runs, flat, and `preset`), `grid` (a setting and a list of values, every combination of which is "
    "run), `runs` (a list of settings, added to the grid), `seeds` (of all of these) and `protocols` (published, "
    "grouped, leave-one-generator-out). `paper_compatible: true` in `base` tells what choosing the epoch on test adds.",
)
@click.option(
    "--store",
    "named",
    type=NamedStore(),
    multiple=True,
    metavar="NAME=STORE",
    help="A further store, which the grid calls NAME in its setting `store`; repeatable. STORE itself is `main` then.",
)
@click.option(
    "--words",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Conversation file with rating words, for the baseline of that name; repeatable.",
)
@click.option(
    "--baseline-store",
    type=StoreLocation(),
    metavar="STORE",
    help="Store of the same items, known by name and prompt, whose features the closed-form baseline reads, such as "
    "the hidden states that STORE is a sketch of.  [default: those of the store that the heads read]",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes that train one head each at a time.  [default: as many as cores (one thread each, unless `threads` "
    "is set); up to 3 on a GPU]",
)
@output_options
def command(
    store: str | Path,
    out: Path,
    grid: str,
    named: tuple[tuple[str, str | Path], ...],
    words: tuple[Path, ...],
    baseline_store: str | Path | None,
    *,
    workers: int | None,
    as_json: bool,
) -> None:
    """Train every head of a grid on STORE, and write OUT/results.jsonl (a line per run), OUT/rows.jsonl and OUT/runs.

    Features are decoded once for all runs. A run that fails is kept with its error, and the rest goes on. The same
    command again trains what is missing or failed. At the end comes a table: means over seeds, intervals by prompt,
    the paired difference to the best head by validation, and baselines without a head, compared alike. Nothing is
    chosen by test results. `agiqa report OUT` makes pictures and a page of it.
    """
    from agiqa.bench.ablation.ablation import run_ablation
    from agiqa.bench.ablation.grids import find_grid, read_grid
    from agiqa.bench.ablation.protocols import generators_of
    from agiqa.bench.ablation.rows import rows_text
    from agiqa.bench.recording.result_folders import RESULTS, ROWS
    from agiqa.heads.model.projection import usual_projection
    from agiqa.store import open_store

    stores = {"main" if named else "": open_store(store)}
    for name, location in named:
        if name in stores:
            message = f"Two stores are called {name!r}."
            raise click.UsageError(message)
        stores[name] = open_store(location)
    file = find_grid(grid)
    projections = {name: usual_projection(source) for name, source in stores.items()}
    plan = read_grid(
        file, stores=list(stores), projections=projections, generators=lambda: generators_of(*stores.values())
    )
    beside = None if baseline_store is None else open_store(baseline_store)
    done = run_ablation(stores, plan, out, grid=file, words=words, baseline_store=beside, workers=workers)
    result = {
        "results": str(out / RESULTS),
        "rows": str(out / ROWS),
        "runs": len(plan),
        "trained": done.trained,
        "failed": [{"name": name, "error": error} for name, error in done.failed.items()],
        "table": done.rows,
    }
    print_result(result, rows_text(done.rows), as_json=as_json)
    fail_if_any(done.failed, total=len(plan), what="runs")
