"""What a transfer leaves behind: a line per trained or applied head, and a row of means and intervals per question.

about.json     the stores, the settings, and what the data sets share
results.jsonl  a line per direction, way, number of training items and seed, appended as it ends
rows.jsonl     a row per direction, way, number and label: means over seeds, intervals by prompt
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from agiqa.bench.ablation.rows import adjust_by_holm, scores_over_seeds, summary
from agiqa.bench.recording.predictions import read_predictions
from agiqa.bench.recording.result_folders import ABOUT, RESULTS, write_about
from agiqa.bench.recording.result_lines import Line, LineFile
from agiqa.bench.recording.store_facts import spelled
from agiqa.bench.transfer.plan import PlannedLine, TransferPlan, completed
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.settings.labels import parse_labels
from agiqa.store.disk.files import read_json
from agiqa.store.format.metadata import differences

_COMPARED = {"tp": "apply", "warm": "fresh"}
"""Which way another one is compared with, on the same test items and training items."""


class TransferResults(LineFile):
    """The lines of a transfer in its folder."""

    def __init__(self, out: Path, about: Mapping[str, Any], plan: TransferPlan) -> None:
        """Read what is in `out`, and write `about` there; the rest of a line that a kill tore off is removed.

        Lines that are not of `plan` are ignored. Raises DataError for the results of other stores or settings.
        """
        planned = [line.name for line in plan.lines]
        _check_about(out / ABOUT, about)
        kept = "the lines before are kept"
        super().__init__(out / RESULTS, kind="a transfer", keys={}, kept=kept, planned=set(planned))
        write_about(out, {**about, "runs": planned})


def _check_about(path: Path, about: Mapping[str, Any]) -> None:
    """Raise DataError where `path` tells of other stores or settings."""
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
    """A line for each name that does not stand for one store in both."""
    before, now = there.get("stores", {}), asked["stores"]
    ids = {name: tuple(stores.get(name, {}).get("id") for stores in (before, now)) for name in {**before, **now}}
    return [
        f"stores.{name}: stored {_spelled(before.get(name))}, asked {_spelled(now.get(name))}"
        for name, (old, new) in ids.items()
        if old != new
    ]


def _spelled(store: Mapping[str, Any] | None) -> str:
    return "none" if not store else spelled(str(store.get("id")), store.get("path"))


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
        found = [self.lines.get(line.name, {"error": "not run"}) for line in group]
        return [line for line in found if "error" not in line]

    def of(self, group: Sequence[PlannedLine]) -> SeedScores | None:
        """None where there is no result."""
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
    """The difference to the way that this one is compared with."""
    way = _COMPARED.get(line.way)
    wanted = {**line.settings, "way": way}
    reference = next((group for group in groups.values() if group[0].settings == wanted), None)
    other = None if reference is None else scores.of(reference)
    if reference is None or other is None or scored is None:
        return None
    return {"row": reference[0].row, **scored.against(other)}
