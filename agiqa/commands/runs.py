"""`agiqa runs`: lists and compares trained runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agiqa.commands.options import OneOf, shared_options
from agiqa.commands.output import print_parts

if TYPE_CHECKING:
    from agiqa.bench.recording.tables import TextTable
    from agiqa.bench.recording.trained_runs import ListedRun, TrainedRun

SORTS = ("validation", "srcc", "plcc", "krcc", "rmse", "date", "name")
USUAL = Path("runs")


@click.command("runs")
@click.argument("folders", type=click.Path(path_type=Path, exists=True, file_okay=False), nargs=-1)
@click.option(
    "--sort",
    type=OneOf("order", SORTS),
    default="validation",
    show_default=True,
    help="Order of the runs: SRCC on validation items, a test metric, date or name.",
)
@click.option("--label", help="Aspect whose scores are listed.  [default: all that a run has]")
@click.option(
    "--paired",
    is_flag=True,
    help="Test the differences, on the same test images, to the run with the best validation SRCC.",
)
@shared_options
def command(folders: tuple[Path, ...], sort: str, label: str | None, *, paired: bool, as_json: bool) -> None:
    """List the runs in FOLDERS, such as `runs`: settings that differ, scores with intervals, date and store.

    FOLDERS are run folders of `agiqa train`, or folders that hold some at any depth; the default is `runs`, or the
    current folder if there is no `runs`. With --paired, runs that differ in their seed alone are one row. There is no
    p-value for rows of one seed, since one seed does not show how much seeds matter.
    """
    from agiqa.bench.ablation.rows import rows_parts
    from agiqa.bench.ablation.single_runs import compare_runs
    from agiqa.bench.recording.trained_runs import differing, find_runs, listed_runs
    from agiqa.errors import DataError, UnknownName
    from agiqa.progress import say

    places = folders or (USUAL if USUAL.is_dir() else Path(),)
    runs, problems = find_runs(places)
    if not runs:
        where = ", ".join(str(place.resolve() if place == Path() else place) for place in places)
        message = f"No run of `agiqa train` is in {where}. {' '.join(problems)}".rstrip()
        raise DataError(message)
    known = {one for run in runs for one in run.labels}
    if label is not None and label not in known:
        kind = "label of these runs"
        raise UnknownName.of(kind, label, sorted(known))
    names, lines = differing(runs), listed_runs(runs, sort=sort, label=label)
    rows: list[dict[str, Any]] = []
    if paired:
        compared = compare_runs(runs)
        problems += compared.problems
        rows = [row for row in compared.rows if label in (None, row["label"])]
    for problem in problems:
        say(f"left out: {problem}")
    result = {
        "runs": [_record(line) for line in lines],
        "settings_that_differ": names,
        "problems": problems,
        **({"paired": rows} if paired else {}),
    }
    parts = [_table(lines, names), *_notes(runs), *([*rows_parts(rows), *_unpaired(rows)] if paired else [])]
    print_parts(result, parts, as_json=as_json)


def _record(line: "ListedRun") -> dict[str, Any]:
    run = line.run
    return {
        "run": run.name,
        "label": line.label,
        "settings": dict(run.settings),
        "store": run.store_id,
        "location": run.location or None,
        "model": run.model or None,
        "trained_at": run.trained_at,
        "chosen_epoch": run.metrics.get("chosen_epoch"),
        "validation": run.scores("validation", line.label) or None,
        "test": run.scores("test", line.label) or None,
    }


def _table(lines: "Sequence[ListedRun]", names: Sequence[str]) -> "TextTable":
    """A row per run and label; columns that are the same or empty in all rows are left out."""
    from agiqa.bench.recording.rows import score_text
    from agiqa.bench.recording.tables import TextTable

    columns: dict[str, list[str]] = {"run": [line.run.name for line in lines]}
    columns["label"] = [line.label for line in lines]
    columns["settings that differ"] = [_settings(line.run, names) for line in lines]
    columns["seed"] = [str(line.run.settings["seed"]) for line in lines]
    for metric in ("srcc", "plcc"):
        tests = [line.run.scores("test", line.label) or None for line in lines]
        columns[f"test {metric.upper()}"] = [score_text(test, metric, undefined="undefined") for test in tests]
    for metric in ("krcc", "rmse"):
        columns[metric.upper()] = [_number(line.value(metric)) for line in lines]
    columns["validation SRCC"] = [_number(line.run.scores("validation", line.label).get("srcc")) for line in lines]
    columns["date"] = [(line.run.trained_at or "-")[:16].replace("T", " ") for line in lines]
    columns["store"] = [line.run.store for line in lines]
    needed = {"label": len(set(columns["label"])) > 1, "settings that differ": bool(names)}
    shown = [name for name, cells in columns.items() if needed.get(name, True) and set(cells) != {"-"}]
    return TextTable(head=shown, rows=list(zip(*(columns[name] for name in shown), strict=True)))


def _settings(run: "TrainedRun", names: Sequence[str]) -> str:
    return ", ".join(f"{name}={run.settings.get(name)}" for name in names) or "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _notes(runs: "Sequence[TrainedRun]") -> list[str]:
    """A sentence if the runs were tested on different images.

    What runs record of their test items differs by store too, so runs of several stores are compared by the images.
    """
    from agiqa.bench.recording.trained_runs import tested_images

    recorded = {found for run in runs if (found := run.config.get("data", {}).get("items", {}).get("test"))}
    if len(recorded) < 2:
        return []
    tested = {found for run in runs if (found := tested_images(run))}
    if len(tested) < 2:
        return []
    return [f"These runs have {len(tested)} different test parts. Compare scores only between runs of the same one."]


def _unpaired(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Why nothing was compared."""
    if any(row["against"] for row in rows):
        return []
    return [
        "Nothing was compared: all runs differ in their seed alone, have no validation items, or were tested on "
        "different images."
    ]
