"""Labels apart from features: join a table of MOS, splits and generators to a store without touching its arrays."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.progress import say
from agiqa.store.disk.files import write_text_atomically
from agiqa.store.format.columns import ColumnNames, LabelTable, open_labels, wrong_width
from agiqa.store.format.items import DEVIATION_PREFIX, LABEL_PREFIX, Items
from agiqa.store.format.labels import (
    ASPECT_COLUMNS,
    DEFAULT_RANGE,
    DEVIATION_COLUMNS,
    IMPORT_RECORD,
    SPLITS,
    MosRange,
    MosReader,
    convert_deviations,
    convert_mos,
    import_record,
    is_plausible,
    range_text,
    read_deviation,
    scale_of,
    scale_warning,
    split_of,
)
from agiqa.store.format.manifest import read_recorded_items, replace_recorded_items, settle_labels
from agiqa.store.format.names import NameIndex
from agiqa.store.format.tables import TableRow
from agiqa.store.reading.store import Store, open_local_store
from agiqa.store.reading.summary import data_card
from agiqa.store.writing.sealing import require_no_cut_off_pull, seal_lock

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
    """By column, how many items had no value and have one now."""
    replaced: Mapping[str, int]
    """By column, how many items have a different value now."""
    ignored_columns: tuple[str, ...]
    """Columns of the table that are no label."""
    mos_ranges: Mapping[str, MosRange | None]
    """By MOS column of the table, the scale of its values in the store now; None where it is unknown."""
    rescaled: tuple[str, ...]
    """Columns whose scale changed or was recorded for the first time."""
    converted: Mapping[str, MosRange]
    """By column, the scale of the table, where its values were converted to that of the store."""
    notes: tuple[str, ...]
    """Remarks for the user; nothing is wrong."""

    @property
    def changed(self) -> bool:
        """Whether the store's item table was replaced."""
        return bool(self.filled or self.replaced or self.rescaled)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {"changed": self.changed, **asdict(self)}


def join_labels(
    store: Store, table: Path, *, mos_range: MosRange | None = None, columns: ColumnNames | None = None
) -> LabelReport:
    """Set MOS, `split` and `generator` of the items that the `table` names, in a finished or unfinished store.

    `table` is of any format of `agiqa.store.format.tables`. It has the column `name` and at least one label column:
    MOS, `split`, `generator`; `columns` say which these are, see `open_labels`. An empty cell keeps the store's value.
    A `prompt` column is compared with the store's prompts.
    `mos_range` is the scale of the table's MOS, by default the one that an import recorded beside it, else that of
    the store, else 0 to 5. Where
    the table has all MOS of an aspect, its scale is recorded; else its MOS are converted to the scale of the others.
    Only items.parquet, MANIFEST.json and the data card are written; a kill leaves the old labels or the new ones.
    Open the store again to read them. While a store is unfinished, `agiqa extract` replaces them by its own table's.

    Raises DataError listing all rows that cannot be used (then nothing is changed), when no row names an item, and
    where the MOS that stay are on no known scale and cannot be on that of the table; ConfigError for an empty
    `mos_range`; IncompleteStore where a pull was cut off; DamagedStore when the item table is not the recorded one.
    """
    recorded = import_record(table.parent / IMPORT_RECORD) is not None
    asked = scale_of(table, mos_range) if recorded or mos_range is not None else None
    layout = store.layout
    with seal_lock(layout):
        require_no_cut_off_pull(layout)
        finished = layout.manifest.exists()
        settle_labels(layout)
        items = read_recorded_items(layout)
        joined, report = _joined(items, _Table(table, items, asked, columns))
        if report.changed:
            replace_recorded_items(layout, joined)
        if report.changed and finished:
            write_text_atomically(layout.card, data_card(open_local_store(store.path)))
    return report


class _Table:
    """The values that a table of labels has for the items of a store, by column of items.parquet."""

    def __init__(self, path: Path, items: Items, mos_range: MosRange | None, columns: ColumnNames | None) -> None:
        """Read it. Raises DataError listing all rows that cannot be used, or when no row names an item."""
        table = open_labels(path, columns)
        self._path, self._items, self._header, self._written = path, items, table.header, table.written
        self._columns = _label_columns(table)
        read = {*self._columns, "name", "prompt"}
        self.ignored = tuple(table.written[column] for column in table.header if column not in read)
        aspects = [name.removeprefix(LABEL_PREFIX) for name in self._columns.values() if name.startswith(LABEL_PREFIX)]
        self.scales = {aspect: mos_range or items.mos_ranges.get(aspect, DEFAULT_RANGE) for aspect in aspects}
        """By aspect, the scale of its MOS."""
        self.mos = {aspect: np.full(len(items), np.nan) for aspect in aspects}
        """By aspect, (items,), NaN where the table has no value."""
        spread = [name for name in self._columns.values() if name.startswith(DEVIATION_PREFIX)]
        self.deviations = {name.removeprefix(DEVIATION_PREFIX): np.full(len(items), np.nan) for name in spread}
        """By aspect, as `mos`, on the scale of the table's MOS."""
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
        numbers = [*self.mos.values(), *self.deviations.values()]
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
        return problems

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
    if not labels:
        message = (
            f"{table.path}: no label column ({table.shown()}); expected at least one of {', '.join(known)}, or add "
            "--columns mos_quality=COLUMN."
        )
        raise DataError(message)
    return labels


