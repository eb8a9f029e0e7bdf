"""Image networks in a report: beside the best head on the same items, and beside Table II of the paper."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from agiqa.bench.recording.predictions import Predictions, read_predictions
from agiqa.bench.recording.records import Against, Row, RunLine
from agiqa.bench.recording.rows import adjust_by_holm, scores_over_seeds
from agiqa.bench.report.naming import listed, on_store, protocol_name, row_titles
from agiqa.bench.report.paper import PROTOCOLS, PaperCited, paper
from agiqa.bench.report.reading import METRICS, Results
from agiqa.bench.report.tables import Cell, Column, Table, difference_columns, make_table, score_column
from agiqa.errors import DataError
from agiqa.heads.evaluation.runs import PREDICTIONS

NETWORKS = "networks"
_NOTE = (
    "The reference is the head with the best mean validation SRCC. Networks are compared with it on the same test "
    "images, by the paired test of the other tables; Holm's correction covers the networks of this table."
)
_CITED_NOTE = (
    "The paper's numbers (arXiv 2502.15167, Table II) are for orientation: it chooses the epoch by the test score, on "
    "splits whose test prompts all occur in training, and gives one seed. It gives no settings of the networks."
)


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """A row with its predictions: a table of all test items for each seed."""

    results: Results
    row: Row
    tables: Mapping[str, Predictions]

    @property
    def first(self) -> Predictions:
        return next(iter(self.tables.values()))

    def has_items_of(self, other: "_Entry") -> bool:
        """Whether both were tested on the same images with the same MOS."""
        mine, theirs = self.first, other.first
        return (mine.names, mine.prompts) == (theirs.names, theirs.prompts) and np.allclose(mine.mos, theirs.mos)


def compared_tables(everything: Sequence[Results], problems: list[str]) -> Iterator[Table]:
    """For each label and protocol, the networks beside the best head on their items, which may be in other folders.

    What cannot be compared is added to `problems`.
    """
    networks = [one for one in everything if one.about.kind == NETWORKS]
    others = [one for one in everything if one.about.kind not in (NETWORKS, "transfer")]
    for one in networks:
        for label, protocol in one.groups():
            ours = list(_entries(one, label, protocol))
            heads = [entry for other in others for entry in _entries(other, label, protocol)]
            heads = [entry for entry in heads if entry.row.kind == "head" and entry.row.validated("srcc") is not None]
            if not ours or not heads:
                continue
            same = [entry for entry in heads if entry.has_items_of(ours[0])]
            if not same:
                what = f"{label}, {protocol_name(protocol)}"
                problems.append(
                    one.prefixed(
                        f"{what}: heads and networks were tested on different images, or on images of different MOS, "
                        "and cannot be compared. Give `agiqa baseline` the data, splits and folds of the store."
                    )
                )
                continue
            best = max(same, key=lambda entry: entry.row.rank_by)
            yield _compared(one, best, [entry for entry in ours if entry.has_items_of(best)], label, protocol)


def _entries(results: Results, label: str, protocol: str) -> Iterator[_Entry]:
    """The rows of heads and networks whose predictions are all there."""
    for row in results.of(label, protocol):
        tables = _tables(results, results.runs_of(row), label) if row.is_trained else None
        if tables:
            yield _Entry(results=results, row=row, tables=tables)


def _tables(results: Results, lines: Iterable[RunLine], label: str) -> dict[str, Predictions] | None:
    """The predictions of each seed, its folds put together; None where some cannot be read.

    Where each seed tested a part of the items only, all seeds are put together.
    """
    by_seed: dict[str, list[Predictions]] = {}
    for line in lines:
        if label not in line.labels:
            continue
        try:
            found = read_predictions(results.run_folder(line) / PREDICTIONS, line.labels, label)
        except DataError:
            return None
        by_seed.setdefault(str(line.seed), []).append(found)
    tables = {seed: _joined(parts) for seed, parts in by_seed.items()}
    if len({tuple(zip(table.names, table.prompts, strict=True)) for table in tables.values()}) > 1:
        return {"all": _joined([part for parts in by_seed.values() for part in parts])}
    return tables


def _joined(parts: Sequence[Predictions]) -> Predictions:
    """All items, by name and prompt."""
    names, prompts = ([text for part in parts for text in getattr(part, what)] for what in ("names", "prompts"))
    order = sorted(range(len(names)), key=lambda place: (names[place], prompts[place]))
    return Predictions(
        names=[names[place] for place in order],
        prompts=[prompts[place] for place in order],
        mos=np.concatenate([part.mos for part in parts])[order],
        predicted=np.concatenate([part.predicted for part in parts])[order],
    )


def _compared(one: Results, best: _Entry, networks: Sequence[_Entry], label: str, protocol: str) -> Table:
    """The reference, then the networks by validation SRCC."""
    reference = scores_over_seeds(best.tables)
    lines = [{"against": scores_over_seeds(entry.tables).against(reference)} for entry in networks]
    adjust_by_holm(lines)
    title = on_store(row_titles([best.row])[best.row.row], best.row.store_name)
    rows = [best.row.model_copy(update={"against": None})]
    for entry, line in zip(networks, lines, strict=True):
        against = Against.model_validate({"row": best.row.row, **line["against"]})
        rows.append(entry.row.model_copy(update={"against": against}))

    def name(row: Row) -> Cell:
        return Cell(title, tag=f"best head of {best.results.name}") if row is rows[0] else Cell(row.row)

    columns: list[Column[Row]] = [Column("row", "Row", name, "text")]
    columns += [score_column(metric, _itself) for metric in METRICS]
    columns += [column for metric in METRICS for column in difference_columns(metric, _itself)]
    columns.append(Column("validation_srcc", "Validation SRCC", lambda row: row.validated("srcc")))
    columns.append(Column("seeds", "Seeds", lambda row: row.seeds, "count"))
    heading = f"networks beside the best head, {label}, {protocol_name(protocol)}"
    return make_table(one, ["networks", label, protocol], heading, columns, rows, [_NOTE])


def _itself(row: Row) -> Row:
    return row


def cited_tables(everything: Sequence[Results]) -> Iterator[Table]:
    """Table II of the paper, for each of its data sets and labels that networks were trained on, beside ours."""
    for one in everything:
        data = paper().data_set(one.store("").hint) if one.about.kind == NETWORKS else None
        for label in dict.fromkeys(row.label for row in one.rows) if data else ():
            known = paper().label(label)
            cited = [row for row in paper().cited if known in row.scores.get(data or "", {})]
            if known and cited:
                yield _cited(one, str(data), known, [row for row in one.rows if row.label == label], cited)


def _cited(one: Results, data: str, label: str, rows: Sequence[Row], cited: Sequence[PaperCited]) -> Table:
    def ours(row: PaperCited, protocol: str) -> Row | None:
        found = [mine for mine in rows if mine.protocol == protocol and mine.row in row.networks]
        return max(found, key=lambda mine: mine.rank_by, default=None)

    columns: list[Column[PaperCited]] = [
        Column("method", "Method", lambda row: row.name, "text"),
        Column("paper_srcc", "Paper SRCC", lambda row: row.scores[data][label][0], "paper"),
        Column("paper_plcc", "Paper PLCC", lambda row: row.scores[data][label][1], "paper"),
    ]
    for protocol in PROTOCOLS:
        if any(row.protocol == protocol for row in rows):
            columns += [
                score_column(
                    metric,
                    lambda row, protocol=protocol: ours(row, protocol),  # type: ignore[misc]
                    key=f"{{metric}}_{protocol}",
                    title=f"{{metric}} {protocol}",
                )
                for metric in METRICS
            ]
    without = [row.name for row in cited if not row.networks]
    unconfirmed = [f"{row.name} ({paper().sources[name]})" for row in cited for name in row.unconfirmed]
    confirmed = dict.fromkeys(paper().sources[name] for row in cited for name in row.confirmed)
    notes = [
        _CITED_NOTE,
        f"Cited only, since agiqa cannot train them: {listed(without)}. `agiqa baseline --predictions NAME=FILE` reads "
        "the predictions of their own code.",
        f"The numbers of the paper agree with {listed(list(confirmed))}. It copied some from other papers, which were "
        f"not compared, and may be about other splits: those of {listed(unconfirmed)}.",
    ]
    return make_table(one, ["table-ii", data, label], f"Table II, {data}, {label}", columns, cited, notes)
