"""What a report says: its sections in order, its summary, and what is missing with the command that makes it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agiqa.bench.report.charts import curves_chart, interval_chart, rank_chart, rank_table
from agiqa.bench.report.coverage import coverage_table
from agiqa.bench.report.findings import METHOD, findings, limits, teacher_findings, transfer_findings
from agiqa.bench.report.group_tables import group_tables, read_groupings
from agiqa.bench.report.items import Examples, Predictions, examples_of, predictions_of, scatter_chart
from agiqa.bench.report.layers import layer_chart, layer_table
from agiqa.bench.report.naming import listed, plural, protocol_name, row_titles
from agiqa.bench.report.networks import NETWORKS, cited_tables, compared_tables
from agiqa.bench.report.paper import paper, paper_tables, radar_chart
from agiqa.bench.report.pictures import Picture
from agiqa.bench.report.provenance import failures_table, left_out_table, outdated, runs_table, stores_table
from agiqa.bench.report.reading import Results
from agiqa.bench.report.row_tables import bias_table, main_tables, optimism_tables
from agiqa.bench.report.tables import SWITCHES, Table
from agiqa.bench.report.transfers import directions, shots_chart, shots_table, transfer_table
from agiqa.heads.evaluation.mos_mappings import CURVE_ITEMS
from agiqa.store.format.columns import ColumnNames

Block = Table | Picture | Examples
Blocks = Iterator[Block | None]
"""The parts of a section; None stands for one that has no data."""
_ROWS_TOGETHER = 30
"""Up to this many rows of several stores share one chart."""
_ABLATE = "agiqa ablate STORE OUT --grid GRID.yaml"


@dataclass(frozen=True)
class Missing:
    """A part of a report that has no data, and the command that makes it."""

    what: str
    command: str
    how: str = ""
    """What the command needs to make it."""

    def line(self) -> str:
        """All of it on one line."""
        return f"{self.what}: {self.command}{', ' if self.how else ''}{self.how}"


_MISSING = {
    "rows": Missing("Heads and baselines", _ABLATE),
    "baselines": Missing("Baselines", _ABLATE, "which writes them beside the heads"),
    "transfer": Missing("Results across data sets, few-shot curve", "agiqa transfer SOURCE TARGET OUT"),
    "optimism": Missing(
        "Optimism of the published split",
        _ABLATE,
        "with `protocols: [published, {grouped: {folds: 5}}]` in the grid",
    ),
    "paper": Missing(
        "The paper's numbers beside ours",
        _ABLATE,
        "on a data set of the paper, with its encoders and poolings; `agiqa report --data NAME` names the data set",
    ),
    "radar": Missing("Radar over the aspects", _ABLATE, "with `label: quality+correspondence` in the base of the grid"),
    "scatter": Missing(
        "Scatter, best and worst items",
        _ABLATE,
        "whose OUT/runs holds the predictions; keep it beside the result lines",
    ),
    "images": Missing("Images of the best and worst items", "agiqa report OUT --images FOLDER"),
    "rank": Missing(
        "SRCC against rank",
        "agiqa store sketch STORE SKETCH --rank R",
        "for several ranks, then `agiqa ablate` with `--store NAME=SKETCH` for each",
    ),
    "groups": Missing(
        "Scores by generator and by style of the prompt",
        "agiqa report OUT --groups TABLE",
        "with the predictions of OUT/runs; a column `generator` of the store is used too",
    ),
    "bias": Missing(
        "Best epoch on test beside the honest number", _ABLATE, "with `paper_compatible: true` in the base of the grid"
    ),
    "curves": Missing("Training curves", _ABLATE, "whose OUT/runs holds the curves of more than one epoch"),
}
"""Everything that a report can lack."""


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    blocks: Sequence[Block] = ()
    words: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Content:
    """The whole content of a report."""

    facts: dict[str, str]
    findings: Sequence[str]
    notes: Sequence[str]
    sections: Sequence[Section]
    missing: Sequence[Missing]
    problems: Sequence[str]
    show: frozenset[str]
    """The switches of columns that are on."""

    def blocks(self) -> Iterable[Block]:
        """Every table, picture and list of items."""
        return (block for section in self.sections for block in section.blocks)


@dataclass(frozen=True, kw_only=True)
class ReportSettings:
    """What a report shows, and which files it has."""

    images: Path | None = None
    """The folder of the images by item name."""
    groups: Path | None = None
    """A table of images; each of its text columns makes a table of scores (`read_groupings`)."""
    columns: ColumnNames | None = None
    """Columns of that table by their meaning, as of `open_labels`."""
    title: str | None = None
    """Of the page; None for the names of the folders."""
    notes: Sequence[str] = ()
    """Sentences on the data for the reader."""
    data: str | None = None
    """The data set of stores that do not name theirs."""
    show: frozenset[str] = frozenset()
    """The columns of `tables.SWITCHES` that are switched on."""
    quartic: bool = False
    """Whether scatter plots have the paper's fit, instead of a logistic."""
    latex: bool = False
    """Whether each table is also written in LaTeX."""
    pdf: bool = False
    """Whether each picture is also written as a PDF of the width of a column."""


