"""What a report is made from: the folders that `agiqa ablate` and `agiqa transfer` leave, read forgivingly.

A line that is no result line is left out and told of; a folder without any result is refused.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agiqa.bench.recording.result_folders import ABOUT, RESULTS, ROWS
from agiqa.errors import DataError
from agiqa.store.disk.files import whole_lines

METRICS = ("srcc", "plcc")
CONFIDENT = 0.05
"""A corrected p-value below this tells two rows apart."""
Pair = tuple[float, float]


class _Record(BaseModel):
    """A frozen record of a file; what it does not know it leaves alone."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Scores(_Record):
    """The metrics of a row, means over its seeds; see `agiqa.heads.evaluation.metrics`."""

    n: int
    srcc: float | None = None
    plcc: float | None = None
    rmse: float | None = None
    seeds: int = 1
    """Answers that these are means over: seeds whose every split has a result, or 1 where each split has its own."""
    sd: dict[str, float | None] = Field(default_factory=dict)
    ci: dict[str, Pair | None] = Field(default_factory=dict)
    confidence: float = 0.95
    caution: str | None = None
    """What to know of few prompts."""
    undefined: str | None = None


class Against(_Record):
    """The paired comparison of this row minus the reference row, or minus itself under another protocol."""

    row: str = ""
    store_name: str | None = None
    """Of the reference row; None is that of this row."""
    difference: dict[str, float | None]
    ci: dict[str, Pair | None] = Field(default_factory=dict)
    p: dict[str, float | None] = Field(default_factory=dict)
    p_holm: dict[str, float | None] = Field(default_factory=dict)
    no_p: str | None = None
    """Why there is no p-value."""
    covers: str | None = None
    """What the interval and p are about; None in older folders, where both left seeds out."""


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
    """Runs whose predictions were put on a line that was fitted on validation items."""
    notes: tuple[str, ...] = ()
    """Of a baseline, what a reader of its scores must know."""

    def value(self, metric: str) -> float | None:
        """The mean of a test metric; None where it is not defined."""
        return None if self.test is None else getattr(self.test, metric)

    def interval(self, metric: str) -> Pair | None:
        """The confidence interval of `value`."""
        return None if self.test is None else self.test.ci.get(metric)

    def validated(self, metric: str) -> float | None:
        """The mean of a validation metric; None where it is not known."""
        found = (self.validation or {}).get(metric)
        return None if found is None else found[0]

    def chosen_by(self) -> float:
        """The mean validation SRCC, which orders heads; -inf without one."""
        found = self.validated("srcc")
        return float("-inf") if found is None else found

    @property
    def was_chosen(self) -> bool:
        """Of the first of its rows by `chosen_by`: whether validation put it there."""
        return self.chosen_by() > float("-inf")

    @property
    def reference(self) -> tuple[str, str] | None:
        """Name and store of the row that this one is compared with; None where it is with none."""
        if self.against is None:
            return None
        store = self.against.store_name
        return self.against.row, self.store_name if store is None else store

    def p(self, metric: str) -> float | None:
        """The corrected p-value of the difference to the reference row; None where it left seeds out."""
        return None if self.against is None or self.leaves_seeds_out else self.against.p_holm.get(metric)

    @property
    def leaves_seeds_out(self) -> bool:
        """Whether an older agiqa compared it, whose p-values are about other prompts alone."""
        return self.against is not None and self.against.covers is None

    @property
    def kin(self) -> str:
        """Same over labels, protocols and stores: the name of a head, the settings of a baseline, named by its fit."""
        return spelled(self.settings) if self.kind == "baseline" and "baseline" in self.settings else self.row


class RunLine(_Record):
    """A line of results.jsonl: a run that was trained, or its error."""

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
    warnings: list[str] = Field(default_factory=list)
    text_authors: dict[str, dict[str, int]] = Field(default_factory=dict)
    """Who wrote the texts that the items of each part read, counted by author."""
    paper_compatible: dict[str, Any] | None = None
    """The best epoch on test beside the honest one, as metrics.json has it; older lines have it there only."""

    @property
    def of_row(self) -> str:
        """The name of its row, which is its own without the seed where none is told."""
        return self.row or re.sub(r",seed=\d+$", "", self.name)

    @property
    def labels(self) -> list[str]:
        """The labels of its head."""
        return str(self.config.get("label", "")).split("+")


