"""Scores on the images of each generator, each style of prompt, or each value of a column that the user has."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.bench.recording.predictions import Predictions, read_predictions
from agiqa.bench.recording.records import Row, RunLine
from agiqa.bench.report.naming import METRIC_NAMES, listed, on_store, protocol_name, row_titles
from agiqa.bench.report.pictures import Floats
from agiqa.bench.report.reading import Results
from agiqa.bench.report.tables import Cell, Column, Table, make_table
from agiqa.errors import AgiqaError, DataError
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.evaluation.runs import PREDICTIONS
from agiqa.store import open_store
from agiqa.store.format.columns import ColumnNames, open_labels

Groups = Mapping[str, str]
"""The group of each image by its name."""
Groupings = Mapping[str, Groups]
"""Groups by what they are groups of: generator, style of the prompt, or a column."""
_HEADS = 4
"""The most heads of a table."""
_FEWEST_IMAGES = 10
"""Groups with fewer images have no scores."""
_MOST_GROUPS = 60
_STYLE = " style"
_NONE = "none"
_NOT_GROUPS = ("name", "prompt", "split", "description", "rating", "answer", "text_author")


@dataclass(frozen=True, kw_only=True)
class _Tested:
    """The test items of a head, and its predictions by seed."""

    row: Row
    names: list[str]
    prompts: list[str]
    true: Floats
    """(items,)"""
    predicted: Floats
    """(seeds, items)"""


@dataclass(frozen=True, kw_only=True)
class _Group:
    """One row of a table."""

    name: str
    images: int
    mean: float
    """Mean true MOS."""
    error: float
    """Mean error of the first head."""
    scores: Sequence[Mapping[str, Any] | None]
    """`SeedScores.score` of each head; None for too few images."""


def read_groupings(path: Path, columns: ColumnNames | None = None) -> Groupings:
    """The groups in the text columns of a table of images, by column; images without a value are in the group `none`.

    `columns` says which column has the names, if `open_labels` does not recognise it. Raises DataError for a table
    without such a column, and as `open_labels`.
    """
    table = open_labels(path, columns)
    table.need("name")
    rows = [dict(zip(table.header, row.cells, strict=False)) for row in table.rows]
    found: dict[str, Groups] = {}
    for column in (column for column in table.header if column not in _NOT_GROUPS):
        groups = {row["name"]: row.get(column, "").strip() or _NONE for row in rows}
        if 1 < len(set(groups.values())) <= _MOST_GROUPS and not all(map(_is_number, groups.values())):
            found[column] = groups
    if not found:
        message = f"{path} has no text column with 2 to {_MOST_GROUPS} values to group images by ({table.shown()})."
        raise DataError(message)
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == _NONE
    return True


def group_tables(results: Results, label: str, protocol: str, groupings: Groupings) -> dict[str, Table]:
    """A table for each grouping, by its name, of the heads with the best validation SRCC whose predictions are there.

    Beside `groupings` the images are grouped by the generators that the store records, and by styles that end prompts,
    as in `a corgi, anime style`.
    """
    rows = [row for row in results.of(label, protocol) if row.kind == "head" and row.validated("srcc") is not None]
    tested: list[_Tested] = []
    for row in rows:
        found = _tested(results, row)
        if found is not None and (not tested or found.names == tested[0].names):
            tested.append(found)
        if len(tested) == _HEADS:
            break
    if not tested:
        return {}
    known = {**_generators(results, tested[0]), **_styles(tested[0]), **groupings}
    titles = row_titles(rows)
    heads = [on_store(titles[one.row.row], one.row.store_name) for one in tested]
    tables = {what: _table(results, tested, heads, what, groups) for what, groups in known.items()}
    return {what: table for what, table in tables.items() if table is not None}


def _tested(results: Results, row: Row) -> _Tested | None:
    """The predictions of each seed, of all folds together; None if any is missing, or seeds tested different items."""
    by_seed: dict[int | None, list[Predictions]] = {}
    for line in results.runs_of(row):
        read = _read(results, line, row.label)
        if read is None:
            return None
        by_seed.setdefault(line.seed, []).append(read)
    seeds = [_joined(parts) for parts in by_seed.values()]
    if not seeds or any(keys != seeds[0][0] for keys, _, _ in seeds):
        return None
    keys, true, _ = seeds[0]
    return _Tested(
        row=row,
        names=[name for name, _, _ in keys],
        prompts=[prompt for _, prompt, _ in keys],
        true=true,
        predicted=np.stack([predicted for _, _, predicted in seeds]),
    )


def _read(results: Results, line: RunLine, label: str) -> Predictions | None:
    try:
        return read_predictions(results.run_folder(line) / PREDICTIONS, line.labels, label)
    except DataError:  # the report lists it beside the scatter plot
        return None


def _joined(parts: Sequence[Predictions]) -> tuple[list[tuple[str, str, int]], Floats, Floats]:
    """Keys, true and predicted MOS of all parts, in the order of the keys."""
    keys = [
        key for part in parts for key in zip(part.names, part.prompts, part.items or [0] * len(part.names), strict=True)
    ]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    true, predicted = (np.concatenate([getattr(part, name) for part in parts]) for name in ("mos", "predicted"))
    return [keys[place] for place in order], true[order], predicted[order]


def _generators(results: Results, tested: _Tested) -> Groupings:
    """The generators that the store records; none where it is not there or records none."""
    path = results.store(tested.row.store_name).path
    if path is None or not Path(path).is_dir():
        return {}
    try:
        items = open_store(Path(path)).items
    except (AgiqaError, OSError):
        return {}
    groups = {name: generator or _NONE for name, generator in zip(items.names, items.generators, strict=True)}
    return {"generator": groups} if len(set(groups.values())) > 1 else {}


def _styles(tested: _Tested) -> Groupings:
    """The styles at the ends of prompts."""
    ends = [prompt.rpartition(",")[2].strip() for prompt in tested.prompts]
    styles = [end if end.endswith(_STYLE) else _NONE for end in ends]
    return {"style of the prompt": dict(zip(tested.names, styles, strict=True))} if len(set(styles)) > 1 else {}


def _table(
    results: Results, tested: Sequence[_Tested], heads: Sequence[str], what: str, groups: Groups
) -> Table | None:
    """The table of one grouping; None if fewer than two groups have images."""
    first = tested[0]
    of_items = [groups.get(name, _NONE) for name in first.names]
    counts = Counter(of_items)
    if len(counts) < 2 or set(first.names).isdisjoint(groups):
        return None
    found = [_group(tested, name, np.array([group == name for group in of_items])) for name in sorted(counts)]
    label, protocol = first.row.label, first.row.protocol
    columns: list[Column[_Group]] = [
        Column("group", what[:1].upper() + what[1:], lambda group: group.name, "text"),
        Column("images", "Images", lambda group: group.images, "count"),
        Column("mean", "Mean MOS", lambda group: group.mean),
        *(_score(place, "srcc", head) for place, head in enumerate(heads)),
        _score(0, "plcc", heads[0]),
        Column("error", f"Mean error, {heads[0]}", lambda group: group.error, "difference"),
    ]
    notes = [
        f"Heads with the best validation SRCC: {listed(heads)}. Each score is computed on the images of one group, and "
        f"averaged over seeds. There is none for fewer than {_FEWEST_IMAGES} images, and no interval for fewer than 10 "
        "prompts. Error: predicted minus true MOS."
    ]
    title = f"by {what}, {label}, {protocol_name(protocol)}"
    return make_table(results, ["by", what, label, protocol], title, columns, found, notes)


def _score(place: int, metric: str, head: str) -> Column[_Group]:
    def cell(group: _Group) -> Cell:
        scores = group.scores[place]
        if scores is None:
            return Cell(None)
        value, interval = scores[metric], scores["ci"][metric]
        return Cell(value, None if interval is None else (interval[0], interval[1]))

    return Column(f"{metric}_{place + 1}", f"{METRIC_NAMES[metric]}, {head}", cell, interval=True)


def _group(tested: Sequence[_Tested], name: str, member: np.ndarray) -> _Group:
    """`member` (items,): whether each item is in the group."""
    prompts = [prompt for prompt, is_member in zip(tested[0].prompts, member, strict=True) if is_member]
    scores = [
        SeedScores.of(one.predicted[:, member], one.true[member], prompts).score()
        if len(prompts) >= _FEWEST_IMAGES
        else None
        for one in tested
    ]
    first = tested[0]
    return _Group(
        name=name,
        images=len(prompts),
        mean=float(first.true[member].mean()),
        error=float(first.predicted[:, member].mean() - first.true[member].mean()),
        scores=scores,
    )
