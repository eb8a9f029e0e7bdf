"""Results across data sets, in the layout of the paper's Table VI, and SRCC by the number of labelled items."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from agiqa.bench.recording.records import Row
from agiqa.bench.report.naming import listed, protocol_name
from agiqa.bench.report.paper import PaperTransfer, comparable, paper
from agiqa.bench.report.pictures import MUTED, SMALL, Picture, draw, draw_line, styled, tidy
from agiqa.bench.report.provenance import origin_note
from agiqa.bench.report.reading import METRICS, Results
from agiqa.bench.report.tables import Column, Table, difference_columns, make_table, score_column, sd_column

WAYS = {"apply": "w/o TP", "tp": "w/ TP", "within": "on its own data set"}
"""Ways of a head that is trained on all items; other ways are few-shot."""
_IN_PAPER = ("apply", "tp")
_WAYS_NOTE = (
    "“w/o TP”: the head is trained on From and tested, unchanged, on the test part of To. “w/ TP”: its predictor is "
    "retrained on the training part of To. “On its own data set”: the head is trained and tested on From."
)
_SHOTS_NOTE = (
    "“Fresh” starts from random weights, “warm” from the head of From. No choice uses test items; the last epoch is "
    "kept. The seed also draws the items of To."
)
Shots = dict[str, list[tuple[int | str, Row]]]
"""For each few-shot way its rows by the number of training items, `all` last."""


@dataclass(frozen=True, kw_only=True)
class Direction:
    """The rows from one data set to another."""

    source: str
    target: str
    rows: tuple[Row, ...]

    def way(self, name: str) -> Row | None:
        """The row of a way that is not few-shot."""
        return next((row for row in self.rows if row.settings.get("way") == name), None)

    def shots(self) -> Shots:
        """The few-shot rows that have a score."""
        found: Shots = {}
        for row in self.rows:
            way, count = str(row.settings.get("way", "")), row.settings.get("training_items", "all")
            if way not in WAYS and row.value("srcc") is not None:
                found.setdefault(way, []).append((count if isinstance(count, int) else str(count), row))
        return {way: sorted(rows, key=lambda one: (isinstance(one[0], str), one[0])) for way, rows in found.items()}


def directions(results: Results, label: str, protocol: str) -> list[Direction]:
    """The directions that have rows. A head's rows on its own data set are in every direction from there."""
    rows = [(_ends(row), row) for row in results.rows if (row.label, row.protocol) == (label, protocol)]
    pairs = dict.fromkeys(ends for ends, _ in rows if ends[0] != ends[1])
    return [
        Direction(
            source=source,
            target=target,
            rows=tuple(row for ends, row in rows if ends in ((source, target), (source, source))),
        )
        for source, target in pairs
    ]


def _ends(row: Row) -> tuple[str, str]:
    source = str(row.settings.get("from", row.store_name))
    return source, str(row.settings.get("to", source))


def transfer_table(results: Results, label: str, protocol: str) -> Table | None:
    """Table VI: a row per direction; ways in columns, the paper's numbers beside ours."""
    found = directions(results, label, protocol)
    ways = [way for way in WAYS if any(one.way(way) for one in found)]
    if not ways:
        return None
    papers = {(one.source, one.target): _paper(results, one, label) for one in found}
    columns: list[Column[Direction]] = [
        Column("from", "From", lambda one: one.source, "text"),
        Column("to", "To", lambda one: one.target, "text"),
    ]
    for way in ways:

        def row_of(one: Direction, way: str = way) -> Row | None:
            return one.way(way)

        title = f"{{metric}} {WAYS[way]}"
        columns += [score_column(metric, row_of, key=f"{way}_{{metric}}", title=title) for metric in METRICS]
        if any(papers.values()) and way in _IN_PAPER:
            columns += _paper_columns(way, papers)
        if any(row is not None and row.against is not None for row in map(row_of, found)):
            columns += difference_columns("srcc", row_of, WAYS["apply"])
    notes = [_WAYS_NOTE, *_shared_prompts(results, found), origin_note(results, [r for one in found for r in one.rows])]
    notes += [comparable(list(results.about.stores.values()))] if any(papers.values()) else []
    title = f"across data sets, {label}, {protocol_name(protocol)}"
    return make_table(results, ["transfer", label, protocol], title, columns, found, notes)


def _paper(results: Results, one: Direction, label: str) -> PaperTransfer | None:
    """The paper's numbers on a direction."""
    names = [paper().data_set(name) or paper().data_set(results.store(name).hint) for name in (one.source, one.target)]
    wanted = (*names, paper().label(label))
    return next((fact for fact in paper().transfers if (fact.source, fact.target, fact.label) == wanted), None)


def _paper_columns(way: str, papers: Mapping[tuple[str, str], PaperTransfer | None]) -> list[Column[Direction]]:
    def value(one: Direction, at: int) -> float | None:
        fact = papers[one.source, one.target]
        return None if fact is None else getattr(fact, way)[at]

    return [
        Column(f"paper_{way}_srcc", "paper's SRCC", lambda one: value(one, 0), "paper"),
        Column(f"paper_{way}_plcc", "paper's PLCC", lambda one: value(one, 1), "paper"),
    ]


