"""The paper's numbers (paper.yaml) beside ours: tables of matching rows, and the radar of its Fig. 1."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes
from pydantic import BaseModel, ConfigDict, Field

from agiqa.bench.recording.records import AboutStore, Row
from agiqa.bench.report.naming import METRIC_NAMES, on_store, plural, protocol_name, row_titles
from agiqa.bench.report.pictures import GRID, MUTED, SMALL, Floats, Picture, draw, draw_line, safe, styled
from agiqa.bench.report.reading import METRICS, Results
from agiqa.bench.report.tables import Column, Table, make_table, score_column

NUMBERS = Path(__file__).with_name("paper.yaml")
PROTOCOLS = ("published", "grouped")
_FEWEST_AXES = 3
_RADAR_HEADS = 4
Spokes = list[tuple[str, str]]
"""Label and metric of each axis of a radar."""


class _Fact(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


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


class PaperCited(_Fact):
    """A row of Table II by another method."""

    name: str
    networks: list[str] = Field(default_factory=list)
    """The models of `agiqa baseline` that it is; empty for a method without code here."""
    confirmed: list[str] = Field(min_length=1)
    """The sources that have every number of the row."""
    unconfirmed: list[str] = Field(default_factory=list)
    """Sources that the paper copied the numbers from, whose splits may be others, and that were not compared."""
    scores: dict[str, dict[str, tuple[float, float]]]
    """SRCC and PLCC by data set and label."""


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
    """A row of Table VI: SRCC and PLCC of the unchanged head, and of the retrained predictor."""

    table: str
    label: str
    source: str = Field(alias="from")
    target: str = Field(alias="to")
    apply: tuple[float, float]
    tp: tuple[float, float]


class Paper(_Fact):
    """The paper's numbers, and other names of its data sets, labels and models."""

    data_sets: dict[str, list[str]]
    labels: dict[str, list[str]]
    models: list[str]
    reads_logits: list[str]
    rows: list[PaperRow]
    sources: dict[str, str]
    """What numbers of other methods were compared with, or should be, by the names in `cited`."""
    cited: list[PaperCited]
    words: list[PaperWords]
    transfers: list[PaperTransfer]

    def data_set(self, name: str) -> str | None:
        """The paper's name of a data set, or None. `name` may continue after it, as `AGIQA-3k_r128` does."""
        begins = _letters(name)
        found = (known for known, others in self.data_sets.items() if begins.startswith((_letters(known), *others)))
        return next(found, None)

    def label(self, name: str) -> str | None:
        """The paper's name of an aspect, or None."""
        wanted = _letters(name)
        return next((known for known, others in self.labels.items() if wanted in (_letters(known), *others)), None)

    def is_its_model(self, store: AboutStore) -> bool:
        """Whether the features are of the model that the paper used."""
        return any(name in _letters(store.model) for name in self.models)


@cache
def paper() -> Paper:
    """The content of paper.yaml."""
    return Paper.model_validate(yaml.safe_load(NUMBERS.read_text(encoding="utf-8")))


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


def comparable(stores: Sequence[AboutStore]) -> str:
    """A sentence that says whether numbers on these stores are comparable with the paper's."""
    others = sorted({store.model or "an unknown model" for store in stores if not paper().is_its_model(store)})
    if not others:
        return (
            "The features are of the model that the paper used. Its splits, its seeds and its choice of the epoch "
            "differ from ours."
        )
    return (
        f"Not comparable: our features are of {' and '.join(others)}. Those of the paper are of MiniCPM-Llama3-V-2.5, "
        "which was fine-tuned on the data set and saw the images. The paper's numbers are for orientation only."
    )


