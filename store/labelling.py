"""Labels apart from features: join a table of MOS, splits and generators to a store without touching its arrays."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.store.card import data_card
from agiqa.store.files import write_text_atomically
from agiqa.store.items import LABEL_PREFIX, Items
from agiqa.store.label_tables import ASPECT_COLUMNS, SPLITS, TableRow, read_mos, read_table
from agiqa.store.reading import Store, open_store
from agiqa.store.recorded_items import read_recorded_items, replace_recorded_items, settle_labels
from agiqa.store.upkeep import upkeep_lock

_NAMES = 5


@dataclass(frozen=True, kw_only=True)
class LabelReport:
    """What a table changed. Columns are called as in items.parquet: `mos_quality`, `split`, `generator`."""

    rows: int
    """Rows of the table."""
    matched: int
    """Items that the table names."""
    kept: int
    """Items that the table does not name; they keep what they have."""
    unmatched_rows: tuple[str, ...]
    """Names in the table that no item has."""
    filled: Mapping[str, int]
    """By column, the items that had no value and have one now."""
    replaced: Mapping[str, int]
    """By column, the items whose value is another now."""
    ignored_columns: tuple[str, ...]
    """Columns of the table that are no label."""

    @property
    def changed(self) -> bool:
        """Whether the store's item table is another now."""
        return bool(self.filled or self.replaced)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"changed": self.changed, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class _LabelRow:
    number: int
    name: str
    prompt: str | None
    values: Mapping[str, str | float]
    """By column of items.parquet; an empty cell has no entry."""
    problems: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"line {self.number}, {self.name!r}" if self.name.strip() else f"line {self.number}"


def join_labels(store: Store, table: Path, *, mos_range: tuple[float, float] = (0.0, 5.0)) -> LabelReport:
    """Set MOS, `split` and `generator` of the items that the csv `table` names, in a finished or unfinished store.

    `table` has the column `name` and at least one label column: the MOS columns of ASPECT_COLUMNS, `split`,
    `generator`. An empty cell leaves the value as it is. A `prompt` column is compared with the store's prompts.
    Only items.parquet, MANIFEST.json and the data card are written; a kill leaves the old labels or the new ones.
    Open the store again to read them. While a store is unfinished, `agiqa extract` sets the labels of its own
    table again.

    Raises DataError listing all rows that cannot be used (then nothing is changed), or when no row names an item;
    DamagedStore when the store's item table is not the one that was recorded.
    """
    columns, ignored, rows = _read_rows(table, mos_range)
    layout = store.layout
    with upkeep_lock(layout):
        finished = layout.manifest.exists()
        settle_labels(layout)
        items = read_recorded_items(layout)
        positions = _match(table, rows, items)
        joined, filled, replaced = _joined(items, rows, positions, columns)
        if filled or replaced:
            replace_recorded_items(layout, joined)
        if (filled or replaced) and finished:
            write_text_atomically(layout.card, data_card(open_store(store.path)))
    return LabelReport(
        rows=len(rows),
        matched=len(positions),
        kept=len(items) - len(positions),
        unmatched_rows=tuple(row.name for row in rows if row.name not in positions),
        filled=filled,
        replaced=replaced,
        ignored_columns=ignored,
    )


def _read_rows(path: Path, mos_range: tuple[float, float]) -> tuple[dict[str, str], tuple[str, ...], list[_LabelRow]]:
    """Label columns (of the table, to that of items.parquet), the columns that are none, and the rows."""
    header, rows = read_table(path)
    columns = _label_columns(path, header)
    ignored = tuple(column for column in header if column not in {*columns, "name", "prompt"})
    return columns, ignored, [_label_row(row, header, columns, mos_range) for row in rows]


def _label_columns(path: Path, header: Sequence[str]) -> dict[str, str]:
    found = f"found: {', '.join(header)}"
    if "name" not in header:
        message = f"{path}: no column 'name' ({found})."
        raise DataError(message)
    known = {**{name: LABEL_PREFIX + aspect for name, aspect in ASPECT_COLUMNS.items()}, "split": "split"}
    known["generator"] = "generator"
    labels = [column for column in header if column in known]
    if not labels:
        message = f"{path}: no label column ({found}); expected at least one of {', '.join(known)}."
        raise DataError(message)
    meanings = [known[column] for column in labels] + [name for name in header if name in ("name", "prompt")]
    if len(set(meanings)) < len(meanings):
        message = f"{path}: two columns mean the same ({found}); keep one of them."
        raise DataError(message)
    return {column: known[column] for column in labels}


