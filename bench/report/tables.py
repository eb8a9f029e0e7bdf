"""A table of a report: numbers with their intervals, as text for people, as markdown, and as CSV with all digits."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from agiqa.bench.recording.tables import as_table
from agiqa.bench.report.reading import CONFIDENT

Value = float | int | str | None
NOTHING = "\N{EN DASH}"
_BREAKS = str.maketrans({"\n": " ", "\r": " ", "|": "\\|", "<": "&lt;", ">": "&gt;"})


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value."""

    value: Value
    interval: tuple[float, float] | None = None
    strong: bool = False
    tag: str | None = None
    """A word beside the value: what kind of row this is."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """What the cells of a column are, and how they look."""

    key: str
    """Its name in CSV files."""
    title: str
    kind: Literal["text", "number", "difference", "p", "count", "paper", "seconds"] = "number"
    interval: bool = False
    """Whether its cells may have one, which are two more columns of a CSV file."""

    def text(self, cell: Cell) -> str:
        """The value for people."""
        value = cell.value
        if value is None or value == "":
            return NOTHING
        if isinstance(value, str):
            return value
        formats = {"number": ".3f", "difference": "+.3f", "paper": ".4f", "count": ",d", "seconds": ",.1f"}
        if self.kind == "p":
            told = f"{value:.3f}" if round(value, 3) != CONFIDENT else f"{value:.5f}"  # on which side it is must show
            return "< 0.001" if value < 0.001 else told
        text = format(round(value) if self.kind == "count" else value, formats.get(self.kind, "g"))
        return _minus(text)

    def around(self, cell: Cell) -> str | None:
        """The interval for people."""
        if cell.interval is None:
            return None
        form = "+.3f" if self.kind == "difference" else ".3f"
        low, high = (_minus(format(bound, form)) for bound in cell.interval)
        return f"{low} to {high}"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with a name, and what its reader must know."""

    name: str
    """Of its files and its anchor."""
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def has_head(self) -> bool:
        """Whether any column has a title."""
        return any(column.title for column in self.columns)

    def markdown(self) -> str:
        """Title, table and notes."""
        head = [plain(column.title) for column in self.columns]
        body = [[_markdown(column, cell) for column, cell in self.cells(row)] for row in self.rows]
        notes = "".join(f"\n\n{plain(note)}" for note in self.notes)
        return f"### {plain(self.title)}\n\n{as_table(head, body)}{notes}\n"

    def csv(self) -> str:
        """Every value with all its digits; intervals in columns of their own, tags in the last."""
        tagged = any(cell.tag for row in self.rows for cell in row)
        head = [name for column in self.columns for name in _names(column)] + (["tag"] if tagged else [])
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(head)
        for row in self.rows:
            values = [value for column, cell in self.cells(row) for value in _values(column, cell)]
            tags = " ".join(cell.tag for cell in row if cell.tag)
            writer.writerow(["" if value is None else value for value in values] + ([tags] if tagged else []))
        return text.getvalue()

    def cells(self, row: Sequence[Cell]) -> list[tuple[Column, Cell]]:
        """Each cell of a row with its column."""
        return list(zip(self.columns, row, strict=True))


def key_values(name: str, title: str, facts: Mapping[str, Value], notes: Sequence[str] = ()) -> Table:
    """A table of names and values."""
    columns = [Column(key="what", title="", kind="text"), Column(key="value", title="", kind="text")]
    rows = [[Cell(value=what), Cell(value=None if value is None else str(value))] for what, value in facts.items()]
    return Table(name=name, title=title, columns=columns, rows=rows, notes=notes)


def _markdown(column: Column, cell: Cell) -> str:
    text, around = plain(column.text(cell)), column.around(cell)
    text = f"**{text}**" if cell.strong else text
    return " ".join(
        part for part in (text, f"[{around}]" if around else "", f"({cell.tag})" if cell.tag else "") if part
    )


def plain(text: str) -> str:
    """The text on one line of a markdown table, markup made harmless."""
    return text.translate(_BREAKS)


def _names(column: Column) -> list[str]:
    return [column.key, *([f"{column.key}_low", f"{column.key}_high"] if column.interval else [])]


def _values(column: Column, cell: Cell) -> list[Value]:
    return [cell.value, *((cell.interval or (None, None)) if column.interval else ())]


def _minus(text: str) -> str:
    """The text with a true minus sign, which is as wide as a plus."""
    return "0.000" if text in ("-0.000", "+0.000") else text.replace("-", "\N{MINUS SIGN}")
