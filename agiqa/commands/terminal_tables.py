"""Tables on a terminal, drawn by rich. A line never breaks within a number or an interval.

A table that is too wide gets its intervals on lines of their own, then broken texts; then it becomes several tables,
each with the first columns, as many as tell the rows apart.
"""

import re
import sys
import textwrap
from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from agiqa.bench.recording.tables import Parts

_BETWEEN = 3
"""Columns of the screen from one column of a table to the next."""
_MARGINS = 1
_USUAL, _MOST, _NARROWEST = 16, 40, 8
"""The width to which texts are broken if need be, the longest word that is not broken while there is room, and the
narrowest text where there is too little."""
_NUMBER = re.compile(r"[+\-\u2212]?[\d.,]+%?( [\[(±].*)?|[-\u2013]?|undefined")
_AFTER = re.compile(r"(?<=[ ,/])")
"""Where a text may break."""


def print_drawn(parts: Parts) -> None:
    """Print paragraphs and tables to a terminal on the output stream."""
    console = Console(file=sys.stdout, highlight=False)
    for part in parts:
        if isinstance(part, str):
            console.print(part.replace("**", ""), markup=False)
            continue
        columns = [_Column(title, [row[place] for row in part.rows], place) for place, title in enumerate(part.head)]
        for block in _blocks(columns, console.width - _MARGINS):
            console.print(_drawn(block, console.width - _MARGINS))


class _Column:
    """A column, and how wide it is: in one line, and at least."""

    def __init__(self, title: str, cells: Sequence[str], place: int) -> None:
        """The first column (`place` 0) is text."""
        self.title, self.cells = title, cells
        self.is_number = place > 0 and all(_NUMBER.fullmatch(cell) for cell in cells)
        word = max(map(len, title.split()), default=0)
        self.natural = max(word, _longest(cells))
        self.width = self.natural
        if self.is_number:
            self.least = max(word, _longest(self.broken()))
        else:
            words = max((len(word.rstrip()) for cell in cells for word in _AFTER.split(cell)), default=0)
            self.least = min(self.natural, max(word, _USUAL, min(words, _MOST)))

    def broken(self) -> list[str]:
        """The numbers with their intervals or p-values on lines of their own."""
        return [re.sub(r" (?=[\[(±])", "\n", cell) for cell in self.cells]

    def lines(self, width: int) -> list[str]:
        """The cells in lines of at most `width`."""
        if self.is_number:
            return self.broken() if width < self.natural else list(self.cells)
        return [_wrapped(cell, width) for cell in self.cells]


def _blocks(columns: Sequence[_Column], room: int) -> Iterator[list[_Column]]:
    """Columns that fit side by side; a block has the naming columns and one other at least."""
    naming = _naming(columns, room)
    block = list(columns[:naming])
    for column in columns[naming:]:
        if len(block) > naming and _total([*(one.least for one in block), column.least]) > room:
            yield block
            block = list(columns[:naming])
        block.append(column)
    yield block


def _naming(columns: Sequence[_Column], room: int) -> int:
    """How many of the first columns each block has: until rows differ, but not numbers or more than there is room."""
    texts = next((place for place, column in enumerate(columns) if column.is_number), len(columns))
    count = 1
    while count < texts and _names(columns[:count]) < _names(columns[:texts]):
        count += 1
    widest = max((column.least for column in columns[count:]), default=0)
    while count > 1 and _total([*(column.least for column in columns[:count]), widest]) > room:
        count -= 1
    return count


def _names(columns: Sequence[_Column]) -> int:
    """How many different rows these columns have."""
    return len(set(zip(*(column.cells for column in columns), strict=True)))


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + _BETWEEN * (len(widths) - 1)


def _fit(columns: Sequence[_Column], room: int) -> None:
    """Set the widths: texts and then numbers get the spare room; texts give up what is lacking, the widest first."""
    spare = room - _total([column.least for column in columns])
    for column in sorted(columns, key=lambda column: -column.least):
        column.width = column.least
        if spare < 0 and not column.is_number:
            column.width = max(column.least + spare, min(column.least, _NARROWEST))
            spare += column.least - column.width
    for column in sorted(columns, key=lambda column: column.is_number):
        wider = min(column.natural, column.least + max(0, spare))
        if spare > 0 and (wider == column.natural or not column.is_number):
            column.width = wider
            spare -= column.width - column.least


def _drawn(columns: Sequence[_Column], room: int) -> Table:
    _fit(columns, room)
    drawn, lines = Table(box=box.SIMPLE_HEAD, pad_edge=False), list[list[str]]()
    for column in columns:
        head = "\n".join(textwrap.wrap(column.title, max(column.width, 1)))
        drawn.add_column(Text(_aligned(column, head)), no_wrap=True, overflow="ignore", min_width=column.width)
        lines.append([_aligned(column, cell) for cell in column.lines(column.width)])
    for cells in zip(*lines, strict=True):
        drawn.add_row(*map(Text, cells))
    return drawn


def _aligned(column: _Column, text: str) -> str:
    """Numbers stand at the right."""
    return "\n".join(line.rjust(column.width) for line in text.split("\n")) if column.is_number else text


def _wrapped(text: str, width: int) -> str:
    """The text broken after spaces, commas and slashes; only a word that is longer than a line is cut."""
    lines = [""]
    for word in _AFTER.split(text):
        if lines[-1] and len(lines[-1]) + len(word.rstrip()) > width:
            lines.append("")
        lines[-1] += word
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return "\n".join(line.rstrip() for line in lines)


def _longest(texts: Sequence[str]) -> int:
    return max((len(line) for text in texts for line in text.split("\n")), default=0)
