"""A table of a report: its columns make cells of records, which are shown as text, markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

from agiqa.bench.recording.records import Row
from agiqa.bench.recording.tables import as_table
from agiqa.bench.report.latex import latex_table, latex_text
from agiqa.bench.report.naming import METRIC_NAMES
from agiqa.bench.report.reading import CONFIDENT, Results

Value = float | int | str | None
Record = TypeVar("Record")
NOTHING = "\N{EN DASH}"
_NUMBERS = {"number": ".3f", "difference": "+.3f", "paper": ".4f", "count": ",d", "seconds": ",.1f"}
"""How the numbers of each kind of column are written."""
_NOT_IN_ONE_COLUMN = ("difference", "p")
_FEW_COLUMNS = 4
"""A LaTeX table with more columns takes the whole width of a page."""
_BREAKS = str.maketrans({"\n": " ", "\r": " ", "|": "\\|", "<": "&lt;", ">": "&gt;"})
SWITCHES = {
    "sd": "sd over seeds",
    "krcc": "KRCC",
    "rmse": "RMSE",
    "logistic": "PLCC (logistic)",
    "slope": "Slope",
    "runs": "Runs",
    "seconds": "Seconds a run",
}
"""Columns that readers switch on, by the name of the switch."""


@dataclass(frozen=True)
class Cell:
    """One value."""

    value: Value
    interval: tuple[float, float] | None = None
    strong: bool = False
    tag: str | None = None
    """The kind of the row, shown beside the value."""

    @property
    def is_filled(self) -> bool:
        """Whether it has a value."""
        return self.value is not None and self.value != ""


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
    switch: str = ""
    """The one of SWITCHES that shows the column; empty for a column that is always shown."""
    on: bool = False
    """Whether the switch is on."""

    @property
    def is_shown(self) -> bool:
        """Whether the column is in markdown and LaTeX, and on the page before anything is switched."""
        return self.on or not self.switch

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

    def latex(self, cell: Cell) -> str:
        """Value, interval and tag in LaTeX."""
        text, around = latex_text(self.text(cell)), self.around(cell)
        text = rf"\textbf{{{text}}}" if cell.strong else text
        around = rf" {{\scriptsize [{latex_text(around.replace(' to ', ', '))}]}}" if around else ""
        return text + around + (f" ({cell.tag})" if cell.tag else "")


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

    def with_switched_on(self, switches: AbstractSet[str]) -> "Table":
        """The table with these of SWITCHES on."""
        columns = [replace(column, on=column.on or column.switch in switches) for column in self.columns]
        return replace(self, columns=columns)

    @property
    def switches(self) -> dict[str, str]:
        """The switches of its columns that have a value, with their titles."""
        used = {self.columns[place].switch for place in self.filled()}
        return {name: title for name, title in SWITCHES.items() if name in used}

    def filled(self) -> list[int]:
        """The places of the columns without the empty ones; the first column is never empty."""
        return [
            place for place in range(len(self.columns)) if place == 0 or any(row[place].is_filled for row in self.rows)
        ]

    def shown(self) -> list[int]:
        """The places of the columns that are not empty and whose switch, if they have one, is on."""
        return [place for place in self.filled() if self.columns[place].is_shown]

    def markdown(self) -> str:
        """Title, table and notes."""
        columns = [(place, self.columns[place]) for place in self.shown()]
        head = [plain(column.title) for _, column in columns]
        body = [[column.markdown(row[place]) for place, column in columns] for row in self.rows]
        notes = "".join(f"\n\n{plain(note)}" for note in self.notes)
        return f"### {plain(self.title)}\n\n{as_table(head, body)}{notes}\n"

    def latex(self) -> dict[str, str]:
        """The table for a paper, with booktabs, by the name of its file; the notes are comments. Only tables of scores.

        A table with differences is as wide as a page; without them, one more, `NAME-column`, is as wide as a column.
        """
        if all(column.kind != "number" for column in self.columns):
            return {}
        everything = self.shown()
        narrow = [place for place in everything if self.columns[place].kind not in _NOT_IN_ONE_COLUMN]
        if len(narrow) == len(everything):
            return {self.name: self._latex(self.name, everything, one_column=len(everything) <= _FEW_COLUMNS)}
        column = f"{self.name}-column"
        return {
            self.name: self._latex(self.name, everything, one_column=False),
            column: self._latex(column, narrow, one_column=True),
        }

    def _latex(self, name: str, places: Sequence[int], *, one_column: bool) -> str:
        columns = [(place, self.columns[place]) for place in places]
        head = [latex_text(column.title) for _, column in columns]
        return latex_table(
            name,
            latex_text(self.title),
            [head] if self.has_head else [],
            [[column.latex(row[place]) for place, column in columns] for row in self.rows],
            ["l" if column.kind == "text" else "r" for _, column in columns],
            one_column=one_column,
            rules=_first_baseline(self.rows),
            notes=self.notes,
        )

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


def _first_baseline(rows: Sequence[Sequence[Cell]]) -> int | None:
    """The number of the first row of a baseline; None where there is none, or nothing above it."""
    tags = [any(cell.tag == "baseline" for cell in row) for row in rows]
    return tags.index(True) if True in tags and not tags[0] else None


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
    switch: str = "",
) -> Column[Record]:
    """A test metric with its interval, empty where there is no row.

    `{metric}` in key and title is its name; `bold` are the `id`s of rows in bold.
    """

    def cell(record: Record) -> Cell:
        row = row_of(record)
        return Cell(None) if row is None else Cell(row.value(metric), row.interval(metric), strong=id(row) in bold)

    name = title.replace("{metric}", METRIC_NAMES[metric])
    return Column(key.replace("{metric}", metric), name, cell, interval=True, switch=switch)


def sd_column(metric: str, row_of: Callable[[Record], Row]) -> Column[Record]:
    """The standard deviation of a test metric over seeds."""

    def cell(record: Record) -> Value:
        test = row_of(record).test
        return None if test is None else test.sd.get(metric)

    return Column(f"{metric}_sd", "sd", cell, switch="sd")


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
