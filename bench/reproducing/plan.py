"""The plan of a reproduction: which data sets, adapters, conversations, heads and networks each table needs.

`plan.yaml` beside this module is the shipped plan. Names in it are those of other entries, so shared work is said once.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.data.importers.sets import IMPORTERS
from agiqa.extract.data.templates import aspects_of, template_of

SHIPPED = Path(__file__).with_name("plan.yaml")
Options = dict[str, Any]
"""Options of a command of agiqa by name, without hyphens at the start; True for a flag."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSet(_Part):
    """A published data set, looked for in the folder of its name below ROOT."""

    importer: str
    """Its name in `agiqa data import`."""
    images: int = Field(ge=1)
    """How many it has: for estimates."""
    side: int = Field(ge=1)
    """Pixels of the side of most of its images: for estimates."""
    max_slices: int | None = None
    """Most slices per image that its adapters were tuned with; None: the checkpoint's own."""


class Descriptions(_Part):
    """What the model, with an adapter or without, says about the images of a data set."""

    data: str
    adapter: str | None = None
    """Hub name; None: the model as it is."""
    aspect: str = "quality"
    """Wording of the questions."""


class StoreOf(_Part):
    """Hidden states of a conversation."""

    descriptions: tuple[str, ...] = Field(min_length=1)
    """The first also gives the data set, the adapter that is applied, and the wording."""
    variant: str = "full"
    """Of the conversation; shorter ones are read from the same store."""


class Ablation(_Part):
    """A grid of heads on one store or several."""

    stores: dict[str, str] = Field(min_length=1)
    """Stores by their names in the grid; a single one is called main."""
    grid: str
    """A YAML file beside the plan, or a grid shipped with `agiqa ablate`."""
    settings: Options = Field(default_factory=dict)
    """Added to the base of the grid."""
    variant: str | None = None
    """Beginning of the conversations that heads read; None: the grid says it, or the whole."""


class Transfer(_Part):
    """Heads of one store tested on another, whose features are of the same model."""

    source: str
    target: str
    label: str = "quality"
    variant: str | None = None


class Networks(_Part):
    """Image networks that are fine-tuned on a data set."""

    data: str
    labels: tuple[str, ...] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)


class PaperHead(_Part):
    """A row of the paper, and our row of an ablation that stands beside it."""

    paper: str
    """Name of the paper's row."""
    data: str
    label: str = "quality"
    ablation: str
    row: str
    """Name of our row: that of the run, or the settings that vary, such as `encoder=gru`."""


class PaperWords(_Part):
    """A row of Table V, and the descriptions whose rating words stand beside it."""

    paper: str
    label: str = "quality"
    descriptions: str


class TablePlan(_Part):
    """What a table of the paper needs."""

    number: str
    """In the paper, such as IV."""
    title: str
    heads: tuple[PaperHead, ...] = ()
    words: tuple[PaperWords, ...] = ()
    networks: tuple[str, ...] = ()
    transfers: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    """Further ablations, which only the report shows."""
    notes: tuple[str, ...] = ()


class Plan(_Part):
    """All of it."""

    model: str
    """Hub name of the multimodal model."""
    options: dict[str, Options] = Field(default_factory=dict)
    """Options of every step, by command: describe, extract, ablate, transfer, baseline, words."""
    data: dict[str, DataSet]
    descriptions: dict[str, Descriptions]
    stores: dict[str, StoreOf]
    ablations: dict[str, Ablation]
    transfers: dict[str, Transfer] = Field(default_factory=dict)
    networks: dict[str, Networks] = Field(default_factory=dict)
    tables: dict[str, TablePlan]
    folder: Path = Path()
    """Of the file, where its grids are."""

    def first(self, store: str) -> Descriptions:
        """The descriptions that give the data set and the adapter of a store."""
        return self.descriptions[self.stores[store].descriptions[0]]

    @cached_property
    def adapters(self) -> tuple[str, ...]:
        """All adapters, once each."""
        return tuple(dict.fromkeys(one.adapter for one in self.descriptions.values() if one.adapter is not None))

    def grid_file(self, ablation: str) -> Path | None:
        """The grid beside the plan; None for one shipped with `agiqa ablate`."""
        file = self.folder / self.ablations[ablation].grid
        return file if file.is_file() else None


def read_plan(file: Path | None = None) -> Plan:
    """The plan in `file`, or the shipped one.

    Raises ConfigError for a file of another form, and UnknownName for a name that no entry has; both name the file.
    """
    path = SHIPPED if file is None else file
    try:
        plan = Plan.model_validate({**_content(path), "folder": path.parent})
        for kind, name, known in _references(plan):
            if name not in known:
                raise UnknownName.of(kind, name, known)
        for one in plan.descriptions.values():
            template_of(one.aspect)
        for name, store in plan.stores.items():
            aspects_of(store.variant, plan.first(name).aspect)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        message = f"{path}: `{where}` of the plan: {first['msg']}."
        raise ConfigError(message) from error
    except (ConfigError, UnknownName) as error:
        error.add_note(f"while reading the plan {path}")
        raise
    return plan


def _content(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path} cannot be read as YAML ({error}). Give a plan, or leave out --plan for the shipped one."
        raise ConfigError(message) from error
    if not isinstance(found, dict):
        message = f"{path}: a plan has keys and values, see {SHIPPED}."
        raise ConfigError(message)
    return {str(key): value for key, value in found.items()}


def _references(plan: Plan) -> Iterator[tuple[str, str, Mapping[str, object]]]:
    """Each name that stands for an entry: its kind, the name, and the entries of that kind."""
    for one in plan.data.values():
        yield "data set", one.importer, dict.fromkeys(IMPORTERS)
    for described in plan.descriptions.values():
        yield "data set of the plan", described.data, plan.data
    for store in plan.stores.values():
        yield from (("descriptions", name, plan.descriptions) for name in store.descriptions)
    for ablation in plan.ablations.values():
        yield from (("store of the plan", name, plan.stores) for name in ablation.stores.values())
    for transfer in plan.transfers.values():
        yield from (("store of the plan", name, plan.stores) for name in (transfer.source, transfer.target))
    for networks in plan.networks.values():
        yield "data set of the plan", networks.data, plan.data
    for table in plan.tables.values():
        yield from (
            ("ablation", name, plan.ablations) for name in (*(one.ablation for one in table.heads), *table.also)
        )
        yield from (("descriptions", one.descriptions, plan.descriptions) for one in table.words)
        yield from (("networks", name, plan.networks) for name in table.networks)
        yield from (("transfer", name, plan.transfers) for name in table.transfers)
