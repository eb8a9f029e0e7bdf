"""A transfer: what a head of one data set is worth on another, applied as it is, retrained, and with few items.

OUT/about.json, results.jsonl, rows.jsonl  see transfer_results.py
OUT/runs/NAME                              the run folder of every head
OUT/predictions/NAME.csv                   what a head predicts of the other data set
OUT/lock                                   held by the process at work
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agiqa.bench.ablation.rows import write_rows
from agiqa.bench.recording.predictions import write_predictions
from agiqa.bench.recording.result_folders import ROWS, RUNS, working_in
from agiqa.bench.recording.result_lines import (
    Line,
    error_facts,
    ignored_line,
    outcome_facts,
    training_facts,
    warning_lines,
)
from agiqa.bench.recording.this_run import this_commit
from agiqa.bench.transfer.plan import PlannedHead, PlannedLine, TransferPlan, TransferSettings, plan_transfer
from agiqa.bench.transfer.results import TransferResults, rows_of
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
from agiqa.heads.evaluation.leaks import author_warnings, authors_by_part
from agiqa.heads.evaluation.mos_mappings import Mappings
from agiqa.heads.evaluation.runs import PREDICTIONS, Run, load_run
from agiqa.heads.evaluation.scoring import predict, scores_of_labels
from agiqa.heads.settings.device import cpu_threads
from agiqa.heads.settings.labels import by_label, of_each_label
from agiqa.heads.sweeps.head_jobs import HeadJob, is_there, with_notes
from agiqa.heads.sweeps.sweeping import Partitions, train_heads
from agiqa.progress import say
from agiqa.store import Store
from agiqa.version import agiqa_version

APPLIED = "predictions"

_REPORTED = (
    "srcc, plcc, krcc and rmse of the predictions as they are, on the target's scale (`converted` where the source has "
    "another); those after a logistic mapping have the one fitted on the source's validation items, not fitted anew"
)


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """What became of a transfer."""

    rows: list[Line]
    """As in rows.jsonl."""
    lines: int
    """Results that were asked for."""
    failed: dict[str, str]
    """Names and errors of those that have none."""
    trained: int
    """Heads that were trained, and not there before."""


def run_transfer(
    stores: Mapping[str, Store],
    settings: TransferSettings,
    out: Path,
    *,
    seeds: int = 5,
    shots: Sequence[int] | None = None,
    one_way: bool = False,
    workers: int | None = None,
    tell: Callable[[str], None] = say,
) -> Transfer:
    """Train and apply what is missing of a transfer between two named stores in `out`; see `train_heads` for `workers`.

    What failed is tried again. Raises what `plan_transfer`, `open_sides` and `chosen_shots` raise before anything is
    written; BusyStore where another process is at work in `out`, DataError for results of other stores or settings,
    HeadError for a head on items or labels that its store does not have any more.
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
    of_authors = [
        f"warning: {side.name}: {line}"
        for side in sides.values()
        for line in author_warnings(side.store, side.partition.parts())
    ]
    for line in of_authors:
        tell(line)
    with working_in(out, "transfer"):
        work = _Work(plan, sides, settings, out, about, tell, commit=commit)
        trained = work.train(workers)
        work.apply()
        for line in warning_lines(work.lines_of_heads(), told=of_authors):
            tell(line)
        rows = rows_of(plan, work.results, out, protocol=settings.train.split, label=settings.train.label)
        write_rows(out / ROWS, rows)
    errors = {line.name: work.results.lines[line.name].get("error") for line in plan.lines}
    failed = {name: error for name, error in errors.items() if error is not None}
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
        self.results = TransferResults(out, about, plan)
        self._shared = about["shared"]
        self._plan, self._sides, self._settings, self._out, self._tell = plan, sides, settings, out, tell
        self._missing = {line.name: line for line in plan.lines if not self._is_done(line)}
        self._commit = commit
        self._failed: dict[str, str] = {}
        if self.results.ignored:
            tell(ignored_line(out, self.results))
        done = len(plan.lines) - len(self._missing)
        if done:
            tell(f"{done} of {len(plan.lines)} results are there already")
        self._check_done()

    def train(self, workers: int | None) -> int:
        """Train the heads that are wanted, sweep by sweep; how many were trained, and not there or failed."""
        trained, wanted = 0, self._wanted()
        for sweep in self._plan.sweeps:
            heads: dict[Path, PlannedHead] = {}
            for head in sweep:
                if head.name in wanted and head.start in self._failed:
                    self._fail(head.name, f"its start {head.start} was not trained: {self._failed[str(head.start)]}")
                elif head.name in wanted:
                    heads[self._folder(head.name)] = head
            if not heads:
                continue
            store, jobs = self._sides[sweep[0].on].store, [self._job(head) for head in heads.values()]
            with closing(train_heads(store, jobs, workers=workers)) as outcomes:
                for ended in outcomes:
                    head = heads[ended.job.run]
                    if ended.error is not None:
                        self._fail(head.name, ended.error)
                    else:
                        self._trained(head, ended.load())
                        trained += ended.status == "trained"
        return trained

    def apply(self) -> None:
        """Predict the other data set by heads that are there."""
        for line in [line for line in self._missing.values() if line.way == "apply"]:
            try:
                self._append(line, self._applied(line, load_run(self._folder(line.head))))
            except (AgiqaError, OSError) as error:
                self._append(line, self._error(with_notes(error)))

    def lines_of_heads(self) -> list[Line]:
        """The first line of each head, trained or failed, in the order of the plan."""
        first: dict[str, Line] = {}
        for line in self._plan.lines:
            if line.way != "apply":
                first.setdefault(line.head, self.results.lines[line.name])
        return list(first.values())

    def _is_done(self, line: PlannedLine) -> bool:
        """Whether the line is there, and what it predicted, which its row needs."""
        return self.results.is_done(line) and (self._out / self.results.lines[line.name]["predictions"]).exists()

    def _wanted(self) -> set[str]:
        """The heads of the lines that are missing, and those that they start from."""
        wanted = {line.head for line in self._missing.values()}
        heads = [head for sweep in self._plan.sweeps for head in sweep]
        return wanted | {head.start for head in heads if head.name in wanted and head.start is not None}

    def _check_done(self) -> None:
        """Raise HeadError for a head of other items or labels: a store that is labelled anew keeps its id.

        Folders that were removed are not asked for.
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
        """The lines of a head on its own test part."""
        for line in [line for line in self._missing.values() if line.head == head.name and line.way != "apply"]:
            facts = {**outcome_facts(run), "predictions": f"{RUNS}/{head.name}/{PREDICTIONS}"}
            if line.way == "tp":
                facts["same_head_as"] = f"{line.target}'s own, as both stores have the same features"
            self._append(line, {**self._facts(line, run), **facts})

    def _applied(self, line: PlannedLine, run: Run) -> Line:
        """The line of a head on the test part of the other data set, whose predictions are written."""
        started = time.perf_counter()
        target, labels = self._sides[line.target], run.train.labels
        items = target.partition.test
        with cpu_threads(run.train.threads):
            guesses = predict(
                run, target.store, items, device=self._settings.train.device, batch_size=run.train.batch_size
            ).reshape(len(items), len(labels))
        mos = read_labels(target.store, items, label=run.train.label)
        scales = run.scales, scales_of(target.store, labels)
        guesses, lines = convert_columns(guesses, *scales), lines_between(*scales)
        fitted = [Mappings.from_record(one) for one in of_each_label(labels, run.metrics["logistic"])]
        mappings = [one.rescaled(*line) for one, line in zip(fitted, lines, strict=True)]
        scores = scores_of_labels(target.store, items, mos, guesses, mappings=mappings)
        path = self._out / APPLIED / f"{line.name}.csv"
        names, prompts = (
            [column[k] for k in items] for column in (target.store.items.names, target.store.items.prompts)
        )
        write_predictions(path, labels, names, prompts, mos, guesses, items=items.tolist())
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
        """What every line of a head that was trained has."""
        told = {
            "config": {**run.head.model_dump(mode="json"), **run.train.model_dump(mode="json")},
            "run": f"{RUNS}/{line.head}",
            **training_facts(run, commit=self._commit),
        }
        if line.way in ("apply", "warm"):
            told["shared"] = self._shared[_direction(line.source, line.target)]
        return told

    def _fail(self, head: str, error: str) -> None:
        """Keep the error of a head in all of its lines."""
        self._failed[head] = error
        for line in [line for line in self._missing.values() if line.head == head and line.way != "apply"]:
            self._append(line, self._error(error))

    def _error(self, error: str) -> Line:
        return error_facts(error, agiqa=agiqa_version(), commit=self._commit)

    def _append(self, line: PlannedLine, facts: Line) -> None:
        stores = {name: self._sides[name].store.id for name in dict.fromkeys((line.source, line.target))}
        identity = {"name": line.name, **line.settings, "seed": line.seed, "stores": stores}
        self.results.append({**identity, "protocol": self._settings.train.split, **facts})
        total = len(self._plan.lines)
        done = sum(one.name in self.results.lines for one in self._plan.lines)
        self._tell(f"[{done}/{total}] {line.name}: {_told(facts)}")


def _told(facts: Line) -> str:
    return f"failed ({facts['error'].splitlines()[0]})" if "error" in facts else f"{facts['seconds']:.1f} s"
