"""The labels that a table has for the items of a store, by column of items.parquet."""

from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.progress import say
from agiqa.store.format.columns import ColumnNames, LabelTable, open_labels, wrong_width
from agiqa.store.format.items import DEVIATION_PREFIX, LABEL_PREFIX, Items
from agiqa.store.format.labels import (
    ASPECT_COLUMNS,
    DEFAULT_RANGE,
    DEVIATION_COLUMNS,
    SPLITS,
    MosRange,
    MosReader,
    read_deviation,
    split_of,
)
from agiqa.store.format.names import NameIndex
from agiqa.store.format.ratings import COUNT_COLUMNS, RatingReader, Summary, count_columns, raters_of
from agiqa.store.format.tables import TableRow

_NAMES = 5


class ItemLabels:
    """The values that a table of labels has for the items of a store, by column of items.parquet."""

    def __init__(self, path: Path, items: Items, mos_range: MosRange | None, columns: ColumnNames | None) -> None:
        """Read it. Raises DataError listing all rows that cannot be used, or when no row names an item."""
        table = open_labels(path, columns)
        self._path, self._items, self._header, self._written = path, items, table.header, table.written
        self._columns = _label_columns(table)
        read = {*self._columns, "name", "prompt", *COUNT_COLUMNS, *chain(*raters_of(table.header).values())}
        self.ignored = tuple(table.written[column] for column in table.header if column not in read)
        aspects = [name.removeprefix(LABEL_PREFIX) for name in self._columns.values() if name.startswith(LABEL_PREFIX)]
        self.scales = {aspect: mos_range or items.mos_ranges.get(aspect, DEFAULT_RANGE) for aspect in aspects}
        """By aspect, the scale of its MOS and of its standard deviations."""
        self.mos = {aspect: np.full(len(items), np.nan) for aspect in aspects}
        """By aspect, (items,), NaN where the table has no value."""
        spread = [name for name in self._columns.values() if name.startswith(DEVIATION_PREFIX)]
        self.deviations = {name.removeprefix(DEVIATION_PREFIX): np.full(len(items), np.nan) for name in spread}
        """By aspect, as `mos`, on the scale of the table's MOS."""
        for aspect in self.deviations:
            self.scales.setdefault(aspect, mos_range or items.mos_ranges.get(aspect, DEFAULT_RANGE))
        self.ratings = RatingReader(table)
        for aspect in self.ratings.aspects:
            self.scales.setdefault(aspect, mos_range or items.mos_ranges.get(aspect, DEFAULT_RANGE))
            self.mos.setdefault(aspect, np.full(len(items), np.nan))
            self.deviations.setdefault(aspect, np.full(len(items), np.nan))
        self.counts: dict[str, NDArray[np.float64]] = {}
        """By aspect and level, as `deviations`."""
        self.texts: dict[str, list[str | None]] = {
            column: [None] * len(items) for column in ("split", "generator") if column in self._columns
        }
        """By column, one per item, None where the table has no value."""
        self.unmatched: dict[str, int] = {}
        """Lines of the names that no item has."""
        self.rows = 0
        self._known = {name: position for position, name in enumerate(items.names)}
        self._lines = np.zeros(len(items), np.int64)
        self._names = NameIndex(items.names, other_extensions=False)
        self._mos_reader = MosReader(path)
        self._repeats: list[int] = []
        problems = [problem for row in table.rows if (problem := self._take(row))]
        self._mos_reader.check()
        self._names.announce(str(path))
        self.counts = {level: of for level, of in self.counts.items() if self.ratings.fitting(level.rpartition("_")[0])}
        if self._repeats:
            count = len(self._repeats)
            say(f"note: {path}: rows that repeat an earlier row are left out: {count}, first line {self._repeats[0]}")
        if problems:
            raise DataError.from_problems(str(path), problems)
        if not self.matched:
            raise self._of_other_items()

    @property
    def matched(self) -> int:
        """How many items the table names."""
        return int(np.count_nonzero(self._lines))

    def _take(self, row: TableRow) -> str | None:
        """Keep the values of a row; returns its problems in one line, or None."""
        self.rows += 1
        cells = dict(zip(self._header, row.cells, strict=False))
        name, prompt = cells.get("name", ""), cells.get("prompt", "")
        problems: list[str] = []
        position = self._position(name, problems)
        if len(row.cells) != len(self._header):
            problems.append(wrong_width(row, self._header))
        if not name.strip():
            problems.append("the name is empty")
        before = self.unmatched.get(name) if position is None else int(self._lines[position])
        kept = None if position is None else self._values_at(position)
        problems += self._set(cells, position, row.number)
        if before and not problems and position is not None and kept == self._values_at(position):
            self._repeats.append(row.number)
        elif before and name.strip():
            problems.append(f"duplicate of line {before}")
        if position is None:
            self.unmatched.setdefault(name, row.number)
        else:
            self._lines[position] = before or row.number
            there = self._items.prompts[position]
            if prompt.strip() and prompt != there:
                problems.append(f"the prompt is {prompt!r}, in the store {there!r}")
        where = f"line {row.number}, {name!r}" if name.strip() else f"line {row.number}"
        return f"{where}: {'; '.join(problems)}" if problems else None

    def _position(self, name: str, problems: list[str]) -> int | None:
        """The item that a row names, even with other folders or case; several are a problem."""
        if name in self._known or not name.strip():
            return self._known.get(name)
        try:
            found = self._names.find(name)
        except DataError as error:
            problems.append(str(error))
            return None
        return None if found is None else self._known[found]

    def _values_at(self, position: int) -> list[object]:
        """The labels that the table gave the item so far; None for a missing MOS."""
        numbers = [*self.mos.values(), *self.deviations.values(), *self.counts.values()]
        mos = [None if np.isnan(values[position]) else float(values[position]) for values in numbers]
        return [*mos, *(values[position] for values in self.texts.values())]

    def _set(self, cells: Mapping[str, str], position: int | None, line: int) -> list[str]:
        """Keep the labels in `cells` for the item at `position`, if there is one; returns their problems."""
        problems: list[str] = []
        for column, meaning in self._columns.items():
            cell = cells.get(column, "").strip()
            if not cell:
                continue
            if meaning in self.texts:
                text = split_of(cell) if meaning == "split" else cell
                if meaning == "split" and text not in SPLITS:
                    problems.append(f"split {cell!r} is none of {', '.join(SPLITS)}")
                elif position is not None:
                    self.texts[meaning][position] = text
                continue
            try:
                column_of, value = self._number(meaning, self._written[column], cell, line)
            except DataError as error:
                problems.append(str(error))
                continue
            if position is not None:
                column_of[position] = value
        for aspect in self.ratings.aspects:
            try:
                found = self.ratings.read(cells, aspect, self.scales[aspect])
            except DataError as error:
                problems.append(str(error))
                continue
            if found is not None:
                problems += self.ratings.contradictions(cells, found, aspect)
                self._keep_ratings(aspect, found, position)
        return problems

    def _keep_ratings(self, aspect: str, found: Summary, position: int | None) -> None:
        """Keep the summary of the ratings of an item; a MOS or std that the table gives stays as it is written."""
        if position is None:
            return
        for columns, value in ((self.mos, found.mos), (self.deviations, found.std)):
            if value is not None and np.isnan(columns[aspect][position]):
                columns[aspect][position] = value
        for level, count in count_columns(aspect, found.counts).items():
            self.counts.setdefault(level, np.full(len(self._items), np.nan))[position] = count

    def _number(self, meaning: str, written: str, cell: str, line: int) -> tuple[NDArray[np.float64], float]:
        """The column that a number belongs to, and the number. Raises DataError, worded for a list of problems."""
        if meaning.startswith(DEVIATION_PREFIX):
            return self.deviations[meaning.removeprefix(DEVIATION_PREFIX)], read_deviation(written, cell)
        aspect = meaning.removeprefix(LABEL_PREFIX)
        return self.mos[aspect], self._mos_reader.read(written, cell, self.scales[aspect], line)

    def _of_other_items(self) -> DataError:
        return DataError(
            f"{self._path}: none of its {self.rows} rows names an item of the store. The table has "
            f"{', '.join(list(self.unmatched)[:_NAMES])}; the store has {', '.join(self._items.names[:_NAMES])}. "
            "Is it the table of another data set?"
        )


def _label_columns(table: LabelTable) -> dict[str, str]:
    """The label columns of the table, and what each is called in items.parquet. Raises DataError without any."""
    table.need("name")
    known = {**{name: LABEL_PREFIX + aspect for name, aspect in ASPECT_COLUMNS.items()}, "split": "split"}
    known["generator"] = "generator"
    spread = {name: DEVIATION_PREFIX + aspect for name, aspect in DEVIATION_COLUMNS.items()}
    labels = {column: name for column in table.header if (name := {**known, **spread}.get(column))}
    if not labels and not RatingReader(table).aspects:
        message = (
            f"{table.path}: no label column ({table.shown()}); expected at least one of {', '.join(known)}, or add "
            "--columns mos_quality=COLUMN."
        )
        raise DataError(message)
    return labels
