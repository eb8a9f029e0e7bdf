"""Tables II to VI of the paper beside what a reproduction has found so far, under both protocols."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from agiqa.bench.ablation.grids import as_mapping
from agiqa.bench.recording.records import Row
from agiqa.bench.recording.result_folders import ROWS
from agiqa.bench.recording.tables import TextTable
from agiqa.bench.report.paper import PROTOCOLS, paper
from agiqa.bench.reproducing.plan import Plan, TablePlan
from agiqa.bench.reproducing.steps import record_path

_SCORES: tuple[str, ...] = ("srcc", "plcc")
_WORDS = ("rough_accuracy", "accuracy", "precision", "f1")
_NONE = "-"
Rows = list[dict[str, Any]]
NOTE = (
    "The paper chooses the epoch by the test score, on splits whose test prompts all occur in training, with one seed. "
    "Here the epoch is chosen on validation items; `published` is the paper's split, and `grouped` tests on unseen "
    "prompts. The published adapters were tuned on the paper's training images, of which `grouped` tests some: its "
    "scores on their features are too high. Scores are means over seeds, with 95 % intervals. A row without scores has "
    "not been run."
)
"""For all tables."""


def paper_rows(plan: Plan, table: str, out: Path) -> Rows:
    """The rows of a table: its name, the paper's numbers, and ours by protocol with intervals; None where not run."""
    wanted = plan.tables[table]
    return [*_heads(wanted, out), *_networks(plan, wanted, out), *_words(wanted, out), *_transfers(plan, wanted, out)]


def as_text(plan: Plan, table: str, rows: Rows) -> list[str | TextTable]:
    """Heading, table and notes of `paper_rows`."""
    wanted = plan.tables[table]
    metrics = _WORDS if wanted.words else _SCORES
    ways = list(dict.fromkeys(way for row in rows for way in row["ours"]))
    head = ["Data, aspect", "Row", *(f"Paper {_title(name)}" for name in metrics)]
    head += ["Here", *(f"{_title(name)} {way}" for way in ways for name in metrics)]
    cells = [
        [
            ", ".join(row["about"]),
            row["paper"],
            *(_number(row["cited"].get(name)) for name in metrics),
            row["row"] or _NONE,
            *(_score(row["ours"].get(way), name) for way in ways for name in metrics),
        ]
        for row in rows
    ]
    notes = [f"- {note}" for note in wanted.notes]
    return [f"## Table {wanted.number}: {wanted.title}", TextTable(head=head, rows=cells), "\n".join(notes)]


def _heads(wanted: TablePlan, out: Path) -> Iterator[dict[str, Any]]:
    for head in wanted.heads:
        cited = next(
            (
                {name: getattr(fact, name) for name in _SCORES}
                for fact in paper().rows
                if (fact.table, fact.data, fact.label, fact.name) == (wanted.number, head.data, head.label, head.paper)
            ),
            {},
        )
        rows = read_rows(out / "heads" / head.ablation)
        found = [row for row in rows if (row.kind, row.label, row.row) == ("head", head.label, head.row)]
        yield _row((head.data, head.label), head.paper, cited, f"{head.ablation}: {head.row}", _by_protocol(found))


def _networks(plan: Plan, wanted: TablePlan, out: Path) -> Iterator[dict[str, Any]]:
    """Every method that the paper cites on the data set, with our network where there is code for it."""
    for name in wanted.networks:
        networks = plan.networks[name]
        rows = read_rows(out / "networks" / name)
        for label in networks.labels:
            for cited in paper().cited:
                scores = cited.scores.get(networks.data, {}).get(label)
                model = next((one for one in networks.models if one in cited.networks), None)
                found = [row for row in rows if row.kind == "network" and (row.row, row.label) == (model, label)]
                numbers = {} if scores is None else dict(zip(_SCORES, scores, strict=True))
                here = model if model is not None else None if cited.networks else "cited only, no public code"
                if numbers or found:
                    yield _row((networks.data, label), cited.name, numbers, here, _by_protocol(found))


def _words(wanted: TablePlan, out: Path) -> Iterator[dict[str, Any]]:
    for one in wanted.words:
        cited = next((fact for fact in paper().words if (fact.label, fact.name) == (one.label, one.paper)), None)
        record = record_path(out, f"words/{one.descriptions}")
        result = json.loads(record.read_text(encoding="utf-8"))["result"] if record.is_file() else None
        numbers = {} if cited is None else {name: getattr(cited, name) for name in _WORDS}
        yield _row(
            () if cited is None else (cited.data, cited.label),
            one.paper,
            numbers,
            f"test images of {one.descriptions}",
            {} if result is None else {"test": {**{name: result[name] for name in _WORDS}, "ci": result["ci"]}},
        )


def _transfers(plan: Plan, wanted: TablePlan, out: Path) -> Iterator[dict[str, Any]]:
    for name in wanted.transfers:
        one = plan.transfers[name]
        source, target = plan.first(one.source).data, plan.first(one.target).data
        cited = next(
            (t for t in paper().transfers if (t.source, t.target, t.label) == (source, target, one.label)), None
        )
        rows = read_rows(out / "transfers" / name)
        for way, title in (("apply", "w/o TP"), ("tp", "w/ TP")):
            found = [row for row in rows if row.settings.get("way") == way and row.settings.get("to") == target]
            numbers = {} if cited is None else dict(zip(_SCORES, getattr(cited, way), strict=True))
            yield _row((f"{source} to {target}", one.label), title, numbers, f"{name}: {way}", _by_protocol(found))


def _row(
    about: Sequence[str], paper_row: str, cited: dict[str, float], here: str | None, ours: dict[str, Any]
) -> dict[str, Any]:
    return {"about": list(about), "paper": paper_row, "cited": cited, "row": here, "ours": ours}


def _by_protocol(rows: Sequence[Row]) -> dict[str, Any]:
    """The test scores of rows with their intervals, under the protocols of the tables."""
    return {
        row.protocol: {**{name: row.value(name) for name in _SCORES}, "ci": row.test.ci, "seeds": row.test.seeds}
        for protocol in PROTOCOLS
        for row in rows
        if row.protocol == protocol and row.test is not None
    }


def read_rows(folder: Path) -> list[Row]:
    """The rows of a result folder; none where it has none yet."""
    file = folder / ROWS
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines()
    return [Row.model_validate(as_mapping(f"{file}", json.loads(line))) for line in lines]


def _title(metric: str) -> str:
    return metric.upper() if metric in _SCORES else metric.replace("_", " ")


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.4f}"


def _score(scores: dict[str, Any] | None, metric: str) -> str:
    if scores is None or scores[metric] is None:
        return _NONE
    interval = scores["ci"].get(metric)
    return _number(scores[metric]) + ("" if interval is None else f" [{interval[0]:.3f}, {interval[1]:.3f}]")
