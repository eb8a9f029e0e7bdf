"""Rows of a table, from result lines and predictions: means over seeds, intervals by prompt, paired differences.

A row is what stays the same over seeds and splits: one head, on one store, under one protocol, for one label. The
predictions of the splits of a seed are put together, so that every test item counts once.
"""

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.bench.ablation.grids import PlannedRun
from agiqa.bench.ablation.protocols import GROUPED, PARTS, PUBLISHED
from agiqa.bench.recording.predictions import Predictions, read_predictions
from agiqa.bench.recording.result_folders import RUNS, write_whole
from agiqa.bench.recording.result_lines import Line, scores_by_label
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.evaluation.runs import PREDICTIONS
from agiqa.heads.evaluation.significance import METRICS, holm
from agiqa.heads.settings.labels import parse_labels
from agiqa.progress import track

_SHOWN = ("srcc", "plcc", "rmse", "slope")


@dataclass(kw_only=True)
class _Group:
    """The runs of one row."""

    first: PlannedRun
    label: str
    runs: list[PlannedRun] = field(default_factory=list[PlannedRun])
    done: list[Line] = field(default_factory=list[Line])
    answers: dict[str, Predictions] = field(default_factory=dict[str, Predictions])
    """What each seed all of whose splits have a result predicted, by the name of its first run."""
    scores: SeedScores | None = None
    items: tuple[tuple[str, str, float], ...] = ()
    """Name, prompt and MOS of each test item."""


def table_rows(
    plan: Sequence[PlannedRun],
    lines: Mapping[str, Line],
    out: Path,
    baselines: Sequence[Line] = (),
) -> list[Line]:
    """A row for each head, store, protocol and label of `plan`, in its order, then `baselines`, as `rows.jsonl` is.

    `lines` are the result lines by name, and `out` is the folder of the runs and of what the baselines predicted.
    `test` is of the seeds all of whose splits have a result, None without one; `against` compares a row with the
    reference of its label and protocol, the head of the best mean validation SRCC among those that were tested on the
    same items, with p-values adjusted for the number of rows that are compared with it, baselines among them. It is
    None for the reference itself, and where no head was tested on the same items. `beside_grouped` of a row of the
    published split is what it has more on its test items than the folds of whole prompts have on the same. Raises
    DataError for predictions that
    are gone or damaged.
    """
    groups, runs = _groups(plan, lines), out / RUNS
    with (
        track("intervals", len(groups) + len(baselines), "rows") as advance,
        ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool,
    ):
        for _ in pool.map(lambda group: _score(group, lines, runs), groups):
            advance(1)
        references = _references(groups)
        told: list[tuple[_Question | None, Line]] = []
        for row in pool.map(lambda line: _baseline_row(line, references, out), baselines):
            told.append(row)
            advance(1)
        rows = [(_question(group), _row(group, references.get(_question(group)))) for group in groups] + told
        pairs = [*_pairs_of_heads(groups, rows), *_pairs_of_baselines(baselines, rows[len(groups) :], out)]
        for pair, same in zip(pairs, pool.map(_same_items, pairs), strict=True):
            pair.row.update({} if same is None else {"beside_grouped": same})
    for question in references:
        adjust_by_holm([row for asked, row in rows if asked == question])
    return [row for _, row in rows]


def summary(label: str, planned: int, done: Sequence[Line], scores: SeedScores | None, against: Line | None) -> Line:
    """What every row tells of its head: its label, the `planned` results and those that are `done`, and their means."""
    return {
        "label": label,
        "runs": planned,
        "seeds": len({line["seed"] for line in done}),
        "failed": planned - len(done),
        "seconds": round(statistics.fmean(line["seconds"] for line in done), 3) if done else None,
        "validation": validation_summary(done, label),
        "calibrated": sum(_fitted_slope(line, label) is not None for line in done),
        "test": None if scores is None else scores.score(),
        "against": against,
    }