def paper_tables(results: Results) -> list[Table]:
    """A table for each data set and label of the paper that has a row which matches one of ours."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        data, label = paper().data_set(results.store(row.store_name).hint), paper().label(row.label)
        if row.kind == "head" and data and label and row.protocol in PROTOCOLS:
            found.setdefault((data, label), []).append(row)
    tables = [_table(results, data, label, rows) for (data, label), rows in found.items()]
    return [table for table in tables if table is not None]


Match = tuple[PaperRow, Mapping[str, Row]]
"""A row of the paper and our row under each protocol."""


def _table(results: Results, data: str, label: str, rows: Sequence[Row]) -> Table | None:
    matched: list[Match] = []
    unmatched: list[str] = []
    for fact in (one for one in paper().rows if (one.data, one.label) == (data, label)):
        ours = _best([row for row in rows if _matches(results, row, fact)])
        matched += [(fact, ours)] if ours else []
        unmatched += [] if ours else [f"{fact.name} ({fact.table})"]
    if not matched:
        return None
    titles = row_titles(rows)

    def title_of_ours(match: Match) -> str:
        row = next(iter(match[1].values()))
        return on_store(titles[row.row], row.store_name)

    columns: list[Column[Match]] = [
        Column("paper_row", "In the paper", lambda match: match[0].name, "text"),
        Column("table", "Table", lambda match: match[0].table, "text"),
        Column("paper_srcc", "Paper SRCC", lambda match: match[0].srcc, "paper"),
        Column("paper_plcc", "Paper PLCC", lambda match: match[0].plcc, "paper"),
        Column("row", "Here", title_of_ours, "text"),
    ]
    for protocol in PROTOCOLS:
        if any(row.protocol == protocol for row in rows):
            columns += _our_scores(protocol)
    notes = [
        comparable([results.store(row.store_name) for row in rows]),
        "Rows match by encoder, pooling and input of the projection, not by depth, direction or training. The "
        "published code pools the first and last token of its bidirectional LSTM (4 layers) and GRU (2 layers), which "
        "the paper does not mention.",
        "The paper chooses the epoch by the test score, on splits whose test prompts all occur in training, and gives "
        "one seed.",
        *([f"Without a counterpart here: {', '.join(unmatched)}."] if unmatched else []),
    ]
    title = f"the paper's numbers, {data}, {label}"
    return make_table(results, ["paper", data, label], title, columns, matched, notes)


def _our_scores(protocol: str) -> list[Column[Match]]:
    def row_of(match: Match) -> Row | None:
        return match[1].get(protocol)

    key, title = f"{{metric}}_{protocol}", f"{{metric}} {protocol}"
    return [score_column(metric, row_of, key=key, title=title) for metric in METRICS]


def _best(rows: Sequence[Row]) -> Mapping[str, Row]:
    """By protocol, the head with the best validation SRCC; empty without rows."""
    best = max(rows, key=lambda row: row.rank_by, default=None)
    same = [row for row in rows if best and (row.row, row.store_name) == (best.row, best.store_name)]
    return {row.protocol: row for row in same}


def _matches(results: Results, row: Row, fact: PaperRow) -> bool:
    """Whether a row of ours has the settings of a row of the paper."""
    if fact.settings is None:
        return False
    line = next(iter(results.runs_of(row)), None)
    settings: dict[str, Any] = {**(line.config if line else {}), **row.settings}
    variant = settings.get("variant") or results.store(row.store_name).variant
    if fact.variant is not None and variant not in fact.variant:
        return False
    projection, wanted = settings.get("projection", "vocabulary"), fact.settings.get("projection")
    if projection != wanted if wanted else projection not in paper().reads_logits:
        return False
    return all(settings.get(name) == value for name, value in fact.settings.items())


def radar_chart(results: Results, protocol: str, store: str) -> Picture | None:
    """The SRCC and PLCC of every aspect under one protocol on one store; None for fewer than three axes."""
    rows = [row for row in results.rows if (row.protocol, row.store_name, row.kind) == (protocol, store, "head")]
    spokes: Spokes = [(label, metric) for metric in METRICS for label in dict.fromkeys(row.label for row in rows)]
    heads = _complete(rows, spokes)
    if len(spokes) < _FEWEST_AXES or not heads:
        return None
    about, titles = results.store(store), row_titles(rows)
    papers = [value for spoke in spokes if (value := _paper_score(about, *spoke)) is not None]
    papers = papers if len(papers) == len(spokes) else []

    def paint(figure: Figure) -> None:
        axes = cast("PolarAxes", figure.add_subplot(projection="polar"))
        angles = np.linspace(0.0, 2.0 * np.pi, len(spokes), endpoint=False)
        lines = [(titles[name], values, style) for name, values, style in styled(heads)]
        lines += [("the paper", papers, {"color": MUTED, "linestyle": (0, (3, 2))})] if papers else []
        for name, values, style in lines:
            points = [(angle, value, None) for angle, value in zip([*angles, 0.0], [*values, values[0]], strict=True)]
            draw_line(axes, points, name, markersize=4, linewidth=1.5, **style)
        _draw_spokes(axes, angles, spokes, [values for _, values, _ in lines])
        figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)

    name, values = next(iter(heads.items()))
    scores = ", ".join(
        f"{label} {METRIC_NAMES[metric]} {value:.3f}" for (label, metric), value in zip(spokes, values, strict=True)
    )
    beside = f" {comparable([about])}" if papers else ""
    return draw(
        results.anchor("radar", protocol, store),
        results.heading(f"aspects, {protocol_name(protocol)}"),
        alt=f"Radar over {len(spokes)} axes of {plural(len(heads), 'head')}. {titles[name]}: {scores}.",
        caption=f"Test SRCC and PLCC of the {plural(len(heads), 'head')} with the best mean validation SRCC.{beside}",
        height=4.3,
        paint=paint,
    )


def _paper_score(about: AboutStore, label: str, metric: str) -> float | None:
    """The score of the paper's own head (Table II) on the data set of a store."""
    wanted = ("II", paper().data_set(about.hint), paper().label(label))
    found = (getattr(one, metric) for one in paper().rows if (one.table, one.data, one.label) == wanted)
    return next(found, None)


def _complete(rows: Sequence[Row], spokes: Spokes) -> dict[str, list[float]]:
    """The values of the heads that have one on every axis, the best mean validation SRCC first."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row.row, {})[row.label] = row
    found: dict[str, list[float]] = {}
    for name in sorted(by_name, key=lambda name: -float(np.mean([row.rank_by for row in by_name[name].values()]))):
        values = [by_name[name][label].value(metric) for label, metric in spokes if label in by_name[name]]
        known = [value for value in values if value is not None]
        if len(known) == len(spokes) and len(found) < _RADAR_HEADS:
            found[name] = known
    return found


def _draw_spokes(axes: PolarAxes, angles: Floats, spokes: Spokes, lines: Sequence[Sequence[float]]) -> None:
    low = min(value for line in lines for value in line)
    axes.set_ylim(max(0.0, np.floor(low * 10 - 1) / 10) if low > 0 else low - 0.1, 1.0)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [safe(f"{label}\n{METRIC_NAMES[metric]}") for label, metric in spokes])
    axes.tick_params(axis="x", pad=12)
    axes.tick_params(axis="y", labelsize=SMALL - 0.5, labelcolor=MUTED)
    axes.set_rlabel_position(180.0 / len(spokes))
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.spines["polar"].set_color(GRID)