class AboutStore(_Record):
    """What about.json says of a store."""

    id: str = ""
    data: Any = None
    encoding: str = ""
    width: int | None = None
    items: int | None = None
    model: Any = None
    path: str | None = None
    variant: str | None = None
    """The variant of its conversations, as in `id:quality+correspondence`."""
    energy: list[float] | None = None
    """The eigenvalues of a sketch's basis, all of them, descending (`basis/energy` of the store)."""

    @property
    def data_name(self) -> str:
        """The data set, or nothing."""
        return _name_of(self.data)

    @property
    def hint(self) -> str:
        """What may tell the data set: its name, or else that of the store's folder."""
        return self.data_name or (self.path or "").rstrip("/").rpartition("/")[2]

    @property
    def model_name(self) -> str:
        """The model of the features, or nothing."""
        return _name_of(self.model)


class About(_Record):
    """about.json."""

    kind: Literal["ablation", "transfer"]
    stores: dict[str, AboutStore] = Field(default_factory=dict)
    runs: list[str] | None = None
    """The names of the runs that were asked for last; lines of others count for nothing. None in older folders."""
    shared: Any = None
    """Of a transfer: of each direction `A -> B`, how many test items of B have a prompt that A trained on."""

    @property
    def command(self) -> str:
        """What makes such results: `agiqa COMMAND`."""
        return {"ablation": "ablate", "transfer": "transfer"}[self.kind]


@dataclass(frozen=True, kw_only=True)
class Results:
    """One folder of results."""

    folder: Path
    name: str
    """What the report calls it, unlike the others."""
    about: About
    rows: tuple[Row, ...]
    """Without those that hold no number, which are in `left_out`."""
    left_out: tuple[Row, ...]
    lines: tuple[RunLine, ...]
    """The last line of each run."""
    problems: tuple[str, ...]
    """What could not be read."""
    prefix: str = ""
    """What tells its files, titles and sentences from those of other folders of one report; empty if it is alone."""

    def told(self, text: str) -> str:
        """The text as it is, behind the folder of which it tells where there are several."""
        return f"{self.prefix}: {text}" if self.prefix else text

    def titled(self, text: str) -> str:
        """The same with a capital, as a title that is not behind a folder."""
        return self.told(text if self.prefix else text[:1].upper() + text[1:])

    @property
    def done(self) -> list[RunLine]:
        """The runs that have a result."""
        return [line for line in self.lines if line.error is None]

    def store(self, name: str) -> AboutStore:
        """What is known of a store, which may be nothing."""
        return self.about.stores.get(name, AboutStore())

    def runs_of(self, row: Row) -> list[RunLine]:
        """The runs behind the row of a head that have a result; none of a baseline.

        Lines of a transfer name no store: their row does.
        """
        if row.kind == "baseline":
            return []
        stores = ("", row.store_name)
        return [
            line
            for line in self.done
            if line.of_row == row.row and line.protocol == row.protocol and line.store_name in stores
        ]

    def groups(self) -> list[tuple[str, str]]:
        """The labels and protocols of the rows, label by label, honest protocols first."""
        found = dict.fromkeys((row.label, row.protocol) for row in self.rows)
        labels = list(dict.fromkeys(label for label, _ in found))
        return sorted(found, key=lambda one: (labels.index(one[0]), one[1] == "published"))

    def of(self, label: str, protocol: str, store: str | None = None) -> list[Row]:
        """The rows of a label and protocol: heads by validation SRCC, then baselines as they stand."""
        rows = [row for row in self.rows if (row.label, row.protocol) == (label, protocol)]
        rows = [row for row in rows if store is None or row.store_name == store]
        heads = sorted((row for row in rows if row.kind == "head"), key=lambda row: -row.chosen_by())
        return heads + [row for row in rows if row.kind == "baseline"]

    def references(self, label: str, protocol: str) -> list[tuple[Row, list[Row]]]:
        """The rows that others are compared with, each with those: the best validation SRCC on the same test items.

        Rows of several stores have one reference where these hold the same items, and else one each.
        """
        rows = self.of(label, protocol)
        compared: dict[tuple[str, str], list[Row]] = {}
        for row in rows:
            if row.reference is not None:
                compared.setdefault(row.reference, []).append(row)
        heads = {(row.row, row.store_name): row for row in rows if row.kind == "head"}
        return [(heads[name], others) for name, others in compared.items() if name in heads]


