"""Cross-dataset results in the layout of the paper's Table VI, and what a few labelled items are worth."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from agiqa.bench.report.figures import MUTED, SMALL, Picture, draw, styles, tidy, whiskered_line
from agiqa.bench.report.naming import METRIC_NAMES, listed, protocol_name, slug
from agiqa.bench.report.paper import PaperTransfer, comparable, paper
from agiqa.bench.report.reading import METRICS, Results, Row
from agiqa.bench.report.row_tables import difference_cells, score_cell
from agiqa.bench.report.tables import Cell, Column, Table

WHOLE = ("apply", "tp", "within")
"""Ways of a head that is trained on all items; the others are few-shot."""
_IN_PAPER = ("apply", "tp")
_WAYS = {"within": "on its own data set", "apply": "as it is", "tp": "w/ TP"}


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The rows from one data set to another."""

    source: str
    target: str
    rows: tuple[Row, ...]

    def way(self, name: str) -> Row | None:
        """The row of a way that is not few-shot."""
        return next((row for row in self.rows if row.settings.get("way") == name), None)

    def shots(self) -> dict[str, list[tuple[int | str, Row]]]:
        """Of each few-shot way its rows by the number of training items, `all` last."""
        found: dict[str, list[tuple[int | str, Row]]] = {}
        for row in self.rows:
            way = str(row.settings.get("way", ""))
            if way not in WHOLE and row.value("srcc") is not None:
                found.setdefault(way, []).append((_items(row), row))
        return {way: sorted(rows, key=lambda one: (isinstance(one[0], str), one[0])) for way, rows in found.items()}


def directions(results: Results, label: str, protocol: str) -> list[Direction]:
    """From where to where there are rows; what a head does on its own data set belongs to every direction from it."""
    rows = [row for row in results.rows if (row.label, row.protocol) == (label, protocol)]
    pairs = dict.fromkeys(_ends(row) for row in rows if _ends(row)[0] != _ends(row)[1])
    return [
        Direction(
            source=source,
            target=target,
            rows=tuple(row for row in rows if _ends(row) in ((source, target), (source, source))),
        )
        for source, target in pairs
    ]


def transfer_table(results: Results, label: str, protocol: str) -> Table | None:
    """Table VI: a row per direction; ways in columns, the paper's numbers beside ours."""
    found = directions(results, label, protocol)
    ways = [way for way in WHOLE if any(one.way(way) for one in found)]
    if not found or not ways:
        return None
    papers = {(one.source, one.target): _paper(results, one, label) for one in found}
    has_paper = any(papers.values())
    compared = {way for way in ways for one in found if (row := one.way(way)) is not None and row.against is not None}
    columns = [Column(key="from", title="From", kind="text"), Column(key="to", title="To", kind="text")]
    for way in ways:
        columns += [
            Column(key=f"{way}_{name}", title=f"{METRIC_NAMES[name]} {_WAYS[way]}", interval=True) for name in METRICS
        ]
        if has_paper and way in _IN_PAPER:
            columns += [
                Column(key=f"paper_{way}_{name}", title=f"paper's {METRIC_NAMES[name]}", kind="paper")
                for name in METRICS
            ]
        columns += _difference_columns(_WAYS["apply"]) if way in compared else []
    body: list[list[Cell]] = []
    for one in found:
        cells = [Cell(value=one.source), Cell(value=one.target)]
        for way in ways:
            row, fact = one.way(way), papers[one.source, one.target]
            cells += [Cell(value=None) if row is None else score_cell(row, metric) for metric in METRICS]
            if has_paper and way in _IN_PAPER:
                cells += [Cell(value=value) for value in ((None, None) if fact is None else getattr(fact, way))]
            cells += difference_cells(row, "srcc") if way in compared else []
        body.append(cells)
    notes = [
        "“As it is”: trained on From, tested on the test part of To. “w/ TP”: the predictor retrained on the "
        "training part of To. "
        "“On its own data set”: trained and tested on From."
    ]
    notes += _shared(results, found)
    notes += [comparable(list(results.about.stores.values()))] if has_paper else []
    title = results.titled(f"across data sets, {label}, {protocol_name(protocol)}")
    return Table(
        name=slug(results.prefix, "transfer", label, protocol),
        title=title,
        columns=columns,
        rows=body,
        notes=notes,
    )


def shots_table(results: Results, label: str, protocol: str) -> Table | None:
    """SRCC and PLCC by the number of labelled items of the target."""
    found = [
        (one, way, count, row)
        for one in directions(results, label, protocol)
        for way, rows in one.shots().items()
        for count, row in rows
    ]
    if not found:
        return None
    compared = any(row.against is not None for *_, row in found)
    columns = [
        Column(key="from", title="From", kind="text"),
        Column(key="to", title="To", kind="text"),
        Column(key="way", title="Start", kind="text"),
        Column(key="training_items", title="Items of To", kind="count"),
    ]
    for metric in METRICS:
        columns += [
            Column(key=metric, title=METRIC_NAMES[metric], interval=True),
            Column(key=f"{metric}_sd", title="sd"),
        ]
    columns += _difference_columns("fresh") if compared else []
    body: list[list[Cell]] = []
    for one, way, count, row in found:
        cells = [Cell(value=one.source), Cell(value=one.target), Cell(value=way), Cell(value=count)]
        for metric in METRICS:
            cells += [score_cell(row, metric), Cell(value=row.test.sd.get(metric) if row.test else None)]
        body.append(cells + (difference_cells(row, "srcc") if compared else []))
    return Table(
        name=slug(results.prefix, "few-shot", label, protocol),
        title=results.titled(f"few-shot, {label}, {protocol_name(protocol)}"),
        columns=columns,
        rows=body,
        notes=[
            "“fresh” starts from random weights, “warm” from the head of From. Nothing is chosen on test items; the "
            "last epoch is kept. A seed draws the items of To, too."
        ],
    )


