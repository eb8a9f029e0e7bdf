"""The results of a transfer: a line per trained or applied head, rows of means and intervals, and tables of these.

about.json     the stores, the settings, and what the data sets share
results.jsonl  a line per direction, way, number of training items and seed, appended as it ends
rows.jsonl     a row per direction, way, number and label: means over seeds, intervals by prompt
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agiqa.bench.recording.predictions import read_predictions
from agiqa.bench.recording.result_folders import ABOUT, RESULTS, Line, LineFile, store_text, write_about
from agiqa.bench.recording.rows import Row, adjust_by_holm, score_text, scores_over_seeds, summary
from agiqa.bench.recording.tables import TextTable
from agiqa.bench.transfer.plan import PlannedLine, TransferPlan, completed
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.settings.labels import parse_labels
from agiqa.store.disk.files import read_json
from agiqa.store.format.metadata import differences

_COMPARED = {"tp": "apply", "warm": "fresh"}
"""The way that another way is compared with, on the same test items and training items."""


def open_results(out: Path, about: Mapping[str, Any], plan: TransferPlan) -> LineFile:
    """The lines of `plan` in results.jsonl; writes `about` to about.json.

    Raises DataError as `LineFile`, and where `out` holds results of other stores or settings.
    """
    planned = [line.name for line in plan.lines]
    _check_about(out / ABOUT, about)
    kept = "the lines before are kept"
    results = LineFile(out / RESULTS, kind="a transfer", keys={}, kept=kept, planned=set(planned))
    write_about(out, {**about, "runs": planned})
    return results


def _check_about(path: Path, about: Mapping[str, Any]) -> None:
    """Raise DataError where `path` names other stores or settings."""
    if not path.exists():
        return
    there = read_json(path, remedy="Choose another OUT.")
    if not isinstance(there, dict):
        there = {}
    found = [*_other_stores(there, about), *differences(_identity(there), _identity(about))]
    if found:
        where = f"{path} is of another transfer, choose another OUT"
        raise DataError.from_problems(where, found)


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    return {"kind": about.get("kind"), "settings": completed(about.get("settings", {}))}


def _other_stores(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """A line for each name that stands for different stores."""
    before, now = there.get("stores", {}), asked["stores"]

    def text(store: Mapping[str, Any] | None) -> str:
        return store_text(str(store.get("id")), store.get("path")) if store else "none"

    return [
        f"stores.{name}: stored {text(before.get(name))}, asked {text(now.get(name))}"
        for name in {**before, **now}
        if before.get(name, {}).get("id") != now.get(name, {}).get("id")
    ]


def table_rows(plan: TransferPlan, lines: Mapping[str, Line], out: Path, *, protocol: str, label: str) -> list[Line]:
    """A row for each label and combination of settings without the seed, in the order of the plan.

    `lines` are the result lines by name. `test` is over seeds as in `seeds_score`, null where every seed failed.
    `against` compares a retrained predictor with the applied one, and a warm start with a fresh one; Holm's procedure
    adjusts its p-values over the rows of the label. Raises DataError for predictions that cannot be read.
    """
    groups: dict[str, list[PlannedLine]] = {}
    for line in plan.lines:
        groups.setdefault(line.row, []).append(line)
    labels, rows = parse_labels(label), list[Line]()
    for one in labels:
        scores = _Scores(lines, out, labels, one)
        made = [_row(group, groups, scores, protocol) for group in groups.values()]
        adjust_by_holm(made)
        rows += made
    return rows


class _Scores:
    """The scores of groups of lines of one label, each computed once."""

    def __init__(self, lines: Mapping[str, Line], out: Path, labels: Sequence[str], label: str) -> None:
        self.lines, self.label = lines, label
        self._out, self._labels = out, labels
        self._known: dict[tuple[str, ...], SeedScores] = {}

    def done(self, group: Sequence[PlannedLine]) -> list[Line]:
        """The lines without an error."""
        found = [self.lines.get(line.name, {"error": "not run"}) for line in group]
        return [line for line in found if "error" not in line]

    def of(self, group: Sequence[PlannedLine]) -> SeedScores | None:
        """The scores of one row; None without a result."""
        paths = {line["name"]: line["predictions"] for line in self.done(group)}
        if not paths:
            return None
        key = tuple(paths.values())
        if key not in self._known:
            tables = {
                name: read_predictions(self._out / path, self._labels, self.label) for name, path in paths.items()
            }
            self._known[key] = scores_over_seeds(tables)
        return self._known[key]


def _row(
    group: Sequence[PlannedLine], groups: Mapping[str, Sequence[PlannedLine]], scores: _Scores, protocol: str
) -> Line:
    first, done, scored = group[0], scores.done(group), scores.of(group)
    return {
        "kind": "head",
        "row": first.row,
        "settings": first.settings,
        "store_name": first.target,
        "protocol": protocol,
        **summary(scores.label, len(group), done, scored, _against(first, scored, groups, scores)),
    }


def _against(
    line: PlannedLine, scored: SeedScores | None, groups: Mapping[str, Sequence[PlannedLine]], scores: _Scores
) -> Line | None:
    """The difference to the row that this one is compared with (`_COMPARED`)."""
    way = _COMPARED.get(line.way)
    wanted = {**line.settings, "way": way}
    reference = next((group for group in groups.values() if group[0].settings == wanted), None)
    other = None if reference is None else scores.of(reference)
    if reference is None or other is None or scored is None:
        return None
    return {"row": reference[0].row, **scored.against(other)}


def transfer_parts(rows: Sequence[Row]) -> list[str | TextTable]:
    """Both tables, each with a label column where there are several."""
    return [
        "**Across data sets**: the head of one applied to the other, and retrained on it (w/ TP); means over "
        "seeds with intervals by prompt.",
        across(rows),
        "**Few-shot**: trained on so many items of the other data set, from random weights (fresh) or from the "
        "head of the first (warm); the last epoch is kept, and no line is fitted (`calibrate`).",
        few_shot(rows),
    ]


def across(rows: Sequence[Row]) -> TextTable:
    """As in Table VI of the paper: SRCC and PLCC per direction, applied and retrained; then each data set itself."""
    head = ["from -> to", *_label_head(rows), "SRCC", "PLCC", "w/ TP SRCC", "w/ TP PLCC"]
    body = [
        [_direction(row), *_label_cell(rows, row), *_cells(row), *_cells(_other(rows, row, "tp"))]
        for row in _of_way(rows, "apply")
    ]
    body += [[_direction(row), *_label_cell(rows, row), *_cells(row), "", ""] for row in _of_way(rows, "within")]
    return TextTable(head=head, rows=body)


def few_shot(rows: Sequence[Row]) -> TextTable:
    """SRCC and PLCC per direction and number of training items."""
    columns = [f"{way} {metric.upper()}" for way in ("fresh", "warm") for metric in ("srcc", "plcc")]
    head = ["from -> to", *_label_head(rows), "items", *columns]
    body = [
        [
            _direction(row),
            *_label_cell(rows, row),
            str(row["settings"]["training_items"]),
            *_cells(row),
            *_cells(_other(rows, row, "warm")),
        ]
        for row in _of_way(rows, "fresh")
    ]
    return TextTable(head=head, rows=body)


def _of_way(rows: Sequence[Row], way: str) -> list[Row]:
    return [row for row in rows if row["settings"]["way"] == way]


def _other(rows: Sequence[Row], row: Row, way: str) -> Row:
    """The row of another way, all else alike."""
    wanted = {**row["settings"], "way": way}
    return next(one for one in rows if one["settings"] == wanted and one["label"] == row["label"])


def _direction(row: Row) -> str:
    return f"{row['settings']['from']} -> {row['settings']['to']}"


def _label_head(rows: Sequence[Row]) -> list[str]:
    return ["label"] if len({row["label"] for row in rows}) > 1 else []


def _label_cell(rows: Sequence[Row], row: Row) -> list[str]:
    return [row["label"]] if _label_head(rows) else []


def _cells(row: Row) -> list[str]:
    """SRCC and PLCC with their intervals."""
    return [score_text(row["test"], metric, undefined="-") for metric in ("srcc", "plcc")]
