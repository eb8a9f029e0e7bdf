"""The result lines of an ablation: one per run, held to the grid and the stores that it has now."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agiqa.bench.ablation.grids import PlannedRun
from agiqa.bench.recording.result_folders import ABOUT
from agiqa.bench.recording.result_lines import Line, LineFile, error_facts, outcome_facts, training_facts
from agiqa.bench.recording.store_facts import place_of, spelled
from agiqa.errors import DataError
from agiqa.heads.evaluation.runs import Run, complete_settings
from agiqa.heads.settings.config import default_settings
from agiqa.heads.training.experiment import OF_THE_MACHINE


class ResultLines(LineFile):
    """`results.jsonl` of an ablation."""

    def __init__(self, path: Path, plan: Sequence[PlannedRun], *, stores: Mapping[str, Mapping[str, Any]]) -> None:
        """Read what is there; the rest of a line that a kill tore off is removed.

        `stores` is what `facts_of` says of them, by name. Lines of runs that are not in `plan` are ignored. Raises
        DataError for lines that are none, and for a line of `plan` on another store or with other settings.
        """
        runs = {run.name: run for run in plan}

        def check(line: Line, where: str) -> None:
            _check(line, where, runs[line["name"]], stores, path.with_name(ABOUT))

        keys = {"store": str, "config": dict}
        kept = "the runs before are kept"
        super().__init__(path, kind="an ablation", keys=keys, kept=kept, planned=runs, check=check)


def result_line(run: PlannedRun, store: str, trained: Run, *, commit: str | None) -> Line:
    """What is told of a run that was trained: its settings, where and how long it ran, and its metrics."""
    return {**_identity(run, store), **training_facts(trained, commit=commit), **outcome_facts(trained)}


def error_line(run: PlannedRun, store: str, error: str, *, agiqa: str, commit: str | None) -> Line:
    """What is told of a run that failed."""
    return {**_identity(run, store), **error_facts(error, agiqa=agiqa, commit=commit)}


def _identity(run: PlannedRun, store: str) -> Line:
    return {
        "name": run.name,
        "row": run.row,
        "protocol": run.protocol,
        "store_name": run.store,
        "config": run.config,
        "seed": run.train.seed,
        "store": store,
    }


def _check(line: Line, where: str, run: PlannedRun, stores: Mapping[str, Mapping[str, Any]], about: Path) -> None:
    """Raise DataError for a line of `run` on another store or with other settings."""
    store = stores[run.store]
    if line["store"] != store["id"]:
        there = spelled(line["store"], place_of(about, line["store"]))
        here = spelled(store["id"], store["path"])
        message = f"{where}: a run on the store {there}, and this is {here}. Choose another OUT."
        raise DataError(message)
    config, now = {**default_settings(), **complete_settings(line["config"])}, run.config
    names = [name for name in {**line["config"], **now} if name not in OF_THE_MACHINE]
    different = [name for name in names if config.get(name) != now.get(name)]
    if different:
        name = different[0]
        message = (
            f"{where}: the run {line['name']!r} had {name} {config.get(name)!r}, and this grid has "
            f"{now.get(name)!r}. Choose another OUT, or go on with its grid."
        )
        raise DataError(message)
