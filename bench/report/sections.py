"""What a report says, in the order of its sections, and what it has no data for."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agiqa.bench.report.bookkeeping import (
    bias_table,
    failures_table,
    left_out_table,
    outdated,
    runs_table,
    stores_table,
)
from agiqa.bench.report.examples import Examples, examples_of
from agiqa.bench.report.figures import Picture
from agiqa.bench.report.item_charts import scatter_chart
from agiqa.bench.report.missing import KEYS, Missing, missing
from agiqa.bench.report.naming import listed, plural, protocol_name, row_titles
from agiqa.bench.report.paper import paper, paper_tables
from agiqa.bench.report.predictions import Predictions, predictions_of
from agiqa.bench.report.radar import radar_chart
from agiqa.bench.report.rank_charts import rank_chart, rank_table
from agiqa.bench.report.reading import Results
from agiqa.bench.report.row_charts import curves_chart, interval_chart
from agiqa.bench.report.row_tables import main_tables, optimism_tables
from agiqa.bench.report.tables import Table
from agiqa.bench.report.transfers import directions, shots_chart, shots_table, transfer_table
from agiqa.bench.report.words import METHOD, findings, limits, teacher_findings, transfer_findings

Block = Table | Picture | Examples
_ROWS_TOGETHER = 30
"""Rows of several stores up to this stand in one chart."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    words: Sequence[str] = ()
    blocks: Sequence[Block] = ()


@dataclass(frozen=True, kw_only=True)
class Content:
    """All that a report says."""

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
    items, unread = _item_blocks(ablations, images)
    sections = [
        Section(name="rows", title="Heads and baselines", blocks=_row_blocks(ablations)),
        Section(name="transfer", title="Across data sets", blocks=_transfer_blocks(transfers)),
        Section(name="optimism", title="What the published split adds", blocks=_optimism_blocks(ablations)),
        Section(name="paper", title="Beside the paper", blocks=_paper_blocks(ablations)),
        Section(name="items", title="Item by item", blocks=items),
        Section(name="ranks", title="Energy and rank", blocks=_rank_blocks(ablations)),
        Section(name="bias", title="Choosing the epoch on test", blocks=_some(map(bias_table, everything))),
        Section(name="curves", title="Training curves", blocks=_curve_blocks(ablations)),
        Section(name="failed", title="Failed and left out", blocks=_failed_blocks(everything)),
    ]
    found = [section for section in sections if section.blocks]
    about = [
        Section(name="method", title="How the numbers are made", words=METHOD),
        Section(name="provenance", title="Provenance", blocks=_provenance_blocks(everything)),
    ]
    problems = [
        one.told(problem) for one in everything for problem in (outdated(one), *one.problems) if problem is not None
    ]
    return Content(
        facts=_facts(everything),
        findings=[
            *(sentence for one in everything for sentence in teacher_findings(one)),
            *(sentence for one in ablations for sentence in findings(one)),
            *(sentence for one in transfers for sentence in transfer_findings(one)),
        ],
        notes=[*notes, *limits(everything)],
        sections=[*found, *about],
        missing=missing(_present(found, ablations, images)),
        problems=[*problems, *unread],
    )


def _row_blocks(ablations: Sequence[Results]) -> list[Block]:
    blocks: list[Block | None] = []
    for one in ablations:
        tables = main_tables(one)
        for label in dict.fromkeys(label for label, _ in one.groups()):
            rows = [row for row in one.rows if row.label == label]
            stores = list(dict.fromkeys(row.store_name for row in rows))
            together = len({(row.kin, row.store_name) for row in rows}) <= _ROWS_TOGETHER
            blocks += [
                interval_chart(one, label, part) for part in ([stores] if together else [[store] for store in stores])
            ]
            blocks += [table for table, (of, _) in zip(tables, one.groups(), strict=True) if of == label]
    return _some(blocks)


def _transfer_blocks(transfers: Sequence[Results]) -> list[Block]:
    blocks: list[Block | None] = []
    for one in transfers:
        for label, protocol in one.groups():
            blocks += [transfer_table(one, label, protocol)]
            blocks += [shots_chart(one, way, label, protocol) for way in directions(one, label, protocol)]
            blocks += [shots_table(one, label, protocol)]
    return _some(blocks)


def _paper_blocks(ablations: Sequence[Results]) -> list[Block]:
    blocks: list[Block | None] = []
    for one in ablations:
        blocks += paper_tables(one)
        stores = dict.fromkeys((row.store_name, row.protocol) for row in one.rows)
        blocks += [radar_chart(one, protocol, store) for store, protocol in stores]
    return _some(blocks)


