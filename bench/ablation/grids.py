"""A grid of heads from a YAML file: which settings vary, every combination of them, and a readable name for each.

base: {projection: sketch, width: 128, preset: paper}    # what all runs have: settings of `agiqa train`, flat
grid:                                                    # every combination, the last setting varying fastest
  encoder: [xlstm, gru]
  pooling: [mean, max]
runs:                                                    # single runs beside the grid
  - {encoder: none, pooling: max}
  - {encoder: lstm, layers: 4, name: deep}
seeds: [0, 1, 2]                                         # every one of these, with each seed
protocols: [published, grouped]                          # what each is trained and tested on (protocols.py)

`store` is a setting too: the name of one of several stores, which the command line says where to find. In `grid`,
`layer: all` stands for every layer of the store.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch

from agiqa.bench.ablation.protocols import PART_SETTINGS, SPLIT_SETTINGS, Protocol, Split, protocol_of, read_protocols
from agiqa.bench.ablation.run_names import file_name, spell, told_apart
from agiqa.errors import AgiqaError, ConfigError, UnknownName, listed
from agiqa.heads.data.layers import JOINER
from agiqa.heads.model.encoders.base import encoder_settings
from agiqa.heads.model.head import check_sizes
from agiqa.heads.model.losses import get_loss
from agiqa.heads.settings.config import HeadConfig, TrainConfig, Usual, read_yaml
from agiqa.heads.settings.form_settings import unread_by_forms
from agiqa.heads.settings.presets import preset_values

_SECTIONS = ("base", "grid", "runs", "seeds", "protocols")
_SHIPPED = Path(__file__).parent / "shipped"
_NOT_OF_A_HEAD = ("preset", "store")
_MAIN = "main"
_LAYER, _ALL = "layer", "all"
_ENCODER_SETTINGS = ("blocks", "num_heads", "layers", "state_size", "residual", "dropout")
"""Settings that only the encoder may read."""
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a grid."""

    name: str
    """Name of its folder: the settings that vary, as in `encoder=gru,seed=0`."""
    spelled: str
    """The same before characters that a folder may not have are replaced."""
    row: str
    """The name without the seed and the split: its row of the table."""
    settings: Mapping[str, Any]
    """The settings in `row`."""
    head: HeadConfig
    train: TrainConfig
    preset: str | None
    store: str
    """The name of its store; empty for the only one."""
    protocol: str
    """See protocols.py."""
    asked: bool
    """Whether its split comes from the section `protocols`."""
    answer: int
    """Runs of a row with the same number test different items; their predictions are joined."""

    @property
    def config(self) -> Settings:
        """All settings, in plain values."""
        settings = {**self.head.model_dump(mode="json"), **self.train.model_dump(mode="json")}
        return settings if self.preset is None else {"preset": self.preset, **settings}


def read_grid(
    file: Path,
    *,
    stores: Sequence[str] = ("",),
    usual: Mapping[str, Usual] = MappingProxyType({}),
    generators: Callable[[], Sequence[str]] = lambda: (),
    layers: Callable[[], Sequence[str]] = lambda: (),
    variant: str | None = None,
) -> list[PlannedRun]:
    """The runs of the grid `file`, in its order.

    `stores` are the names that the setting `store` may have; the first is the default, and each must be used by a run.
    `usual` has, by store, its `usual_settings`. `generators` gives those of the data, and `layers` those that
    `layer: all` stands for. `variant` is that of runs that set none. On a CPU, `threads` is 1 unless set, so that as
    many runs train at once as there are cores. Raises ConfigError or UnknownName, naming the file, for a file of
    another form, a setting that is unknown, out of range or set in two places, no runs, and runs that are the same or
    differ only in settings that they do not read.
    """
    try:
        sections = _sections(file, layers)
        named = sections["protocols"]
        protocols = None if named is None else read_protocols(named, generators)
        if not any(stores):
            _refuse_stores(sections)
        if variant is not None and "variant" not in sections["grid"]:
            sections["base"].setdefault("variant", variant)
        planned = list(_planned(sections, protocols, stores, usual))
        names = told_apart([(run.name, run.spelled) for run in planned])
        runs = [replace(run, name=name) for run, name in zip(planned, names, strict=True)]
        _refuse_repeated(runs)
        _refuse_unused(stores, runs)
    except AgiqaError as error:
        error.add_note(f"while reading the grid {file}")
        raise
    return runs


