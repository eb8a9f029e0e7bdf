"""What a transfer leaves behind: a line per trained or applied head, and a row of means and intervals per question.

about.json     the stores, the settings, and what the data sets share
results.jsonl  a line per direction, way, number of training items and seed, appended as it ends
rows.jsonl     a row per direction, way, number and label: means over seeds, intervals by prompt
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agiqa.bench.ablation_results import Line, scores_by_label
from agiqa.bench.predictions import read_predictions
from agiqa.bench.transfer_plan import PlannedLine, TransferPlan, completed
from agiqa.errors import DataError
from agiqa.heads.comparing import SeedScores, holm
from agiqa.heads.labels import parse_labels
from agiqa.heads.metrics import METRICS
from agiqa.store.files import append_durably, read_json, telling_disk_errors, whole_lines, write_text_atomically
from agiqa.store.provenance import differences

ABOUT, RESULTS, ROWS = "about.json", "results.jsonl", "rows.jsonl"
_COMPARED = {"tp": "apply", "warm": "fresh"}
"""Which way another one is compared with, on the same test items and training items."""


class TransferResults:
    """The lines of a transfer in its folder. One that was tried again has a second line, which counts."""

    def __init__(self, out: Path, about: Mapping[str, Any], plan: TransferPlan) -> None:
        """Read what is in `out`, and write `about` there; the rest of a line that a kill tore off is removed.

        Raises DataError for the results of other stores or settings, or lines that are not of `plan`.
        """
        self._path = out / RESULTS
        self.lines: dict[str, Line] = {}
        _check_about(out / ABOUT, about)
        self._read({line.name for line in plan.lines})
        write_text_atomically(out / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")

    def append(self, line: Line) -> None:
        """Add a line, and force it to the disk."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with telling_disk_errors(f"writing {self._path}", "the lines before are kept"):
            append_durably(self._path, text.encode())
        self.lines[line["name"]] = line

    def is_done(self, line: PlannedLine) -> bool:
        """Whether the line is there, and no error."""
        return "error" not in self.lines.get(line.name, {"error": "not run"})

    def _read(self, known: set[str]) -> None:
        if not self._path.exists():
            return
        content = whole_lines(self._path)
        if len(content) < self._path.stat().st_size:
            os.truncate(self._path, len(content))
        for number, text in enumerate(content.split(b"\n")[:-1], 1):
            where = f"{self._path}, line {number}"
            try:
                line: Any = json.loads(text)
                name = line["name"]
            except (ValueError, KeyError, TypeError) as error:
                message = f"{where} is no result line of a transfer. Choose another OUT, or remove the line."
                raise DataError(message) from error
            if name not in known:
                message = f"{where}: {name!r} is not asked for now. Choose another OUT, or ask for it again."
                raise DataError(message)
            self.lines[name] = line


def _check_about(path: Path, about: Mapping[str, Any]) -> None:
    """Raise DataError where `path` tells of other stores or settings."""
    if not path.exists():
        return
    there = read_json(path, remedy="Choose another OUT.")
    if not isinstance(there, dict):
        there = {}
    found = list(differences(_identity(there), _identity(about)))
    if found:
        where = f"{path} is of another transfer, choose another OUT"
        raise DataError.from_problems(where, found)


def _identity(about: Mapping[str, Any]) -> dict[str, Any]:
    stores = {name: store.get("id") for name, store in about.get("stores", {}).items()}
    return {"kind": about.get("kind"), "stores": stores, "settings": completed(about.get("settings", {}))}


def rows_of(plan: TransferPlan, results: TransferResults, out: Path, *, protocol: str, label: str) -> list[Line]:
    """A row for each combination of settings but the seed and each label, in the order of the plan.

    `test` is over seeds as `seeds_score` gives it, null where every seed failed. `against` compares a retrained
    predictor with the applied one, and a warm start with a fresh one; its p-values are adjusted by Holm's procedure
    over the rows of the label. Raises DataError for predictions that cannot be read.
    """
    groups: dict[str, list[PlannedLine]] = {}
    for line in plan.lines:
        groups.setdefault(line.row, []).append(line)
    labels, rows = parse_labels(label), list[Line]()
    for one in labels:
        scores = _Scores(results.lines, out, labels, one)
        made = [_row(group, groups, scores, protocol) for group in groups.values()]
        _adjust(made)
        rows += made
    return rows


class _Scores:
    """The scores of groups of lines of one label, each computed once."""

    def __init__(self, lines: Mapping[str, Line], out: Path, labels: Sequence[str], label: str) -> None:
        self.lines, self.label = lines, label
        self._out, self._labels = out, labels
        self._known: dict[tuple[str, ...], SeedScores] = {}

    def done(self, group: Sequence[PlannedLine]) -> list[Line]:
        found = [self.lines.get(line.name, {"error": "not run"}) for line in group]
        return [line for line in found if "error" not in line]

    def of(self, group: Sequence[PlannedLine]) -> SeedScores | None:
        """None where there is no result."""
        paths = tuple(line["predictions"] for line in self.done(group))
        if not paths:
            return None
        if paths not in self._known:
            read = [read_predictions(self._out / path, self._labels, self.label) for path in paths]
            predicted = np.stack([one.predicted for one in read])
            self._known[paths] = SeedScores.of(predicted, read[0].mos, read[0].prompts)
        return self._known[paths]


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
        "label": scores.label,
        "runs": len(group),
        "seeds": len(done),
        "failed": len(group) - len(done),
        "seconds": round(statistics.fmean(line["seconds"] for line in done), 3) if done else None,
        "validation": _validation(done, scores.label),
        "test": None if scored is None else scored.score(),
        "against": _against(first, scored, groups, scores),
    }


def _against(
    line: PlannedLine, scored: SeedScores | None, groups: Mapping[str, Sequence[PlannedLine]], scores: _Scores
) -> Line | None:
    """The difference to the way that this one is compared with."""
    way = _COMPARED.get(line.way)
    wanted = {**line.settings, "way": way}
    reference = next((group for group in groups.values() if group[0].settings == wanted), None)
    other = None if reference is None else scores.of(reference)
    if reference is None or other is None or scored is None:
        return None
    return {"row": reference[0].row, **scored.against(other)}


def _adjust(rows: Sequence[Line]) -> None:
    """Add the p-values of Holm's procedure, for each metric over all `rows` that have one."""
    compared = [row["against"] for row in rows if row["against"] is not None]
    for against in compared:
        against["p_holm"] = dict.fromkeys(METRICS)
    for metric in METRICS:
        tested = [against for against in compared if against["p"][metric] is not None]
        adjusted = holm([against["p"][metric] for against in tested])
        for against, value in zip(tested, adjusted, strict=True):
            against["p_holm"][metric] = value


def _validation(lines: Sequence[Line], label: str) -> dict[str, list[float | None]] | None:
    """Mean and standard deviation over seeds of the validation metrics; None without validation items."""
    found = [one for line in lines if (one := scores_by_label(line, "validation").get(label)) is not None]
    told: dict[str, list[float | None]] = {}
    for metric in ("srcc", "plcc"):
        values = [one[metric] for one in found if one[metric] is not None]
        if values:
            told[metric] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
    return told or None
