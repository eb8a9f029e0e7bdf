"""The result folders of `agiqa ablate`, `transfer` and `baseline`, and runs of `agiqa train`, as a report reads them.

A damaged line is skipped and reported as a problem. A folder without any result is refused.
"""

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from pydantic import ValidationError

from agiqa.bench.ablation.single_runs import compare_runs
from agiqa.bench.recording.records import About, AboutStore, Record, Row, RunLine
from agiqa.bench.recording.result_folders import ABOUT, RESULTS, ROWS, RUNS
from agiqa.bench.recording.trained_runs import TrainedRun, find_runs, is_run, run_folders
from agiqa.errors import DataError
from agiqa.store.disk.files import whole_lines

METRICS = ("srcc", "plcc")
CONFIDENT = 0.05
"""The level of significance of corrected p-values."""


@dataclass(frozen=True, kw_only=True)
class Results:
    """One folder of results."""

    folder: Path
    name: str
    """Its name in the report, which no other folder has."""
    about: About
    rows: tuple[Row, ...]
    """The rows that have a number."""
    left_out: tuple[Row, ...]
    """The rows without a number."""
    lines: tuple[RunLine, ...]
    """The last line of each run."""
    problems: tuple[str, ...]
    """What could not be read."""
    prefix: str = ""
    """The folder's name before its files, titles and sentences; empty in a report on one folder."""

    def anchor(self, *parts: str) -> str:
        """A name for files and anchors: the prefix and `parts` in lower-case letters, digits and hyphens."""
        words = [re.sub(r"[^a-z0-9]+", "-", part.casefold()).strip("-") for part in (self.prefix, *parts)]
        return "-".join(word for word in words if word) or "table"

    def prefixed(self, text: str) -> str:
        """The text after the prefix, if there is one."""
        return f"{self.prefix}: {text}" if self.prefix else text

    def heading(self, text: str) -> str:
        """The text after the prefix; with a capital letter without one."""
        return self.prefixed(text if self.prefix else text[:1].upper() + text[1:])

    @property
    def done(self) -> list[RunLine]:
        """The runs that have a result."""
        return [line for line in self.lines if line.error is None]

    def store(self, name: str) -> AboutStore:
        """The entry on a store; an empty entry if there is none."""
        return self.about.stores.get(name, AboutStore())

    def run_folder(self, line: RunLine) -> Path:
        """The run folder of a line."""
        return self.folder / RUNS / line.name if line.path is None else Path(line.path)

    def runs_of(self, row: Row) -> list[RunLine]:
        """The successful runs of a head's row; none for a baseline. Lines of a transfer name no store."""
        if row.kind == "baseline":
            return []
        wanted = {(row.row, row.protocol, store) for store in ("", row.store_name)}
        return [line for line in self.done if (line.row_name, line.protocol, line.store_name) in wanted]

    def mean_of_runs(self, row: Row, metric: str) -> float | None:
        """The mean over the runs of a row of a test metric that rows lack; None unless all runs have it."""
        values = [line.tested(metric, row.label) for line in self.runs_of(row)]
        known = [value for value in values if value is not None]
        return fmean(known) if known and len(known) == len(values) else None

    @property
    def trained_noun(self) -> str:
        """What its trained rows are: `network` or `head`."""
        return "network" if self.about.kind == "networks" else "head"

    def groups(self) -> list[tuple[str, str]]:
        """The labels and protocols of the rows, label by label, the published split last."""
        found = dict.fromkeys((row.label, row.protocol) for row in self.rows)
        labels = list(dict.fromkeys(label for label, _ in found))
        return sorted(found, key=lambda one: (labels.index(one[0]), one[1] == "published"))

    def of(self, label: str, protocol: str) -> list[Row]:
        """The rows of a label and protocol: heads and networks by validation SRCC, then baselines as in the file."""
        rows = [row for row in self.rows if (row.label, row.protocol) == (label, protocol)]
        heads = sorted((row for row in rows if row.is_trained), key=lambda row: -row.rank_by)
        return heads + [row for row in rows if row.kind == "baseline"]

    def references(self, label: str, protocol: str) -> list[tuple[Row, list[Row]]]:
        """Each reference row with the rows that are compared with it.

        Stores of the same items share one reference, the best validation SRCC; other stores have one each.
        """
        rows = self.of(label, protocol)
        compared: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.reference is not None:
                compared.setdefault(row.reference, []).append(row)
        heads = {(row.row, row.store_name): row for row in rows if row.is_trained}
        return [(heads[name], others) for name, others in compared.items() if name in heads]


def read_all(folders: Sequence[Path], *, data: str | None = None) -> list[Results]:
    """The results of each folder; runs of `agiqa train` are together one of them, at the place of the first.

    A folder that is no result of another command stands for the runs that it holds at any depth. `data` is the data
    set of stores that name none, but not of a transfer. Raises DataError for a folder that holds no results, or that is
    given twice.
    """
    given = [path for folder in folders if not _is_report(folder) for path in _meant(folder)]
    for folder in given:
        if [one.resolve() for one in given].count(folder.resolve()) > 1:
            message = f"{folder} is given twice: give each folder of results once."
            raise DataError(message)
    runs = [folder for folder in given if is_run(folder)]
    sources = [*dict.fromkeys(tuple(runs) if folder in runs else (folder,) for folder in given)]
    if not sources:
        message = f"{folders[0]} is a report. Give the folders of results that it was made from."
        raise DataError(message)
    paths = [_common_folder(source) if source[0] in runs else source[0].resolve() for source in sources]
    names = [path.name for path in paths]
    found: list[Results] = []
    for source, path in zip(sources, paths, strict=True):
        name = path.name if names.count(path.name) == 1 else "/".join(path.parts[-2:])
        prefix = name if len(sources) > 1 else ""
        if source[0] in runs:
            found.append(_read_runs(source, path, name, prefix, data))
        else:
            found.append(_read(source[0], name, prefix, data))
    return found


