"""Lines of result files as records: the rows of tables, the runs, and about.json."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

Interval = tuple[float, float]


def _name_of(value: Any) -> str:
    """The name in a store's entry on its data or model, which is a text or an object with a name."""
    if isinstance(value, dict):
        return str(value.get("name") or "")
    return "" if value is None else str(value)


Name = Annotated[str, BeforeValidator(_name_of)]


class Record(BaseModel):
    """A frozen record of a file. Unknown fields are ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Scores(Record):
    """The test metrics of a row, means over its seeds; see `agiqa.heads.evaluation.metrics`."""

    n: int
    srcc: float | None = None
    plcc: float | None = None
    krcc: float | None = None
    rmse: float | None = None
    seeds: int = 1
    """Seeds with a result for every part of the split; 1 where each part has a seed of its own."""
    sd: dict[str, float | None] = Field(default_factory=dict)
    ci: dict[str, Interval | None] = Field(default_factory=dict)
    caution: str | None = None
    """A warning about few prompts."""


class Against(Record):
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


class Row(Record):
    """A line of rows.jsonl: a head, network or baseline under one protocol, on one store, for one label."""

    kind: Literal["head", "network", "baseline"]
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

    @property
    def is_trained(self) -> bool:
        """Whether it is a head or a network, with seeds and a choice of the epoch."""
        return self.kind != "baseline"

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


class RunLine(Record):
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
    path: str | None = None
    """Its run folder, if that is not below the folder of results."""
    trained_at: str | None = None
    """When the training ended, UTC; older lines lack it."""
    test: dict[str, Any] | None = None
    """The test metrics of `evaluate_scores`, by label if its head has several."""
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

    def tested(self, metric: str, label: str) -> float | None:
        """A test metric of one label; None where it was not recorded."""
        scores: Any = self.test or {}
        value = (scores.get(label) or {} if len(self.labels) > 1 else scores).get(metric)
        return float(value) if isinstance(value, int | float) else None


class AboutStore(Record):
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


class About(Record):
    """The file about.json."""

    kind: Literal["ablation", "transfer", "networks", "runs"]
    """`networks` are those of `agiqa baseline`; `runs` are single trainings, which have no about.json."""
    stores: dict[str, AboutStore] = Field(default_factory=dict)
    runs: list[str] | None = None
    """The runs of the last command; lines of other runs are ignored. None in older folders."""
    shared: Any = None
    """In a transfer, by direction `A -> B`: the number of test items of B whose prompt A trained on."""

    @property
    def command(self) -> str:
        """The agiqa command that writes such results."""
        commands = {"ablation": "ablate", "transfer": "transfer", "networks": "baseline", "runs": "train"}
        return commands[self.kind]


def spelled(settings: Mapping[str, Any]) -> str:
    """`encoder=gru,pooling=mean`."""
    return ",".join(f"{name}={value}" for name, value in settings.items())