def compose(everything: Sequence[Results], settings: ReportSettings) -> Content:
    """The content of a report on these results. Raises as `read_groupings`."""
    ablations = [one for one in everything if one.about.kind not in ("transfer", NETWORKS)]
    networks = [one for one in everything if one.about.kind == NETWORKS]
    transfers = [one for one in everything if one.about.kind == "transfer"]
    trained = [*ablations, *networks]
    problems = [one.prefixed(text) for one in everything for text in (outdated(one), *one.problems) if text is not None]
    parts: list[tuple[str, str, Iterable[Block | None]]] = [
        ("rows", "Heads and baselines", _row_blocks(ablations)),
        ("networks", "Image networks", _network_blocks(everything, networks, problems)),
        ("transfer", "Across data sets", _transfer_blocks(transfers)),
        ("optimism", "What the published split adds", (one for each in trained for one in optimism_tables(each))),
        ("paper", "Beside the paper", _paper_blocks(ablations)),
        ("items", "Item by item", _item_blocks(ablations, settings, problems)),
        ("groups", "By generator and prompt", _group_blocks(ablations, settings, problems)),
        ("layers", "Layer by layer", _layer_blocks(ablations)),
        ("coverage", "Intervals", (coverage_table(one, *group) for one in ablations for group in one.groups())),
        ("ranks", "Energy and rank", _rank_blocks(ablations)),
        ("bias", "Choosing the epoch on test", map(bias_table, everything)),
        ("curves", "Training curves", (curves_chart(one, *group) for one in trained for group in one.groups())),
        (
            "failed",
            "Failed and left out",
            (make(one) for one in everything for make in (failures_table, left_out_table)),
        ),
    ]
    sections = [Section(name, title, list(_switched(blocks, settings.show))) for name, title, blocks in parts]
    sections = [section for section in sections if section.blocks]
    provenance = [make(one) for one in everything for make in (stores_table, runs_table)]
    return Content(
        facts=_facts(everything),
        findings=[
            *(sentence for one in everything for sentence in teacher_findings(one)),
            *(sentence for one in ablations for sentence in findings(one)),
            *(sentence for one in transfers for sentence in transfer_findings(one)),
        ],
        notes=[*settings.notes, *limits(everything)],
        sections=[
            *sections,
            Section("method", "How the numbers are computed", words=METHOD),
            Section("provenance", "Provenance", provenance),
        ],
        missing=_missing(sections, ablations, settings.images),
        problems=[*problems, *_absent_columns(sections, settings.show)],
        show=settings.show,
    )


def _switched(blocks: Iterable[Block | None], show: frozenset[str]) -> Iterator[Block]:
    """The blocks that have data, with these columns of their tables switched on."""
    for block in blocks:
        if block is not None:
            yield block.with_switched_on(show) if isinstance(block, Table) else block


def _absent_columns(sections: Sequence[Section], show: frozenset[str]) -> list[str]:
    """A line for each column to show that no table has."""
    tables = [block for section in sections for block in section.blocks if isinstance(block, Table)]
    found = {name for table in tables for name in table.switches}
    why = {"logistic": f" A logistic curve needs {CURVE_ITEMS} validation images in every run of a row."}
    return [
        f"the column {SWITCHES[name]} (`--show {name}`): no row has a value for it.{why.get(name, '')}"
        for name in sorted(show - found)
    ]


def _row_blocks(ablations: Sequence[Results]) -> Blocks:
    for one in ablations:
        tables = main_tables(one)
        for label in dict.fromkeys(label for label, _ in one.groups()):
            rows = [row for row in one.rows if row.label == label]
            stores = list(dict.fromkeys(row.store_name for row in rows))
            together = len({(row.identity, row.store_name) for row in rows}) <= _ROWS_TOGETHER
            for part in [stores] if together else [[store] for store in stores]:
                yield interval_chart(one, label, part)
            yield from (table for table, (of, _) in zip(tables, one.groups(), strict=True) if of == label)


def _network_blocks(everything: Sequence[Results], networks: Sequence[Results], problems: list[str]) -> Blocks:
    """Networks beside the best head, Table II beside ours, then their own tables."""
    yield from compared_tables(everything, problems)
    yield from cited_tables(networks)
    yield from _row_blocks(networks)


def _transfer_blocks(transfers: Sequence[Results]) -> Blocks:
    for one in transfers:
        for label, protocol in one.groups():
            yield transfer_table(one, label, protocol)
            for direction in directions(one, label, protocol):
                yield shots_chart(one, direction, label, protocol)
            yield shots_table(one, label, protocol)


