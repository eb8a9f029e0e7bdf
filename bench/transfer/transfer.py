"""A transfer: tests heads of one data set on another: applied unchanged, retrained, and trained on few items.

OUT/about.json, results.jsonl, rows.jsonl  see results.py
OUT/runs/NAME                              the run folder of every head
OUT/predictions/NAME.csv                   the predictions of a head for the other data set
OUT/lock                                   held by the process at work
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.recording.predictions import write_predictions
from agiqa.bench.recording.result_folders import (
    ROWS,
    RUNS,
    Line,
    error_facts,
    outcome_facts,
    training_facts,
    warning_lines,
    working_in,
    write_rows,
)
from agiqa.bench.transfer.plan import PlannedHead, PlannedLine, TransferPlan, TransferSettings, plan_transfer
from agiqa.bench.transfer.results import open_results, table_rows
from agiqa.bench.transfer.sides import Side, chosen_shots, making_differs, open_sides, scale_notes, shared
from agiqa.errors import AgiqaError
from agiqa.heads.data.features import read_labels
from agiqa.heads.data.scales import (
    conversions,
    convert_columns,
    lines_between,
    scales_of,
    scales_record,
    unknown_scales,
)
from agiqa.heads.evaluation.conformal import interval_records, recorded_errors
from agiqa.heads.evaluation.leaks import author_warnings, authors_by_part
from agiqa.heads.evaluation.mos_mappings import Mappings
from agiqa.heads.evaluation.runs import PREDICTIONS, Run, load_run
from agiqa.heads.evaluation.scoring import Moments, run_moments, scores_of_labels
from agiqa.heads.settings.device import cpu_threads
from agiqa.heads.settings.labels import by_label, of_each_label
from agiqa.heads.sweeps.head_jobs import HeadJob, is_there, with_notes
from agiqa.heads.sweeps.sweeping import Partitions, train_heads
from agiqa.heads.sweeps.watching import SweepWatch, watching
from agiqa.progress import say
from agiqa.store import AnyStore
from agiqa.version import agiqa_version, this_commit

APPLIED = "predictions"

_REPORTED = (
    "srcc, plcc, krcc and rmse of the predictions as they are, on the target's scale (`converted` where the source has "
    "another); those after a logistic mapping have the one fitted on the source's validation items, not fitted anew"
)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """The outcome of a transfer."""

    rows: list[Line]
    """The lines of rows.jsonl."""
    lines: int
    """How many results the plan has."""
    failed: dict[str, str]
    """Names and errors of the lines without a result."""
    trained: int
    """How many heads this call trained."""


def run_transfer(
    stores: Mapping[str, AnyStore],
    settings: TransferSettings,
    out: Path,
    *,
    seeds: int = 5,
    shots: Sequence[int] | None = None,
    one_way: bool = False,
    workers: int | None = None,
    tell: Callable[[str], None] = say,
) -> Transfer:
    """Train and apply the missing heads of a transfer between two named stores; `workers` as in `train_heads`.

    Heads that failed are tried again. Raises as `plan_transfer`, `open_sides` and `chosen_shots` before anything is
    written; BusyStore where another process is at work in `out`, DataError for results of other stores or settings,
    and HeadError for a head on items or labels that changed in its store.
    """
    first, second = stores
    commit = this_commit()
    sides = open_sides(stores, settings)
    targets = [second] if one_way else [second, first]
    counts, left_out = chosen_shots([sides[name] for name in targets], settings, shots)
    if left_out is not None:
        tell(f"note: {left_out}")
    plan = plan_transfer((first, second), settings, seeds=seeds, shots=counts, one_way=one_way)
    about = _about(sides, settings)
    if about["making_differs"]:
        tell(f"warning: {first} and {second} were made differently: {', '.join(about['making_differs'])}")
    for note in scale_notes(sides[first], sides[second], settings.train.labels):
        tell(note)
    about_authors = [
        f"warning: {side.name}: {line}"
        for side in sides.values()
        for line in author_warnings(side.store, side.partition.parts())
    ]
    for line in about_authors:
        tell(line)
    with working_in(out, "transfer"):
        work = _Work(plan, sides, settings, out, about, tell, commit=commit)
        trained = work.train(workers)
        work.apply()
        for line in warning_lines(work.lines_of_heads(), printed=about_authors):
            tell(line)
        rows = table_rows(plan, work.results.lines, out, protocol=settings.train.split, label=settings.train.label)
        write_rows(out / ROWS, rows)
    failed = work.results.failed(line.name for line in plan.lines)
    return Transfer(rows=rows, lines=len(plan.lines), failed=failed, trained=trained)


def _about(sides: Mapping[str, Side], settings: TransferSettings) -> dict[str, Any]:
    a, b = sides.values()
    return {
        "kind": "transfer",
        "stores": {name: side.about() for name, side in sides.items()},
        "settings": settings.record(),
        "making_differs": making_differs(a.store, b.store),
        "shared": {_direction(one.name, other.name): shared(one, other) for one, other in ((a, b), (b, a))},
        "agiqa": agiqa_version(),
    }


def _direction(source: str, target: str) -> str:
    return f"{source} -> {target}"


class _Work:
    """A transfer under way."""

    def __init__(
        self,
        plan: TransferPlan,
        sides: Mapping[str, Side],
        settings: TransferSettings,
        out: Path,
        about: Mapping[str, Any],
        tell: Callable[[str], None],
        *,
        commit: str | None,
    ) -> None:
        self.results = open_results(out, about, plan)
        self._shared = about["shared"]
        self._plan, self._sides, self._settings, self._out, self._tell = plan, sides, settings, out, tell
        self._missing = {line.name: line for line in plan.lines if not self._is_done(line)}
        self._commit = commit
        self._failed: dict[str, str] = {}
        for note in self.results.ignored_note():
            tell(note)
        done = len(plan.lines) - len(self._missing)
        if done:
            tell(f"{done} of {len(plan.lines)} results exist already")
        self._refuse_changed_items()

    def train(self, workers: int | None) -> int:
        """Train the missing heads, sweep by sweep; returns how many were trained now and without an error."""
        wanted = self._wanted()
        with watching("transfer", len(wanted)) as watch:
            return self._train(wanted, workers, watch)

    def _train(self, wanted: set[str], workers: int | None, watch: SweepWatch) -> int:
        trained = 0
        for sweep in self._plan.sweeps:
            heads: dict[Path, PlannedHead] = {}
            for head in (head for head in sweep if head.name in wanted):
                if head.start in self._failed:
                    watch.ended(head.name, there=True)
                    self._fail(head.name, f"its start {head.start} was not trained: {self._failed[head.start]}")
                else:
                    heads[self._folder(head.name)] = head
            if not heads:
                continue
            store, jobs = self._sides[sweep[0].on].store, [self._job(head) for head in heads.values()]
            with closing(train_heads(store, jobs, workers=workers, watch=watch)) as outcomes:
                for ended in outcomes:
                    head = heads[ended.job.run]
                    if ended.error is not None:
                        self._fail(head.name, ended.error)
                    else:
                        self._trained(head, ended.load())
                        trained += ended.status == "trained"
        return trained

    def apply(self) -> None:
        """Predict the other data set by the heads that are trained."""
        for line in [line for line in self._missing.values() if line.way == "apply"]:
            try:
                self._append(line, self._applied(line, load_run(self._folder(line.head))))
            except (AgiqaError, OSError) as error:
                self._append(line, error_facts(with_notes(error), commit=self._commit))

    def lines_of_heads(self) -> list[Line]:
        """The first line of each head, trained or failed, in the order of the plan."""
        first: dict[str, Line] = {}
        for line in self._plan.lines:
            if line.way != "apply":
                first.setdefault(line.head, self.results.lines[line.name])
        return list(first.values())

    def _is_done(self, line: PlannedLine) -> bool:
        """Whether the line has a result, and its predictions exist, which its row needs."""
        return self.results.is_done(line.name) and (self._out / self.results.lines[line.name]["predictions"]).exists()

    def _wanted(self) -> set[str]:
        """The heads of the missing lines, and those that they start from."""
        wanted = {line.head for line in self._missing.values()}
        heads = [head for sweep in self._plan.sweeps for head in sweep]
        return wanted | {head.start for head in heads if head.name in wanted and head.start is not None}

    def _refuse_changed_items(self) -> None:
        """Raise HeadError for a head of other items or labels: a store that is labelled anew keeps its id.

        Folders that were removed are not checked.
        """
        done = {line.head for line in self._plan.lines if line.name not in self._missing}
        for sweep in self._plan.sweeps:
            partitions = Partitions(self._sides[sweep[0].on].store)
            for head in sweep:
                if head.name in done:
                    is_there(self._sides[head.on].store, self._job(head), partitions.of(head.train))

    def _folder(self, head: str) -> Path:
        return self._out / RUNS / head

    def _job(self, head: PlannedHead) -> HeadJob:
        return HeadJob(
            run=self._folder(head.name),
            head=self._settings.head,
            train=head.train,
            preset=self._settings.preset,
            start=None if head.start is None else self._folder(head.start),
        )

    def _trained(self, head: PlannedHead, run: Run) -> None:
        """Append the lines of a head on the test part of its own data set."""
        for line in [line for line in self._missing.values() if line.head == head.name and line.way != "apply"]:
            facts = {**outcome_facts(run), "predictions": f"{RUNS}/{head.name}/{PREDICTIONS}"}
            if line.way == "tp":
                facts["same_head_as"] = f"{line.target}'s own, as both stores have the same features"
            self._append(line, {**self._facts(line, run), **facts})

    def _applied(self, line: PlannedLine, run: Run) -> Line:
        """Predict the test part of the other data set, write the predictions, and return their line."""
        started = time.perf_counter()
        target, labels = self._sides[line.target], run.train.labels
        items = target.partition.test
        with cpu_threads(run.train.threads):
            learned = run_moments(
                run, target.store, items, device=self._settings.train.device, batch_size=run.train.batch_size
            )
        mos = read_labels(target.store, items, label=run.train.label)
        scales = run.scales, scales_of(target.store, labels)
        guesses, scores = _scored(run, target.store, items, mos, learned)
        path = self._out / APPLIED / f"{line.name}.csv"
        names, prompts = (
            [column[k] for k in items] for column in (target.store.items.names, target.store.items.prompts)
        )
        write_predictions(path, labels, names, prompts, mos, guesses.mos, items=items.tolist(), spread=guesses.spread)
        return {
            **self._facts(line, run),
            "seconds": round(time.perf_counter() - started, 3),
            "reported": _REPORTED,
            "validation": None,
            "test": by_label(labels, scores),
            "mos_ranges": scales_record(labels, scales[1]),
            "converted": conversions(labels, *scales),
            "warnings": [
                *unknown_scales(f"the head {line.head}", scales[0], target.store, labels, mos),
                *author_warnings(target.store, {"test": items}),
            ],
            "text_authors": authors_by_part(target.store, {"test": items}),
            "predictions": path.relative_to(self._out).as_posix(),
        }

    def _facts(self, line: PlannedLine, run: Run) -> Line:
        """The facts of every line of a trained head."""
        facts = {
            "config": {**run.head.model_dump(mode="json"), **run.train.model_dump(mode="json")},
            "run": f"{RUNS}/{line.head}",
            **training_facts(run, commit=self._commit),
        }
        if line.way in ("apply", "warm"):
            facts["shared"] = self._shared[_direction(line.source, line.target)]
        return facts

    def _fail(self, head: str, error: str) -> None:
        """Append the error of a head as each of its lines."""
        self._failed[head] = error
        for line in [line for line in self._missing.values() if line.head == head and line.way != "apply"]:
            self._append(line, error_facts(error, commit=self._commit))

    def _append(self, line: PlannedLine, facts: Line) -> None:
        stores = {name: self._sides[name].store.id for name in dict.fromkeys((line.source, line.target))}
        identity = {"name": line.name, **line.settings, "seed": line.seed, "stores": stores}
        self.results.append({**identity, "protocol": self._settings.train.split, **facts})
        total = len(self._plan.lines)
        done = sum(one.name in self.results.lines for one in self._plan.lines)
        what = f"failed ({facts['error'].splitlines()[0]})" if "error" in facts else f"{facts['seconds']:.1f} s"
        self._tell(f"[{done}/{total}] {line.name}: {what}")


def _scored(
    run: Run, store: AnyStore, items: NDArray[np.int64], mos: NDArray[np.float64], learned: Moments
) -> tuple[Moments, list[Line]]:
    """Predictions on the scale of `store`, and the metrics of each label; those given are on the scale of the run.

    The coverage of intervals is computed on the scale of the run.
    """
    labels = run.train.labels
    there, here = run.scales, scales_of(store, labels)
    lines = lines_between(there, here)
    spread = None if learned.spread is None else learned.spread * np.array([slope for slope, _ in lines])
    guesses = Moments(mos=convert_columns(learned.mos, there, here), spread=spread)
    fitted = [Mappings.from_record(one) for one in of_each_label(labels, run.metrics["logistic"])]
    mappings = [one.rescaled(*line) for one, line in zip(fitted, lines, strict=True)]
    scores = scores_of_labels(store, items, mos, guesses, mappings=mappings, names=labels, scales=here)
    generators = [store.items.generators[k] for k in items]
    truth = convert_columns(mos, here, there)
    records = interval_records(recorded_errors(run), learned.mos, learned.spread, truth, generators)
    return guesses, [{**score, "intervals": record} for score, record in zip(scores, records, strict=True)]
