"""What a report says: its sections in order, its summary, and what is missing with the command that makes it."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agiqa.bench.report.charts import curves_chart, interval_chart, rank_chart, rank_table
from agiqa.bench.report.findings import METHOD, findings, limits, teacher_findings, transfer_findings
from agiqa.bench.report.items import Examples, Predictions, examples_of, predictions_of, scatter_chart
from agiqa.bench.report.naming import listed, plural, protocol_name, row_titles
from agiqa.bench.report.paper import paper, paper_tables, radar_chart
from agiqa.bench.report.pictures import Picture
from agiqa.bench.report.provenance import failures_table, left_out_table, outdated, runs_table, stores_table
from agiqa.bench.report.reading import Results
from agiqa.bench.report.row_tables import bias_table, main_tables, optimism_tables
from agiqa.bench.report.tables import Table
from agiqa.bench.report.transfers import directions, shots_chart, shots_table, transfer_table

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

    def blocks(self) -> Iterable[Block]:
        """Every table, picture and list of items."""
        return (block for section in self.sections for block in section.blocks)


def compose(everything: Sequence[Results], *, images: Path | None, notes: Sequence[str]) -> Content:
    """The content of a report on these results."""
    ablations = [one for one in everything if one.about.kind == "ablation"]
    transfers = [one for one in everything if one.about.kind == "transfer"]
    problems = [one.prefixed(text) for one in everything for text in (outdated(one), *one.problems) if text is not None]
    parts: list[tuple[str, str, Iterable[Block | None]]] = [
        ("rows", "Heads and baselines", _row_blocks(ablations)),
        ("transfer", "Across data sets", _transfer_blocks(transfers)),
        ("optimism", "What the published split adds", (one for each in ablations for one in optimism_tables(each))),
        ("paper", "Beside the paper", _paper_blocks(ablations)),
        ("items", "Item by item", _item_blocks(ablations, images, problems)),
        ("ranks", "Energy and rank", _rank_blocks(ablations)),
        ("bias", "Choosing the epoch on test", map(bias_table, everything)),
        ("curves", "Training curves", (curves_chart(one, *group) for one in ablations for group in one.groups())),
        (
            "failed",
            "Failed and left out",
            (make(one) for one in everything for make in (failures_table, left_out_table)),
        ),
    ]
    sections = [Section(name, title, [one for one in blocks if one is not None]) for name, title, blocks in parts]
    sections = [section for section in sections if section.blocks]
    provenance = [make(one) for one in everything for make in (stores_table, runs_table)]
    return Content(
        facts=_facts(everything),
        findings=[
            *(sentence for one in everything for sentence in teacher_findings(one)),
            *(sentence for one in ablations for sentence in findings(one)),
            *(sentence for one in transfers for sentence in transfer_findings(one)),
        ],
        notes=[*notes, *limits(everything)],
        sections=[
            *sections,
            Section("method", "How the numbers are computed", words=METHOD),
            Section("provenance", "Provenance", provenance),
        ],
        missing=_missing(sections, ablations, images),
        problems=problems,
    )


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


def _item_blocks(ablations: Sequence[Results], images: Path | None, problems: list[str]) -> Blocks:
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
            yield scatter_chart(one, found, title)
            if protocol != "published" or (label, "grouped") not in one.groups():
                examples = examples_of(one, found, title, images=images)
                lists.append(examples)
                problems += [one.prefixed(examples.problem)] if examples.problem else []
    yield from lists


def _best_predictions(one: Results, label: str, protocol: str) -> Predictions | None:
    """The predictions of the head with the best validation SRCC; None without such a head or its predictions."""
    best = next(iter(one.of(label, protocol)), None)
    return None if best is None or best.validated("srcc") is None else predictions_of(one, best)


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
    facts = {
        "Data": listed(sorted({paper().data_set(data) or data for name, one in stores if (data := one.data or name)})),
        "Features of": listed(sorted({store.model for _, store in stores if store.model})),
        "Labels": listed(list(dict.fromkeys(row.label for row in rows))),
        "Protocols": listed(list(dict.fromkeys(protocol_name(row.protocol) for row in rows))),
        "Runs": f"{len(lines) - failed:,} done" + (f", {failed:,} failed" if failed else ""),
        "Rows": listed([plural(count, kind) for kind, count in sorted(kinds.items(), reverse=True)]),
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
