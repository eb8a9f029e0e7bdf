"""The result folders of `agiqa ablate` and `agiqa transfer`, as a report reads them.

A damaged line is skipped and reported as a problem. A folder without any result is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from agiqa.bench.recording.result_folders import ABOUT, RESULTS, ROWS
from agiqa.errors import DataError
from agiqa.store.disk.files import whole_lines

METRICS = ("srcc", "plcc")
CONFIDENT = 0.05
"""The level of significance of corrected p-values."""
Interval = tuple[float, float]


def _name_of(value: Any) -> str:
    """The name in a store's entry on its data or model, which is a text or an object with a name."""
    if isinstance(value, dict):
        return str(value.get("name") or "")
    return "" if value is None else str(value)


Name = Annotated[str, BeforeValidator(_name_of)]


class _Record(BaseModel):
    """A frozen record of a file. Unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Scores(_Record):
    """The test metrics of a row, means over its seeds; see `agiqa.heads.evaluation.metrics`."""

    n: int
    srcc: float | None = None
    plcc: float | None = None
    rmse: float | None = None
    seeds: int = 1
    """Seeds with a result for every part of the split; 1 where each part has a seed of its own."""
    sd: dict[str, float | None] = Field(default_factory=dict)
    ci: dict[str, Interval | None] = Field(default_factory=dict)
    caution: str | None = None
    """A warning about few prompts."""


class Against(_Record):
    """The paired comparison of this row minus the reference row, or minus itself under another protocol."""

    row: str = ""
    store_name: str | None = None
    """The store of the reference row; None for the store of this row."""
    difference: dict[str, float | None]
    ci: dict[str, Interval | None] = Field(default_factory=dict)
    p_holm: dict[str, float | None] = Field(default_factory=dict)
    no_p: str | None = None
    """Why there is no p-value."""
    covers: str | None = None
    """The variation that interval and p include; None in older folders, where both ignore seeds."""


class Row(_Record):
    """A line of rows.jsonl: a head or a baseline under one protocol, on one store, for one label."""

    kind: Literal["head", "baseline"]
    row: str
    settings: dict[str, Any] = Field(default_factory=dict)
    store_name: str = ""
    protocol: str
    label: str
    runs: int = 0
    seeds: int = 0
    failed: int = 0
    seconds: float | None = None
    validation: dict[str, tuple[float, float | None] | None] | None = None
    test: Scores | None = None
    against: Against | None = None
    beside_grouped: Against | None = None
    left_out: str | None = None
    calibrated: int = 0
    """Runs whose predictions were calibrated by a line that was fitted on validation items."""
    notes: tuple[str, ...] = ()
    """Notes on the scores of a baseline."""

    def value(self, metric: str) -> float | None:
        """The mean of a test metric; None where it is not defined."""
        return None if self.test is None else getattr(self.test, metric)

    def interval(self, metric: str) -> Interval | None:
        """The confidence interval of `value`."""
        return None if self.test is None else self.test.ci.get(metric)

    def validated(self, metric: str) -> float | None:
        """The mean of a validation metric; None where it is unknown."""
        found = (self.validation or {}).get(metric)
        return None if found is None else found[0]

    @property
    def rank_by(self) -> float:
        """The mean validation SRCC, by which heads are ordered; -inf where it is unknown."""
        found = self.validated("srcc")
        return float("-inf") if found is None else found

    @property
    def reference(self) -> tuple[str, str] | None:
        """Name and store of the row that this one is compared with; None without a comparison."""
        if self.against is None:
            return None
        store = self.against.store_name
        return self.against.row, self.store_name if store is None else store

    def difference(self, metric: str) -> float | None:
        """The metric of this row minus that of the reference row."""
        return None if self.against is None else self.against.difference.get(metric)

    def p(self, metric: str) -> float | None:
        """The corrected p-value of the difference to the reference row; None where it ignores seeds."""
        return None if self.against is None or self.ignores_seeds else self.against.p_holm.get(metric)

    @property
    def ignores_seeds(self) -> bool:
        """Whether an older agiqa compared the rows. Its p-values cover other prompts, but not other seeds."""
        return self.against is not None and self.against.covers is None

    @property
    def identity(self) -> str:
        """What the row is called under all labels, protocols and stores.

        The name of a head; the settings of a baseline, because its name contains what was fitted.
        """
        return spelled(self.settings) if self.kind == "baseline" and "baseline" in self.settings else self.row


class RunLine(_Record):
    """A line of results.jsonl: a trained run, or the error of a failed one."""

    name: str
    row: str = ""
    protocol: str = ""
    store_name: str = ""
    seed: int | None = None
    config: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None
    agiqa: str | None = None
    commit: str | None = None
    torch: str | None = None
    device: str | None = None
    kernels: str | None = None
    seconds: float | None = None
    split: dict[str, Any] | None = None
    text_authors: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Items of each part of the split by the author of the text that their features were computed from."""
    paper_compatible: dict[str, Any] | None = None
    """The best epoch on test and the honest one, as in metrics.json; older lines lack it."""

    @property
    def row_name(self) -> str:
        """The name of its row; without one, its own name without the seed."""
        return self.row or re.sub(r",seed=\d+$", "", self.name)

    @property
    def labels(self) -> list[str]:
        """The labels of its head."""
        return str(self.config.get("label", "")).split("+")