def find_grid(name: str) -> Path:
    """The grid file `name`, or the shipped grid of that name. Raises UnknownName where there is neither."""
    if Path(name).is_file():
        return Path(name)
    shipped = {file.stem: file for file in sorted(_SHIPPED.glob("*.yaml"))}
    if name not in shipped:
        kind = "file and no grid"
        raise UnknownName.of(kind, name, shipped)
    return shipped[name]


def as_mapping(where: str, value: object) -> Settings:
    """The mapping `value` with text keys; empty for None. Raises ConfigError, naming `where`, for anything else."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        message = f"Expected keys and values in {where}, found {value!r}."
        raise ConfigError(message)
    return {str(key): item for key, item in cast("dict[object, Any]", value).items()}


def _sections(file: Path, layers: Callable[[], Sequence[str]]) -> Settings:
    """The sections of the file, each checked for its type."""
    content = as_mapping("the file", read_yaml(file))
    for name in content:
        if name not in _SECTIONS:
            kind = "section"
            raise UnknownName.of(kind, name, _SECTIONS)
    given = as_mapping("grid", content.get("grid"))
    if given.get(_LAYER) == _ALL:
        given[_LAYER] = list(layers())
    grid = {key: _different(key, value) for key, value in given.items()}
    entries = _values("runs", content["runs"]) if "runs" in content else []
    runs = [as_mapping("an entry of runs", one) for one in entries]
    base, protocols = as_mapping("base", content.get("base")), content.get("protocols")
    if "protocols" in content and protocols is None:
        protocols = []
    seeds = _different("seeds", content["seeds"]) if "seeds" in content else None
    return {"base": base, "grid": grid, "runs": runs, "seeds": seeds, "protocols": protocols}


def _planned(
    sections: Settings,
    protocols: Sequence[Protocol] | None,
    stores: Sequence[str],
    usual: Mapping[str, Usual],
) -> Iterator[PlannedRun]:
    seeds = sections["seeds"]
    _refuse_twice(sections, protocols)
    for chosen, shown, name in _entries(sections):
        for number, seed in enumerate(seeds or [None]):
            given = {} if seed is None else {"seed": seed}
            settings = {**sections["base"], **chosen, **given}
            for protocol, split in _splits(protocols, number, len(seeds or [None])):
                yield _plan(settings, shown, stores, usual, protocol, split, given=given, name=name)


def _entries(sections: Settings) -> Iterator[tuple[Settings, Settings, Any]]:
    """For each combination and each single run: its settings, those that its name shows, and a given name or None."""
    grid = sections["grid"]
    varied = [name for name, values in grid.items() if len(values) > 1] or list(grid)
    for values in product(*grid.values()) if grid else ():
        chosen = dict(zip(grid, values, strict=True))
        yield chosen, {name: chosen[name] for name in varied}, None
    for entry in sections["runs"]:
        chosen = {name: value for name, value in entry.items() if name != "name"}
        yield chosen, chosen, entry.get("name")


def _refuse_twice(sections: Settings, protocols: Sequence[Protocol] | None) -> None:
    """Raise ConfigError for an empty grid, and for a setting that two places of the grid decide."""
    base, grid, runs = sections["base"], sections["grid"], sections["runs"]
    both = [name for name in grid if name in base]
    if both:
        message = f"`{both[0]}` is both in `base` and in `grid`: keep it in one of them."
        raise ConfigError(message)
    if not grid and not runs:
        message = "There is nothing to run: give `grid` a setting with a list of values, or `runs` an entry."
        raise ConfigError(message)
    if sections["seeds"] is not None and any("seed" in section for section in (base, grid, *runs)):
        message = "`seed` is set beside `seeds`: keep one of them."
        raise ConfigError(message)
    if protocols is None:
        return
    if sections["seeds"] is None and any(protocol.seed_per_fold for protocol in protocols):
        message = "`seed_per_fold` deals the folds to `seeds`: give the grid that section."
        raise ConfigError(message)
    _refuse_idle_seeds(protocols, sections["seeds"] or [])
    for name in SPLIT_SETTINGS:
        if any(name in section for section in (base, grid, *runs)):
            message = f"`{name}` is decided by `protocols`: leave it out, or leave out `protocols`."
            raise ConfigError(message)


def _refuse_idle_seeds(protocols: Sequence[Protocol], seeds: Sequence[Any]) -> None:
    """Raise ConfigError where `seed_per_fold` leaves a seed without a fold."""
    for protocol in protocols:
        idle = [seed for number, seed in enumerate(seeds) if not protocol.of_seed(number, len(seeds))]
        if idle:
            message = (
                f"`seed_per_fold` deals the {len(protocol.splits)} folds of {protocol.name} to {len(seeds)} `seeds`, "
                f"and none is left for {listed([str(seed) for seed in idle])}. Give as many `folds`, or fewer `seeds`."
            )
            raise ConfigError(message)


def _refuse_stores(sections: Settings) -> None:
    """Raise ConfigError for a grid that names stores where only one is given."""
    places = [sections["base"], *({"store": one} for one in sections["grid"].get("store", ())), *sections["runs"]]
    names = list(dict.fromkeys(str(place["store"]) for place in places if "store" in place))
    if len(names) > 1 or (names and names != [_MAIN]):
        main = "STORE is main, give" if _MAIN in names else f"call one of them {_MAIN}, which is STORE, and give"
        message = f"This grid compares the stores {', '.join(names)}: {main} the others by --store NAME=STORE."
        raise ConfigError(message)
    if names:
        message = f"This grid names the store {_MAIN}, and there is no other: leave out the setting `store`."
        raise ConfigError(message)


def _refuse_unused(stores: Sequence[str], runs: Sequence[PlannedRun]) -> None:
    """Raise ConfigError for a store that no run is trained on."""
    idle = [name for name in stores if name not in {run.store for run in runs}]
    if idle:
        what = "STORE, which is called main" if idle[0] == _MAIN else f"the store {idle[0]!r} given by --store"
        message = (
            f"No run of this grid uses {what}. Name it in the setting `store`, as in `grid: {{store: "
            f"[{', '.join(stores)}]}}`, or leave it out."
        )
        raise ConfigError(message)


def _splits(protocols: Sequence[Protocol] | None, seed: int, seeds: int) -> list[tuple[Protocol | None, Split]]:
    """The splits that a head with seed number `seed` of `seeds` trains on."""
    if protocols is None:
        return [(None, Split(settings={}, shown={}))]
    return [(protocol, split) for protocol in protocols for split in protocol.of_seed(seed, seeds)]


def _plan(
    settings: Settings,
    shown: Mapping[str, Any],
    stores: Sequence[str],
    usual: Mapping[str, Usual],
    protocol: Protocol | None,
    split: Split,
    *,
    given: Mapping[str, Any],
    name: Any,
) -> PlannedRun:
    """The run of these settings, named by `name` or the `shown` settings, and by seed and split."""
    store = settings.get("store", stores[0])
    if store not in stores:
        kind, known = "store given by --store", [one for one in stores if one]
        raise UnknownName.of(kind, str(store), known)
    chosen = {**{key: value for key, value in settings.items() if key != "store"}, **split.settings}
    head, train, preset = _configs(chosen, usual.get(store))
    if name is not None and (not isinstance(name, str) or file_name(name) != name or name.startswith(".")):
        message = (
            f"{name!r} is no name of a run: use letters, digits and any of . _ - = + @ , (not at the start a dot)."
        )
        raise ConfigError(message)
    kept = {key: value for key, value in shown.items() if key not in ("seed", *PART_SETTINGS)}
    added = {**given, **({} if protocol is None else {"protocol": protocol.name}), **split.shown}
    full = ",".join(part for part in (name or spell(shown), spell(added)) if part)
    return PlannedRun(
        name=file_name(full) or "base",
        spelled=full,
        row=name or spell(kept) or "base",
        settings=kept,
        head=head,
        train=train,
        preset=preset,
        store=store,
        protocol=protocol_of(train) if protocol is None else protocol.name,
        asked=protocol is not None,
        answer=0 if protocol is not None and protocol.seed_per_fold else train.seed,
    )


def _configs(settings: Settings, usual: Usual | None) -> tuple[HeadConfig, TrainConfig, str | None]:
    """Both configs of flat settings, and their preset.

    An explicit null is a value here. Raises UnknownName for an unknown setting, part of the head or loss, and
    ConfigError for sizes that a part cannot have.
    """
    chosen, preset = {**settings}, settings.get("preset")
    chosen.pop("preset", None)
    known = (*HeadConfig.model_fields, *TrainConfig.model_fields)
    for name in (name for name in chosen if name not in known):
        kind = "setting"
        raise UnknownName.of(kind, name, (*known, *_NOT_OF_A_HEAD))
    values = with_defaults(chosen, None if preset is None else str(preset), usual)
    head = HeadConfig(**{name: value for name, value in values.items() if name in HeadConfig.model_fields})
    train = TrainConfig(**{name: value for name, value in values.items() if name in TrainConfig.model_fields})
    check_sizes(head)
    get_loss(train.loss)
    return head, train, None if preset is None else str(preset)


def with_defaults(chosen: Mapping[str, Any], preset: str | None, usual: Usual | None) -> Settings:
    """The flat settings `chosen`, completed by those of `preset`, then `usual`, and on a CPU one thread."""
    values = {**({} if preset is None else preset_values(preset, chosen)), **chosen}
    if values.get("device") == "cpu" or not torch.cuda.is_available():
        values.setdefault("threads", 1)
    return values if usual is None else {**usual(values), **values}


def unread_settings(head: HeadConfig, train: TrainConfig) -> dict[str, str]:
    """The settings without effect in these configs, each with the part that ignores it (`the encoder 'none'`)."""
    read = encoder_settings(head.encoder)
    unread = {} if read is None else {n: f"the encoder {head.encoder!r}" for n in _ENCODER_SETTINGS if n not in read}
    unread |= unread_by_forms(head)
    split = f"the split {train.split!r}"
    unread |= {name: split for name, of in (("folds", "folds"), ("test_share", "grouped")) if train.split != of}
    if JOINER not in (train.layer or ""):
        unread["layer_mix"] = "a head of one layer"
    if not get_loss(train.loss).reads_levels:
        unread |= dict.fromkeys(("soft_labels", "label_std"), f"the loss {train.loss!r}")
    if train.training_items is None:
        unread["training_seed"] = "a training without `training_items`"
    return unread


def _refuse_repeated(runs: list[PlannedRun]) -> None:
    """Raise ConfigError for two runs of the same name, or of the same settings apart from those without effect."""
    by_config: dict[str, PlannedRun] = {}
    by_name: dict[str, PlannedRun] = {}
    for run in runs:
        unread = unread_settings(run.head, run.train)
        config = str((run.store, {name: value for name, value in run.config.items() if name not in unread}))
        if config in by_config:
            raise ConfigError(_alike(by_config[config], run, unread))
        if run.name in by_name:
            message = f"Two runs of different settings are called {run.name!r}: give one of them a `name`."
            raise ConfigError(message)
        by_config[config] = by_name[run.name] = run


def _alike(first: PlannedRun, second: PlannedRun, unread: Mapping[str, str]) -> str:
    """The message for two runs that would have the same numbers."""
    name = next((name for name, value in second.config.items() if first.config.get(name) != value), None)
    if name is not None:
        return (
            f"The runs {first.name!r} and {second.name!r} differ in `{name}`, which {unread[name]} does not read: "
            f"their results would be equal. Keep one of them; list settings that only some encoders read under `runs`."
        )
    if first.name == second.name:
        return f"The run {first.name!r} is there twice: keep it once."
    return f"The runs {first.name!r} and {second.name!r} have the same settings: keep one of them."


def _values(name: str, value: object) -> list[Any]:
    """`value`, which must be a list with a value."""
    if not isinstance(value, list) or not value:
        message = f"`{name}` needs a list with one value or more, found {value!r}."
        raise ConfigError(message)
    return value


def _different(name: str, value: object) -> list[Any]:
    """`value`, which must be a list of different values."""
    values, seen = _values(name, value), set[str]()
    for one in values:
        if repr(one) in seen:
            message = f"`{name}` has the value {spell({'': one})[1:]} twice: keep it once."
            raise ConfigError(message)
        seen.add(repr(one))
    return values
