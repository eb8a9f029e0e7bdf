"""`agiqa ablate`: a grid of heads over one store."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from agiqa.commands.options import StoreLocation, output_options, train_workers_option, variant_option
from agiqa.commands.output import fail_if_any, print_parts

if TYPE_CHECKING:
    from agiqa.bench.ablation.ablation import Ablation
    from agiqa.store import Store

SHIPPED = sorted(
    file.name.removesuffix(".yaml") for file in (resources.files("agiqa.bench.ablation") / "shipped").iterdir()
)
"""The built-in grids, by name."""


class Grid(click.ParamType):  # type: ignore[type-arg]  # pyright: ignore[reportMissingTypeArgument]  # newer click
    """A grid by name, or a YAML file; `find_grid` resolves it."""

    name = "NAME|FILE.yaml"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shipped grids, or else files."""
        names = [CompletionItem(name) for name in SHIPPED if name.startswith(incomplete)]
        return names or click.Path().shell_complete(ctx, param, incomplete)


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
    "--grid",
    required=True,
    type=Grid(),
    help=f"Built-in ({', '.join(SHIPPED)}), or a YAML file as above.",
)
@click.option(
    "--store",
    "named",
    type=NamedStore(),
    multiple=True,
    metavar="NAME=STORE",
    help="Further store, which the grid names in its setting `store`; repeatable. STORE itself is then `main`.",
)
@click.option(
    "--words",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    help="Conversation file whose rating words are a baseline; repeatable.",
)
@click.option(
    "--baseline-store",
    type=StoreLocation(),
    metavar="STORE",
    help="Store of the same items for the closed-form baselines, such as the hidden states behind a sketch.  "
    "[default: the store of the heads]",
)
@variant_option
@train_workers_option
@output_options
def command(
    store: str | Path,
    out: Path,
    grid: str,
    named: tuple[tuple[str, str | Path], ...],
    words: tuple[Path, ...],
    baseline_store: str | Path | None,
    variant: str | None,
    *,
    workers: int | None,
    as_json: bool,
) -> None:
    """Train every head of a grid on STORE. Run it again to train what is missing or failed.

    It writes OUT/results.jsonl (a line per run), OUT/rows.jsonl (a line per row of the table) and OUT/runs. The table
    has means over seeds, intervals over prompts and seeds, the paired difference to the head with the best
    validation SRCC, and baselines without a head. `agiqa report OUT` makes a page. Test results choose nothing.

    \b
    A grid file has the keys
      base       settings of all runs (flat), and `preset`
      grid       settings and lists of values; every combination is a run;
                 `layer: all` is every layer of STORE
      runs       a list of settings, added to the grid
      seeds      seeds of every run
      protocols  published, grouped, leave-one-generator-out
    """
    from agiqa.bench.ablation.ablation import run_ablation
    from agiqa.bench.ablation.grids import find_grid, read_grid
    from agiqa.bench.ablation.protocols import generators_of, layers_of
    from agiqa.bench.ablation.rows import rows_parts
    from agiqa.heads.model.reading import usual_settings
    from agiqa.store import open_store

    stores, file = _opened(store, named), find_grid(grid)
    plan = read_grid(
        file,
        stores=list(stores),
        usual={name: usual_settings(source) for name, source in stores.items()},
        generators=lambda: generators_of(*stores.values()),
        layers=lambda: layers_of(*stores.values()),
        variant=variant,
    )
    beside = None if baseline_store is None else open_store(baseline_store)
    done = run_ablation(stores, plan, out, grid=file, words=words, baseline_store=beside, workers=workers)
    print_parts(_result(out, len(plan), done), rows_parts(done.rows), as_json=as_json)
    fail_if_any(done.failed, total=len(plan), what="runs")


def _opened(store: str | Path, named: Sequence[tuple[str, str | Path]]) -> "dict[str, Store]":
    """All stores by name. Raises click.UsageError for a name given twice."""
    from agiqa.store import open_store

    stores = {"main" if named else "": open_store(store)}
    for name, location in named:
        if name in stores:
            message = f"Two stores are called {name!r}."
            raise click.UsageError(message)
        stores[name] = open_store(location)
    return stores


def _result(out: Path, runs: int, done: "Ablation") -> dict[str, Any]:
    """What the command prints with `--json`."""
    from agiqa.bench.recording.result_folders import RESULTS, ROWS

    return {
        "results": str(out / RESULTS),
        "rows": str(out / ROWS),
        "runs": runs,
        "trained": done.trained,
        "failed": [{"name": name, "error": error} for name, error in done.failed.items()],
        "table": done.rows,
    }