def _shared_prompts(results: Results, found: Sequence[Direction]) -> list[str]:
    """How many test items have a prompt on which the other data set trains."""
    shared = results.about.shared if isinstance(results.about.shared, dict) else {}
    parts: list[str] = []
    for one in found:
        numbers = shared.get(f"{one.source} -> {one.target}")
        if isinstance(numbers, dict) and {"test_items", "with_a_prompt_of_the_source"} <= numbers.keys():
            share = f"{numbers['with_a_prompt_of_the_source']} of {numbers['test_items']}"
            parts.append(
                f"{share} test images of {one.target} have a prompt that also occurs in training on {one.source}"
            )
    return [f"{'; '.join(parts)}."] if parts else []


Shot = tuple[Direction, str, int | str, Row]
"""A direction, a few-shot way, the number of training items, and the row."""


def shots_table(results: Results, label: str, protocol: str) -> Table | None:
    """SRCC and PLCC by the number of labelled items of the target."""
    found: list[Shot] = [
        (one, way, count, row)
        for one in directions(results, label, protocol)
        for way, rows in one.shots().items()
        for count, row in rows
    ]
    if not found:
        return None
    columns: list[Column[Shot]] = [
        Column("from", "From", lambda shot: shot[0].source, "text"),
        Column("to", "To", lambda shot: shot[0].target, "text"),
        Column("way", "Start", lambda shot: shot[1], "text"),
        Column("training_items", "Items of To", lambda shot: shot[2], "count"),
        score_column("srcc", _row_of),
        sd_column("srcc", _row_of),
        score_column("plcc", _row_of),
        sd_column("plcc", _row_of),
        *(difference_columns("srcc", _row_of, "fresh") if any(row.against is not None for *_, row in found) else []),
    ]
    title = f"few-shot, {label}, {protocol_name(protocol)}"
    notes = [_SHOTS_NOTE, origin_note(results, [row for *_, row in found])]
    return make_table(results, ["few-shot", label, protocol], title, columns, found, notes)


def _row_of(shot: Shot) -> Row:
    return shot[3]


def shots_chart(results: Results, one: Direction, label: str, protocol: str) -> Picture | None:
    """SRCC by the number of labelled items of the target, with the unchanged and the retrained head beside it."""
    shots = one.shots()
    if not shots:
        return None
    places = _places(results, shots)

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        for way, rows, style in styled(shots):
            points = [(places[count], row.value("srcc"), row.interval("srcc")) for count, row in rows]
            draw_line(axes, points, way, markersize=4.5, linewidth=1.5, **style)
        for way, dashes in (("apply", (0, (4, 2))), ("tp", (0, (1, 2)))):
            row = one.way(way)
            value = None if row is None else row.value("srcc")
            if value is not None:
                axes.axhline(value, color=MUTED, linewidth=1.2, linestyle=dashes, label=WAYS[way])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(list(places.values())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{count}" for count in places])
        tidy(axes, x=f"labelled items of {one.target}", y="test SRCC")
        figure.legend(loc="outside upper right", ncols=4, fontsize=SMALL)

    return draw(
        results.anchor("few-shot", label, protocol, one.source, one.target),
        results.heading(f"few-shot: {one.source} to {one.target}, {label}"),
        alt=_describe_shots(one),
        caption=f"SRCC on {one.target} by the number of its labelled items ({protocol_name(protocol)}), with 95% "
        "intervals. Horizontal lines: heads trained on all items.",
        height=3.3,
        paint=paint,
    )


def _places(results: Results, shots: Shots) -> dict[int | str, float]:
    """The place of each number of items on the axis.

    `all` is placed at the number of items that its runs trained on, and at least at twice the largest other number.
    """
    numbers = sorted({count for rows in shots.values() for count, _ in rows if isinstance(count, int)})
    places: dict[int | str, float] = {count: float(count) for count in numbers}
    rest = [row for rows in shots.values() for count, row in rows if isinstance(count, str)]
    if rest:
        splits = [line.split for row in rest for line in results.runs_of(row) if line.split]
        trained = [int(split.get("train") or 0) + int(split.get("validation") or 0) for split in splits]
        places["all"] = float(max([*trained, 2 * numbers[-1] if numbers else 1]))
    return places


def _describe_shots(one: Direction) -> str:
    parts: list[str] = []
    for way, rows in one.shots().items():
        ends = rows if len(rows) < 2 else (rows[0], rows[-1])
        values = [f"{row.value('srcc'):.3f} with {count} items" for count, row in ends]
        parts.append(f"{way}: {listed(values)}")
    applied = one.way("apply")
    if applied is not None and applied.value("srcc") is not None:
        parts.append(f"{WAYS['apply']}: {applied.value('srcc'):.3f}")
    return f"Lines of the SRCC on {one.target} by the number of its labelled items. {'; '.join(parts)}."
