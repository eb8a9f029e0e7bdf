"""An ablation: every run of a grid trained over its store, a result line each, baselines, and the rows of a table.

OUT/about.json                        the stores and the grid
OUT/results.jsonl                     a line per run, appended as it ends
OUT/runs/NAME                         its run folder
OUT/baselines.jsonl, OUT/baselines/   predictors without a head on the same parts (baselines.py)
OUT/rows.jsonl                        means, intervals and comparisons, computed from these (rows.py)
OUT/lock                              held by the process at work
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.bench.ablation.grids import PlannedRun
from agiqa.bench.ablation.results import ResultLines, error_line, result_line
from agiqa.bench.ablation.rows import table_rows, write_rows
from agiqa.bench.baselines.baselines import run_baselines
from agiqa.bench.baselines.mean_features import MeanFeatures
from agiqa.bench.baselines.words import RatingWords
from agiqa.bench.recording.result_folders import RESULTS, ROWS, RUNS, working_in, write_about
from agiqa.bench.recording.result_lines import Line, ignored_line, scores_by_label, warning_lines
from agiqa.bench.recording.store_facts import facts_of
from agiqa.bench.recording.this_run import this_commit
from agiqa.errors import AgiqaError, UnknownName
from agiqa.heads.data.features import read_labels
from agiqa.heads.data.splits import PARTITION_SETTINGS
from agiqa.heads.evaluation.leaks import author_warnings
from agiqa.heads.settings.config import TrainConfig, read_yaml
from agiqa.heads.sweeps.head_jobs import HeadJob, JobOutcome, is_there
from agiqa.heads.sweeps.sweeping import Partitions, train_heads
from agiqa.heads.training.experiment import check_settings
from agiqa.progress import say
from agiqa.store import Store
from agiqa.version import agiqa_version

BASELINES = "baselines.jsonl"
_OF_A_DRAWING = tuple(name for name in PARTITION_SETTINGS if name not in ("fold", "held_out", "validation"))
"""What baselines that are told apart differ in; validation items are among those that they are fitted on."""


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """What became of a grid."""

    rows: list[Line]
    """Of the heads, then of the baselines, as in rows.jsonl."""
    failed: dict[str, str]
    """Names and errors of the runs that have no result."""
    trained: int
    """Runs that were trained, and not there before."""


def run_ablation(
    stores: Mapping[str, Store],
    plan: Sequence[PlannedRun],
    out: Path,
    *,
    grid: Path,
    words: Sequence[Path] = (),
    baseline_store: Store | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = say,
) -> Ablation:
    """Train what is missing of `plan`, read from the file `grid`, in the folder `out`; see `train_heads` for `workers`.

    `stores` are those that the runs name, and `words` conversation files with rating words, for that baseline. The
    baseline `features` reads `baseline_store` where it is given, such as the hidden states that the stores are
    sketches of. Runs that failed, or whose folders were removed, are trained again. `tell` gets a line per run that
    ends, and then each kind of warning that heads were trained with. Raises BusyStore where another process is at work
    in `out`, DataError for results of another store or of the same run with other settings, HeadError for a run on
    items or labels that its store does not have any more, and as
    `train_heads` and `run_baselines`. Before anything is trained: DataError for a `baseline_store` of raw logits or
    without an item of `stores`, UnknownName for a label or generator that a run names and its store does not have, and
    where something is wrong with every run (settings, features, split, labels) that of the first.
    Results of runs that are not in `plan` stay in the file and count for nothing.
    """
    told, commit = RatingWords(words), this_commit()  # what cannot be read is refused before anything is trained
    means = _mean_features(stores, baseline_store)
    _refuse_hopeless(stores, plan, started=(out / RESULTS).exists())
    at_first = [*_author_warnings(stores, plan), *_sketch_notes(means)]
    for line in at_first:
        tell(line)
    with working_in(out, "ablation"):
        facts = {name: facts_of(store) for name, store in stores.items()}
        results = ResultLines(out / RESULTS, plan, stores=facts)
        done = [run for run in plan if results.is_done(run) and _job(run, out).run.exists()]
        for name, store in stores.items():
            _check_done(store, [_job(run, out) for run in done if run.store == name])
        names = [run.name for run in plan]
        about = {"kind": "ablation", "stores": facts, "grid": read_yaml(grid), "runs": names}
        write_about(out, about if baseline_store is None else {**about, "baseline_store": facts_of(baseline_store)})
        if results.ignored:
            tell(ignored_line(out, results))
        clock = _Clock(len(plan), len(done), tell)
        trained = 0
        for name, store in stores.items():
            missing = [run for run in plan if run.store == name and run not in done]
            trained += _train(store, missing, out, results, workers, clock, commit=commit) if missing else 0
        for line in warning_lines((results.lines[run.name] for run in plan), told=at_first):
            tell(line)
        rows = table_rows(plan, results.lines, out, _baselines(stores, plan, out, told, means))
        write_rows(out / BASELINES, [row for row in rows if row["kind"] == "baseline"])
        write_rows(out / ROWS, rows)
    errors = {run.name: results.lines[run.name].get("error") for run in plan}
    failed = {name: error for name, error in errors.items() if error is not None}
    return Ablation(rows=rows, failed=failed, trained=trained)


def _mean_features(stores: Mapping[str, Store], baseline_store: Store | None) -> dict[str, MeanFeatures]:
    """What the baseline of each store reads. Raises DataError for a `baseline_store` that cannot be read for one."""
    if baseline_store is None:
        return {name: MeanFeatures(store) for name, store in stores.items()}
    shared = MeanFeatures(baseline_store)
    shared.refuse_logits()
    for store in stores.values():
        shared.places_of(store)
    return dict.fromkeys(stores, shared)


def _sketch_notes(means: Mapping[str, MeanFeatures]) -> Iterator[str]:
    """A line where the baseline of some stores reads a sketch."""
    names = [name for name, found in means.items() if found.source.encoding == "sketch"]
    if names:
        where = f" of {', '.join(name for name in names if name)}" if any(names) else ""
        yield (
            f"note: the baseline on mean features{where} reads a sketch only, which holds less than the hidden states "
            "that it was made from: heads look better beside it. --baseline-store names hidden states to read."
        )


def _baselines(
    stores: Mapping[str, Store],
    plan: Sequence[PlannedRun],
    out: Path,
    words: RatingWords,
    means: Mapping[str, MeanFeatures],
) -> list[Line]:
    """The baselines of every store, protocol and way of drawing its items that the plan has."""
    found: list[Line] = []
    for name, store in stores.items():
        by_protocol: dict[str, dict[tuple[Any, ...], list[TrainConfig]]] = {}
        for run in plan:
            if run.store == name:
                how = tuple(getattr(run.train, setting) for setting in _OF_A_DRAWING)
                by_protocol.setdefault(run.protocol, {}).setdefault(how, []).append(run.train)
        for protocol, drawn in by_protocol.items():
            varied = [k for k in range(len(_OF_A_DRAWING)) if len({how[k] for how in drawn}) > 1]
            for how, trained in drawn.items():
                shown = {_OF_A_DRAWING[k]: how[k] for k in varied}
                found += run_baselines(
                    store,
                    trained,
                    protocol=protocol,
                    out=out,
                    words=words,
                    store_name=name,
                    means=means[name],
                    shown=shown,
                )
    return found


def _refuse_hopeless(stores: Mapping[str, Store], plan: Sequence[PlannedRun], *, started: bool) -> None:
    """Raise what is known to be wrong before anything is trained.

    That is the first name that a run has and its store does not: a label, a generator. Unless the ablation has
    `started` before, it is also the error of the first run where each has one, such as too many folds, and where each
    run of a protocol has one on one store.
    """
    partitions = {name: Partitions(store) for name, store in stores.items()}
    errors: list[AgiqaError] = []
    for run in plan:
        try:
            check_settings(stores[run.store], run.head, run.train)
            for items in partitions[run.store].of(run.train).parts().values():
                read_labels(stores[run.store], items, label=run.train.label)
        except UnknownName as error:
            error.add_note(f"in {run.name}, a run of this grid; nothing was trained")
            raise
        except AgiqaError as error:
            errors.append(error)
    if started:
        return
    _refuse_undrawable(plan, partitions)
    if errors and len(errors) == len(plan):
        errors[0].add_note(
            f"in {plan[0].name}, the first of {len(plan)} run{'s' * (len(plan) > 1)}, none of which can be trained"
        )
        raise errors[0]


def _refuse_undrawable(plan: Sequence[PlannedRun], partitions: Mapping[str, Partitions]) -> None:
    """Raise the first error of a protocol none of whose splits a store can be drawn into."""
    groups: dict[tuple[str, str], list[PlannedRun]] = {}
    for run in plan:
        if run.asked:
            groups.setdefault((run.store, run.protocol), []).append(run)
    for (store, protocol), runs in groups.items():
        error: AgiqaError | None = None
        for run in runs:
            try:
                partitions[run.store].of(run.train)
            except AgiqaError as found:
                error = error or found
            else:
                break
        else:
            assert error is not None  # there is a run, and none was drawn
            where = f" on the store {store!r}" if store else ""
            error.add_note(
                f"in {runs[0].name}, the first of {len(runs)} runs of the protocol {protocol}{where}, none "
                f"of which can be trained. Change the protocol, or leave it out."
            )
            raise error


def _author_warnings(stores: Mapping[str, Store], plan: Sequence[PlannedRun]) -> Iterator[str]:
    """A line for each store and part whose items, of any run, read a teacher's rating words; see `author_warnings`."""
    for name, store in stores.items():
        drawn, items = Partitions(store), {"validation": [np.arange(0)], "test": [np.arange(0)]}
        for run in plan:
            if run.store == name:
                with suppress(AgiqaError):  # a run that cannot be drawn tells why itself
                    partition = drawn.of(run.train)
                    items["validation"].append(partition.validation)
                    items["test"].append(partition.test)
        where = f"{name}: " if name else ""
        parts = {part: np.unique(np.concatenate(of_runs)) for part, of_runs in items.items()}
        yield from (f"warning: {where}{line}" for line in author_warnings(store, parts))


