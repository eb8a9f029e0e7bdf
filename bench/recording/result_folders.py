"""The folder of an ablation or a transfer: its files, its lock, and its result lines.

A result line is a JSON object with a name. Lines are appended as they come, and read again after a kill.
"""

import json
import os
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from agiqa.errors import DataError
from agiqa.heads.data.layers import stored_layers
from agiqa.heads.settings.labels import of_each_label, parse_labels
from agiqa.store import AnyStore
from agiqa.store.disk.files import (
    append_durably,
    telling_disk_errors,
    whole_lines,
    working_in_folder,
    write_text_atomically,
)
from agiqa.version import agiqa_version

ABOUT = "about.json"
"""The stores, and the settings of the command."""
RESULTS = "results.jsonl"
"""The result lines."""
ROWS = "rows.jsonl"
"""Means, intervals and comparisons, computed from the results at the end."""
RUNS = "runs"
"""The run folders of the heads."""
KEPT = "the results before are kept"
"""The note on a full disk: what is kept."""
PARTS = ("validation", "test")
Line = dict[str, Any]


@contextmanager
def working_in(out: Path, what: str) -> Generator[None]:
    """Make the folder `out`, with RUNS, and hold its lock inside the block; `what` names the work, such as `ablation`.

    Raises as `working_in_folder`.
    """
    with working_in_folder(out, what, kept=KEPT):
        (out / RUNS).mkdir(exist_ok=True)
        yield


def write_about(out: Path, about: Mapping[str, Any]) -> None:
    """Write about.json in one step."""
    _write_whole(out / ABOUT, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def write_rows(path: Path, rows: Sequence[Line]) -> None:
    """Write `rows` as lines of JSON, in one step."""
    _write_whole(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows))


def _write_whole(path: Path, text: str) -> None:
    with telling_disk_errors(f"writing {path}", KEPT):
        write_text_atomically(path, text)


def store_facts(store: AnyStore) -> Line:
    """Identity, location, data, model and conversation of a store for about.json.

    `energy` of a sketch holds the eigenvalues of its basis, descending; a rank keeps their cumulative share.
    """
    facts: Line = {
        "id": store.id,
        "path": store.location,
        "data": store.provenance.get("data_set", {}),
        "encoding": store.encoding,
        "width": store.width,
        "items": len(store.n_tokens),
        "tokens": int(store.n_tokens.sum()),
        "mos_ranges": {aspect: store.items.mos_ranges.get(aspect) for aspect in store.items.labels},
        "model": store.provenance.get("model", {}).get("name"),
        "variant": store.provenance.get("conversation", {}).get("variant"),
        "layers": list(stored_layers(store)),
    }
    if store.encoding == "sketch":
        facts["energy"] = [float(value) for value in store.basis().energy]
    return facts


def store_text(identity: str, location: str | None) -> str:
    """A store in a message: its location, where known, and the beginning of its id."""
    return f"{location} ({identity[:12]})" if location else identity[:12]


def recorded_location(about: Path, identity: str) -> str | None:
    """The location that the file `about` (about.json) gives for the store with this id; None where it gives none."""
    try:
        stores = json.loads(about.read_bytes())["stores"].values()
        return next((str(store["path"]) for store in stores if store["id"] == identity), None)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


