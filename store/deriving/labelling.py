"""Labels apart from features: join a table of MOS, splits and generators to a store without touching its arrays."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.store.deriving.item_labels import ItemLabels
from agiqa.store.disk.files import write_text_atomically
from agiqa.store.format.columns import ColumnNames
from agiqa.store.format.items import COUNT_PREFIX, DEVIATION_PREFIX, LABEL_PREFIX, Items
from agiqa.store.format.labels import (
    IMPORT_RECORD,
    MosRange,
    convert_deviations,
    convert_mos,
    import_record,
    is_plausible,
    range_text,
    scale_of,
    scale_warning,
)
from agiqa.store.format.manifest import read_recorded_items, replace_recorded_items, settle_labels
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
        joined, report = _joined(items, ItemLabels(table, items, asked, columns))
        if report.changed:
            replace_recorded_items(layout, joined)
        if report.changed and finished:
            write_text_atomically(layout.card, data_card(open_local_store(store.path)))
    return report


def _joined(items: Items, table: ItemLabels) -> tuple[Items, LabelReport]:
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
        scales[aspect] = kept
        labels[aspect] = _merged(old, mos, column, filled, replaced)
    for column, new in table.texts.items():
        pairs = list(zip(texts[column], new, strict=True))
        filled[column] = sum(before is None and after is not None for before, after in pairs)
        replaced[column] = sum(before is not None and after not in (None, before) for before, after in pairs)
        texts[column] = [before if after is None else after for before, after in pairs]
    recorded = {aspect: scale for aspect, scale in scales.items() if scale is not None}
    ranges = {**items.mos_ranges, **recorded}
    deviations = _joined_deviations(items, table, labels, ranges, filled, replaced)
    joined = replace(
        items,
        labels=labels,
        deviations=deviations,
        counts=_joined_counts(items, table, filled, replaced),
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
        notes=(*notes, *table.ratings.notes()),
    )


def _joined_deviations(
    items: Items,
    table: ItemLabels,
    labels: Mapping[str, NDArray[np.float64]],
    ranges: Mapping[str, MosRange],
    filled: Counter[str],
    replaced: Counter[str],
) -> dict[str, NDArray[np.float64]]:
    """The standard deviations of the items and of `table`, on the scales `ranges` of the MOS; counts the changes.

    `labels` are the new MOS. Where they are the old ones on another scale, only the record of the scale was wrong, and
    the deviations stay.
    """
    found: dict[str, NDArray[np.float64]] = {}
    own = {
        aspect: ranges[aspect] if np.array_equal(items.labels[aspect], labels[aspect], equal_nan=True) else scale
        for aspect, scale in items.mos_ranges.items()
        if aspect in items.labels
    }
    for aspect in sorted({*items.deviations, *table.deviations}):
        missing, target = np.full(len(items), np.nan), ranges.get(aspect)
        columns: list[NDArray[np.float64]] = []
        for values, scale in (
            (items.deviations.get(aspect, missing), own.get(aspect)),
            (table.deviations.get(aspect, missing), table.scales.get(aspect, target)),
        ):
            if scale is not None and target is not None:
                values = convert_deviations(np.asarray(values, np.float64), scale, target)
            columns.append(np.asarray(values, np.float64))
        found[aspect] = _merged(columns[0], columns[1], DEVIATION_PREFIX + aspect, filled, replaced)
    return found


def _joined_counts(
    items: Items, table: ItemLabels, filled: Counter[str], replaced: Counter[str]
) -> dict[str, NDArray[np.float64]]:
    """The counts of the items and of `table`; counts the changes."""
    missing = np.full(len(items), np.nan)
    return {
        level: _merged(
            items.counts.get(level, missing), table.counts.get(level, missing), COUNT_PREFIX + level, filled, replaced
        )
        for level in sorted({*items.counts, *table.counts})
    }


def _merged(
    old: NDArray[np.float64], new: NDArray[np.float64], column: str, filled: Counter[str], replaced: Counter[str]
) -> NDArray[np.float64]:
    """`new` where it has a value, else `old`; counts the changes of the column."""
    sets = np.isfinite(new)
    filled[column] = int((sets & np.isnan(old)).sum())
    replaced[column] = int((sets & ~np.isnan(old) & (new != old)).sum())
    return np.where(sets, new, old)


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