def _paper_blocks(ablations: Sequence[Results]) -> Blocks:
    for one in ablations:
        yield from paper_tables(one)
        for store, protocol in dict.fromkeys((row.store_name, row.protocol) for row in one.rows):
            yield radar_chart(one, protocol, store)


def _group_blocks(ablations: Sequence[Results], settings: ReportSettings, problems: list[str]) -> Blocks:
    """The tables by group of each label and protocol; a table of groups that has none of the images is a problem."""
    groupings = {} if settings.groups is None else read_groupings(settings.groups, settings.columns)
    used: set[str] = set()
    for one in ablations:
        for label, protocol in one.groups():
            tables = group_tables(one, label, protocol, groupings)
            used |= tables.keys()
            yield from tables.values()
    if groupings and used.isdisjoint(groupings):
        problems.append(f"{settings.groups}: none of its images is among the test images whose predictions are there.")


def _item_blocks(ablations: Sequence[Results], settings: ReportSettings, problems: list[str]) -> Blocks:
    """The scatter plots of the best head of each label and protocol, then its best and worst items.

    Predictions and images that could not be read are added to `problems`.
    """
    lists: list[Examples] = []
    for one in ablations:
        for label, protocol in one.groups():
            found = _best_predictions(one, label, protocol)
            if found is None:
                continue
            title = row_titles(one.of(label, protocol))[found.row.row]
            problems += [one.prefixed(problem) for problem in found.missing]
            yield scatter_chart(one, found, title, quartic=settings.quartic)
            if protocol != "published" or (label, "grouped") not in one.groups():
                examples = examples_of(one, found, title, images=settings.images)
                lists.append(examples)
                problems += [one.prefixed(examples.problem)] if examples.problem else []
    yield from lists


def _best_predictions(one: Results, label: str, protocol: str) -> Predictions | None:
    """The predictions of the head with the best validation SRCC; None without such a head or its predictions."""
    best = next(iter(one.of(label, protocol)), None)
    return None if best is None or best.validated("srcc") is None else predictions_of(one, best)


def _layer_blocks(ablations: Sequence[Results]) -> Blocks:
    for one in ablations:
        for label, protocol in one.groups():
            yield layer_chart(one, label, protocol)
            yield layer_table(one, label, protocol)


def _rank_blocks(ablations: Sequence[Results]) -> Blocks:
    """Charts and tables of heads at several ranks; without any, the energy that a sketch keeps."""
    found = False
    for one in ablations:
        for label, protocol in one.groups():
            table = rank_table(one, label, protocol)
            if table is not None:
                found = True
                yield rank_chart(one, label, protocol)
                yield table
    if ablations and not found:
        yield rank_chart(ablations[0], *ablations[0].groups()[0])


def _facts(everything: Sequence[Results]) -> dict[str, str]:
    stores = [(name, store) for one in everything for name, store in one.about.stores.items()]
    lines = [line for one in everything for line in one.lines]
    failed = sum(line.error is not None for line in lines)
    rows = [row for one in everything for row in one.rows]
    kinds = Counter(row.kind for row in rows)
    data = [found for name, one in stores if (found := one.data or name or one.hint)]
    facts = {
        "Data": listed(sorted({paper().data_set(name) or name for name in data})),
        "Model of the features": listed(sorted({store.model for _, store in stores if store.model})),
        "Labels": listed(list(dict.fromkeys(row.label for row in rows))),
        "Protocols": listed(list(dict.fromkeys(protocol_name(row.protocol) for row in rows))),
        "Runs": f"{len(lines) - failed:,} done" + (f", {failed:,} failed" if failed else ""),
        "Compared": listed([plural(count, kind) for kind, count in sorted(kinds.items(), reverse=True)]),
    }
    return {name: value for name, value in facts.items() if value}


def _missing(sections: Sequence[Section], ablations: Sequence[Results], images: Path | None) -> list[Missing]:
    """Everything of `_MISSING` that the sections lack. If there is no ablation, only that is missing."""
    blocks = {section.name: section.blocks for section in sections}
    pictures = [block.name.split("-") for part in blocks.values() for block in part if isinstance(block, Picture)]
    found = {
        **dict.fromkeys(blocks, True),
        **{kind: any(kind in words for words in pictures) for kind in ("radar", "scatter")},
        "baselines": any(row.kind == "baseline" for one in ablations for row in one.rows),
        "images": images is not None or "items" not in blocks,
        "rank": any(isinstance(block, Table) for block in blocks.get("ranks", ())),
    }
    wanted = _MISSING if ablations else {"rows": _MISSING["rows"], "transfer": _MISSING["transfer"]}
    return [one for key, one in wanted.items() if not found.get(key)]
