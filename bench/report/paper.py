"""The paper's numbers (paper.yaml) beside ours, where a row of ours means the same thing."""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field

from agiqa.bench.report.naming import METRIC_NAMES, on_store, row_titles, slug
from agiqa.bench.report.reading import METRICS, AboutStore, Results, Row
from agiqa.bench.report.row_tables import score_cell
from agiqa.bench.report.tables import Cell, Column, Table

NUMBERS = Path(__file__).with_name("paper.yaml")
PROTOCOLS = ("published", "grouped")


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PaperRow(_Fact):
    """A row of Tables II to IV."""

    table: str
    data: str
    label: str
    name: str
    settings: dict[str, str] | None = None
    variant: list[str] | None = None
    srcc: float
    plcc: float


class PaperWords(_Fact):
    """A row of Table V: the rating word as a class."""

    table: str
    data: str
    label: str
    name: str
    rough_accuracy: float
    accuracy: float
    precision: float
    f1: float


class PaperTransfer(_Fact):
    """A row of Table VI: SRCC and PLCC of the head as it is, and of the predictor retrained."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    table: str
    label: str
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    apply: tuple[float, float]
    tp: tuple[float, float]


class Paper(_Fact):
    """The numbers, and the names that data sets, labels and models go by elsewhere."""

    data_sets: dict[str, list[str]]
    labels: dict[str, list[str]]
    models: list[str]
    reads_logits: list[str]
    rows: list[PaperRow]
    words: list[PaperWords]
    transfers: list[PaperTransfer]

    def data_set(self, name: str) -> str | None:
        """The paper's name of the data set that `name` names or begins with, as `AGIQA-3k_r128` does; or None."""
        begins = _letters(name)
        found = (known for known, others in self.data_sets.items() if begins.startswith((_letters(known), *others)))
        return next(found, None)

    def label(self, name: str) -> str | None:
        """The paper's name of an aspect, or None."""
        return _known(name, self.labels)

    def is_its_model(self, store: AboutStore) -> bool:
        """Whether the features are of the model that the paper used."""
        return any(name in _letters(store.model_name) for name in self.models)


@cache
def paper() -> Paper:
    """What paper.yaml says."""
    return Paper.model_validate(yaml.safe_load(NUMBERS.read_text(encoding="utf-8")))


def paper_tables(results: Results) -> list[Table]:
    """A table for each data set and label that the paper has, where a row of ours means the same as one of its."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        data, label = paper().data_set(results.store(row.store_name).hint), paper().label(row.label)
        if row.kind == "head" and data and label and row.protocol in PROTOCOLS:
            found.setdefault((data, label), []).append(row)
    tables = [_table(results, data, label, rows) for (data, label), rows in found.items()]
    return [table for table in tables if table is not None]


def paper_scores(data: str | None, label: str | None) -> PaperRow | None:
    """The paper's own head on a data set and label (Table II)."""
    return next((one for one in paper().rows if (one.table, one.data, one.label) == ("II", data, label)), None)


def comparable(stores: Sequence[AboutStore]) -> str:
    """Whether numbers on these stores may be held against the paper's, in words."""
    others = sorted(
        {store.model_name or "a model that is not recorded" for store in stores if not paper().is_its_model(store)}
    )
    if not others:
        return (
            "The features are of the model that the paper used; its splits, seeds and choice of the epoch still "
            "differ from ours."
        )
    return (
        f"Not comparable: our features are of {' and '.join(others)}, the paper's of MiniCPM-Llama3-V-2.5 "
        "fine-tuned on the "
        "data set, which saw the images. The paper's numbers stand here for orientation only."
    )


def _table(results: Results, data: str, label: str, rows: Sequence[Row]) -> Table | None:
    facts = [one for one in paper().rows if (one.data, one.label) == (data, label)]
    matches = {k: [row for row in rows if _means_the_same(results, row, fact)] for k, fact in enumerate(facts)}
    if not any(matches.values()):
        return None
    titles = row_titles(rows)
    protocols = [protocol for protocol in PROTOCOLS if any(row.protocol == protocol for row in rows)]
    columns = [
        Column(key="paper_row", title="In the paper", kind="text"),
        Column(key="table", title="Table", kind="text"),
    ]
    columns += [
        Column(key=f"paper_{metric}", title=f"Paper {METRIC_NAMES[metric]}", kind="paper") for metric in METRICS
    ]
    columns += [Column(key="row", title="Here", kind="text")]
    for protocol in protocols:
        for metric in METRICS:
            columns += [Column(key=f"{metric}_{protocol}", title=f"{METRIC_NAMES[metric]} {protocol}", interval=True)]
    body = [_line(fact, matches[k], protocols, titles) for k, fact in enumerate(facts) if matches[k]]
    others = [f"{fact.name} ({fact.table})" for k, fact in enumerate(facts) if not matches[k]]
    stores = [results.store(row.store_name) for row in rows]
    notes = [
        comparable(stores),
        "Rows are matched by encoder, pooling and what the projection reads, not by depth, direction or "
        "training. The published "
        "code pools the first and last token in its bidirectional LSTM (4 layers) and GRU (2), which the paper "
        "does not say.",
        "The paper picks the epoch by its test score, on splits whose prompts all occur in training, and gives "
        "one seed.",
        *([f"Without a counterpart here: {', '.join(others)}."] if others else []),
    ]
    title = results.titled(f"the paper's numbers, {data}, {label}")
    return Table(
        name=slug(results.prefix, "paper", data, label),
        title=title,
        columns=columns,
        rows=body,
        notes=notes,
    )


def _line(fact: PaperRow, matches: Sequence[Row], protocols: Sequence[str], titles: dict[str, str]) -> list[Cell]:
    """A row of the paper, and the row of ours with the best validation SRCC among those that mean the same."""
    best = max(matches, key=Row.chosen_by)
    same = [row for row in matches if (row.row, row.store_name) == (best.row, best.store_name)]
    by_protocol = {row.protocol: row for row in same}
    ours = [
        score_cell(by_protocol[protocol], metric) if protocol in by_protocol else Cell(value=None)
        for protocol in protocols
        for metric in METRICS
    ]
    return [
        Cell(value=fact.name),
        Cell(value=fact.table),
        Cell(value=fact.srcc),
        Cell(value=fact.plcc),
        Cell(value=on_store(titles[best.row], best.store_name)),
        *ours,
    ]


def _means_the_same(results: Results, row: Row, fact: PaperRow) -> bool:
    if fact.settings is None:
        return False
    if fact.variant is not None and results.store(row.store_name).variant not in fact.variant:
        return False
    settings = settings_of(results, row)
    projection = fact.settings.get("projection")
    reads = settings.get("projection", "vocabulary")
    if reads != projection if projection else reads not in paper().reads_logits:
        return False
    return all(settings.get(name) == value for name, value in fact.settings.items())


def settings_of(results: Results, row: Row) -> dict[str, Any]:
    """All settings of the runs of a row, as far as they are recorded."""
    line = next(iter(results.runs_of(row)), None)
    return {**(line.config if line else {}), **row.settings}


def _known(name: str, names: dict[str, list[str]]) -> str | None:
    wanted = _letters(name)
    return next((known for known, others in names.items() if wanted in (_letters(known), *others)), None)


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
