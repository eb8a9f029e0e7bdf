"""Tables of an ablation's rows: scores with paired differences, the published split's optimism, the epoch's bias."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from agiqa.bench.recording.records import Row
from agiqa.bench.report.naming import (
    GENERATORS,
    METRIC_NAMES,
    capitalized,
    counts,
    identity_titles,
    on_store,
    plural,
    protocol_name,
    row_titles,
)
from agiqa.bench.report.provenance import origin_note
from agiqa.bench.report.reading import CONFIDENT, METRICS, Results
from agiqa.bench.report.tables import (
    Cell,
    Column,
    Record,
    Table,
    difference_columns,
    make_table,
    score_column,
    sd_column,
)

BASELINE, REFERENCE = "baseline", "reference"
_GENERATORS_NOTE = (
    "Each image is scored by a {head} that saw no image of its generator. The images of all generators are then ranked "
    "together, so differences between generators count. The intervals cover other prompts, not other generators: they "
    "do not say what a further generator would change."
)
_READING_NOTE = (
    "Small figures: 95% intervals. Δ: this row minus the reference row. sd: over seeds. Slope: of the line that "
    "predicts the MOS of validation images from their predictions, ideally 1."
)
_BOLD_NOTE = (
    f"Bold: the reference row, and each row that does not differ significantly from it (corrected p of {CONFIDENT} or "
    "more) and whose value is not below the interval of the reference row. If any rows are significantly better than "
    "the reference, only those are bold. If no row differs significantly, nothing is bold. Only rows that were tested "
    "on the same images are compared."
)
_BIAS_NOTE = (
    "Best epoch on test: the epoch is chosen by the test score, as in the published code. Honest: it is chosen by "
    "validation items. Bias: best epoch on test minus honest (with `refit`, the second training contributes to it). "
    "The numbers are means over runs, each fold counted by itself, so they differ from those of the other tables."
)


@dataclass(frozen=True, kw_only=True, order=True)
class Leak:
    """The number of test items whose prompt also occurs in training."""

    items: int
    """With the same or nearly the same prompt."""
    tested: int
    """All test items."""
    verbatim: int | None = field(compare=False)
    """With exactly the same prompt; None in older folders."""

    def sentence(self) -> str:
        """`15 of 20 test images have a prompt that also occurs in training (12 of them word for word)`."""
        text = f"{self.items:,} of {self.tested:,} test images have a prompt that also occurs in training"
        return text if self.verbatim in (None, self.items) else f"{text} ({self.verbatim:,} of them word for word)"


def leak(results: Results, protocol: str) -> Leak | None:
    """The leak of the row with the largest one, summed over its folds or held-out generators; None if unknown."""
    by_row: dict[tuple[str, str], dict[tuple[str, str], Leak]] = {}
    for line in results.done:
        found = _leak_of(line.split) if line.protocol == protocol else None
        if found is not None:
            part = str(line.config.get("fold")), str(line.config.get("held_out"))
            by_row.setdefault((line.row_name, line.store_name), {})[part] = found
    return max((_sum(list(parts.values())) for parts in by_row.values()), default=None)


def _sum(parts: Sequence[Leak]) -> Leak:
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
    count, verbatim = (leaked.get(f"test_items_with_a_training_prompt{end}") for end in ("", "_verbatim"))
    if count is None:
        return None
    return Leak(items=int(count), tested=int(split["test"]), verbatim=None if verbatim is None else int(verbatim))


def main_tables(results: Results) -> list[Table]:
    """The table of each label and protocol."""
    return [_main_table(results, label, protocol) for label, protocol in results.groups()]


def _main_table(results: Results, label: str, protocol: str) -> Table:
    rows = results.of(label, protocol)
    references = results.references(label, protocol)
    titles = row_titles(rows)
    bold = {
        metric: {id(row) for reference, others in references for row in bold_rows(reference, others, metric)}
        for metric in METRICS
    }

    def name(row: Row) -> Cell:
        is_reference = any(row is reference for reference, _ in references)
        return Cell(titles[row.row], tag=BASELINE if row.kind == "baseline" else REFERENCE if is_reference else None)

    columns: list[Column[Row]] = [
        Column("row", "Row", name, "text"),
        *_store_column(rows, _itself),
        score_column("srcc", _itself, bold=bold["srcc"]),
        sd_column("srcc", _itself),
        score_column("plcc", _itself, bold=bold["plcc"]),
        sd_column("plcc", _itself),
        Column(
            "plcc_logistic",
            "PLCC (logistic)",
            lambda row: results.mean_of_runs(row, "plcc_logistic4"),
            switch="logistic",
        ),
        score_column("krcc", _itself, switch="krcc"),
        Column("rmse", METRIC_NAMES["rmse"], lambda row: row.value("rmse"), switch="rmse"),
        Column("validation_slope", "Slope", lambda row: row.validated("slope"), switch="slope"),
        *(column for metric in METRICS for column in difference_columns(metric, _itself)),
        Column("validation_srcc", "Validation SRCC", lambda row: row.validated("srcc")),
        Column("runs", "Runs", lambda row: row.runs if row.is_trained else None, "count", switch="runs"),
        Column("seconds", "Seconds a run", lambda row: row.seconds, "seconds", switch="seconds"),
    ]
    notes = [*_notes(results, label, protocol), *([_BOLD_NOTE] if any(bold.values()) else [])]
    notes += [origin_note(results, rows)]
    title = f"{label}, {protocol_name(protocol)}"
    return make_table(results, [label, protocol], title, columns, rows, notes)


def _itself(row: Row) -> Row:
    return row


def _store_column(rows: Sequence[Row], row_of: Callable[[Record], Row]) -> list[Column[Record]]:
    """The store of each row, where there are several."""
    several = len({row.store_name for row in rows}) > 1
    return [Column("store", "Store", lambda record: row_of(record).store_name, "text")] if several else []


def bold_rows(reference: Row, others: Sequence[Row], metric: str) -> list[Row]:
    """The rows in bold among a reference and those compared with it, by the rule of the note under the table.

    A row whose scores vary much may differ from the reference by far and not significantly: it is not bold.
    """
    tested = [(row, p) for row in others if (p := row.p(metric)) is not None]
    apart = [row for row, p in tested if p < CONFIDENT]
    better = [row for row in apart if (row.difference(metric) or 0.0) > 0]
    interval = reference.interval(metric)
    least = float("inf") if interval is None else interval[0]
    alike = [row for row, p in tested if p >= CONFIDENT and (row.value(metric) or 0.0) >= least]
    return (better or [reference, *alike]) if apart else []


def _notes(results: Results, label: str, protocol: str) -> list[str]:
    rows = results.of(label, protocol)
    trained, noun = [row for row in rows if row.is_trained], results.trained_noun
    failed = sum(row.failed for row in rows)
    parts = [
        f"{counts((row.test.n for row in rows if row.test is not None), 'test image')}.",
        *_seeds(trained, noun),
        f"{plural(failed, 'run')} failed and {'is' if failed == 1 else 'are'} not in these means." if failed else "",
        _READING_NOTE,
        *_calibrated(trained, noun),
    ]
    meaning = _GENERATORS_NOTE.format(head=noun) if protocol == GENERATORS else None
    found = [meaning, _leak_note(results, protocol), " ".join(part for part in parts if part), *_cautions(rows)]
    return [note for note in found if note]


def _leak_note(results: Results, protocol: str) -> str | None:
    found = leak(results, protocol)
    if found is None:
        return None
    if not found.items:
        return "No prompt of a test image occurs in training."
    images = "images of a new generator" if protocol == GENERATORS else "new images"
    return f"This protocol leaks prompts: {found.sentence()}. Its numbers describe {images} for known prompts."


def _calibrated(trained: Sequence[Row], noun: str) -> list[str]:
    """How calibration changes Slope and RMSE."""
    count = sum(row.calibrated > 0 for row in trained)
    if not count:
        return []
    which = f"All {noun}s" if count == len(trained) else f"{count:,} of {plural(len(trained), noun)}"
    were = "was" if count == 1 < len(trained) else "were"
    return [
        f"{which} {were} calibrated by a line that was fitted on validation images: their Slope is that of this line, "
        "and their RMSE is that of the calibrated predictions."
    ]


def _seeds(trained: Sequence[Row], noun: str) -> list[str]:
    """The seeds over which the numbers of heads or networks are means."""
    tested = [(row, row.test.seeds) for row in trained if row.test is not None]
    shared = [row.seeds for row, seeds in tested if seeds == 1 < row.seeds and not row.failed]
    means = [seeds for row, seeds in tested if not (seeds == 1 < row.seeds and not row.failed)]
    found = [f"{capitalized(noun)}s are means over {counts(means, 'seed')}."] if max(means, default=0) > 1 else []
    found += [f"{capitalized(noun)}s are of 1 seed."] if means and not found else []
    if shared:
        seeds = counts(shared, "seed")
        found.append(f"Each part of the split has a seed of its own ({seeds} in all), so there is no sd.")
    return found


def _cautions(rows: Sequence[Row]) -> list[str]:
    """Restrictions on the intervals, p-values and scores of a table."""
    few = dict.fromkeys(row.test.caution for row in rows if row.test is not None and row.test.caution)
    found = [f"{capitalized(text)}." for text in few]
    untested = [row for row in rows if row.against is not None and row.against.no_p]
    if untested:
        found.append(
            f"{plural(len(untested), 'row')} {'has' if len(untested) == 1 else 'have'} no p-value, because one of the "
            "compared rows has one seed: the interval covers other prompts, not other seeds."
        )
    if any(row.ignores_seeds for row in rows):
        found.append(
            "These rows were computed by an older agiqa. Their intervals cover other prompts, but not other seeds. "
            "Their p-values ignore seeds too, so they are not shown. The command that made the results computes the "
            "rows anew."
        )
    return [*found, *_notes_of_rows(rows)]


def _notes_of_rows(rows: Sequence[Row]) -> list[str]:
    """The notes on the scores of baselines; those that several rows share are said once."""
    by_note: dict[str, list[str]] = {}
    for row in rows:
        if row.notes:
            by_note.setdefault("; ".join(row.notes).removesuffix("."), []).append(row.row)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {note}."
        for note, names in by_note.items()
    ]


def optimism_tables(results: Results) -> list[Table]:
    """The published split beside the grouped one, for each label that has both."""
    groups = results.groups()
    labels = [label for label, protocol in groups if protocol == "published" and (label, "grouped") in groups]
    return [_optimism_table(results, label) for label in labels]


Pair = tuple[Row, Row]
"""The same row under the grouped and the published protocol."""


def _optimism_table(results: Results, label: str) -> Table:
    """Both protocols side by side, in the order of the grouped one."""
    pairs: list[Pair] = [
        (grouped, published)
        for grouped in results.of(label, "grouped")
        for published in results.of(label, "published")
        if (grouped.identity, grouped.store_name, grouped.kind)
        == (published.identity, published.store_name, published.kind)
    ]
    titles = identity_titles(row for pair in pairs for row in pair)

    def name(pair: Pair) -> Cell:
        return Cell(titles[pair[0].identity], tag=BASELINE if pair[0].kind == "baseline" else None)

    columns: list[Column[Pair]] = [
        Column("row", "Row", name, "text"),
        *_store_column([grouped for grouped, _ in pairs], _grouped),
        *(column for metric in METRICS for column in _optimism_columns(metric)),
    ]
    leaked = leak(results, "published")
    notes = [
        "The two protocols test on different images, which is one reason why their numbers differ. Δ compares them on "
        f"the test images of the published split: {results.trained_noun}s of the published split minus "
        f"{results.trained_noun}s grouped by prompt." + (f" There {leaked.sentence()}." if leaked else "")
    ]
    if all(published.beside_grouped is None for _, published in pairs):
        notes.append("Rows of an older agiqa lack Δ: the command that made these results computes it.")
    return make_table(results, [label, "optimism"], f"{label}, published beside grouped", columns, pairs, notes)


def _grouped(pair: Pair) -> Row:
    return pair[0]


def _optimism_columns(metric: str) -> list[Column[Pair]]:
    def gap(pair: Pair) -> Cell:
        same = pair[1].beside_grouped
        return Cell(None) if same is None else Cell(same.difference.get(metric), same.ci.get(metric))

    return [
        score_column(metric, lambda pair: pair[1], key="{metric}_published", title="{metric} published"),
        score_column(metric, _grouped, key="{metric}_grouped", title="{metric} grouped"),
        Column(f"{metric}_optimism", "Δ on the same images", gap, "difference", interval=True),
    ]


@dataclass(frozen=True)
class _Bias:
    """Of the runs of a row that recorded both, the score of the best epoch on test, and its excess."""

    row: Row
    runs: Sequence[tuple[Mapping[str, float], Mapping[str, float]]]

    def mean(self, which: int, metric: str) -> float:
        return fmean(run[which][metric] for run in self.runs)


def bias_table(results: Results) -> Table | None:
    """The epoch chosen by the test score beside the honest one, means over runs; None where no run recorded it."""
    found = [_Bias(row, runs) for row in results.rows if (runs := _biases(results, row))]
    if not found:
        return None
    titles = row_titles(one.row for one in found)
    columns: list[Column[_Bias]] = [
        Column("row", "Row", lambda one: on_store(titles[one.row.row], one.row.store_name), "text"),
        Column("protocol", "Protocol", lambda one: protocol_name(one.row.protocol), "text"),
        Column("label", "Label", lambda one: one.row.label, "text"),
        *(column for metric in METRICS for column in _bias_columns(metric)),
        Column("runs", "Runs", lambda one: len(one.runs), "count"),
    ]
    title = "best epoch on test beside the honest number"
    return make_table(results, ["bias"], title, columns, found, [_BIAS_NOTE])


def _bias_columns(metric: str) -> list[Column[_Bias]]:
    name = METRIC_NAMES[metric]
    return [
        Column(f"{metric}_honest", f"{name} honest", lambda one: one.mean(0, metric) - one.mean(1, metric)),
        Column(f"{metric}_best_epoch", f"{name} best epoch on test", lambda one: one.mean(0, metric)),
        Column(f"{metric}_bias", "bias", lambda one: one.mean(1, metric), "difference"),
    ]


def _biases(results: Results, row: Row) -> list[tuple[dict[str, float], dict[str, float]]]:
    """The best score and its bias by metric, for every run of the row that recorded both."""
    found: list[tuple[dict[str, float], dict[str, float]]] = []
    for line in results.runs_of(row):
        entry: Any = line.paper_compatible
        if entry is None:
            entry = _read_json(results.run_folder(line) / "metrics.json").get("paper_compatible")
        entry = entry.get(row.label) if isinstance(entry, dict) and len(line.labels) > 1 else entry
        if isinstance(entry, dict) and isinstance(entry.get("bias"), dict):
            best, bias = _numbers(entry), _numbers(entry["bias"])
            found += [(best, bias)] if len(best) == len(bias) == len(METRICS) else []
    return found


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing or not readable."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _numbers(entry: Mapping[str, object]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {metric: float(value) for metric in METRICS if isinstance(value := entry.get(metric), int | float)}
