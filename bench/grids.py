"""A grid of heads from a YAML file: which settings vary, every combination of them, and a readable name for each.

base: {projection: sketch, width: 128, preset: paper}    # what all runs have: settings of `agiqa train`, flat
grid:                                                    # every combination, the last setting varying fastest
  encoder: [xlstm, gru]
  seed: [0, 1, 2]
runs:                                                    # single runs beside the grid
  - {encoder: none, pooling: max}
  - {encoder: lstm, layers: 4, name: deep}
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, cast

import torch

from agiqa.errors import AgiqaError, ConfigError, UnknownName
from agiqa.heads.config import HeadConfig, TrainConfig, read_yaml
from agiqa.heads.presets import preset_values

_SECTIONS = ("base", "grid", "runs")
_LONGEST_NAME = 120
Settings = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run of a grid."""

    name: str
    """Of its folder: what varies, as in `encoder=gru,seed=0`."""
    row: str
    """The same without the seed: its row of the table."""
    head: HeadConfig
    train: TrainConfig
    preset: str | None

    @property
    def config(self) -> Settings:
        """All settings, in plain values."""
        settings = {**self.head.model_dump(mode="json"), **self.train.model_dump(mode="json")}
        return settings if self.preset is None else {"preset": self.preset, **settings}


def read_grid(file: Path) -> list[PlannedRun]:
    """The runs that `file` asks for, in its order.

    On a CPU a run whose `threads` nobody sets has one, so that as many run at once as there are cores. Raises
    ConfigError or UnknownName, naming the file, for what is no such grid, a setting that is unknown, out of range or
    both in `base` and in `grid`, no runs, and runs that are the same.
    """
    try:
        runs = list(_planned(_sections(file)))
        _refuse_repeated(runs)
    except AgiqaError as error:
        error.add_note(f"while reading the grid {file}")
        raise
    return runs


def _sections(file: Path) -> Settings:
    """The sections of the file, each of the kind that it must be."""
    content = _mapping("the file", read_yaml(file))
    for name in content:
        if name not in _SECTIONS:
            kind = "section"
            raise UnknownName.of(kind, name, _SECTIONS)
    grid = {key: _values(key, value) for key, value in _mapping("grid", content.get("grid")).items()}
    runs = (
        [_mapping("an entry of runs", one) for one in _values("runs", content.get("runs", []))]
        if "runs" in content
        else []
    )
    return {"base": _mapping("base", content.get("base")), "grid": grid, "runs": runs}


def _planned(sections: Settings) -> Iterator[PlannedRun]:
    base, grid, runs = sections["base"], sections["grid"], sections["runs"]
    both = [name for name in grid if name in base]
    if both:
        message = f"`{both[0]}` is both in `base` and in `grid`: keep it in one of them."
        raise ConfigError(message)
    if not grid and not runs:
        message = "There is nothing to run: give `grid` a setting with a list of values, or `runs` an entry."
        raise ConfigError(message)
    varied = [name for name, values in grid.items() if len(values) > 1] or list(grid)
    for values in product(*grid.values()) if grid else ():
        chosen = dict(zip(grid, values, strict=True))
        yield _plan({**base, **chosen}, {name: chosen[name] for name in varied})
    for entry in runs:
        chosen = {name: value for name, value in entry.items() if name != "name"}
        yield _plan({**base, **chosen}, chosen, name=entry.get("name"))


def _plan(settings: Settings, shown: Mapping[str, Any], *, name: Any = None) -> PlannedRun:
    """The run of these settings, named by those that are `shown` unless it has a name."""
    head, train, preset = _configs(settings)
    if name is not None and (not isinstance(name, str) or _file_name(name) != name or name.startswith(".")):
        message = (
            f"{name!r} is no name of a run: use letters, digits and any of . _ - = + @ , (not at the start a dot)."
        )
        raise ConfigError(message)
    row = name or _spell({key: value for key, value in shown.items() if key != "seed"}) or "base"
    return PlannedRun(name=name or _file_name(_spell(shown)) or "base", row=row, head=head, train=train, preset=preset)


def _configs(settings: Settings) -> tuple[HeadConfig, TrainConfig, str | None]:
    """Both configs of flat settings, which beat those of the preset. An explicit null is a value here."""
    chosen = {name: value for name, value in settings.items() if name != "preset"}
    preset = settings.get("preset")
    known = (*HeadConfig.model_fields, *TrainConfig.model_fields)
    for name in chosen:
        if name not in known:
            kind = "setting"
            raise UnknownName.of(kind, name, (*known, "preset"))
    values = {**({} if preset is None else preset_values(str(preset), chosen)), **chosen}
    if values.get("device") == "cpu" or not torch.cuda.is_available():
        values.setdefault("threads", 1)
    head = HeadConfig(**{name: value for name, value in values.items() if name in HeadConfig.model_fields})
    train = TrainConfig(**{name: value for name, value in values.items() if name in TrainConfig.model_fields})
    return head, train, None if preset is None else str(preset)


def _refuse_repeated(runs: list[PlannedRun]) -> None:
    """Raise ConfigError for two runs that have the same settings or the same name."""
    by_config: dict[str, PlannedRun] = {}
    by_name: dict[str, PlannedRun] = {}
    for run in runs:
        config = str(run.config)
        if config in by_config:
            message = f"The runs {by_config[config].name!r} and {run.name!r} have the same settings: keep one of them."
            raise ConfigError(message)
        if run.name in by_name:
            message = f"Two runs of different settings are called {run.name!r}: give one of them a `name`."
            raise ConfigError(message)
        by_config[config] = by_name[run.name] = run


def _spell(settings: Mapping[str, Any]) -> str:
    """`key=value,key=value`."""
    words = {True: "true", False: "false", None: "none"}
    return ",".join(
        f"{name}={words[value] if value is None or isinstance(value, bool) else value}"
        for name, value in settings.items()
    )


def _file_name(text: str) -> str:
    """`text` as a folder can be called, with a hash in the place of a long end."""
    safe = re.sub(r"[^\w.,=+@-]+", "_", text)
    if len(safe) <= _LONGEST_NAME:
        return safe
    return f"{safe[: _LONGEST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _mapping(where: str, value: object) -> Settings:
    """`value` with text keys; nothing is an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        message = f"Expected keys and values in {where}, found {value!r}."
        raise ConfigError(message)
    return {str(key): item for key, item in cast("dict[object, Any]", value).items()}


def _values(name: str, value: object) -> list[Any]:
    """A list that is not empty."""
    if not isinstance(value, list) or not value:
        message = f"`{name}` needs a list with one value or more, found {value!r}."
        raise ConfigError(message)
    return value
