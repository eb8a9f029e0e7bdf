"""Data sets: rows, conversations and images joined into items, with every problem found in one go."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from agiqa.errors import DataError
from agiqa.extract.data.building import ItemBuilder
from agiqa.extract.data.cautions import cautions
from agiqa.extract.data.conversations import Talk, read_conversations
from agiqa.extract.data.image_checks import CHECKERS, image_checks
from agiqa.extract.data.items import DataSet, Item
from agiqa.extract.data.joining import Joined, Pair, join, join_aspects
from agiqa.extract.data.labels import Rows, read_rows
from agiqa.extract.data.sources import Sources, find_sources
from agiqa.extract.data.templates import aspects_of
from agiqa.progress import track
from agiqa.store.format.labels import ASPECT_COLUMNS, DEFAULT_RANGE, MosRange, check_range, scale_warning


def load_data_set(
    data: Path,
    *,
    conversations: Sequence[str] = (),
    labels: Path | None = None,
    variant: str = "id",
    aspect: str = "quality",
    images: bool,
    mos_range: MosRange | None = DEFAULT_RANGE,
    on_bad_item: Literal["fail", "skip"] = "fail",
) -> DataSet:
    """Read and check a whole data set; every image is decoded once when `images` is true.

    `data` is a folder with data.csv (and images/), a csv file, or an M3-AGIQA conversation file whose MOS
    are in the csv `labels`. `conversations` are `[ASPECT:][SPLIT=]FILE`; a conversation belongs to the row
    whose `name` ends its `image` field. A variant with several aspects (see `aspects_of`) needs files of each, the
    aspect written before the file or a word of its name, or no files and a column `description_ASPECT` of each in the
    csv; its column `description` is on `aspect`. Rows that no conversation names are not part of the data
    set; their number is in `notes`. `warnings` tell of test items that read a teacher's text, and of a missing test
    part. MOS must lie within `mos_range` (lowest, highest), and every row of a csv that has a column of them must have
    one; None leaves them unread.

    Raises UnknownName for a variant, aspect or split; ConfigError for options that contradict each other;
    DataError for files that cannot be used at all and, under `on_bad_item="fail"`, one that lists every bad
    item. "skip" leaves bad items out, and raises DataError only when no item is left.
    """
    aspects = aspects_of(variant, aspect)
    scale = None if mos_range is None else check_range(mos_range)
    sources = find_sources(data, conversations, labels, aspect=aspect)
    table = read_rows(sources.table, mos_range, aspect=aspect)
    joined = _join(sources, table, aspects, variant)
    builder = ItemBuilder(sources=sources, aspects=aspects, variant=variant, images=images)
    outcomes = _build(builder, joined.pairs) if images else [builder.build(pair) for pair in joined.pairs]
    items = tuple(outcome for outcome in outcomes if isinstance(outcome, Item))
    problems = (*joined.problems, *(outcome for outcome in outcomes if isinstance(outcome, str)))
    if problems and (on_bad_item == "fail" or not items):
        raise DataError.from_problems(str(data), problems)
    about_labels = () if scale is None else _doubts(items, scale) if table.labelled else (_unlabelled(sources, table),)
    return DataSet(
        name=sources.name,
        items=items,
        skipped=problems,
        notes=(*joined.notes, *about_labels),
        warnings=tuple(cautions(sources, items, variant=variant)),
        table=sources.table,
        mos_range=scale,
    )


def _build(builder: ItemBuilder, pairs: Sequence[Pair]) -> list[Item | str]:
    """The items of all pairs; decoding many images takes a while."""
    outcomes: list[Item | str] = []
    with (
        ThreadPoolExecutor(CHECKERS) as pool,
        image_checks() as check,
        track("check", len(pairs), "images") as advance,
    ):
        for outcome in pool.map(replace(builder, check=check).build, pairs):
            outcomes.append(outcome)
            advance(1)
    return outcomes


def _doubts(items: Sequence[Item], scale: MosRange) -> tuple[str, ...]:
    """A note for each aspect whose MOS look like those of a smaller scale."""
    aspects = sorted({aspect for item in items for aspect in item.labels})
    values = {aspect: np.array([item.labels.get(aspect, np.nan) for item in items]) for aspect in aspects}
    return tuple(note for aspect in aspects if (note := scale_warning(aspect, values[aspect], scale)))


def _unlabelled(sources: Sources, table: Rows) -> str:
    return (
        f"note: {sources.table} has no MOS column (found: {', '.join(table.header)}), so its items have no labels; "
        f"MOS columns are {', '.join(ASPECT_COLUMNS)}, and `agiqa store labels STORE TABLE` joins them later."
    )


def _join(sources: Sources, table: Rows, aspects: Sequence[str], variant: str) -> Joined:
    """The rows with their conversations on every one of `aspects`."""
    talks: dict[str, list[Talk]] = {aspect: [] for aspect in aspects}
    for file in sources.conversations:
        talks[file.aspect_among(aspects)].extend(read_conversations(file.path, file.split))
    if len(aspects) > 1 and sources.conversations:
        return join_aspects(sources, table.rows, talks)
    if variant != "no_id" and not sources.conversations:
        _check_descriptions(sources, table, aspects, variant)
    return join(sources, table.rows, talks[aspects[0]])


def _check_descriptions(sources: Sources, table: Rows, aspects: Sequence[str], variant: str) -> None:
    """Raise DataError where not a single row has a description of one of `aspects`."""
    for aspect in aspects:
        if not any(aspect in row.descriptions for row in table.rows):
            which, column = ("", "description") if len(aspects) == 1 else (f" of {aspect}", f"description_{aspect}")
            message = (
                f"{sources.table}: the variant {variant!r} needs descriptions{which}, and there are none; "
                f"give --conversations or use --variant no_id. A column {column!r} would do too."
            )
            raise DataError(message)
