"""An ablation: trains every run of a grid, fits baselines on the same parts, and computes the rows of a table.

OUT/about.json                        the stores and the grid
OUT/results.jsonl                     a line per run, appended as it ends
OUT/runs/NAME                         its run folder
OUT/baselines.jsonl, OUT/baselines/   predictors without a head on the same parts (baselines.py)
OUT/rows.jsonl                        means, intervals and comparisons, computed from these (rows.py)
OUT/lock                              held by the process at work
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agiqa.bench.ablation.grids import PlannedRun
from agiqa.bench.ablation.rows import table_rows
from agiqa.bench.ablation.sources import Key, fit_baselines, key_of, mean_features, sketch_notes, sources_of
from agiqa.bench.baselines.evidence import RatingWords
from agiqa.bench.baselines.recorded import RecordedBaselines
from agiqa.bench.recording.result_folders import (
    ABOUT,
    RESULTS,
    ROWS,
    RUNS,
    Line,
    LineFile,
    error_facts,
    outcome_facts,
    recorded_location,
    scores_by_label,
    store_facts,
    store_text,
    training_facts,
    warning_lines,
    working_in,
    write_about,
    write_rows,
)
from agiqa.errors import AgiqaError, DataError, UnknownName
from agiqa.heads.data.features import FeatureSource, read_labels
from agiqa.heads.evaluation.leaks import author_warnings
from agiqa.heads.evaluation.runs import complete_settings
from agiqa.heads.model.reading import features_for
from agiqa.heads.settings.config import default_settings, read_yaml
from agiqa.heads.sweeps.head_jobs import HeadJob, JobOutcome, is_there
from agiqa.heads.sweeps.sweeping import Partitions, train_heads
from agiqa.heads.sweeps.watching import SweepWatch, watching
from agiqa.heads.training.experiment import OF_THE_MACHINE, check_settings
from agiqa.progress import say
from agiqa.store import AnyStore
from agiqa.version import this_commit

BASELINE_LINES = "baselines.jsonl"


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The outcome of a grid."""

    rows: list[Line]
    """Rows of the heads, then of the baselines, as in rows.jsonl."""
    failed: dict[str, str]
    """Names and errors of the runs without a result."""
    trained: int
    """How many runs this call trained."""


def run_ablation(
    stores: Mapping[str, AnyStore],
    plan: Sequence[PlannedRun],
    out: Path,
    *,
    grid: Path,
    words: Sequence[Path] = (),
    baseline_store: AnyStore | None = None,
    workers: int | None = None,
    tell: Callable[[str], None] = say,
) -> Ablation:
    """Train the missing runs of `plan`, read from the file `grid`, in the folder `out`; `workers` as in `train_heads`.

    `stores` maps the names in `plan` to stores. `words` are conversation files for the baseline `rating word`. The
    baseline `features` reads `baseline_store` if it is given, such as the hidden states from which the stores were
    sketched. Runs that failed, or whose folders were removed, are trained again, and so are baselines whose csv is not
    what it was, or that depend on something else now (see recorded.py). Results of runs outside `plan` stay
    in the file and are ignored. `tell` gets a line per run that ends, and then each kind of warning of the heads.

    Raises BusyStore where another process is at work in `out`, DataError for results of another store or of the same
    run with other settings, HeadError for a run on items or labels that changed in its store, and as `train_heads` and
    `run_baselines`. Before anything is trained: DataError for a `baseline_store` of raw logits or without an item of
    `stores`, UnknownName for a label or generator that a store lacks, and the first run's error where all have one.
    """
    rating_words, commit = RatingWords(words), this_commit()  # unreadable words are refused before anything is trained
    sources = sources_of(stores, plan)
    means = mean_features(sources, plan, baseline_store)
    _refuse_hopeless(sources, plan, started=(out / RESULTS).exists())
    at_first = [*_author_warnings(sources, plan), *sketch_notes(means)]
    for line in at_first:
        tell(line)
    with working_in(out, "ablation"):
        facts = {name: store_facts(store) for name, store in stores.items()}
        results = open_results(out / RESULTS, plan, stores=facts)
        done = _done(plan, results, sources, out)
        names = [run.name for run in plan]
        about = {"kind": "ablation", "stores": facts, "grid": read_yaml(grid), "runs": names}
        write_about(out, about if baseline_store is None else {**about, "baseline_store": store_facts(baseline_store)})
        for line in results.ignored_note():
            tell(line)
        if done:
            tell(f"{len(done)} of {len(plan)} runs exist already")
        trained = 0
        with watching("ablation", len(plan), "runs", done=len(done)) as watch:
            training = _Training(out, results, workers, watch, tell, commit=commit, done=len(done), total=len(plan))
            for key, source in sources.items():
                missing = [run for run in plan if key_of(run) == key and run not in done]
                trained += training.train(source, missing, store=facts[key[0]]["id"]) if missing else 0
        for line in warning_lines((results.lines[name] for name in names), printed=at_first):
            tell(line)
        recorded = RecordedBaselines(out / BASELINE_LINES)
        baselines = fit_baselines(sources, plan, out, rating_words, means, recorded)
        for line in recorded.notes(len(baselines)):
            tell(line)
        rows = table_rows(plan, results.lines, out, baselines)
        write_rows(out / BASELINE_LINES, [row for row in rows if row["kind"] == "baseline"])
        write_rows(out / ROWS, rows)
    return Ablation(rows=rows, failed=results.failed(names), trained=trained)


