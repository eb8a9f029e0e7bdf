"""Baselines that an earlier call fitted: a line is taken as it is where everything that its numbers depend on is equal.

Each fitted line has an entry `fitted`, `{"key", "predictions_sha256"}`: the hash of what it depends on (items, labels,
texts and features of the store, the parts, the settings, the device, and the versions of the libraries), and that of
its csv. Lines of an older agiqa have none, and are fitted again.
"""

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from agiqa.bench.recording.result_folders import KEPT, Line
from agiqa.store.disk.files import append_durably, canonical_json, telling_disk_errors, whole_lines
from agiqa.version import agiqa_version

FITTED = "fitted"
_LIBRARIES = ("numpy", "scipy", "scikit-learn", "torch")


def key_of(facts: Mapping[str, Any]) -> str:
    """The sha256 of `facts`, which are ready for JSON, and of the versions of agiqa and the libraries."""
    versions = {"agiqa": agiqa_version(), **{name: version(name) for name in _LIBRARIES}}
    return hashlib.sha256(canonical_json([{**facts}, versions]).encode()).hexdigest()


class RecordedBaselines:
    """The fitted lines of a file, by their keys."""

    def __init__(self, path: Path) -> None:
        """Read the file, which may be absent. A line of another form is passed over, and so fitted again."""
        self._path = path
        self._lines: dict[str, Line] = {}
        self._reused = 0
        for text in whole_lines(path).splitlines():
            try:
                line = json.loads(text)
                self._lines[line[FITTED]["key"]] = line
            except (ValueError, KeyError, TypeError):
                continue

    def find(self, key: str) -> Line | None:
        """The line with this key, without comparisons; None unless there is one, and its csv as it was written."""
        line = self._lines.get(key)
        if line is None or line[FITTED].get("predictions_sha256") != self._hash(line):
            return None
        self._reused += 1
        return {name: None if name == "against" else value for name, value in line.items() if name != "beside_grouped"}

    def add(self, line: Line, key: str) -> Line:
        """`line` with its key and the hash of its csv, appended to the file."""
        made = {**line, FITTED: {"key": key, "predictions_sha256": self._hash(line)}}
        text = json.dumps(made, ensure_ascii=False, allow_nan=False) + "\n"
        with telling_disk_errors(f"writing {self._path}", KEPT):
            append_durably(self._path, text.encode())
        return made

    def notes(self, count: int) -> list[str]:
        """A line to print where some of `count` baselines were found."""
        return [f"{self._reused} of {count} baselines exist already"] if self._reused else []

    def _hash(self, line: Line) -> str | None:
        """The sha256 of the csv of `line`; None where it cannot be read."""
        try:
            return hashlib.sha256((self._path.parent / line["predictions"]).read_bytes()).hexdigest()
        except (OSError, KeyError, TypeError):
            return None
