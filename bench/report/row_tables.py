"""Tables of an ablation: rows with their intervals and paired differences, and how optimistic published splits are."""

from collections.abc import Iterable, Sequence

from agiqa.bench.report.naming import METRIC_NAMES, group_title, plural, protocol_name, row_titles, slug
from agiqa.bench.report.reading import CONFIDENT, METRICS, Results, Row
from agiqa.bench.report.tables import Cell, Column, Table

BASELINE, REFERENCE = "baseline", "reference"


def main_tables(results: Results, *, several: bool) -> list[Table]:
    """The table of each label and protocol."""
    return [_main_table(results, label, protocol, several=several) for label, protocol in results.groups()]


def optimism_tables(results: Results, *, several: bool) -> list[Table]:
    """Published minus grouped of the same row, for each label of which both were run."""
    groups = results.groups()
    labels = [label for label, protocol in groups if protocol == "published" and (label, "grouped") in groups]
    return [_optimism_table(results, label, several=several) for label in labels]


def leak(results: Results, protocol: str) -> tuple[int, int] | None:
    """Test items with a prompt of training, and all test items, of the run with the most; None if unknown."""
    found = [line.split for line in results.done if line.protocol == protocol and line.split]
    counts = [
        (int(split["leak"]["test_items_with_a_training_prompt"]), int(split["test"]))
        for split in found
        if isinstance(split.get("leak"), dict)
        and "test_items_with_a_training_prompt" in split["leak"]
        and "test" in split
    ]
    return max(counts, default=None)


def leak_note(results: Results, protocol: str) -> str | None:
    """What a reader must know of the prompts of a protocol."""
    counts = leak(results, protocol)
    if counts is None:
        return None
    leaked, tested = counts
    if not leaked:
        return "No prompt of a test image occurs in training."
    return (
        f"This protocol leaks prompts: {leaked:,} of {tested:,} test images have a prompt that also occurs in "
        "training. "
        "Its numbers tell of new images for known prompts."
    )


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