def scores_over_seeds(tables: Mapping[str, Predictions], *, seedless: bool = False) -> SeedScores:
    """The scores of predictions of one row by the names of their runs, one for each seed; `seedless` as `SeedScores`.

    Raises DataError where they are not of the same items in the same order.
    """
    (first, table), *others = tables.items()
    for name, other in others:
        if (other.names, other.prompts) != (table.names, table.prompts):
            message = f"The runs {first!r} and {name!r} of one row were tested on different items."
            raise DataError(message)
    predicted = np.stack([one.predicted for one in tables.values()])
    return SeedScores.of(predicted, table.mos, table.prompts, seedless=seedless)


def adjust_by_holm(rows: Sequence[Line]) -> None:
    """Add to each `against` the p-values of Holm's procedure, for each metric over all `rows` that have one."""
    compared = [row["against"] for row in rows if row["against"] is not None]
    for against in compared:
        against["p_holm"] = dict.fromkeys(METRICS)
    for metric in METRICS:
        tested = [against for against in compared if against["p"][metric] is not None]
        for against, value in zip(tested, holm([one["p"][metric] for one in tested]), strict=True):
            against["p_holm"][metric] = value


def validation_summary(lines: Sequence[Line], label: str) -> dict[str, list[float | None]] | None:
    """Mean and standard deviation over result lines of the validation metrics; None without validation items.

    The slope of a calibrated head is that before its line, as that of the line itself is 1 by its making.
    """
    found: list[Line] = []
    for line in lines:
        scores, fitted = scores_by_label(line, "validation").get(label), _fitted_slope(line, label)
        if scores is not None:
            found.append({**scores} if fitted is None else {**scores, "slope": fitted})
    told: dict[str, list[float | None]] = {}
    for metric in _SHOWN:
        values = [one[metric] for one in found if one.get(metric) is not None]
        if values:
            told[metric] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
    return told or None


def _fitted_slope(line: Line, label: str) -> float | None:
    """The slope of the line that the predictions were put on (`calibrate`); None where they are as the head is."""
    told: Mapping[str, Any] = scores_by_label(line, "calibration").get(label, {})
    slope: float | None = told.get("slope")
    return slope


def write_rows(path: Path, rows: Sequence[Line]) -> None:
    """Write `rows` as lines of JSON, in one step."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _groups(plan: Sequence[PlannedRun], lines: Mapping[str, Line]) -> list[_Group]:
    """The rows of the plan, in its order, each label by itself."""
    found: dict[tuple[str, str, str, str], _Group] = {}
    for run in plan:
        same = {name: value for name, value in run.config.items() if name not in ("seed", *PARTS)}
        for label in parse_labels(run.train.label):
            key = (run.store, run.protocol, str(same), label)
            group = found.setdefault(key, _Group(first=run, label=label))
            group.runs.append(run)
            line = lines.get(run.name)
            if line is not None and "error" not in line:
                group.done.append(line)
    return list(found.values())


def _score(group: _Group, lines: Mapping[str, Line], runs: Path) -> None:
    """Put the predictions of each answer together, and score them."""
    answers: dict[int, list[PlannedRun]] = {}
    for run in group.runs:
        answers.setdefault(run.answer, []).append(run)
    whole = [ran for ran in answers.values() if all("error" not in lines.get(run.name, {"error": ""}) for run in ran)]
    if not whole:
        return
    group.answers = {ran[0].name: _together(ran, group.label, runs) for ran in whole}
    group.items = _items(group.answers[whole[0][0].name])
    group.scores = scores_over_seeds(group.answers)


def _together(ran: Sequence[PlannedRun], label: str, runs: Path) -> Predictions:
    """The test items of all these runs, by name. Raises DataError for an item that two of them tested."""
    parts = [read_predictions(runs / run.name / PREDICTIONS, parse_labels(run.train.label), label=label) for run in ran]
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
    """Name, prompt and number of each item, as a store may hold a name with the same prompt twice."""
    return list(zip(table.names, table.prompts, table.items or [0] * len(table.names), strict=True))


def _items(table: Predictions) -> tuple[tuple[str, str, float], ...]:
    """Name, prompt and MOS of each item."""
    return tuple(zip(table.names, table.prompts, table.mos.tolist(), strict=True))


_Question = tuple[str, str, tuple[tuple[str, str, float], ...]]


def _question(group: _Group) -> _Question:
    """What rows must share to be compared."""
    return group.first.protocol, group.label, group.items


def _references(groups: Sequence[_Group]) -> dict[_Question, _Group]:
    """The row of the best mean validation SRCC of each question; the first of equals."""
    best: dict[_Question, tuple[float, _Group]] = {}
    for group in groups:
        chosen = validation_summary(group.done, group.label)
        if group.scores is None or chosen is None or chosen.get("srcc") is None:
            continue
        value = chosen["srcc"][0]
        assert value is not None  # the mean of one value or more
        if _question(group) not in best or value > best[_question(group)][0]:
            best[_question(group)] = (value, group)
    return {question: group for question, (_, group) in best.items()}


def _row(group: _Group, reference: _Group | None) -> Line:
    run, scores = group.first, group.scores
    against = None
    if reference is not None and reference is not group and scores is not None:
        against = _against(scores, reference)
    return {
        "kind": "head",
        "row": run.row,
        "settings": dict(run.settings),
        "store_name": run.store,
        "protocol": run.protocol,
        **summary(group.label, len(group.runs), group.done, scores, against),
    }


def _baseline_row(line: Line, references: Mapping[_Question, _Group], out: Path) -> tuple[_Question | None, Line]:
    """The row of a baseline, compared with the reference that was tested on its items, and what both answer.

    A correlation that the line has none of, as it tells of the split alone, is not compared.
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
            against |= {told: {**against[told], metric: None} for told in ("difference", "ci", "p")}
    return question, {**line, "against": against}