def _done(
    plan: Sequence[PlannedRun], results: LineFile, sources: Mapping[Key, FeatureSource], out: Path
) -> list[PlannedRun]:
    """The runs with a result and a folder. Raises HeadError where items or labels changed: the store keeps its id."""
    done = [run for run in plan if results.is_done(run.name) and _job(run, out).run.exists()]
    for key, source in sources.items():
        partitions = Partitions(source)
        for run in done:
            if key_of(run) == key:
                is_there(source, _job(run, out), partitions.of(run.train))
    return done


def open_results(path: Path, plan: Sequence[PlannedRun], *, stores: Mapping[str, Line]) -> LineFile:
    """The lines of `plan` in results.jsonl; `stores` are their `store_facts` by name.

    Raises DataError as `LineFile`, and for a line on another store or with other settings.
    """
    runs = {run.name: run for run in plan}

    def check(line: Line, where: str) -> None:
        run = runs[line["name"]]
        store = stores[run.store]
        if line["store"] != store["id"]:
            there = store_text(line["store"], recorded_location(path.with_name(ABOUT), line["store"]))
            here = store_text(store["id"], store["path"])
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

    keys, kept = {"store": str, "config": dict}, "the runs before are kept"
    return LineFile(path, kind="an ablation", keys=keys, kept=kept, planned=runs, check=check)


def _refuse_hopeless(sources: Mapping[Key, FeatureSource], plan: Sequence[PlannedRun], *, started: bool) -> None:
    """Raise the errors that can be found before anything is trained.

    Raises UnknownName if a run names a label or generator that its store lacks. If the ablation has not `started`
    before, also raises if no run can be trained, or no run of one protocol on one store, such as for too many folds:
    the error of the first such run.
    """
    partitions = {key: Partitions(source) for key, source in sources.items()}
    errors: list[AgiqaError] = []
    for run in plan:
        try:
            source = sources[key_of(run)]
            check_settings(features_for(source, run.head, run.train.layer), run.head, run.train)
            for items in partitions[key_of(run)].of(run.train).parts().values():
                read_labels(source, items, label=run.train.label)
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


