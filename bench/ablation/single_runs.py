"""Single runs of `agiqa train` compared as an ablation compares its runs: rows over seeds, with paired differences."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agiqa.bench.ablation.grids import PlannedRun
from agiqa.bench.ablation.protocols import PART_SETTINGS, protocol_of
from agiqa.bench.ablation.rows import table_rows
from agiqa.bench.recording.predictions import read_predictions
from agiqa.bench.recording.result_folders import Line, outcome_facts, training_facts
from agiqa.bench.recording.trained_runs import TrainedRun, differing
from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.heads.evaluation.runs import METRICS, PREDICTIONS
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.training.experiment import OF_THE_MACHINE

_SHARED = ("seed", *PART_SETTINGS)
"""Settings in which the runs of one row may differ."""
_NOT_IN_ROWS = ("label", "split", *_SHARED, *OF_THE_MACHINE)


@dataclass(frozen=True, kw_only=True)
class ComparedRuns:
    """Runs as the rows of a table."""

    rows: list[Line]
    """As `table_rows` of an ablation."""
    lines: list[Line]
    """Result lines, with `path` of the run folder; `name` is the run's own."""
    stores: dict[str, TrainedRun]
    """A run of each store, by the name of the store in the rows."""
    problems: list[str]
    """The runs that are in no row, and why."""


def compare_runs(runs: Sequence[TrainedRun]) -> ComparedRuns:
    """Rows of runs that differ in seed or fold alone, each compared with the row of the best validation SRCC.

    A row is called by the settings in which the rows differ; where none do, by the folder of its first run. Raises
    DataError for runs of one row that were tested on different items.
    """
    plan, problems = _plan(runs)
    by_name = {str(run.path.resolve()): run for run in runs}
    kept, unequal = _whole(plan)
    lines = {one.name: _line(one, by_name[one.name]) for one in kept}
    rows = table_rows(kept, lines, Path())
    shown = [{**line, "name": by_name[name].name, "path": name} for name, line in lines.items()]
    stores = {one.store: by_name[one.name] for one in reversed(kept)}
    return ComparedRuns(
        rows=rows,
        lines=shown,
        stores=stores,
        problems=[*problems, *(by_name[name].name + why for name, why in unequal.items())],
    )


def _plan(runs: Sequence[TrainedRun]) -> tuple[list[PlannedRun], list[str]]:
    """The runs as those of a grid, and why some are left out."""
    stores, names = _store_names(runs), differing(runs, apart=_NOT_IN_ROWS)
    starts = len({_start(run) for run in runs}) > 1
    plan: list[PlannedRun] = []
    problems: list[str] = []
    seen: dict[str, str] = {}
    for run in runs:
        try:
            head = HeadConfig(**{name: run.settings[name] for name in HeadConfig.model_fields})
            train = TrainConfig(**{name: run.settings[name] for name in TrainConfig.model_fields})
        except (ConfigError, UnknownName, ValueError, TypeError, KeyError) as error:
            problems.append(f"{run.name} has settings that this agiqa does not know ({error}).")
            continue
        if (fault := _fault(run)) is not None:
            problems.append(f"{run.name} is in no table: {fault}")
            continue
        settings = {name: run.settings[name] for name in names} | ({"start": _start(run) or "none"} if starts else {})
        one = PlannedRun(
            name=str(run.path.resolve()),
            spelled=run.name,
            row=",".join(f"{name}={value}" for name, value in settings.items()),
            settings=settings,
            head=head,
            train=train,
            preset=_start(run) or None,  # runs of one row have the same start, and no setting says it
            store=stores[run.store_id],
            protocol=protocol_of(train),
            asked=False,
            answer=train.seed,
        )
        key = str((one.store, one.config))
        if key in seen:
            problems.append(f"{run.name} has the settings and the seed of {seen[key]}, which alone is in the tables.")
            continue
        seen[key] = run.name
        plan.append(one)
    return _named(plan), problems


def _fault(run: TrainedRun) -> str | None:
    """What a table needs and the files of the run lack."""
    try:
        for label in run.labels:
            read_predictions(run.path / PREDICTIONS, run.labels, label)
        outcome_facts(run)
    except DataError as error:
        return str(error)
    except (AttributeError, KeyError, TypeError) as error:
        return f"{run.path / METRICS} lacks what tables are made of ({error!r}). Train it anew, or leave it out."
    return None


def _named(plan: Sequence[PlannedRun]) -> list[PlannedRun]:
    """Rows without any setting of their own are called by the folder of their first run."""
    first: dict[tuple[str, str], str] = {}
    for one in plan:
        first.setdefault((one.row, one.store), Path(one.name).name)
    return [one if one.row else replace(one, row=first[one.row, one.store]) for one in plan]


def _whole(plan: Sequence[PlannedRun]) -> tuple[list[PlannedRun], dict[str, str]]:
    """The runs of the seeds that were tested on the most parts, row by row, and why the others are left out."""
    parts: dict[tuple[Any, ...], dict[int, set[str]]] = {}
    for one in plan:
        parts.setdefault(_row_of(one), {}).setdefault(one.answer, set()).add(_part(one))
    kept: list[PlannedRun] = []
    unequal: dict[str, str] = {}
    for one in plan:
        of_seeds = parts[_row_of(one)]
        if of_seeds[one.answer] == max(of_seeds.values(), key=len):
            kept.append(one)
        else:
            unequal[one.name] = f" has seed {one.answer}, of which other folds are missing: it is in no table."
    return kept, unequal


def _row_of(one: PlannedRun) -> tuple[Any, ...]:
    config = {name: value for name, value in one.config.items() if name not in _SHARED}
    return one.store, one.protocol, json.dumps(config, default=str)


def _part(one: PlannedRun) -> str:
    return str([one.config.get(name) for name in PART_SETTINGS])


def _start(run: TrainedRun) -> str:
    """The name of the run that it was started from; empty without one."""
    start: Any = run.config.get("start")
    return str(start.get("run")) if isinstance(start, dict) else ""


def _store_names(runs: Sequence[TrainedRun]) -> dict[str, str]:
    """The name of each store by its id: none for the only one, else its folder, with its id where two are alike."""
    stores = {run.store_id: run.store for run in runs}
    if len(stores) == 1:
        return dict.fromkeys(stores, "")
    seen = Counter(stores.values())
    return {store: name if seen[name] == 1 else f"{name} {store[:6]}" for store, name in stores.items()}


def _line(planned: PlannedRun, run: TrainedRun) -> Line:
    return {
        "row": planned.row,
        "protocol": planned.protocol,
        "store_name": planned.store,
        "config": dict(planned.config),
        "seed": planned.train.seed,
        "store": run.store_id,
        **training_facts(run, commit=None),
        **outcome_facts(run),
    }
