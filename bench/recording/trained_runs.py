"""Run folders of `agiqa train` as they record themselves: found below folders, read without their parts, and listed."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agiqa.bench.recording.predictions import read_predictions
from agiqa.errors import DataError
from agiqa.heads.evaluation.runs import CONFIG, FORMAT, METRICS, PREDICTIONS, complete_settings
from agiqa.heads.settings.config import default_settings
from agiqa.heads.settings.labels import of_each_label
from agiqa.heads.training.experiment import OF_THE_MACHINE

_APART = ("label", "seed", *OF_THE_MACHINE)
"""Settings that are listed on their own, or do not change results."""
_ID_LETTERS = 12
SORTS = ("validation", "srcc", "plcc", "krcc", "rmse", "date", "name")
"""What runs are sorted by; `validation` is the SRCC on validation items."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """One run folder."""

    path: Path
    name: str
    """As the user's folders lead to it."""
    config: Mapping[str, Any]
    """config.json."""
    metrics: Mapping[str, Any]
    """metrics.json."""
    settings: Mapping[str, Any]
    """All settings of head and training; those that an older run lacks have the value that it was trained with."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of its head."""
        return tuple(str(self.settings["label"]).split("+"))

    @property
    def store_id(self) -> str:
        """The id of the store that it was trained on."""
        return str(self.config["features"]["store"])

    @property
    def store(self) -> str:
        """The folder name of that store; its id where an older run recorded no location."""
        return self.location.rstrip("/").rpartition("/")[2] or self.store_id[:_ID_LETTERS]

    @property
    def location(self) -> str:
        """The path or URL of that store when the run was trained; empty in older runs."""
        return str(self.config.get("location") or "")

    @property
    def model(self) -> str:
        """The model of the features; empty in older runs."""
        return str((self.config.get("origin", {}).get("model") or {}).get("name") or "")

    @property
    def trained_at(self) -> str | None:
        """When the training ended, UTC, ISO 8601; None in older runs."""
        found = self.metrics.get("trained_at")
        return None if found is None else str(found)

    def scores(self, part: str, label: str) -> Mapping[str, Any]:
        """The metrics of `validation` or `test` for one label; empty where the part has no items."""
        recorded = self.metrics.get(part)
        found = dict(zip(self.labels, of_each_label(self.labels, recorded), strict=True)) if recorded else {}
        return found.get(label) or {}


def find_runs(folders: Sequence[Path]) -> tuple[list[TrainedRun], list[str]]:
    """The runs that are these folders or lie below them, once each, and a line for each that cannot be read."""
    found: dict[Path, TrainedRun] = {}
    problems: list[str] = []
    for folder in folders:
        for path in run_folders(folder):
            if path.resolve() in found:
                continue
            try:
                found[path.resolve()] = read_trained_run(path)
            except DataError as error:
                problems.append(str(error))
    return list(found.values()), problems


def is_run(folder: Path) -> bool:
    """Whether the folder has the files of a run."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()


def read_trained_run(path: Path) -> TrainedRun:
    """The run in a folder. Raises DataError where its files are not what a training writes."""
    config, metrics = _read(path / CONFIG), _read(path / METRICS)
    if config.get("format") != FORMAT:
        message = f"{path / CONFIG} is no run of `agiqa train`: its format is {config.get('format')!r}."
        raise DataError(message)
    try:
        settings = {**default_settings(), **complete_settings(config["head"]), **config["train"]}
        run = TrainedRun(path=path, name=str(path), config=config, metrics=metrics, settings=settings)
        _check(run)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        message = f"{path} is not what `agiqa train` writes ({error!r}). Train it anew, or leave it out."
        raise DataError(message) from error
    return run


def _check(run: TrainedRun) -> None:
    """Read what lists and tables read. Raises AttributeError, LookupError, TypeError or ValueError."""
    for label in run.labels:
        for part in ("validation", "test"):
            scores = run.scores(part, label)
            if scores and not {"n", "srcc", "plcc", "krcc", "rmse", "ci"} <= scores.keys():
                message = f"{part} has no {', '.join({'n', 'srcc', 'plcc', 'krcc', 'rmse', 'ci'} - scores.keys())}"
                raise ValueError(message)
    if not isinstance(run.config["features"]["store"], str):
        message = "the id of the store is no text"
        raise TypeError(message)


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        message = f"{path} cannot be read ({error}). Train the run anew, or leave it out."
        raise DataError(message) from error
    return content if isinstance(content, dict) else {}


def run_folders(folder: Path) -> list[Path]:
    """The folder itself, or the run folders below it, by name. Hidden folders hold unfinished trainings."""
    if is_run(folder):
        return [folder]
    found: list[Path] = []
    for place, names, _ in os.walk(folder):
        below = [Path(place) / name for name in sorted(names) if not name.startswith(".")]
        found += [path for path in below if is_run(path)]
        names[:] = [path.name for path in below if not is_run(path)]
    return sorted(found)


def differing(runs: Sequence[TrainedRun], *, apart: Sequence[str] = _APART) -> list[str]:
    """The settings in which runs differ, in the order of the settings, without those in `apart`."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    return [
        name
        for name in names
        if name not in apart and len({json.dumps(run.settings.get(name), default=str) for run in runs}) > 1
    ]


def tested_images(run: TrainedRun) -> frozenset[tuple[str, str]]:
    """Names and prompts of the test images of a run; empty where its predictions cannot be read."""
    try:
        found = read_predictions(run.path / PREDICTIONS, run.labels, run.labels[0])
    except DataError:
        return frozenset()
    return frozenset(zip(found.names, found.prompts, strict=True))


@dataclass(frozen=True, kw_only=True)
class ListedRun:
    """A run and one of its labels, as a line of a list."""

    run: TrainedRun
    label: str

    def sort_key(self, by: str) -> tuple[bool, float | str]:
        """Lines without a value come last."""
        if by == "name":
            return False, self.run.name
        if by == "date":
            return self.run.trained_at is None, self.run.trained_at or ""
        value = self.run.scores("validation", self.label).get("srcc") if by == "validation" else self.value(by)
        return value is None, 0.0 if value is None else value if by == "rmse" else -value

    def value(self, metric: str) -> float | None:
        """A test metric; None where it is undefined."""
        found = self.run.scores("test", self.label).get(metric)
        return None if found is None else float(found)


def listed_runs(runs: Sequence[TrainedRun], *, sort: str, label: str | None = None) -> list[ListedRun]:
    """A line for each run and label, or for one label, sorted by one of SORTS: the best first, the oldest first."""
    lines = [ListedRun(run=run, label=one) for run in runs for one in run.labels if label in (None, one)]
    return sorted(lines, key=lambda line: line.sort_key(sort))