def read_all(folders: Sequence[Path], *, data: str | None = None) -> list[Results]:
    """The results of each folder; `data` is the data set of stores that do not tell theirs, but of no transfer's.

    Raises DataError for a folder that holds none, or that is given twice.
    """
    resolved = [folder.resolve() for folder in folders]
    names = [folder.name for folder in resolved]
    for folder in resolved:
        if resolved.count(folder) > 1:
            message = f"{folder} is given twice: give each folder of results once."
            raise DataError(message)
    told = [
        name if names.count(name) == 1 else "/".join(path.parts[-2:])
        for name, path in zip(names, resolved, strict=True)
    ]
    several = len(folders) > 1
    return [_read(folder, name, name if several else "", data) for folder, name in zip(folders, told, strict=True)]


def _read(folder: Path, name: str, prefix: str, data: str | None) -> Results:
    problems: list[str] = []
    about = _of_data(_read_about(folder), data)
    rows = _read_lines(folder / ROWS, Row, problems)
    lines = {line.name: line for line in _read_lines(folder / RESULTS, RunLine, problems)}
    if about.runs is not None:
        lines = {name: lines[name] for name in about.runs if name in lines}
    if not rows:
        made = f"its runs all failed, or `agiqa {about.command}` has not ended" if lines else "nothing was run"
        message = (
            f"{folder / ROWS} holds no results: {made}. Run the same `agiqa {about.command}` again, which "
            "goes on where it was, and then report."
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


def _read_about(folder: Path) -> About:
    path = folder / ABOUT
    if not path.is_file():
        message = (
            f"{folder} is no folder of results: it has no {ABOUT}. Give the OUT of `agiqa ablate` or `agiqa transfer`."
        )
        raise DataError(message)
    try:
        return About.model_validate_json(path.read_bytes())
    except ValidationError as error:
        message = f"{path} is not what `agiqa ablate` or `agiqa transfer` writes: {_fault(error)}."
        raise DataError(message) from error


def _of_data(about: About, data: str | None) -> About:
    """`about`, its stores of the data set `data` where they do not tell."""
    if data is None or about.kind == "transfer":
        return about
    stores = {
        name: store if store.data_name else store.model_copy(update={"data": data})
        for name, store in about.stores.items()
    }
    return about.model_copy(update={"stores": stores})


Record = TypeVar("Record", bound=_Record)


def _read_lines(path: Path, kind: type[Record], problems: list[str]) -> list[Record]:
    """The lines of a file, less those that are damaged, which are told of in `problems`."""
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
    """The lines of the file; an end that was torn off is told of."""
    content = whole_lines(path)
    if len(content) < path.stat().st_size:
        problems.append(f"{path.name} ends in the middle of a line, which was left out.")
    return [line for line in content.split(b"\n")[:-1] if line.strip()]


def _fault(error: ValidationError) -> str:
    """The first thing that pydantic minds, in one line."""
    first = error.errors()[0]
    where = ".".join(str(step) for step in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


def spelled(settings: Mapping[str, Any]) -> str:
    """`encoder=gru,pooling=mean`."""
    return ",".join(f"{name}={value}" for name, value in settings.items())


def _name_of(value: Any) -> str:
    """The name in what a store says of its data or model: a text, or an object with a name."""
    if isinstance(value, dict):
        return str(value.get("name") or "")
    return "" if value is None else str(value)