def _refuse_undrawable(plan: Sequence[PlannedRun], partitions: Mapping[Key, Partitions]) -> None:
    """Raise the first error of a protocol if none of its splits can be drawn from a store."""
    groups: dict[tuple[Key, str], list[PlannedRun]] = {}
    for run in plan:
        if run.asked:
            groups.setdefault((key_of(run), run.protocol), []).append(run)
    for (key, protocol), runs in groups.items():
        store, _ = key
        error: AgiqaError | None = None
        for run in runs:
            try:
                partitions[key_of(run)].of(run.train)
            except AgiqaError as found:
                error = error or found
            else:
                break
        else:
            assert error is not None  # there is a run, and none could be drawn
            where = f" on the store {store!r}" if store else ""
            error.add_note(
                f"in {runs[0].name}, the first of {len(runs)} runs of the protocol {protocol}{where}, none "
                f"of which can be trained. Change the protocol, or leave it out."
            )
            raise error


def _author_warnings(sources: Mapping[Key, FeatureSource], plan: Sequence[PlannedRun]) -> Iterator[str]:
    """A line for each source and part whose items, of any run, read a teacher's rating words; see `author_warnings`."""
    for key, source in sources.items():
        drawn, items = Partitions(source), {"validation": [np.arange(0)], "test": [np.arange(0)]}
        for run in plan:
            if key_of(run) == key:
                with suppress(AgiqaError):  # training a run that cannot be drawn reports why
                    partition = drawn.of(run.train)
                    items["validation"].append(partition.validation)
                    items["test"].append(partition.test)
        where = f"{key[0]}: " if key[0] else ""
        parts = {part: np.unique(np.concatenate(of_runs)) for part, of_runs in items.items()}
        yield from (f"warning: {where}{line}" for line in author_warnings(source, parts))


class _Training:
    """Trains runs, appends their lines, and prints each with the time left."""

    def __init__(
        self,
        out: Path,
        results: LineFile,
        workers: int | None,
        watch: SweepWatch,
        tell: Callable[[str], None],
        *,
        commit: str | None,
        done: int,
        total: int,
    ) -> None:
        self._out, self._results, self._workers, self._watch, self._tell = out, results, workers, watch, tell
        self._commit, self._done, self._total = commit, done, total

    def train(self, source: FeatureSource, missing: Sequence[PlannedRun], *, store: str) -> int:
        """Train the missing runs on `source`, a view of the store with the id `store`, or that store itself.

        Returns how many were trained now and without an error.
        """
        jobs = [_job(run, self._out) for run in missing]
        by_folder = {job.run: run for job, run in zip(jobs, missing, strict=True)}
        trained = 0
        with closing(train_heads(source, jobs, workers=self._workers, watch=self._watch)) as outcomes:
            for ended in outcomes:
                line = result_line(by_folder[ended.job.run], store, ended, commit=self._commit)
                self._results.append(line)
                self._done += 1
                place = f"[{self._done}/{self._total}] {line['name']}"
                self._tell(f"{place}: {_outcome_text(line)}, {self._watch.left} left")
                trained += ended.status == "trained"
        return trained


def _job(run: PlannedRun, out: Path) -> HeadJob:
    return HeadJob(run=out / RUNS / run.name, head=run.head, train=run.train, preset=run.preset)


def result_line(run: PlannedRun, store: str, ended: JobOutcome, *, commit: str | None) -> Line:
    """The line of a run on the store of id `store`: its settings, environment and metrics, or its error."""
    identity = {
        "name": run.name,
        "row": run.row,
        "protocol": run.protocol,
        "store_name": run.store,
        "config": run.config,
        "seed": run.train.seed,
        "store": store,
    }
    if ended.error is not None:
        return {**identity, **error_facts(ended.error, commit=commit)}
    trained = ended.load()
    return {**identity, **training_facts(trained, commit=commit), **outcome_facts(trained)}


def _outcome_text(line: Line) -> str:
    """The validation SRCC and the time of a run, or its error, on one line."""
    if "error" in line:
        return f"failed ({line['error'].splitlines()[0]})"
    scores = scores_by_label(line, "validation").items()
    values = [f"{label} {'undefined' if one['srcc'] is None else format(one['srcc'], '.4f')}" for label, one in scores]
    return f"validation SRCC {', '.join(values) or '-'}, {line['seconds']:.1f} s"