class _Clock:
    """Counts the runs that end, and tells of each, with the time left."""

    def __init__(self, total: int, done: int, tell: Callable[[str], None]) -> None:
        self._total, self._before, self._done = total, done, done
        self._tell = tell
        self._started = time.monotonic()
        if done:
            tell(f"{done} of {total} runs are there already")

    def end(self, line: Line) -> None:
        """A run has ended."""
        self._done += 1
        took = time.monotonic() - self._started
        left = took / (self._done - self._before) * (self._total - self._done)
        self._tell(f"[{self._done}/{self._total}] {line['name']}: {_told(line)}, {_duration(left)} left")


def _train(
    store: Store,
    missing: Sequence[PlannedRun],
    out: Path,
    results: ResultLines,
    workers: int | None,
    clock: _Clock,
    *,
    commit: str | None,
) -> int:
    """Train the runs that are missing, and append their lines; how many were trained, and not there or failed."""
    jobs = [_job(run, out) for run in missing]
    by_folder = {job.run: run for job, run in zip(jobs, missing, strict=True)}

    def line_of(ended: JobOutcome) -> Line:
        run = by_folder[ended.job.run]
        if ended.error is not None:
            return error_line(run, store.id, ended.error, agiqa=agiqa_version(), commit=commit)
        return result_line(run, store.id, ended.load(), commit=commit)

    trained = 0
    with closing(train_heads(store, jobs, workers=workers)) as outcomes:
        for ended in outcomes:
            line = line_of(ended)
            results.append(line)
            clock.end(line)
            trained += ended.status == "trained"
    return trained


def _job(run: PlannedRun, out: Path) -> HeadJob:
    return HeadJob(run=out / RUNS / run.name, head=run.head, train=run.train, preset=run.preset)


def _check_done(store: Store, jobs: Sequence[HeadJob]) -> None:
    """Raise HeadError for a run folder of other items or labels: a store that is labelled anew keeps its id."""
    partitions = Partitions(store)
    for job in jobs:
        is_there(store, job, partitions.of(job.train))


def _told(line: Line) -> str:
    """The validation SRCC and the time of a run, or its error, on one line."""
    if "error" in line:
        return f"failed ({line['error'].splitlines()[0]})"
    scores = scores_by_label(line, "validation").items()
    values = [f"{label} {_digits(one['srcc'])}" for label, one in scores]
    return f"validation SRCC {', '.join(values) or '-'}, {line['seconds']:.1f} s"


def _digits(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
