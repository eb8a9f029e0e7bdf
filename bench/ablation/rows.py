"""Rows of an ablation's table, from result lines and predictions, and the table as Markdown.

A row stays the same over seeds and splits: one head, on one store, under one protocol, for one label. The predictions
of all splits of a seed are put together, so that every test item counts once.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from agiqa.bench.ablation.protocols import GROUPED, PART_SETTINGS, PUBLISHED
from agiqa.bench.recording.predictions import Predictions, read_predictions
from agiqa.bench.recording.result_folders import RUNS, Line
from agiqa.bench.recording.rows import (
    Row,
    adjust_by_holm,
    score_text,
    scores_over_seeds,
    summary,
    validation_summary,
)
from agiqa.bench.recording.tables import TextTable
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.evaluation.runs import PREDICTIONS
from agiqa.heads.evaluation.significance import METRICS
from agiqa.heads.settings.labels import parse_labels
from agiqa.progress import track

_Question = tuple[str, str, tuple[tuple[str, str, float], ...]]
"""What rows must share to be compared: protocol, label, and name, prompt and MOS of each test item."""


@runtime_checkable
class TableRun(Protocol):
    """A planned run as its table sees it: that of a head, or of an image network."""

    @property
    def name(self) -> str: ...
    @property
    def row(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def store(self) -> str: ...
    @property
    def protocol(self) -> str: ...
    @property
    def answer(self) -> int: ...


@dataclass(kw_only=True)
class _Group:
    """The runs of one row."""

    first: TableRun
    label: str
    runs: list[TableRun] = field(default_factory=list[TableRun])
    done: list[Line] = field(default_factory=list[Line])
    answers: dict[str, Predictions] = field(default_factory=dict[str, Predictions])
    """By the name of its first run, the predictions of each seed for which all splits have a result."""
    scores: SeedScores | None = None
    items: tuple[tuple[str, str, float], ...] = ()
    """Name, prompt and MOS of each test item."""

    @property
    def question(self) -> _Question:
        return self.first.protocol, self.label, self.items


def table_rows(
    plan: Sequence[TableRun],
    lines: Mapping[str, Line],
    out: Path,
    baselines: Sequence[Line] = (),
    *,
    kind: str = "head",
) -> list[Line]:
    """The lines of `rows.jsonl`: a row per head, store, protocol and label of `plan`, in its order, then `baselines`.

    `kind` is that of the rows of `plan`.
    `lines` are the result lines by name; `out` holds the runs and the baselines' predictions. `test` covers the seeds
    for which all splits have a result; None without such a seed. `against` compares a row with the reference of its
    label and protocol: the head of the best mean validation SRCC among those on the same test items. It is None for the
    reference itself, and without a reference. Its p-values are adjusted for the number of rows that are compared with
    one reference, baselines included. `beside_grouped` of a row of the published split is its advantage over the folds
    of whole prompts on its own test items. Raises DataError for predictions that are gone or damaged.
    """
    groups, runs = _groups(plan, lines), out / RUNS
    with (
        track("intervals", len(groups) + len(baselines), "rows") as advance,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        for _ in pool.map(lambda group: _score(group, lines, runs), groups):
            advance(1)
        references = _references(groups)
        of_baselines: list[tuple[_Question | None, Line]] = []
        for row in pool.map(lambda line: _baseline_row(line, references, out), baselines):
            of_baselines.append(row)
            advance(1)
        rows = [(group.question, _row(group, references.get(group.question), kind)) for group in groups] + of_baselines
        pairs = [*_pairs_of_heads(groups, rows), *_pairs_of_baselines(baselines, rows[len(groups) :], out)]
        for pair, same in zip(pairs, pool.map(_same_items, pairs), strict=True):
            pair.row.update({} if same is None else {"beside_grouped": same})
    for question in references:
        adjust_by_holm([row for asked, row in rows if asked == question])
    return [row for _, row in rows]


def _groups(plan: Sequence[TableRun], lines: Mapping[str, Line]) -> list[_Group]:
    """The rows of the plan, in its order, one per label."""
    found: dict[tuple[str, str, str, str], _Group] = {}
    for run in plan:
        same = {name: value for name, value in run.config.items() if name not in ("seed", *PART_SETTINGS)}
        for label in parse_labels(str(run.config["label"])):
            key = (run.store, run.protocol, str(same), label)
            group = found.setdefault(key, _Group(first=run, label=label))
            group.runs.append(run)
            line = lines.get(run.name)
            if line is not None and "error" not in line:
                group.done.append(line)
    return list(found.values())


def _score(group: _Group, lines: Mapping[str, Line], runs: Path) -> None:
    """Join the predictions of each seed, and score them."""
    answers: dict[int, list[TableRun]] = {}
    for run in group.runs:
        answers.setdefault(run.answer, []).append(run)
    whole = [ran for ran in answers.values() if all("error" not in lines.get(run.name, {"error": ""}) for run in ran)]
    if not whole:
        return
    group.answers = {ran[0].name: _together(ran, group.label, runs) for ran in whole}
    group.items = _items(group.answers[whole[0][0].name])
    group.scores = scores_over_seeds(group.answers)


def _together(ran: Sequence[TableRun], label: str, runs: Path) -> Predictions:
    """The predictions of all these runs, by name. Raises DataError for an item that two of them tested."""
    parts = [
        read_predictions(runs / run.name / PREDICTIONS, parse_labels(str(run.config["label"])), label=label)
        for run in ran
    ]
    joined = _in_order(parts)
    if len(set(_known_by(joined))) < len(joined.names):
        message = f"The runs of {ran[0].row!r}, {ran[0].protocol}, tested an item twice; their splits must not overlap."
        raise DataError(message)
    return joined


def _in_order(parts: Sequence[Predictions]) -> Predictions:
    """All items of `parts`, by name, prompt and number."""
    known_by = [key for part in parts for key in _known_by(part)]
    numbered = all(part.items is not None for part in parts)
    order = sorted(range(len(known_by)), key=known_by.__getitem__)
    return Predictions(
        names=[known_by[place][0] for place in order],
        prompts=[known_by[place][1] for place in order],
        items=[known_by[place][2] for place in order] if numbered else None,
        mos=np.concatenate([part.mos for part in parts])[order],
        predicted=np.concatenate([part.predicted for part in parts])[order],
    )


def _known_by(table: Predictions) -> list[tuple[str, str, int]]:
    """Name, prompt and number of each item; the number, since a store may hold a name with the same prompt twice."""
    return list(zip(table.names, table.prompts, table.items or [0] * len(table.names), strict=True))


def _items(table: Predictions) -> tuple[tuple[str, str, float], ...]:
    """Name, prompt and MOS of each item."""
    return tuple(zip(table.names, table.prompts, table.mos.tolist(), strict=True))


def _references(groups: Sequence[_Group]) -> dict[_Question, _Group]:
    """The row of the best mean validation SRCC of each question; the first of equals."""
    best: dict[_Question, tuple[float, _Group]] = {}
    for group in groups:
        chosen = validation_summary(group.done, group.label)
        if group.scores is None or chosen is None or chosen.get("srcc") is None:
            continue
        value = chosen["srcc"][0]
        assert value is not None  # the mean of one value or more
        if group.question not in best or value > best[group.question][0]:
            best[group.question] = (value, group)
    return {question: group for question, (_, group) in best.items()}


def _row(group: _Group, reference: _Group | None, kind: str) -> Line:
    run, scores = group.first, group.scores
    against = None
    if reference is not None and reference is not group and scores is not None:
        against = _against(scores, reference)
    return {
        "kind": kind,
        "row": run.row,
        "settings": dict(run.settings),
        "store_name": run.store,
        "protocol": run.protocol,
        **summary(group.label, len(group.runs), group.done, scores, against),
    }


def _baseline_row(line: Line, references: Mapping[_Question, _Group], out: Path) -> tuple[_Question | None, Line]:
    """The row of a baseline, compared with the reference that was tested on its items, and the question of both.

    A correlation that the line leaves undefined, since it reflects the split alone, is not compared.
    """
    if "left_out" in line:
        return None, line
    table = _predicted(line, out)
    question = line["protocol"], line["label"], _items(table)
    reference = references.get(question)
    if reference is None:
        return None, {**line, "against": None}
    against = _against(scores_over_seeds({line["row"]: table}, seedless=True), reference)
    for metric in METRICS:
        if line["test"][metric] is None:
            against |= {name: {**against[name], metric: None} for name in ("difference", "ci", "p")}
    return question, {**line, "against": against}


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """The predictions of one row under the published split and under folds of whole prompts."""

    row: Line
    """That of the published split."""
    items: Predictions
    """The test items of the published split."""
    published: SeedScores
    folds: Mapping[str, Predictions]


def _pairs_of_heads(groups: Sequence[_Group], rows: Sequence[tuple[_Question | None, Line]]) -> Iterator[_Pair]:
    """Heads that were trained under both protocols."""
    folds = {(one.first.row, one.first.store, one.label): one for one in groups if one.first.protocol == GROUPED}
    for group, (_, row) in zip(groups, rows, strict=False):
        other = folds.get((group.first.row, group.first.store, group.label))
        if group.first.protocol == PUBLISHED and other is not None and group.scores is not None and other.answers:
            items = next(iter(group.answers.values()))
            yield _Pair(row=row, items=items, published=group.scores, folds=other.answers)


def _pairs_of_baselines(
    lines: Sequence[Line], rows: Sequence[tuple[_Question | None, Line]], out: Path
) -> Iterator[_Pair]:
    """Baselines that predict under both protocols, and whose correlations reflect more than the split."""
    known = {
        (_identity(line), line["protocol"]): line
        for line in lines
        if "left_out" not in line and line["test"]["srcc"] is not None
    }
    for line, (_, row) in zip(lines, rows, strict=True):
        other_line = known.get((_identity(line), GROUPED))
        if line is known.get((_identity(line), PUBLISHED)) and other_line is not None:
            items, folds = _predicted(line, out), {line["row"]: _predicted(other_line, out)}
            published = scores_over_seeds({line["row"]: items}, seedless=True)
            yield _Pair(row=row, items=items, published=published, folds=folds)


def _identity(line: Line) -> tuple[str, str, str]:
    """What identifies a baseline across protocols; not its row alone, since `features` is named after its fit."""
    return str(line.get("settings") or line["row"]), line.get("store_name", ""), line["label"]


def _same_items(pair: _Pair) -> Line | None:
    """The published split minus the folds, both on the published test items; None unless the folds test them all."""
    wanted, cut = _known_by(pair.items), dict[str, Predictions]()
    for name, one in pair.folds.items():
        places = {key: place for place, key in enumerate(_known_by(one))}
        if not places.keys() >= set(wanted):
            return None
        at = [places[key] for key in wanted]
        cut[name] = replace(pair.items, mos=one.mos[at], predicted=one.predicted[at])
    compared = pair.published.against(scores_over_seeds(cut, seedless=pair.published.seedless))
    return {name: compared[name] for name in ("n", "prompts", "difference", "ci", "covers", "confidence")}


def _predicted(line: Line, out: Path) -> Predictions:
    """The predictions of a baseline, in the order of `_in_order`."""
    return _in_order([read_predictions(out / line["predictions"], [line["label"]], label=line["label"])])


def _against(scores: SeedScores, reference: _Group) -> Line:
    """The paired comparison with the reference."""
    assert reference.scores is not None  # _references chose
    return {
        "row": reference.first.row,
        "store_name": reference.first.store,
        **scores.against(reference.scores),
    }


def rows_parts(rows: Sequence[Row]) -> list[str | TextTable]:
    """A table: heads in the order of the grid, then baselines, protocol by protocol.

    Scores have intervals of 95 % and the paired difference to the best head by validation. Lines below the table say
    which baselines are left out.
    """
    shown = [row for row in rows if "left_out" not in row]
    order = {protocol: number for number, protocol in enumerate(dict.fromkeys(row["protocol"] for row in shown))}
    shown.sort(key=lambda row: (order[row["protocol"]], row["kind"] == "baseline"))
    columns = _columns(shown)
    table = TextTable(head=[title for title, _ in columns], rows=[[cell(row) for _, cell in columns] for row in shown])
    left_out = [
        f"{row['row']} ({row['protocol']}, {row['label']}): {row['left_out']}" for row in rows if "left_out" in row
    ]
    return [table, *(["Left out:\n" + "\n".join(left_out)] if left_out else [])]


def _columns(rows: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """Titles and cells; store, protocol and label have a column only where they differ."""
    several = {name: len({row[name] for row in rows}) > 1 for name in ("store_name", "protocol", "label")}
    columns: list[tuple[str, Callable[[Row], str]]] = [("run", lambda row: str(row["row"]))]
    for name, title in (("store_name", "store"), ("protocol", "protocol"), ("label", "label")):
        if several[name]:
            columns.append((title, partial(lambda name, row: str(row[name]), name)))
    columns += [
        ("seeds", _seeds_text),
        ("validation SRCC", _validation_text),
        ("test SRCC", lambda row: score_text(row["test"], "srcc", undefined="undefined")),
        ("test PLCC", lambda row: score_text(row["test"], "plcc", undefined="undefined")),
        ("SRCC against the best by validation (p, Holm)", _difference_text),
    ]
    return columns


def _seeds_text(row: Row) -> str:
    """The number of seeds that the means are over, and the number of all seeds where it differs."""
    if row["kind"] == "baseline":
        return "-"
    seeds = row["seeds"]
    averaged = seeds if row["test"] is None else row["test"]["seeds"]
    if averaged == seeds:
        return str(seeds)
    return f"{averaged} of {seeds}" if row["failed"] else f"{seeds}, one a part"


def _validation_text(row: Row) -> str:
    found = (row["validation"] or {}).get("srcc")
    if found is None:
        return "-"
    mean, spread = found
    return f"{mean:.4f}" if spread is None else f"{mean:.4f} ± {spread:.4f}"


def _difference_text(row: Row) -> str:
    against = row["against"]
    if against is None or against["difference"]["srcc"] is None:
        return "-"
    p = against["p_holm"]["srcc"]
    p_value = "one seed: no p" if "no_p" in against else "no p" if p is None else f"{p:.3g}"
    return f"{against['difference']['srcc']:+.4f} ({p_value})"
