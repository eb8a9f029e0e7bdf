"""A table of a report: its columns make cells of records, which are shown as text, markdown and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from agiqa.bench.recording.tables import as_table
from agiqa.bench.report.naming import METRIC_NAMES
from agiqa.bench.report.reading import CONFIDENT, Results, Row

Value = float | int | str | None
Record = TypeVar("Record")
NOTHING = "\N{EN DASH}"
_NUMBERS = {"number": ".3f", "difference": "+.3f", "paper": ".4f", "count": ",d", "seconds": ",.1f"}
"""How the numbers of each kind of column are written."""
_BREAKS = str.maketrans({"\n": " ", "\r": " ", "|": "\\|", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True)
class Cell:
    """One value."""

    value: Value
    interval: tuple[float, float] | None = None
    strong: bool = False
    tag: str | None = None
    """The kind of the row, shown beside the value."""


@dataclass(frozen=True)
class Column(Generic[Record]):
    """A column, and how its cells are made and shown."""

    key: str
    """Its name in CSV files."""
    title: str
    of: Callable[[Record], Cell | Value]
    """The cell, or its bare value, of a record."""
    kind: Literal["text", "number", "difference", "p", "count", "paper", "seconds"] = "number"
    interval: bool = False
    """Whether cells may have an interval, which takes two more columns of a CSV file."""

    def cell(self, record: Record) -> Cell:
        """The cell of a record."""
        made = self.of(record)
        return made if isinstance(made, Cell) else Cell(made)

    def text(self, cell: Cell) -> str:
        """The value as readers see it."""
        value = cell.value
        if value is None or value == "":
            return NOTHING
        if isinstance(value, str):
            return value
        if self.kind == "p":
            if value < 0.001:
                return "< 0.001"
            return f"{value:.5f}" if round(value, 3) == CONFIDENT else f"{value:.3f}"  # shows which side it is on
        return _minus(format(round(value) if self.kind == "count" else value, _NUMBERS.get(self.kind, "g")))

    def around(self, cell: Cell) -> str | None:
        """The interval as readers see it."""
        if cell.interval is None:
            return None
        form = "+.3f" if self.kind == "difference" else ".3f"
        low, high = (_minus(format(bound, form)) for bound in cell.interval)
        return f"{low} to {high}"

    def markdown(self, cell: Cell) -> str:
        """Value, interval and tag in a markdown table."""
        text, around = plain(self.text(cell)), self.around(cell)
        text = f"**{text}**" if cell.strong else text
        return text + (f" [{around}]" if around else "") + (f" ({cell.tag})" if cell.tag else "")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a name for its files and its anchor, and notes below it."""

    name: str
    title: str
    columns: Sequence[Column[Any]]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()

    @property
    def has_head(self) -> bool:
        """Whether any column has a title."""
        return any(column.title for column in self.columns)

    def markdown(self) -> str:
        """Title, table and notes."""
        head = [plain(column.title) for column in self.columns]
        body = [[column.markdown(cell) for column, cell in self.cells(row)] for row in self.rows]
        notes = "".join(f"\n\n{plain(note)}" for note in self.notes)
        return f"### {plain(self.title)}\n\n{as_table(head, body)}{notes}\n"

    def csv(self) -> str:
        """Every value with all its digits; intervals in columns of their own, tags in the last column."""
        tagged = any(cell.tag for row in self.rows for cell in row)
        head = [f"{column.key}{end}" for column in self.columns for end in ("", *(("_low", "_high") * column.interval))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow([*head, *(["tag"] * tagged)])
        for row in self.rows:
            values: list[Value] = []
            for column, cell in self.cells(row):
                values += [cell.value, *((cell.interval or (None, None)) if column.interval else ())]
            tags = " ".join(cell.tag for cell in row if cell.tag)
            writer.writerow(["" if value is None else value for value in values] + [tags] * tagged)
        return text.getvalue()

    def cells(self, row: Sequence[Cell]) -> list[tuple[Column[Any], Cell]]:
        """Each cell of a row with its column."""
        return list(zip(self.columns, row, strict=True))


def make_table(
    results: Results,
    name: Sequence[str],
    title: str,
    columns: Sequence[Column[Record]],
    records: Iterable[Record],
    notes: Sequence[str] = (),
) -> Table:
    """The table of some records, one per row. Name and title begin with the prefix of the results."""
    rows = [[column.cell(record) for column in columns] for record in records]
    heading = results.heading(title)
    return Table(name=results.anchor(*name), title=heading, columns=columns, rows=rows, notes=notes)


def fact_table(results: Results, name: str, title: str, facts: Mapping[str, str | None]) -> Table:
    """A table of names and values, without a head."""
    columns: list[Column[tuple[str, str | None]]] = [
        Column("what", "", lambda fact: fact[0], "text"),
        Column("value", "", lambda fact: fact[1], "text"),
    ]
    return make_table(results, [name], title, columns, facts.items())


def score_column(
    metric: str,
    row_of: Callable[[Record], Row | None],
    *,
    key: str = "{metric}",
    title: str = "{metric}",
    bold: AbstractSet[int] = frozenset(),
) -> Column[Record]:
    """A test metric with its interval, empty where there is no row.

    `{metric}` in key and title is its name; `bold` are the `id`s of rows in bold.
    """

    def cell(record: Record) -> Cell:
        row = row_of(record)
        return Cell(None) if row is None else Cell(row.value(metric), row.interval(metric), strong=id(row) in bold)

    return Column(key.replace("{metric}", metric), title.replace("{metric}", METRIC_NAMES[metric]), cell, interval=True)


def sd_column(metric: str, row_of: Callable[[Record], Row]) -> Column[Record]:
    """The standard deviation of a test metric over seeds."""

    def cell(record: Record) -> Value:
        test = row_of(record).test
        return None if test is None else test.sd.get(metric)

    return Column(f"{metric}_sd", "sd", cell)


def difference_columns(
    metric: str, row_of: Callable[[Record], Row | None], reference: str = ""
) -> list[Column[Record]]:
    """The difference to the reference row, whose name the title may give, and its corrected p-value."""

    def difference(record: Record) -> Cell:
        row = row_of(record)
        if row is None or row.against is None:
            return Cell(None)
        return Cell(row.difference(metric), row.against.ci.get(metric))

    def p(record: Record) -> Value:
        row = row_of(record)
        return None if row is None else row.p(metric)

    title = f"Δ {METRIC_NAMES[metric]}" + (f" to {reference}" if reference else "")
    return [
        Column(f"{metric}_difference", title, difference, "difference", interval=True),
        Column(f"{metric}_p_holm", "p\N{NO-BREAK SPACE}(Holm)", p, "p"),
    ]


def plain(text: str) -> str:
    """The text on one line of a markdown table, with its markup escaped."""
    return text.translate(_BREAKS)


def _minus(text: str) -> str:
    """The text with a true minus sign, which is as wide as a plus."""
    return "0.000" if text in ("-0.000", "+0.000") else text.replace("-", "\N{MINUS SIGN}")