class LineFile:
    """The result lines of a file by name. A result that was tried again has a second line, which counts."""

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
        """Read the file, and remove the rest of a line that a kill tore off.

        `kind` names what made the file, `keys` are required in every line beside the name, and `kept` says what a full
        disk leaves. Lines whose name is not `planned` stay in the file; only `ignored` counts them. `check` may refuse
        the others; it gets the line and its place in the file. Raises DataError for a line of another form, and as
        `check`; the file is then unchanged.
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
        """The number of results in the file that are not `planned`."""
        if path.exists() and len(whole) < path.stat().st_size:
            os.truncate(path, len(whole))

    def append(self, line: Line) -> None:
        """Add a line, and force it to the disk."""
        text = json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n"
        with telling_disk_errors(f"writing {self._path}", self._kept):
            append_durably(self._path, text.encode())
        self.lines[line["name"]] = line

    def is_done(self, name: str) -> bool:
        """Whether there is a line of this name, and it holds no error."""
        return "error" not in self.lines.get(name, {"error": "not run"})

    def failed(self, names: Iterable[str]) -> dict[str, str]:
        """The errors of those of `names` that have one. Each of them has a line."""
        return {name: self.lines[name]["error"] for name in names if "error" in self.lines[name]}

    def ignored_note(self) -> list[str]:
        """A line to print if the file holds results that are not `planned`."""
        what = f"note: {self._path} also has {self.ignored} results that this command does not plan; they are ignored"
        return [what] if self.ignored else []


class Recorded(Protocol):
    """What a run folder records: a `Run`, or a run that was read without its parts."""

    @property
    def config(self) -> Mapping[str, Any]:
        """config.json."""
        ...

    @property
    def metrics(self) -> Mapping[str, Any]:
        """metrics.json."""
        ...


def training_facts(run: Recorded, *, commit: str | None) -> Line:
    """The environment that a head was trained in, and the epoch that was kept, as far as it is recorded."""
    environment, ending = (
        ("agiqa", "torch", "device", "kernels"),
        ("trained_at", "chosen_epoch", "chosen_by", "epochs_run"),
    )
    return {
        **{name: run.config[name] for name in environment if name in run.config},
        "commit": commit,
        **{name: run.metrics[name] for name in ending if name in run.metrics},
    }


def outcome_facts(run: Recorded) -> Line:
    """Training time, parts of the data, and metrics of a head.

    With the setting `paper_compatible` also the metrics of the epoch with the best test score.
    """
    seconds = round(sum(run.metrics["seconds"].values()), 3)
    facts = {"seconds": seconds, **{name: run.metrics[name] for name in ("split", "warnings", *PARTS)}}
    for name in ("calibration", "text_authors", "layer_weights"):
        if run.metrics.get(name):
            facts[name] = run.metrics[name]
    biased = run.metrics.get("paper_compatible")
    return facts if biased is None else {**facts, "paper_compatible": biased}


def error_facts(error: str, *, commit: str | None) -> Line:
    """The facts of a result that failed."""
    return {"agiqa": agiqa_version(), "commit": commit, "error": error}


def scores_by_label(line: Line, part: str) -> dict[str, Mapping[str, Any]]:
    """The metrics of one part of a result line for each label of its head; none where the part has no items.

    A head of several labels, `quality+correspondence`, has its metrics under their names.
    """
    scores, labels = line.get(part), parse_labels(line["config"]["label"])
    return dict(zip(labels, of_each_label(labels, scores), strict=True)) if scores else {}


def warning_lines(lines: Iterable[Line], *, printed: Iterable[str] = (), what: str = "heads") -> list[str]:
    """Each kind of warning of the heads (`what`) of `lines`, once: how many have it, and the name of the first.

    Warnings are of one kind where they differ in numbers alone. Those that a line of `printed` ends with are left out.
    """
    heads = [line for line in lines if "error" not in line]
    kinds = [_without_numbers(line) for line in printed]
    found: dict[str, dict[str, str]] = {}
    for line in heads:
        for text in line.get("warnings", ()):
            kind = _without_numbers(text)
            if not any(one.endswith(kind) for one in kinds):
                found.setdefault(kind, {}).setdefault(line["name"], text)
    return [
        f"warning: {len(texts)} of {len(heads)} {what} ({name}{', ...' if len(texts) > 1 else ''}): {text}"
        for texts in found.values()
        for name, text in list(texts.items())[:1]
    ]


def _without_numbers(warning: str) -> str:
    return re.sub(r"\d+(?:[.,]\d+)*", "#", warning)


def _texts(path: Path, content: bytes) -> list[str]:
    """Whole lines as text. Only a line feed ends one, since errors may hold other line ends."""
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
    if not isinstance(line, dict) or not all(isinstance(line.get(key), is_of) for key, is_of in keys.items()):
        raise DataError(message)
    return cast("Line", line)