def shots_chart(results: Results, one: Direction, label: str, protocol: str) -> Picture | None:
    """SRCC against the number of labelled items of the target, with the head as it is for comparison."""
    shots = one.shots()
    if not shots:
        return None
    places = _places(results, shots)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for (way, rows), (colour, marker) in zip(shots.items(), styles(shots).values(), strict=True):
            points = [(places[count], row.value("srcc"), row.interval("srcc")) for count, row in rows]
            whiskered_line(axes, points, colour=colour, marker=marker, label=way, size=4.5, width=1.5)
        for way, dashes in (("apply", (0, (4, 2))), ("tp", (0, (1, 2)))):
            row = one.way(way)
            if row is not None and row.value("srcc") is not None:
                axes.axhline(row.value("srcc") or 0.0, color=MUTED, linewidth=1.2, linestyle=dashes, label=_WAYS[way])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{count}" for count in places])
        axes.set_xlabel(f"labelled items of {one.target}")
        axes.set_ylabel("test SRCC")
        tidy(axes)
        figure.legend(loc="outside upper right", ncols=4, fontsize=SMALL)

    return draw(
        slug(results.prefix, "few-shot", label, protocol, one.source, one.target),
        f"Few-shot: {one.source} to {one.target}, {label}",
        alt=_told(one),
        caption=(
            f"SRCC on {one.target} by its labelled items ({protocol_name(protocol)}), with 95% intervals; lines "
            "across: all items."
        ),
        height=3.3,
        paint=paint,
    )


def _shared(results: Results, found: Sequence[Direction]) -> list[str]:
    """How many test items have a prompt of the other data set's training."""
    told = results.about.shared if isinstance(results.about.shared, dict) else {}
    parts: list[str] = []
    for one in found:
        counts = told.get(f"{one.source} -> {one.target}")
        if isinstance(counts, dict) and {"test_items", "with_a_prompt_of_the_source"} <= counts.keys():
            share = f"{counts['with_a_prompt_of_the_source']} of {counts['test_items']}"
            parts.append(f"{share} test images of {one.target} have a prompt that {one.source} trains on")
    return [f"{'; '.join(parts)}."] if parts else []


def _difference_columns(reference: str) -> list[Column]:
    return [
        Column(key="srcc_difference", title=f"Δ SRCC to {reference}", kind="difference", interval=True),
        Column(key="srcc_p_holm", title="p\N{NO-BREAK SPACE}(Holm)", kind="p"),
    ]


def _ends(row: Row) -> tuple[str, str]:
    source = str(row.settings.get("from", row.store_name))
    return source, str(row.settings.get("to", source))


def _items(row: Row) -> int | str:
    count = row.settings.get("training_items", "all")
    return count if isinstance(count, int) else str(count)


def _paper(results: Results, one: Direction, label: str) -> PaperTransfer | None:
    names = [paper().data_set(name) or paper().data_set(results.store(name).hint) for name in (one.source, one.target)]
    wanted = (*names, paper().label(label))
    return next((fact for fact in paper().transfers if (fact.source, fact.target, fact.label) == wanted), None)


def _places(results: Results, shots: dict[str, list[tuple[int | str, Row]]]) -> dict[int | str, float]:
    """Where each number of items is drawn: `all` at the items that its runs trained on, or past the others."""
    numbers = sorted({count for rows in shots.values() for count, _ in rows if isinstance(count, int)})
    rest = [row for rows in shots.values() for count, row in rows if isinstance(count, str)]
    places: dict[int | str, float] = {count: float(count) for count in numbers}
    if rest:
        trained = [_trained_on(results, row) for row in rest]
        past = 2.0 * numbers[-1] if numbers else 1.0
        places["all"] = float(max(max(trained), past))
    return places


def _trained_on(results: Results, row: Row) -> int:
    splits = [line.split for line in results.runs_of(row) if line.split]
    return max((int(split.get("train") or 0) + int(split.get("validation") or 0) for split in splits), default=0)


def _told(one: Direction) -> str:
    parts = []
    for way, rows in one.shots().items():
        ends = [
            f"{row.value('srcc'):.3f} with {count} items"
            for count, row in (rows if len(rows) < 2 else (rows[0], rows[-1]))
        ]
        parts.append(f"{way}: {listed(ends)}")
    applied = one.way("apply")
    if applied is not None and applied.value("srcc") is not None:
        parts.append(f"as it is: {applied.value('srcc'):.3f}")
    return f"Lines of the SRCC on {one.target} against its labelled items. {'; '.join(parts)}."