def _label_row(
    row: TableRow, header: Sequence[str], columns: Mapping[str, str], mos_range: tuple[float, float]
) -> _LabelRow:
    cells = dict(zip(header, row.cells, strict=False))
    problems: list[str] = []
    if len(row.cells) != len(header):
        problems.append(f"has {len(row.cells)} fields where the header has {len(header)}")
    if not cells.get("name", "").strip():
        problems.append("the name is empty")
    values: dict[str, str | float] = {}
    for column, meaning in columns.items():
        cell = cells.get(column, "").strip()
        try:
            if cell:
                values[meaning] = read_mos(column, cell, mos_range) if meaning.startswith(LABEL_PREFIX) else cell
        except DataError as error:
            problems.append(str(error))
    split = values.get("split")
    if split is not None and split not in SPLITS:
        problems.append(f"split {split!r} is none of {', '.join(SPLITS)}")
    prompt = cells.get("prompt", "")
    return _LabelRow(
        number=row.number,
        name=cells.get("name", ""),
        prompt=prompt if prompt.strip() else None,
        values=values,
        problems=tuple(problems),
    )


def _match(table: Path, rows: Sequence[_LabelRow], items: Items) -> dict[str, int]:
    """Position of each item that a row names. Raises DataError with every row that cannot be used."""
    known = {name: position for position, name in enumerate(items.names)}
    problems = list(_problems(rows, items, known))
    if problems:
        raise DataError.from_problems(str(table), problems)
    positions = {row.name: known[row.name] for row in rows if row.name in known}
    if not positions:
        message = (
            f"{table}: none of its {len(rows)} rows names an item of the store. The table has {_some(rows)}; the store "
            f"has {', '.join(items.names[:_NAMES])}. Is it the table of another data set?"
        )
        raise DataError(message)
    return positions


def _problems(rows: Sequence[_LabelRow], items: Items, known: Mapping[str, int]) -> Iterator[str]:
    first: dict[str, int] = {}
    for row in rows:
        problems = list(row.problems)
        if row.name.strip() and row.name in first:
            problems.append(f"duplicate of line {first[row.name]}")
        first.setdefault(row.name, row.number)
        if row.prompt is not None and row.name in known and row.prompt != items.prompts[known[row.name]]:
            problems.append(f"the prompt is {row.prompt!r}, in the store {items.prompts[known[row.name]]!r}")
        if problems:
            yield f"{row.where}: {'; '.join(problems)}"


def _joined(
    items: Items, rows: Sequence[_LabelRow], positions: Mapping[str, int], columns: Mapping[str, str]
) -> tuple[Items, dict[str, int], dict[str, int]]:
    """The items with the values of `rows`; by column, how many had none and how many had another."""
    text: dict[str, list[str | None]] = {"split": list(items.splits), "generator": list(items.generators)}
    labels = {aspect: np.array(mos) for aspect, mos in items.labels.items()}
    filled, replaced = dict.fromkeys(columns.values(), 0), dict.fromkeys(columns.values(), 0)
    for row in rows:
        for column, value in row.values.items() if row.name in positions else ():
            position = positions[row.name]
            old: str | float | None
            if isinstance(value, str):
                old, text[column][position] = text[column][position], value
            else:
                mos = labels.setdefault(column.removeprefix(LABEL_PREFIX), _no_mos(len(items)))
                old = None if np.isnan(mos[position]) else float(mos[position])
                mos[position] = value
            filled[column] += old is None
            replaced[column] += old is not None and old != value
    joined = replace(items, labels=labels, splits=text["split"], generators=text["generator"])
    return joined, _counted(filled), _counted(replaced)


def _no_mos(count: int) -> NDArray[np.float64]:
    return np.full(count, np.nan)


def _counted(counts: Mapping[str, int]) -> dict[str, int]:
    return {column: count for column, count in counts.items() if count}


def _some(rows: Sequence[_LabelRow]) -> str:
    return ", ".join(row.name for row in rows[:_NAMES])
