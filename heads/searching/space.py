"""The space of a search: which settings vary, and over which values. The file space.yaml explains the form."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from agiqa.errors import AgiqaError, ConfigError, HeadError, UnknownName
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.layers import pooled_rows
from agiqa.heads.data.splits import PARTITION_SETTINGS
from agiqa.heads.model.encoders.base import encoder_settings
from agiqa.heads.model.head import check_parts
from agiqa.heads.model.losses import get_loss
from agiqa.heads.model.projection import check_encoding
from agiqa.heads.settings.config import HeadConfig, TrainConfig, read_yaml

SHIPPED = Path(__file__).with_name("space.yaml")
_FIXED = (
    *("label", "seed", "device", "keep", "memory", "threads", "refit", "calibrate", "paper_compatible"),
    *("save_seconds", "tensorboard", "layer", *PARTITION_SETTINGS),
)
"""Settings that a search does not vary: items, labels and layer, the machine, and what happens after the search."""
_ENCODER_SETTINGS = ("blocks", "num_heads", "layers", "state_size", "residual", "dropout")
"""Settings that only the encoder may read."""
_LOSS = "loss."
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
Settings = dict[str, Any]


@runtime_checkable
class Suggests(Protocol):
    """What a space needs of a trial of Optuna."""

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...
    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float: ...
    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]

    def suggest(self, trial: Suggests, name: str) -> Any:
        """A value of the trial."""
        return self.values[0] if len(self.values) == 1 else trial.suggest_categorical(name, list(self.values))

    def holds(self, value: Any) -> bool:
        """Whether `value` is one of them."""
        return any(one == value and isinstance(one, bool) is isinstance(value, bool) for one in self.values)

    @property
    def middle(self) -> Any:
        """The first value: names have no order."""
        return self.values[0]

    def record(self) -> Any:
        """As in the file."""
        return list(self.values)


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two, both included."""

    low: float
    high: float
    step: float | None = None
    log: bool = False
    whole: bool = False

    def suggest(self, trial: Suggests, name: str) -> float | int:
        """A number of the trial."""
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        value = trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)
        return round(value, 10) if self.step is not None else value  # without the rounding of 0.1 + 0.2

    def holds(self, value: Any) -> bool:
        """Whether it is a number of the range."""
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        steps = 0.0 if self.step is None else (value - self.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-6)

    @property
    def middle(self) -> float | int:
        """The number in the middle, which a step allows."""
        if self.log:
            middle = math.sqrt(self.low * self.high)
        elif self.step is None:
            middle = (self.low + self.high) / 2
        else:
            middle = self.low + self.step * ((self.high - self.low) / self.step // 2)
        return round(middle) if self.whole else round(middle, 10)

    def record(self) -> Any:
        """As in the file."""
        kind = int if self.whole else float
        ends = {"from": kind(self.low), "to": kind(self.high)}
        return ends | ({} if self.step is None else {"step": kind(self.step)}) | ({"log": True} if self.log else {})


@dataclass(frozen=True, kw_only=True)
class Space:
    """The settings that vary. The weights of a sum of losses are named `loss.TERM`."""

    settings: Mapping[str, Choice | Range]

    def suggest(self, trial: Suggests, head: HeadConfig) -> Settings:
        """The settings of a trial, flat; those that its encoder does not read are left out. `head` has the others."""
        found: Settings = {}
        weights: dict[str, float] = {}
        encoder = self.settings.get("encoder")
        name = head.encoder if encoder is None else str(encoder.suggest(trial, "encoder"))
        read = encoder_settings(name)
        for setting, values in self.settings.items():
            if setting in _ENCODER_SETTINGS and read is not None and setting not in read:
                continue
            value = name if setting == "encoder" else values.suggest(trial, setting)
            if setting.startswith(_LOSS):
                weights[setting.removeprefix(_LOSS)] = float(value)
            else:
                found[setting] = value
        return {**found, "loss": spell_loss(weights)} if weights else found

    def first(self, head: HeadConfig, train: TrainConfig) -> Settings:
        """The values of the first trial: those of the configs where the space holds them, else the middle."""
        values = {**head.model_dump(mode="json"), **train.model_dump(mode="json")}
        values |= {f"{_LOSS}{term}": weight for term, weight in loss_weights(train.loss).items()}
        return {
            name: self._held(varied, values.get(name, 0.0 if name.startswith(_LOSS) else None))
            for name, varied in self.settings.items()
        }

    def at_first(self, head: HeadConfig, train: TrainConfig) -> Settings:
        """The settings of the first trial, flat."""
        return self.suggest(_Given(self.first(head, train)), head)

    @staticmethod
    def _held(varied: Choice | Range, value: Any) -> Any:
        return value if varied.holds(value) else varied.middle

    def record(self) -> Settings:
        """As in the file, with a line per weight of a loss."""
        return {name: values.record() for name, values in self.settings.items()}


class _Given:
    """Suggests given values."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def suggest_categorical(self, name: str, choices: Any) -> Any:
        del choices
        return self._values[name]

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None, log: bool) -> float:
        del low, high, step, log
        return float(self._values[name])

    def suggest_int(self, name: str, low: int, high: int, *, step: int, log: bool) -> int:
        del low, high, step, log
        return int(self._values[name])


def read_space(file: Path, source: FeatureSource, head: HeadConfig, train: TrainConfig) -> Space:
    """The space of `file` for heads on `source`.

    Raises ConfigError or UnknownName, naming the file, for another form, for settings that are unknown, out of range
    or not to be searched, and where nothing varies.
    """
    try:
        content = _mapping("the file", read_yaml(file))
        settings: dict[str, Choice | Range] = {}
        for name, value in content.items():
            settings |= _setting(name, value)
        settings = _readable(settings, source)
        for name, values in settings.items():
            _check_values(name, values, head, train)
        if all(isinstance(values, Choice) and len(values.values) == 1 for values in settings.values()):
            message = "Nothing varies: give a setting a list of two values or more, or a range."
            raise ConfigError(message)
    except AgiqaError as error:
        error.add_note(f"while reading the space {file}")
        raise
    return Space(settings=settings)


def spell_loss(weights: Mapping[str, float]) -> str:
    """`mse+0.5*plcc`; the first loss where all weights are 0."""
    kept = {term: weight for term, weight in weights.items() if weight} or {next(iter(weights)): 1.0}
    return "+".join(term if weight == 1 else f"{weight:g}*{term}" for term, weight in kept.items())


def loss_weights(loss: str) -> dict[str, float]:
    """The weights of `mse+0.5*plcc`."""
    found: dict[str, float] = {}
    for part in loss.split("+"):
        weight, star, term = part.rpartition("*")
        found[term.strip()] = float(weight) if star else 1.0
    return found


def _setting(name: str, value: Any) -> dict[str, Choice | Range]:
    """The values of one entry of the file, or of each loss of the entry `loss`."""
    fields = {**HeadConfig.model_fields, **TrainConfig.model_fields}
    if name in _FIXED:
        message = f"`{name}` cannot be searched: it decides the items, the machine, or what is done with the best head."
        raise ConfigError(message)
    if name not in fields:
        kind = "setting"
        raise UnknownName.of(kind, name, [one for one in fields if one not in _FIXED])
    if name == "loss" and isinstance(value, dict):
        terms = _mapping("loss", cast("object", value))
        for term in terms:
            get_loss(term)
        return {f"{_LOSS}{term}": _values(f"loss of {term}", weight, whole=False) for term, weight in terms.items()}
    return {name: _values(name, value, whole=fields[name].annotation is int)}


def _values(name: str, value: Any, *, whole: bool) -> Choice | Range:
    if isinstance(value, dict):
        return _range(name, _mapping(name, cast("object", value)), whole=whole)
    given: list[Any] = value if isinstance(value, list) else [value]
    values = [_number(one) for one in given]
    if not values or len({repr(one) for one in values}) < len(values):
        message = f"`{name}` needs different values, found {value!r}."
        raise ConfigError(message)
    plain = [one for one in values if one is None or isinstance(one, bool | int | float | str)]
    if len(plain) < len(values):
        message = f"`{name}` needs numbers, names, true, false or null, found {value!r}."
        raise ConfigError(message)
    return Choice(values=tuple(values))


def _range(name: str, given: Mapping[str, Any], *, whole: bool) -> Range:
    for key in given:
        if key not in ("from", "to", "step", "log"):
            kind = f"key of the range of {name}"
            raise UnknownName.of(kind, key, ("from", "to", "step", "log"))
    numbers: dict[str, Any] = {key: _number(given.get(key)) for key in ("from", "to", "step")}
    wrong = [key for key, one in numbers.items() if not _is_number(one, whole=whole, optional=key == "step")]
    low, high, step, log = numbers["from"], numbers["to"], numbers["step"], given.get("log", False)
    if wrong or not isinstance(log, bool):
        kind = "whole numbers" if whole else "numbers"
        message = (
            f"The range of `{name}` needs {kind} `from` and `to`, if wanted `step`, and `log: true`; found {given!r}."
        )
    elif not low < high:
        message = f"The range of `{name}` goes from {low} to {high}: `to` must be larger."
    elif log and (low <= 0 or step is not None):
        message = f"The range of `{name}` is logarithmic: it begins above 0 and has no `step`. Found {given!r}."
    elif step is not None and not 0 < step <= high - low:
        message = f"The `step` of `{name}` is {step}: it must be above 0 and fit between {low} and {high}."
    else:
        last = high if step is None else low + step * math.floor((high - low) / step + 1e-9)
        width = None if step is None else float(step)
        return Range(low=float(low), high=round(float(last), 10), step=width, log=log, whole=whole)
    raise ConfigError(message)


def _number(value: Any) -> Any:
    """`value`, or the number that a text such as 1e-4 is: YAML reads a number only in 1.0e-4."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _is_number(value: Any, *, whole: bool, optional: bool) -> bool:
    if value is None:
        return optional
    return not isinstance(value, bool) and isinstance(value, int if whole else int | float) and math.isfinite(value)


def _readable(settings: Mapping[str, Choice | Range], source: FeatureSource) -> dict[str, Choice | Range]:
    """`settings` without projections that cannot read `source`; the last error where none can.

    Of a store of pooled rows, `source` is what the encoder and pooling of the fixed settings read: they do not vary.
    """
    if pooled_rows(source):
        settings = {name: values for name, values in settings.items() if name not in ("encoder", "pooling")}
    varied = settings.get("projection")
    if not isinstance(varied, Choice):
        return {**settings}
    kept: list[Any] = []
    problem: HeadError | None = None
    for name in varied.values:
        try:
            check_encoding(source, name)
        except HeadError as error:
            problem = error
        else:
            kept.append(name)
    if not kept and problem is not None:
        raise problem
    return {**settings, "projection": Choice(values=tuple(kept))}


def _check_values(name: str, values: Choice | Range, head: HeadConfig, train: TrainConfig) -> None:
    """Raise what the configs and registries raise for a value of the space."""
    if name.startswith(_LOSS):
        for weight in _ends(values):
            if not _is_number(weight, whole=False, optional=False) or weight < 0:
                message = f"The weight of the loss {name.removeprefix(_LOSS)!r} cannot be {weight}: give 0 or more."
                raise ConfigError(message)
        return
    for value in _ends(values):
        given: dict[str, Any] = {name: value}
        if name in HeadConfig.model_fields:
            check_parts(HeadConfig(**{**head.model_dump(), **given}))
        else:
            get_loss(TrainConfig(**{**train.model_dump(), **given}).loss)


def _ends(values: Choice | Range) -> Iterable[Any]:
    return values.values if isinstance(values, Choice) else (values.low, values.high)


def _mapping(where: str, value: object) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        message = f"Expected settings with their values in {where}, found {value!r}."
        raise ConfigError(message)
    return {str(key): one for key, one in cast("dict[object, Any]", value).items()}