class AboutStore(_Record):
    """The entry of about.json on a store."""

    id: str = ""
    data: Name = ""
    """The data set; empty if unknown."""
    encoding: str = ""
    width: int | None = None
    items: int | None = None
    model: Name = ""
    """The model of the features; empty if unknown."""
    path: str | None = None
    variant: str | None = None
    """The variant of its conversations, such as `id:quality+correspondence`."""
    energy: list[float] | None = None
    """All eigenvalues of a sketch's basis, descending (`basis/energy` of the store)."""

    @property
    def hint(self) -> str:
        """A text from which the data set may be recognised: its name, or the name of the store's folder."""
        return self.data or (self.path or "").rstrip("/").rpartition("/")[2]


class About(_Record):
    """The file about.json."""

    kind: Literal["ablation", "transfer"]
    stores: dict[str, AboutStore] = Field(default_factory=dict)
    runs: list[str] | None = None
    """The runs of the last command; lines of other runs are ignored. None in older folders."""
    shared: Any = None
    """In a transfer, by direction `A -> B`: the number of test items of B whose prompt A trained on."""

    @property
    def command(self) -> str:
        """The agiqa command that writes such results."""
        return {"ablation": "ablate", "transfer": "transfer"}[self.kind]


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

    def runs_of(self, row: Row) -> list[RunLine]:
        """The successful runs of a head's row; none for a baseline. Lines of a transfer name no store."""
        if row.kind == "baseline":
            return []
        wanted = {(row.row, row.protocol, store) for store in ("", row.store_name)}
        return [line for line in self.done if (line.row_name, line.protocol, line.store_name) in wanted]

    def groups(self) -> list[tuple[str, str]]:
        """The labels and protocols of the rows, label by label, the published split last."""
        found = dict.fromkeys((row.label, row.protocol) for row in self.rows)
        labels = list(dict.fromkeys(label for label, _ in found))
        return sorted(found, key=lambda one: (labels.index(one[0]), one[1] == "published"))

    def of(self, label: str, protocol: str) -> list[Row]:
        """The rows of a label and protocol: heads by validation SRCC, then baselines in the order of the file."""
        rows = [row for row in self.rows if (row.label, row.protocol) == (label, protocol)]
        heads = sorted((row for row in rows if row.kind == "head"), key=lambda row: -row.rank_by)
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
        heads = {(row.row, row.store_name): row for row in rows if row.kind == "head"}
        return [(heads[name], others) for name, others in compared.items() if name in heads]


def read_all(folders: Sequence[Path], *, data: str | None = None) -> list[Results]:
    """The results of each folder. `data` is the data set of an ablation's stores that name none.

    Raises DataError for a folder that holds no results, or that is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    for folder in resolved:
        if resolved.count(folder) > 1:
            message = f"{folder} is given twice: give each folder of results once."
            raise DataError(message)
    found: list[Results] = []
    for folder, path in zip(folders, resolved, strict=True):
        name = path.name if names.count(path.name) == 1 else "/".join(path.parts[-2:])
        found.append(_read(folder, name, name if len(folders) > 1 else "", data))
    return found


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
            f"{folder} is no folder of results: it has no {ABOUT}. Give the OUT of `agiqa ablate` or `agiqa transfer`."
        )
        raise DataError(message)
    try:
        about = About.model_validate_json(path.read_bytes())
    except ValidationError as error:
        message = f"{path} is not what `agiqa ablate` or `agiqa transfer` writes: {_fault(error)}."
        raise DataError(message) from error
    if data is None or about.kind == "transfer":
        return about
    stores = {name: store.model_copy(update={"data": store.data or data}) for name, store in about.stores.items()}
    return about.model_copy(update={"stores": stores})


Record = TypeVar("Record", bound=_Record)


def _read_lines(path: Path, kind: type[Record], problems: list[str]) -> list[Record]:
    """The undamaged lines of a file; each damaged one is added to `problems`."""
    if not path.is_file():
        return []
    found: list[Record] = []
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


def spelled(settings: Mapping[str, Any]) -> str:
    """`encoder=gru,pooling=mean`."""
    return ",".join(f"{name}={value}" for name, value in settings.items())