def _main_table(results: Results, label: str, protocol: str, *, several: bool) -> Table:
    rows = results.of(label, protocol)
    stores = list(dict.fromkeys(row.store_name for row in rows))
    references = {store: results.reference(label, protocol, store) for store in stores}
    bold = {metric: _bold(rows, references, metric) for metric in METRICS}
    titles = row_titles(rows)
    columns = [Column(key="row", title="Row", kind="text")]
    columns += [Column(key="store", title="Store", kind="text")] if len(stores) > 1 else []
    for metric in METRICS:
        columns += [Column(key=metric, title=METRIC_NAMES[metric], interval=True)]
        columns += [Column(key=f"{metric}_sd", title="sd")]
    columns += [
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
        tag = BASELINE if row.kind == "baseline" else REFERENCE if row is references[row.store_name] else None
        cells = [Cell(value=titles[row.row], tag=tag)]
        cells += [Cell(value=row.store_name)] if len(stores) > 1 else []
        for metric in METRICS:
            sd = None if row.test is None else row.test.sd.get(metric)
            cells += [score_cell(row, metric, strong=k in bold[metric]), Cell(value=sd)]
        cells += [*(cell for metric in METRICS for cell in difference_cells(row, metric)), *_training(row)]
        body.append(cells)
    return Table(
        name=slug(results.name if several else "", label, protocol),
        title=group_title(results, label, protocol, several=several),
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
    chosen = (row.validation or {}).get("srcc")
    runs = row.runs if row.kind == "head" else None
    return [Cell(value=None if chosen is None else chosen[0]), Cell(value=runs), Cell(value=row.seconds)]


def _difference(row: Row, metric: str) -> float | None:
    return None if row.against is None else row.against.difference.get(metric)


def _bold(rows: Sequence[Row], references: dict[str, Row | None], metric: str) -> set[int]:
    """The positions of bold values; rows of several stores were compared store by store."""
    found: set[int] = set()
    for store, reference in references.items():
        places = [k for k, row in enumerate(rows) if row.store_name == store]
        found |= {places[k] for k in bold_rows([rows[k] for k in places], reference, metric)}
    return found


def _notes(results: Results, label: str, protocol: str) -> list[str]:
    rows = results.of(label, protocol)
    heads = [row for row in rows if row.kind == "head"]
    failed = sum(row.failed for row in rows)
    parts = [
        f"{_range(row.test.n for row in rows if row.test is not None)} test images.",
        f"Heads are means over {_range(row.seeds for row in heads)} seeds." if heads else "",
        f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} not in these means." if failed else "",
        "Small figures: 95% intervals; sd: over seeds; Δ: minus the reference row.",
    ]
    found = [leak_note(results, protocol), " ".join(part for part in parts if part), _smallest_p(rows)]
    return [note for note in found if note]


def _range(numbers: Iterable[int]) -> str:
    """`5`, or `3 to 5`."""
    found = sorted(set(numbers))
    return " to ".join(f"{number:,}" for number in dict.fromkeys((found[0], found[-1])))


def _smallest_p(rows: Sequence[Row]) -> str | None:
    """A warning where so few resamples were drawn that the correction lets no difference count."""
    tested = [(row.store_name, row.against.resamples) for row in rows if row.against and row.p("srcc") is not None]
    for store in dict.fromkeys(store for store, _ in tested):
        drawn = [resamples for one, resamples in tested if one == store]
        smallest = 2.0 * len(drawn) / (min(drawn) + 1)
        if smallest >= CONFIDENT:
            return (
                f"With {min(drawn):,} resamples and {len(drawn)} comparisons no corrected p can be below "
                f"{min(1.0, smallest):.3f}: this table cannot tell any row from the reference, however different. "
                "It takes "
                "more resamples."
            )
    return None


def _optimism_table(results: Results, label: str, *, several: bool) -> Table:
    """Both protocols side by side, in the order of the grouped one."""
    pairs = [
        (grouped, published)
        for grouped in results.of(label, "grouped")
        for published in results.of(label, "published")
        if (grouped.row, grouped.store_name, grouped.kind) == (published.row, published.store_name, published.kind)
    ]
    titles = row_titles(row for row, _ in pairs)
    stores = {row.store_name for row, _ in pairs}
    columns = [Column(key="row", title="Row", kind="text")]
    columns += [Column(key="store", title="Store", kind="text")] if len(stores) > 1 else []
    for metric in METRICS:
        name = METRIC_NAMES[metric]
        columns += [
            Column(key=f"{metric}_published", title=f"{name} published", interval=True),
            Column(key=f"{metric}_grouped", title=f"{name} grouped", interval=True),
            Column(key=f"{metric}_optimism", title="optimism", kind="difference"),
        ]
    body: list[list[Cell]] = []
    for grouped, published in pairs:
        cells = [Cell(value=titles[grouped.row], tag=BASELINE if grouped.kind == BASELINE else None)]
        cells += [Cell(value=grouped.store_name)] if len(stores) > 1 else []
        for metric in METRICS:
            values = published.value(metric), grouped.value(metric)
            gap = None if values[0] is None or values[1] is None else values[0] - values[1]
            cells += [score_cell(published, metric), score_cell(grouped, metric), Cell(value=gap)]
        body.append(cells)
    counts = leak(results, "published")
    leaked = (
        f" {counts[0]:,} of {counts[1]:,} test images there have a prompt that occurs in training." if counts else ""
    )
    note = (
        f"Optimism is the {protocol_name('published')} minus the {protocol_name('grouped')} protocol.{leaked} The "
        "two test on "
        "different images, so a small difference of either sign is no more than chance."
    )
    title = f"{results.name + ': ' if several else ''}{label}, published beside grouped"
    return Table(
        name=slug(results.name if several else "", label, "optimism"),
        title=title,
        columns=columns,
        rows=body,
        notes=[note],
    )