def _meant(folder: Path) -> list[Path]:
    """The folder, or the runs in it."""
    return [folder] if (folder / ABOUT).is_file() else run_folders(folder) or [folder]


def _is_report(folder: Path) -> bool:
    """Whether a folder was made by `agiqa report`, as `runs/*` may include one."""
    return (folder / "index.html").is_file() and (folder / "report.md").is_file()


def _common_folder(runs: Sequence[Path]) -> Path:
    """The folder that all runs are in."""
    return Path(os.path.commonpath([run.resolve().parent for run in runs]))


def _read_runs(paths: Sequence[Path], folder: Path, name: str, prefix: str, data: str | None) -> Results:
    runs, problems = find_runs(paths)
    compared = compare_runs(runs)
    rows = [Row.model_validate(row) for row in compared.rows]
    if not rows:
        message = f"{folder} has no run that can be reported. {' '.join([*problems, *compared.problems])}"
        raise DataError(message.rstrip())
    has_numbers = [row for row in rows if row.test is not None]
    stores = {store: _store_of(run) for store, run in compared.stores.items()}
    return Results(
        folder=folder,
        name=name,
        about=_of_data(About(kind="runs", stores=stores), data),
        rows=tuple(has_numbers),
        left_out=tuple(row for row in rows if row not in has_numbers),
        lines=tuple(RunLine.model_validate(line) for line in compared.lines),
        problems=(*problems, *compared.problems),
        prefix=prefix,
    )


def _store_of(run: TrainedRun) -> AboutStore:
    """What a run records of its store."""
    features = run.config["features"]
    return AboutStore(
        id=run.store_id,
        encoding=str(features.get("encoding", "")),
        width=features.get("width"),
        model=run.model,
        path=run.location or None,
        variant=(run.config.get("origin", {}).get("conversation") or {}).get("variant"),
    )


def _read(folder: Path, name: str, prefix: str, data: str | None) -> Results:
    problems: list[str] = []
    about = _read_about(folder, data)
    rows = _read_lines(folder / ROWS, Row, problems)
    lines = {line.name: line for line in _read_lines(folder / RESULTS, RunLine, problems)}
    if about.runs is not None:
        lines = {run: lines[run] for run in about.runs if run in lines}
    if not rows:
        why = f"all runs failed, or `agiqa {about.command}` has not finished" if lines else "nothing was run"
        message = (
            f"{folder / ROWS} holds no results: {why}. Run the same `agiqa {about.command}` again, which continues "
            "where it stopped, and then make the report."
        )
        raise DataError(message)
    has_numbers = [row for row in rows if row.test is not None and row.left_out is None]
    return Results(
        folder=folder,
        name=name,
        about=about,
        rows=tuple(has_numbers),
        left_out=tuple(row for row in rows if row not in has_numbers),
        lines=tuple(lines.values()),
        problems=tuple(problems),
        prefix=prefix,
    )


def _read_about(folder: Path, data: str | None) -> About:
    """The file about.json; an ablation's stores without a data set are given the data set `data`."""
    path = folder / ABOUT
    if not path.is_file():
        message = (
            f"{folder} is no folder of results: it has no {ABOUT} and holds no run. Give the OUT of `agiqa ablate`, "
            "`agiqa transfer` or `agiqa baseline`, or runs of `agiqa train`."
        )
        raise DataError(message)
    try:
        about = About.model_validate_json(path.read_bytes())
    except ValidationError as error:
        message = f"{path} is not what `agiqa ablate` or `agiqa transfer` writes: {_fault(error)}."
        raise DataError(message) from error
    return _of_data(about, data)


def _of_data(about: About, data: str | None) -> About:
    """With the data set `data` for the stores that name none; those of a transfer have names."""
    if data is None or about.kind == "transfer":
        return about
    stores = {name: store.model_copy(update={"data": store.data or data}) for name, store in about.stores.items()}
    return about.model_copy(update={"stores": stores})


Kind = TypeVar("Kind", bound=Record)


def _read_lines(path: Path, kind: type[Kind], problems: list[str]) -> list[Kind]:
    """The undamaged lines of a file; each damaged one is added to `problems`."""
    if not path.is_file():
        return []
    found: list[Kind] = []
    for number, text in enumerate(_split(path, problems), 1):
        try:
            found.append(kind.model_validate_json(text))
        except ValidationError as error:
            problems.append(f"{path.name}, line {number} is damaged and was left out ({_fault(error)}).")
    return found


def _split(path: Path, problems: list[str]) -> Iterable[bytes]:
    """The complete lines of the file; an incomplete last line is added to `problems`."""
    content = whole_lines(path)
    if len(content) < path.stat().st_size:
        problems.append(f"{path.name} ends in the middle of a line, which was left out.")
    return [line for line in content.split(b"\n")[:-1] if line.strip()]


def _fault(error: ValidationError) -> str:
    """The first fault that pydantic found, on one line."""
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])
