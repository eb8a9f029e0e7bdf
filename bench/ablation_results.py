"""The result lines of an ablation: one per run, appended as it ends, read again after a kill."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from agiqa.bench.grids import PlannedRun
from agiqa.errors import DataError
from agiqa.heads.labels import of_each_label, parse_labels
from agiqa.heads.runs import Run
from agiqa.store.files import append_durably, telling_disk_errors, whole_lines

PARTS = ("validation", "test")
Line = dict[str, Any]


class ResultLines:
    """`results.jsonl` of an ablation. A run that was tried again has a second line, which counts."""

    def __init__(self, path: Path, plan: Sequence[PlannedRun], *, stores: Mapping[str, str]) -> None:
        """Read what is there; the rest of a line that a kill tore off is removed.

        `stores` are the ids of the stores by name. Raises DataError for lines that are none, or of another store or
        another grid than `plan`.
        """
        self._path = path
        self.lines: dict[str, Line] = {}
        if not path.exists():
            return
        for number, text in enumerate(_whole_lines(path), 1):
            line = _parse(path, number, text)
            self._check(line, number, {run.name: run for run in plan}, stores)
            self.lines[line["name"]] = line

    def append(self, line: Line) -> None:
        """Add a line, and force it to the disk."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with telling_disk_errors(f"writing {self._path}", "the runs before are kept"):
            append_durably(self._path, text.encode())
        self.lines[line["name"]] = line

    def is_done(self, run: PlannedRun) -> bool:
        """Whether the run has a result."""
        return "error" not in self.lines.get(run.name, {"error": "not run"})

    def _check(self, line: Line, number: int, plan: Mapping[str, PlannedRun], stores: Mapping[str, str]) -> None:
        where = f"{self._path}, line {number}"
        run = plan.get(line["name"])
        if run is None:
            message = f"{where}: the run {line['name']!r} is not in this grid. Choose another OUT, or put it back."
            raise DataError(message)
        if line["store"] != stores[run.store]:
            message = (
                f"{where}: a run on the store {line['store']}, and this is {stores[run.store]}. Choose another OUT."
            )
            raise DataError(message)
        config, now = line["config"], run.config
        different = [name for name in {**config, **now} if config.get(name) != now.get(name)]
        if different:
            name = different[0]
            message = (
                f"{where}: the run {line['name']!r} had {name} {config.get(name)!r}, and this grid has "
                f"{now.get(name)!r}. Choose another OUT, or go on with its grid."
            )
            raise DataError(message)


def result_line(run: PlannedRun, store: str, trained: Run, *, commit: str | None) -> Line:
    """What is told of a run that was trained: its settings, where and how long it ran, and its metrics."""
    metrics, config = trained.metrics, trained.config
    return {
        **_identity(run, store),
        "agiqa": config["agiqa"],
        "commit": commit,
        "torch": config["torch"],
        "device": config["device"],
        "kernels": config["kernels"],
        "seconds": round(sum(metrics["seconds"].values()), 3),
        "chosen_epoch": metrics["chosen_epoch"],
        "chosen_by": metrics["chosen_by"],
        "epochs_run": metrics["epochs_run"],
        "split": metrics["split"],
        "warnings": metrics["warnings"],
        **{part: metrics[part] for part in PARTS},
    }


def error_line(run: PlannedRun, store: str, error: str, *, agiqa: str, commit: str | None) -> Line:
    """What is told of a run that failed."""
    return {**_identity(run, store), "agiqa": agiqa, "commit": commit, "error": error}


def scores_by_label(line: Line, part: str) -> dict[str, Mapping[str, Any]]:
    """The metrics of one part of a result line for each label of its head; none where the part has no items.

    A head of several labels, `quality+correspondence`, has its metrics under their names.
    """
    scores, labels = line.get(part), _labels(line["config"])
    return dict(zip(labels, of_each_label(labels, scores), strict=True)) if scores else {}


def _labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels that a head with these settings learns."""
    return parse_labels(config["label"])


def _identity(run: PlannedRun, store: str) -> Line:
    return {
        "name": run.name,
        "row": run.row,
        "protocol": run.protocol,
        "store_name": run.store,
        "config": run.config,
        "seed": run.train.seed,
        "store": store,
    }


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file, after what follows the last line's end is cut off."""
    content = whole_lines(path)
    if len(content) < path.stat().st_size:
        os.truncate(path, len(content))
    try:
        return content.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        message = f"{path} is no file of result lines ({error}). Choose another OUT, or remove it."
        raise DataError(message) from error


def _parse(path: Path, number: int, text: str) -> Line:
    message = f"{path}, line {number} is no result line of an ablation. Choose another OUT, or remove the line."
    try:
        line: Any = json.loads(text)
    except ValueError as error:
        raise DataError(message) from error
    if not isinstance(line, dict) or not isinstance(line.get("config"), dict) or not {"name", "store"} <= line.keys():
        raise DataError(message)
    return cast("Line", line)
