"""A file of result lines: JSON objects with a name each, appended as they come and read again after a kill.

What every line of a head that was trained tells is here too, so that all such files tell it alike.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from agiqa.bench.recording.result_folders import RESULTS
from agiqa.errors import DataError
from agiqa.heads.evaluation.runs import Run
from agiqa.heads.settings.labels import of_each_label, parse_labels
from agiqa.store.disk.files import append_durably, telling_disk_errors, whole_lines

PARTS = ("validation", "test")
Line = dict[str, Any]


class Planned(Protocol):
    """What a line is the result of."""

    @property
    def name(self) -> str:
        """The name of the line."""
        ...


class LineFile:
    """The lines of a file by name. A result that was tried again has a second line, which counts."""

    def __init__(
        self,
        path: Path,
        *,
        kind: str,
        keys: Mapping[str, type],
        kept: str,
        planned: Collection[str],
        check: Callable[[Line, str], None] = lambda _line, _where: None,
    ) -> None:
        """Read what is there; the rest of a line that a kill tore off is removed.

        `kind` is what made the file, `keys` are those that every line has beside its name, and `kept` is what a full
        disk leaves. Lines whose name is not `planned` stay in the file and are only counted, in `ignored`; the others
        `check` may refuse, given where they are. Raises DataError for what is no such line, and as `check`; the file is
        then as it was.
        """
        self._path, self._kept = path, kept
        self.lines: dict[str, Line] = {}
        ignored: set[str] = set()
        whole = whole_lines(path)
        for number, text in enumerate(_texts(path, whole), 1):
            where = f"{path}, line {number}"
            line = _parse(text, where, kind, {"name": str, **keys})
            if line["name"] not in planned:
                ignored.add(line["name"])
                continue
            check(line, where)
            self.lines[line["name"]] = line
        self.ignored = len(ignored)
        """Results that are there and not asked for."""
        if path.exists() and len(whole) < path.stat().st_size:
            os.truncate(path, len(whole))

    def append(self, line: Line) -> None:
        """Add a line, and force it to the disk."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with telling_disk_errors(f"writing {self._path}", self._kept):
            append_durably(self._path, text.encode())
        self.lines[line["name"]] = line

    def is_done(self, planned: Planned) -> bool:
        """Whether it has a line, and no error."""
        return "error" not in self.lines.get(planned.name, {"error": "not run"})


def ignored_line(out: Path, results: LineFile) -> str:
    """What is said of the results in `out` that are not asked for."""
    return f"note: {out / RESULTS} also has {results.ignored} results that are not asked for now; they are ignored"


def training_facts(run: Run, *, commit: str | None) -> Line:
    """With what a head was trained, and which epoch was kept."""
    return {
        **{name: run.config[name] for name in ("agiqa", "torch", "device", "kernels")},
        "commit": commit,
        **{name: run.metrics[name] for name in ("chosen_epoch", "chosen_by", "epochs_run")},
    }


def outcome_facts(run: Run) -> Line:
    """How long the training of a head took, on which parts of its data, and how good it is on them.

    With the setting `paper_compatible` also what choosing the epoch on test would have given.
    """
    seconds = round(sum(run.metrics["seconds"].values()), 3)
    told = {"seconds": seconds, **{name: run.metrics[name] for name in ("split", "warnings", *PARTS)}}
    if calibration := run.metrics.get("calibration"):
        told["calibration"] = calibration
    if authors := run.metrics.get("text_authors"):
        told["text_authors"] = authors
    biased = run.metrics.get("paper_compatible")
    return told if biased is None else {**told, "paper_compatible": biased}


def warning_lines(lines: Iterable[Line], *, told: Iterable[str] = ()) -> list[str]:
    """Each kind of warning of the heads of `lines`, once, with how many heads have it and the name of the first.

    Warnings are of one kind where they differ in numbers alone. Those that a line of `told` ends with are left out.
    """
    heads = [line for line in lines if "error" not in line]
    kinds = [_kind(line) for line in told]
    found: dict[str, dict[str, str]] = {}
    for line in heads:
        for text in line.get("warnings", ()):
            if not any(kind.endswith(_kind(text)) for kind in kinds):
                found.setdefault(_kind(text), {}).setdefault(line["name"], text)
    return [
        f"warning: {len(texts)} of {len(heads)} heads ({name}{', ...' if len(texts) > 1 else ''}): {text}"
        for texts in found.values()
        for name, text in list(texts.items())[:1]
    ]


def _kind(warning: str) -> str:
    return re.sub(r"\d+(?:[.,]\d+)*", "#", warning)


def error_facts(error: str, *, agiqa: str, commit: str | None) -> Line:
    """What is told of a result that there is not."""
    return {"agiqa": agiqa, "commit": commit, "error": error}


def scores_by_label(line: Line, part: str) -> dict[str, Mapping[str, Any]]:
    """The metrics of one part of a result line for each label of its head; none where the part has no items.

    A head of several labels, `quality+correspondence`, has its metrics under their names.
    """
    scores, labels = line.get(part), parse_labels(line["config"]["label"])
    return dict(zip(labels, of_each_label(labels, scores), strict=True)) if scores else {}


def _texts(path: Path, content: bytes) -> list[str]:
    """Whole lines as text; only a line feed ends one, for errors hold other ends of lines."""
    try:
        return content.decode().split("\n")[:-1]
    except UnicodeDecodeError as error:
        message = f"{path} is no file of result lines ({error}). Choose another OUT, or remove it."
        raise DataError(message) from error


def _parse(text: str, where: str, kind: str, keys: Mapping[str, type]) -> Line:
    message = f"{where} is no result line of {kind}. Choose another OUT, or remove the line."
    try:
        line: Any = json.loads(text)
    except ValueError as error:
        raise DataError(message) from error
    if not isinstance(line, dict):
        raise DataError(message)
    found = cast("Line", line)
    if not all(isinstance(found.get(key), is_of) for key, is_of in keys.items()):
        raise DataError(message)
    return found
