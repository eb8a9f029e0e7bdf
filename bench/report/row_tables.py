"""Tables of an ablation: rows with their intervals and paired differences, and how optimistic published splits are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agiqa.bench.report.naming import (
    GENERATORS,
    METRIC_NAMES,
    PROTOCOL_NOTES,
    group_title,
    kin_titles,
    plural,
    protocol_name,
    row_titles,
    slug,
)
from agiqa.bench.report.reading import CONFIDENT, METRICS, Results, Row
from agiqa.bench.report.tables import Cell, Column, Table

BASELINE, REFERENCE = "baseline", "reference"


def main_tables(results: Results) -> list[Table]:
    """The table of each label and protocol."""
    return [_main_table(results, label, protocol) for label, protocol in results.groups()]


def optimism_tables(results: Results) -> list[Table]:
    """Published minus grouped of the same row, for each label of which both were run."""
    groups = results.groups()
    labels = [label for label, protocol in groups if protocol == "published" and (label, "grouped") in groups]
    return [_optimism_table(results, label) for label in labels]


@dataclass(frozen=True, kw_only=True, order=True)
class Leak:
    """Test items with a prompt of training."""

    items: int
    """Letter by letter or nearly."""
    tested: int
    """All test items."""
    verbatim: int | None = field(compare=False)
    """Letter by letter; None in older folders."""

    def told(self) -> str:
        """`15 of 20 test images have a prompt that also occurs in training (12 of them letter by letter)`."""
        text = f"{self.items:,} of {self.tested:,} test images have a prompt that also occurs in training"
        return text if self.verbatim in (None, self.items) else f"{text} ({self.verbatim:,} of them letter by letter)"


def leak(results: Results, protocol: str) -> Leak | None:
    """The leak of the row with the most; None if unknown.

    Those of the folds or held-out generators of a row are summed, as its numbers are of all of them.
    """
    by_row: dict[tuple[str, str], dict[tuple[str, str], Leak]] = {}
    for line in results.done:
        counts = _leak_of(line.split) if line.protocol == protocol else None
        if counts is not None:
            part = str(line.config.get("fold")), str(line.config.get("held_out"))
            by_row.setdefault((line.of_row, line.store_name), {})[part] = counts
    return max((_sum(list(parts.values())) for parts in by_row.values()), default=None)


def _sum(parts: Sequence[Leak]) -> Leak:
    """All parts of a split together."""
    verbatim = [part.verbatim for part in parts if part.verbatim is not None]
    return Leak(
        items=sum(part.items for part in parts),
        tested=sum(part.tested for part in parts),
        verbatim=sum(verbatim) if len(verbatim) == len(parts) else None,
    )


def _leak_of(split: Mapping[str, Any] | None) -> Leak | None:
    """The leak of one run."""
    leaked = (split or {}).get("leak")
    if split is None or not isinstance(leaked, dict) or "test" not in split:
        return None
    count = leaked.get("test_items_with_a_training_prompt")
    if count is None:
        return None
    verbatim = leaked.get("test_items_with_a_training_prompt_verbatim")
    return Leak(items=int(count), tested=int(split["test"]), verbatim=None if verbatim is None else int(verbatim))


def leak_note(results: Results, protocol: str) -> str | None:
    """What a reader must know of the prompts of a protocol."""
    found = leak(results, protocol)
    if found is None:
        return None
    if not found.items:
        return "No prompt of a test image occurs in training."
    news = "images of a new generator" if protocol == GENERATORS else "new images"
    return f"This protocol leaks prompts: {found.told()}. Its numbers tell of {news} for known prompts."


def bold_rows(rows: Sequence[Row], reference: Row | None, metric: str) -> set[int]:
    """Which rows are set in bold, by position: see BOLD. None where nothing was compared."""
    tested = {k: p for k, row in enumerate(rows) if (p := row.p(metric)) is not None}
    if reference is None or not tested:
        return set()
    apart = {k for k, p in tested.items() if p < CONFIDENT}
    better = {k for k in apart if (_difference(rows[k], metric) or 0.0) > 0}
    alike = {k for k, row in enumerate(rows) if row is reference} | (tested.keys() - apart)
    return (better or alike) if apart else set()


BOLD = (
    f"Bold: the reference row and the rows that the paired test cannot tell from it (corrected p of {CONFIDENT} "
    "or more); "
    "where any row is better than the reference by that test, only those. Nothing is bold where the test tells "
    "no row apart."
)


def _main_table(results: Results, label: str, protocol: str) -> Table:
    rows = results.of(label, protocol)
    stores = list(dict.fromkeys(row.store_name for row in rows))
    references = results.references(label, protocol)
    bold = {metric: _bold(rows, references, metric) for metric in METRICS}
    titles = row_titles(rows)
    columns = [Column(key="row", title="Row", kind="text")]
    columns += [Column(key="store", title="Store", kind="text")] if len(stores) > 1 else []
    for metric in METRICS:
        columns += [Column(key=metric, title=METRIC_NAMES[metric], interval=True)]
        columns += [Column(key=f"{metric}_sd", title="sd")]
    columns += [
        Column(key="rmse", title=METRIC_NAMES["rmse"]),
        Column(key="validation_slope", title="Slope"),
        Column(key="srcc_difference", title="Δ SRCC", kind="difference", interval=True),
        Column(key="srcc_p_holm", title="p\N{NO-BREAK SPACE}(Holm)", kind="p"),
        Column(key="plcc_difference", title="Δ PLCC", kind="difference", interval=True),
        Column(key="plcc_p_holm", title="p\N{NO-BREAK SPACE}(Holm)", kind="p"),
        Column(key="validation_srcc", title="Validation SRCC"),
        Column(key="runs", title="Runs", kind="count"),
        Column(key="seconds", title="Seconds a run", kind="seconds"),
    ]
    body: list[list[Cell]] = []
    for k, row in enumerate(rows):
        is_reference = any(row is reference for reference, _ in references)
        tag = BASELINE if row.kind == "baseline" else REFERENCE if is_reference else None
        cells = [Cell(value=titles[row.row], tag=tag)]
        cells += [Cell(value=row.store_name)] if len(stores) > 1 else []
        for metric in METRICS:
            sd = None if row.test is None else row.test.sd.get(metric)
            cells += [score_cell(row, metric, strong=k in bold[metric]), Cell(value=sd)]
        cells += [Cell(value=row.value("rmse")), Cell(value=row.validated("slope"))]
        cells += [*(cell for metric in METRICS for cell in difference_cells(row, metric)), *_training(row)]
        body.append(cells)
    return Table(
        name=slug(results.prefix, label, protocol),
        title=group_title(results, label, protocol),
        columns=columns,
        rows=body,
        notes=[*_notes(results, label, protocol), *([BOLD] if any(bold.values()) else [])],
    )


def score_cell(row: Row, metric: str, *, strong: bool = False) -> Cell:
    """A test metric with its interval."""
    return Cell(value=row.value(metric), interval=row.interval(metric), strong=strong)


def difference_cells(row: Row | None, metric: str) -> list[Cell]:
    """The difference to the row that this one is compared with, and its corrected p-value."""
    if row is None:
        return [Cell(value=None), Cell(value=None)]
    interval = None if row.against is None else row.against.ci.get(metric)
    return [Cell(value=_difference(row, metric), interval=interval), Cell(value=row.p(metric))]


def _training(row: Row) -> list[Cell]:
    runs = row.runs if row.kind == "head" else None
    return [Cell(value=row.validated("srcc")), Cell(value=runs), Cell(value=row.seconds)]


def _difference(row: Row, metric: str) -> float | None:
    return None if row.against is None else row.against.difference.get(metric)


def _bold(rows: Sequence[Row], references: Sequence[tuple[Row, Sequence[Row]]], metric: str) -> set[int]:
    """The positions of bold values: those of each reference and the rows that were compared with it."""
    found: set[int] = set()
    for reference, others in references:
        places = [k for k, row in enumerate(rows) if any(row is one for one in (reference, *others))]
        found |= {places[k] for k in bold_rows([rows[k] for k in places], reference, metric)}
    return found


def _notes(results: Results, label: str, protocol: str) -> list[str]:
    rows = results.of(label, protocol)
    heads = [row for row in rows if row.kind == "head"]
    failed = sum(row.failed for row in rows)
    parts = [
        f"{_range((row.test.n for row in rows if row.test is not None), 'test image')}.",
        *_seeds(heads),
        f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} not in these means." if failed else "",
        "Small figures: 95% intervals; sd: over seeds; RMSE: of the test images; Slope: of a line through the MOS of "
        "validation images over their predictions, 1 is right; Δ: minus the reference row.",
        *_calibrated(heads),
    ]
    meaning = PROTOCOL_NOTES.get(protocol)
    found = [meaning, leak_note(results, protocol), " ".join(part for part in parts if part), *_cautions(rows)]
    return [note for note in found if note]


def _calibrated(heads: Sequence[Row]) -> list[str]:
    """What a line that was fitted on validation images changes in slope and RMSE."""
    count = sum(row.calibrated > 0 for row in heads)
    if not count:
        return []
    whose = "All heads" if count == len(heads) else f"{count:,} of {plural(len(heads), 'head')}"
    were = "was" if count == 1 < len(heads) else "were"
    return [
        f"{whose} {were} put on a line that was fitted on validation images: their Slope is that of this line, and "
        "their RMSE is after it."
    ]


def _seeds(heads: Sequence[Row]) -> list[str]:
    """What the numbers of heads are means over."""
    shared = [row for row in heads if row.test is not None and row.test.seeds == 1 and row.seeds > 1 and not row.failed]
    means = [row.test.seeds for row in heads if row.test is not None and row not in shared]
    told = [f"Heads are means over {_range(means, 'seed')}."] if max(means, default=0) > 1 else []
    told += ["Heads are of 1 seed."] if means and not told else []
    if shared:
        seeds = _range((row.seeds for row in shared), "seed")
        told.append(f"Each part of the split has a seed of its own ({seeds} in one answer), so there is no sd.")
    return told


def _range(numbers: Iterable[int], noun: str) -> str:
    """`1 seed`, `5 seeds`, or `3 to 5 seeds`."""
    found = sorted(set(numbers))
    return plural(found[0], noun) if len(found) == 1 else f"{found[0]:,} to {plural(found[-1], noun)}"


def _cautions(rows: Sequence[Row]) -> list[str]:
    """What takes weight from the intervals and p-values of a table."""
    few = dict.fromkeys(row.test.caution for row in rows if row.test is not None and row.test.caution)
    found = [f"{text[:1].upper()}{text[1:]}." for text in few]
    untested = [row for row in rows if row.against is not None and row.against.no_p]
    if untested:
        found.append(
            f"{plural(len(untested), 'row')} {'has' if len(untested) == 1 else 'have'} no p-value, as a side of the "
            "comparison has one seed: its interval covers other prompts, not other seeds."
        )
    if any(row.leaves_seeds_out for row in rows):
        found.append(
            "These rows were computed by an older agiqa: their intervals are about other prompts, not other seeds, and "
            "their p-values left seeds out too, so they are not shown. The command that made the results computes the "
            "rows anew."
        )
    noted = [row for row in rows if row.notes]
    return [*found, *(f"{row.row}: {'; '.join(row.notes).removesuffix('.')}." for row in noted)]


def _optimism_table(results: Results, label: str) -> Table:
    """Both protocols side by side, in the order of the grouped one."""
    pairs = [
        (grouped, published)
        for grouped in results.of(label, "grouped")
        for published in results.of(label, "published")
        if (grouped.kin, grouped.store_name, grouped.kind) == (published.kin, published.store_name, published.kind)
    ]
    titles = kin_titles(row for pair in pairs for row in pair)
    stores = {row.store_name for row, _ in pairs}
    columns = [Column(key="row", title="Row", kind="text")]
    columns += [Column(key="store", title="Store", kind="text")] if len(stores) > 1 else []
    for metric in METRICS:
        name = METRIC_NAMES[metric]
        columns += [
            Column(key=f"{metric}_published", title=f"{name} published", interval=True),
            Column(key=f"{metric}_grouped", title=f"{name} grouped", interval=True),
            Column(key=f"{metric}_optimism", title="Δ on the same images", kind="difference", interval=True),
        ]
    body: list[list[Cell]] = []
    for grouped, published in pairs:
        cells = [Cell(value=titles[grouped.kin], tag=BASELINE if grouped.kind == BASELINE else None)]
        cells += [Cell(value=grouped.store_name)] if len(stores) > 1 else []
        for metric in METRICS:
            same = published.beside_grouped
            difference, ends = (None, None) if same is None else (same.difference.get(metric), same.ci.get(metric))
            gap = Cell(value=difference, interval=ends)
            cells += [score_cell(published, metric), score_cell(grouped, metric), gap]
        body.append(cells)
    counts = leak(results, "published")
    leaked = f" There {counts.told()}." if counts else ""
    notes = [
        f"The two test on different images, so their numbers differ for that reason too. Δ is what heads of the "
        f"{protocol_name('published')} have more than those {protocol_name('grouped')}, both on the test images of the "
        f"published split.{leaked}"
    ]
    if all(published.beside_grouped is None for _, published in pairs):
        notes.append("Rows of an older agiqa lack Δ: the command that made these results computes it.")
    title = results.titled(f"{label}, published beside grouped")
    return Table(
        name=slug(results.prefix, label, "optimism"),
        title=title,
        columns=columns,
        rows=body,
        notes=notes,
    )
