"""The plan of a transfer between two data sets: the heads to train on each, and the result lines they give.

The settings are those of `agiqa train --config`, with one more section for few-shot trainings:

head: {projection: sketch, encoder: gru, width: 128}
train: {epochs: 20, batch_size: 32}
few_shot: {epochs: 40, batch_size: 8, lr: 5e-4}

They are fixed before anything is trained, so nothing is chosen on a test part. A few-shot training has no validation
items: it keeps its last epoch, and its head is not calibrated. Its SRCC and PLCC compare with those of the other heads;
errors such as RMSE do not where `train` sets `calibrate`.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from agiqa.bench.ablation.grids import as_mapping, with_defaults
from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.data.splits import PARTITION_SETTINGS
from agiqa.heads.evaluation.runs import complete_settings
from agiqa.heads.settings.config import HeadConfig, TrainConfig, Usual, read_yaml
from agiqa.heads.training.experiment import OF_THE_MACHINE

Way = Literal["within", "apply", "tp", "fresh", "warm"]

WAYS: tuple[Way, ...] = ("within", "apply", "tp", "fresh", "warm")
SPLITS = ("published", "grouped")
SHOTS = (10, 30, 100, 300)
_SECTIONS = ("head", "train", "few_shot")
_NO_VALIDATION: dict[str, Any] = {"validation": 0.0, "patience": None, "refit": False, "calibrate": False}


@dataclass(frozen=True, kw_only=True)
class TransferSettings:
    """The settings of heads on all items and on few."""

    head: HeadConfig
    train: TrainConfig
    few_shot: TrainConfig
    preset: str | None

    def record(self) -> dict[str, Any]:
        """The settings that change a head, without those of the machine, in plain values."""
        hidden = set(OF_THE_MACHINE)
        sections = {name: getattr(self, name).model_dump(mode="json", exclude=hidden) for name in _SECTIONS}
        return {**sections, "preset": self.preset}


def completed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A `record` of settings, completed as an older agiqa trained: by `complete_settings`, else by the defaults."""
    kinds = {"head": HeadConfig, "train": TrainConfig, "few_shot": TrainConfig}
    recorded = {**record, "head": complete_settings(record.get("head", {}))}
    known = {
        name: {
            setting: value
            for setting, value in {**kind().model_dump(mode="json"), **recorded.get(name, {})}.items()
            if setting not in OF_THE_MACHINE
        }
        for name, kind in kinds.items()
    }
    return {**record, **known}


@dataclass(frozen=True, kw_only=True)
class PlannedHead:
    """A head to train, which gives one line or several."""

    name: str
    """Name of its run folder."""
    on: str
    """The data set that it is trained on."""
    train: TrainConfig
    start: str | None = None
    """The head whose weights it starts from."""


@dataclass(frozen=True, kw_only=True)
class PlannedLine:
    """One line of the results."""

    source: str
    target: str
    way: Way
    items: int | None
    """Training items of the last training; None: all outside the test part."""
    seed: int
    head: str
    """The head that is tested on the target's test part."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that define its row."""
        items = "all" if self.items is None else self.items
        return {"from": self.source, "to": self.target, "way": self.way, "training_items": items}

    @property
    def row(self) -> str:
        """The settings as one text."""
        return ",".join(f"{name}={value}" for name, value in self.settings.items())

    @property
    def name(self) -> str:
        """The settings and the seed as one text."""
        return f"{self.row},seed={self.seed}"


@dataclass(frozen=True, kw_only=True)
class TransferPlan:
    """All heads and lines of a transfer."""

    sweeps: tuple[tuple[PlannedHead, ...], ...]
    """Heads that are trained together, each sweep on one data set; start heads are in earlier sweeps."""
    lines: tuple[PlannedLine, ...]


def read_transfer_settings(
    file: Path | None,
    overrides: Mapping[str, Any] | None = None,
    *,
    preset: str | None = None,
    usual: Usual | None = None,
) -> TransferSettings:
    """The settings of `file`; `overrides` (of `train`, flat; None: not given) come before it, `preset` after it.

    `usual` is `usual_settings` of both stores. On a CPU, `threads` is 1 unless set, so that as many heads train at once
    as there are cores. Raises ConfigError or UnknownName, naming the file, for a file of another form, and for settings
    that a transfer sets itself.
    """
    try:
        sections = _read_sections(file)
        sections["train"] |= {name: value for name, value in (overrides or {}).items() if value is not None}
        return _settings(sections, preset, usual)
    except (ConfigError, UnknownName) as error:
        if file is not None:
            error.add_note(f"while reading {file} and the options given")
        raise