def _joined(items: Items, table: _Table) -> tuple[Items, LabelReport]:
    """The items with the labels of `table`, and the changes. Raises DataError where scales would be mixed."""
    filled, replaced = Counter[str](), Counter[str]()
    labels, texts = dict(items.labels), {"split": items.splits, "generator": items.generators}
    scales: dict[str, MosRange | None] = {}
    tables: dict[str, MosRange] = {}
    notes: list[str] = []
    for aspect, mos in table.mos.items():
        if not np.isfinite(mos).any():
            continue
        column, scale = LABEL_PREFIX + aspect, table.scales[aspect]
        old = np.asarray(labels.get(aspect, np.full(len(items), np.nan)), np.float64)
        kept = _scale_with(aspect, old[np.isnan(mos)], items.mos_ranges.get(aspect), scale)
        notes += [note for note in (scale_warning(aspect, mos, scale), _scale_note(aspect, kept, scale)) if note]
        if kept is not None and kept != scale:
            mos, tables[column] = convert_mos(mos, scale, kept), scale
        scales[aspect], sets = kept, np.isfinite(mos)
        filled[column] = int((sets & np.isnan(old)).sum())
        replaced[column] = int((sets & ~np.isnan(old) & (mos != old)).sum())
        labels[aspect] = np.where(sets, mos, old)
    for column, new in table.texts.items():
        pairs = list(zip(texts[column], new, strict=True))
        filled[column] = sum(before is None and after is not None for before, after in pairs)
        replaced[column] = sum(before is not None and after not in (None, before) for before, after in pairs)
        texts[column] = [before if after is None else after for before, after in pairs]
    recorded = {aspect: scale for aspect, scale in scales.items() if scale is not None}
    ranges = {**items.mos_ranges, **recorded}
    deviations = _joined_deviations(items, table, ranges, filled, replaced)
    joined = replace(
        items,
        labels=labels,
        deviations=deviations,
        splits=texts["split"],
        generators=texts["generator"],
        mos_ranges=ranges,
    )
    return joined, LabelReport(
        rows=table.rows,
        matched=table.matched,
        kept=len(items) - table.matched,
        unmatched_rows=tuple(table.unmatched),
        filled={column: count for column, count in filled.items() if count},
        replaced={column: count for column, count in replaced.items() if count},
        ignored_columns=table.ignored,
        mos_ranges={LABEL_PREFIX + aspect: scale for aspect, scale in scales.items()},
        rescaled=tuple(LABEL_PREFIX + one for one, scale in recorded.items() if items.mos_ranges.get(one) != scale),
        converted=tables,
        notes=tuple(notes),
    )


def _joined_deviations(
    items: Items, table: _Table, ranges: Mapping[str, MosRange], filled: Counter[str], replaced: Counter[str]
) -> dict[str, NDArray[np.float64]]:
    """The standard deviations of the items and of `table`, on the scales `ranges` of the MOS; counts the changes."""
    found: dict[str, NDArray[np.float64]] = {}
    for aspect in sorted({*items.deviations, *table.deviations}):
        missing, target = np.full(len(items), np.nan), ranges.get(aspect)
        columns: list[NDArray[np.float64]] = []
        for values, scale in (
            (items.deviations.get(aspect, missing), items.mos_ranges.get(aspect)),
            (table.deviations.get(aspect, missing), table.scales.get(aspect, target)),
        ):
            if scale is not None and target is not None:
                values = convert_deviations(np.asarray(values, np.float64), scale, target)
            columns.append(np.asarray(values, np.float64))
        old, new = columns
        sets, column = np.isfinite(new), DEVIATION_PREFIX + aspect
        filled[column] = int((sets & np.isnan(old)).sum())
        replaced[column] = int((sets & ~np.isnan(old) & (new != old)).sum())
        found[aspect] = np.where(sets, new, old)
    return found


def _scale_with(aspect: str, stays: NDArray[np.float64], own: MosRange | None, scale: MosRange) -> MosRange | None:
    """The scale of an aspect whose table values are on `scale`, and whose other values, `stays`, are on `own`.

    None is unknown. Raises DataError where `own` is unknown and `stays` cannot be on `scale`.
    """
    known = stays[np.isfinite(stays)]
    if not len(known):
        return scale
    if own is None and not is_plausible(known, scale):
        message = (
            f"The table has only some of the {aspect} MOS, on {range_text(scale)}. The {len(known)} others go from "
            f"{known.min():g} to {known.max():g}, and their scale is not recorded: both would be mixed. Give a table "
            "with the MOS of all items that have one, or the --mos-range that all are on."
        )
        raise DataError(message)
    return own


def _scale_note(aspect: str, kept: MosRange | None, scale: MosRange) -> str | None:
    """A note where the table was, or may have been, on another scale than the values that stay."""
    if kept is None:
        return (
            f"note: the scale of the other {aspect} MOS is not recorded; they are taken to be on {range_text(scale)} "
            "too. A table with the MOS of all items records it."
        )
    if kept == scale:
        return None
    return (
        f"note: the {aspect} MOS of the table are converted from {range_text(scale)} to {range_text(kept)}, the scale "
        "of the items that it does not name. A table with the MOS of all items would set their scale."
    )