@dataclass(frozen=True, kw_only=True)
class _Pair:
    """What was predicted for one row under the published split and under folds of whole prompts."""

    row: Line
    """That of the published split."""
    items: Predictions
    """The test items of the published split."""
    published: SeedScores
    folds: Mapping[str, Predictions]


def _pairs_of_heads(groups: Sequence[_Group], rows: Sequence[tuple[_Question | None, Line]]) -> Iterator[_Pair]:
    """The heads that were trained under both protocols."""
    folds = {(one.first.row, one.first.store, one.label): one for one in groups if one.first.protocol == GROUPED}
    for group, (_, row) in zip(groups, rows, strict=False):
        other = folds.get((group.first.row, group.first.store, group.label))
        if group.first.protocol == PUBLISHED and other is not None and group.scores is not None and other.answers:
            items = next(iter(group.answers.values()))
            yield _Pair(row=row, items=items, published=group.scores, folds=other.answers)


def _pairs_of_baselines(
    lines: Sequence[Line], rows: Sequence[tuple[_Question | None, Line]], out: Path
) -> Iterator[_Pair]:
    """The baselines that predict under both protocols, where their scores are of more than the split alone."""
    known = {
        (_asked(line), line["protocol"]): line
        for line in lines
        if "left_out" not in line and line["test"]["srcc"] is not None
    }
    for line, (_, row) in zip(lines, rows, strict=True):
        other_line = known.get((_asked(line), GROUPED))
        if line is known.get((_asked(line), PUBLISHED)) and other_line is not None:
            items, folds = _predicted(line, out), {line["row"]: _predicted(other_line, out)}
            published = scores_over_seeds({line["row"]: items}, seedless=True)
            yield _Pair(row=row, items=items, published=published, folds=folds)


def _asked(line: Line) -> tuple[str, str, str]:
    """What a baseline is called by over protocols: `features` is named by what it fitted."""
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
    told = pair.published.against(scores_over_seeds(cut, seedless=pair.published.seedless))
    return {name: told[name] for name in ("n", "prompts", "difference", "ci", "covers", "confidence")}


def _predicted(line: Line, out: Path) -> Predictions:
    """What a baseline predicted, in the order of `_in_order`."""
    return _in_order([read_predictions(out / line["predictions"], [line["label"]], label=line["label"])])


def _against(scores: SeedScores, reference: _Group) -> Line:
    """The paired comparison with the reference."""
    assert reference.scores is not None  # _references chose
    return {
        "row": reference.first.row,
        "store_name": reference.first.store,
        **scores.against(reference.scores),
    }