def _item_blocks(ablations: Sequence[Results], images: Path | None) -> tuple[list[Block], list[str]]:
    """Fig. 5 of the reference row of every label and protocol, its best and worst items, and what was not readable."""
    charts: list[Block | None] = []
    lists: list[Block | None] = []
    problems: list[str] = []
    for one in ablations:
        for label, protocol in one.groups():
            found = _leading(one, label, protocol)
            if found is None:
                continue
            title = row_titles(one.of(label, protocol))[found.row.row]
            problems += [one.told(problem) for problem in found.missing]
            charts.append(scatter_chart(one, found, title))
            if protocol != "published" or (label, "grouped") not in one.groups():
                best_and_worst = examples_of(one, found, title, images=images)
                lists.append(best_and_worst)
                problems += [one.told(best_and_worst.problem)] if best_and_worst.problem else []
    return _some([*charts, *lists]), problems


def _leading(one: Results, label: str, protocol: str) -> Predictions | None:
    """The predictions of the head with the best validation SRCC that has any."""
    heads = [row for row in one.of(label, protocol) if row.kind == "head" and row.was_chosen]
    return next((found for row in heads[:1] for found in [predictions_of(one, row)] if found), None)


def _rank_blocks(ablations: Sequence[Results]) -> list[Block]:
    """Of each ablation at two ranks or more; where there is none, the energy that a sketch keeps is known still."""
    blocks: list[Block | None] = []
    for one in ablations:
        for label, protocol in one.groups():
            table = rank_table(one, label, protocol)
            blocks += [rank_chart(one, label, protocol), table] if table is not None else []
    return _some(blocks or [rank_chart(one, *one.groups()[0]) for one in ablations[:1]])


def _curve_blocks(ablations: Sequence[Results]) -> list[Block]:
    return _some(curves_chart(one, *group) for one in ablations for group in one.groups())


def _failed_blocks(everything: Sequence[Results]) -> list[Block]:
    return _some(make(one) for one in everything for make in (failures_table, left_out_table))


def _provenance_blocks(everything: Sequence[Results]) -> list[Block]:
    return [make(one) for one in everything for make in (stores_table, runs_table)]


def _optimism_blocks(ablations: Sequence[Results]) -> list[Block]:
    return [table for one in ablations for table in optimism_tables(one)]


def _some(blocks: Iterable[Block | None]) -> list[Block]:
    return [block for block in blocks if block is not None]


def _facts(everything: Sequence[Results]) -> dict[str, str]:
    stores = [(name, store) for one in everything for name, store in one.about.stores.items()]
    lines = [line for one in everything for line in one.lines]
    failed = sum(line.error is not None for line in lines)
    rows = [row for one in everything for row in one.rows]
    kinds = Counter(row.kind for row in rows)
    facts = {
        "Data": listed(sorted({_data_set(data) for name, store in stores if (data := store.data_name or name)})),
        "Features of": listed(sorted({store.model_name for _, store in stores if store.model_name})),
        "Labels": listed(list(dict.fromkeys(row.label for row in rows))),
        "Protocols": listed(list(dict.fromkeys(protocol_name(row.protocol) for row in rows))),
        "Runs": f"{len(lines) - failed:,} done" + (f", {failed:,} failed" if failed else ""),
        "Rows": listed([plural(count, kind) for kind, count in sorted(kinds.items(), reverse=True)]),
    }
    return {name: value for name, value in facts.items() if value}


def _data_set(name: str) -> str:
    """The data set as the paper writes it, if it has it."""
    return paper().data_set(name) or name


def _present(found: Sequence[Section], ablations: Sequence[Results], images: Path | None) -> set[str]:
    """The keys of `missing` that the sections have."""
    present = {section.name for section in found}
    blocks = {section.name: section.blocks for section in found}
    pictures = [block.name for section in found for block in section.blocks if isinstance(block, Picture)]
    present |= {kind for kind in ("radar", "scatter") if any(kind in name.split("-") for name in pictures)}
    if not ablations:  # one command brings all of these
        present |= KEYS - {"rows", "transfer"}
    if any(row.kind == "baseline" for one in ablations for row in one.rows):
        present.add("baselines")
    if images is not None or "items" not in present:
        present.add("images")
    if any(isinstance(block, Table) for block in blocks.get("ranks", ())):
        present.add("rank")
    return present