def plan_transfer(
    names: tuple[str, str],
    settings: TransferSettings,
    *,
    seeds: int,
    shots: Sequence[int],
    one_way: bool = False,
) -> TransferPlan:
    """The heads and lines of a transfer from the first of `names` to the second and, unless `one_way`, back.

    Few-shot trainings draw their items anew for every seed, smaller numbers nested in larger ones; their test part is
    that of the data set's own heads. Raises ConfigError for equal or empty names, and for seeds or shots that are not
    positive or repeated.
    """
    first, second = names
    if _safe(first) == _safe(second) or not (first and second):
        message = f"Two data sets need two names, and these are {first!r} and {second!r}. Give --names A,B."
        raise ConfigError(message)
    if seeds < 1 or len(set(shots)) < len(shots) or any(count < 1 for count in shots):
        message = f"A transfer needs seeds (given: {seeds}) and different numbers of items from 1 (given: {shots})."
        raise ConfigError(message)
    steps = range(seeds)
    counts = [*sorted(shots), None]
    own = {name: tuple(_own(name, settings, step) for step in steps) for name in names}
    few = {
        (a, b): tuple(
            _few(a, b, settings, step, count, way) for way in _few_ways(settings) for count in counts for step in steps
        )
        for a, b in ((first, second), (second, first))
    }
    directions = [(first, second)] if one_way else [(first, second), (second, first)]
    sweeps = [own[first], (*own[second], *few[first, second])]
    if not one_way:
        sweeps.append(few[second, first])
    lines = [line for a, b in directions for line in _lines(a, b, settings, steps, counts)]
    return TransferPlan(sweeps=tuple(sweeps), lines=tuple(lines))


def _lines(
    a: str, b: str, settings: TransferSettings, steps: Sequence[int], counts: Sequence[int | None]
) -> Iterator[PlannedLine]:
    """The lines of one direction, way by way."""
    for way in _ways(settings):
        for count in counts if way in ("fresh", "warm") else (None,):
            for step in steps:
                seed = settings.train.seed + step
                if way == "fresh" or way == "warm":
                    head = _few(a, b, settings, step, count, way).name
                else:
                    head = _own(b if way == "tp" else a, settings, step).name
                target = a if way == "within" else b
                yield PlannedLine(source=a, target=target, way=way, items=count, seed=seed, head=head)


def _ways(settings: TransferSettings) -> tuple[Way, ...]:
    """The ways of these heads: closed forms, also as `init`, are fitted anew, so that none starts from another head."""
    fitted_anew = settings.head.is_closed or settings.head.init is not None
    return tuple(way for way in WAYS if not (fitted_anew and way == "warm"))


def _few_ways(settings: TransferSettings) -> list[Literal["fresh", "warm"]]:
    """The ways that train on few items."""
    return ["fresh", "warm"] if "warm" in _ways(settings) else ["fresh"]


def _own(name: str, settings: TransferSettings, step: int) -> PlannedHead:
    """The head of a data set itself."""
    seed = settings.train.seed + step
    return PlannedHead(
        name=f"{_safe(name)},own,seed={seed}", on=name, train=settings.train.model_copy(update={"seed": seed})
    )


def _few(
    a: str, b: str, settings: TransferSettings, step: int, count: int | None, way: Literal["fresh", "warm"]
) -> PlannedHead:
    """A head trained on some items of `b`, from random weights or from the head of `a`."""
    config, seed = settings.few_shot, settings.train.seed + step
    first = config.split_seed if config.training_seed is None else config.training_seed
    drawn = None if count is None else first + step
    items = "all" if count is None else count
    how = "fresh" if way == "fresh" else f"from={_safe(a)}"
    return PlannedHead(
        name=f"{_safe(b)},{how},items={items},seed={seed}",
        on=b,
        train=config.model_copy(update={"seed": seed, "training_items": count, "training_seed": drawn}),
        start=None if way == "fresh" else _own(a, settings, step).name,
    )


def _read_sections(file: Path | None) -> dict[str, dict[str, Any]]:
    content = as_mapping(f"{file}", None if file is None else read_yaml(file))
    for name in content:
        if name not in _SECTIONS:
            kind = "section"
            raise UnknownName.of(kind, name, _SECTIONS)
    return {name: as_mapping(f"section {name!r}", content.get(name)) for name in _SECTIONS}


def _settings(sections: Mapping[str, dict[str, Any]], preset: str | None, usual: Usual | None) -> TransferSettings:
    """The settings of `sections`, completed by `with_defaults`."""
    below = with_defaults({**sections["head"], **sections["train"]}, preset, usual)
    known = {"head": HeadConfig.model_fields, "train": TrainConfig.model_fields}
    head, train = ({**{k: v for k, v in below.items() if k in known[name]}, **sections[name]} for name in known)
    whole = TrainConfig(**train)
    _check(whole, sections["few_shot"])
    few = TrainConfig(**{**train, **_NO_VALIDATION, **sections["few_shot"]})
    return TransferSettings(head=HeadConfig(**head), train=whole, few_shot=few, preset=preset)


def _check(train: TrainConfig, few_shot: Mapping[str, Any]) -> None:
    """Raise ConfigError for settings that a transfer sets itself or does not support."""
    if train.split not in SPLITS:
        message = (
            f"A transfer tests on one part of each data set: the split is {' or '.join(SPLITS)}, not {train.split!r}."
        )
        raise ConfigError(message)
    if train.training_items is not None:
        message = "`training_items` of a transfer are given by --shots; leave the setting out."
        raise ConfigError(message)
    fixed = {"seed", "label", "layer", *PARTITION_SETTINGS, "device", "keep", "memory"} - _NO_VALIDATION.keys()
    for name in few_shot:
        if name in fixed or (name in _NO_VALIDATION and few_shot[name] != _NO_VALIDATION[name]):
            message = (
                f"`{name}` cannot be set in `few_shot`: the items are those of `train` and --shots, all of them train."
            )
            raise ConfigError(message)


def _safe(name: str) -> str:
    """`name` as a part of a folder's name."""
    return re.sub(r"[^\w.-]+", "_", name)
