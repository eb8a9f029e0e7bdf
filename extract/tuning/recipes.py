"""Recipes: what of a model is trained, and how (`recipes.yaml` beside this module)."""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import yaml

from agiqa.errors import ConfigError, UnknownName
from agiqa.extract.models.compiling import COMPILING

SCHEDULES = ("cosine", "constant")
CHECKPOINTING = ("auto", "all", "vision", "none")
"""Layers whose activations are computed again in the backward pass instead of kept; vision: of parts trained whole.

`auto` is chosen by `agiqa.extract.tuning.estimates.settled`.
"""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is trained, and how. Raises ConfigError for a value out of range."""

    name: str
    """The recipe that the settings began with."""
    adapts: str
    """The part of the model with LoRA pairs: one of `agiqa.extract.tuning.parts.PARTS` or a regular expression."""
    trains: tuple[str, ...] = ()
    """The parts that are trained and saved whole."""
    rank: int = 64
    alpha: float = 64
    """LoRA's product is scaled by alpha / rank."""
    dropout: float = 0.05
    """Of the input of LoRA pairs."""
    lr: float = 2e-6
    """Highest learning rate of AdamW."""
    weight_decay: float = 0.1
    """Of matrices; vectors (biases and norms) have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    warmup: float = 0.01
    """Share of the steps in which the learning rate rises."""
    schedule: str = "cosine"
    """How the learning rate goes on: one of SCHEDULES."""
    batch_size: int = 2
    """Items per step, over all devices."""
    micro_batch: int | None = None
    """Items per forward pass; None for as many as fit. Changes results by rounding and dropout only."""
    steps: int | None = None
    epochs: float | None = None
    """Used if `steps` is None."""
    max_length: int | None = None
    """Most tokens of a conversation, its image included; None for as many as the model has positions."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None for no limit."""
    checkpointing: str = "auto"
    """One of CHECKPOINTING."""
    compile: str = "auto"
    """One of COMPILING; `auto` is chosen by `settled` too. Compiled layers are faster on a GPU, and round less."""
    validations: int = 10
    """Validations in the whole training, evenly spread."""
    patience: int = 3
    """Stop after this many validations without a better loss; 0 never stops early."""

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for kind, name, known in (
            ("schedule", self.schedule, SCHEDULES),
            ("checkpointing", self.checkpointing, CHECKPOINTING),
            ("choice of compile", self.compile, COMPILING),
        ):
            if name not in known:
                raise UnknownName.of(kind, name, known)
        for key, fits, wanted in (
            *((key, getattr(self, key) >= 1, "1 or more") for key in ("rank", "batch_size", "validations")),
            *((key, getattr(self, key) > 0, "more than 0") for key in ("alpha", "lr")),
            *((key, 0 <= getattr(self, key) < 1, "at least 0 and below 1") for key in _SHARES),
            *((key, getattr(self, key) >= 0, "0 or more") for key in ("weight_decay", "patience")),
            *((key, (value := getattr(self, key)) is None or value > 0, "more than 0, or null") for key in _OPTIONAL),
        ):
            if not fits or getattr(self, key) == math.inf:
                message = f"The recipe's {key} is {getattr(self, key)}; it must be {wanted}."
                raise ConfigError(message)
        for pattern in (self.adapts, *self.trains):
            try:
                re.compile(pattern)
            except re.error as error:
                message = f"The recipe names the modules {pattern!r}, which is no regular expression ({error})."
                raise ConfigError(message) from error
        if (self.steps is None) == (self.epochs is None):
            message = f"The recipe {self.name} needs either steps or epochs; the other must be null."
            raise ConfigError(message)

    def as_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "trains": list(self.trains)}


_SHARES = ("dropout", "beta1", "beta2", "warmup")
_OPTIONAL = ("micro_batch", "steps", "epochs", "max_length", "clip")
_KEYS = tuple(field.name for field in fields(Recipe) if field.name != "name")


@cache
def _shipped() -> Mapping[str, Mapping[str, Any]]:
    found: Mapping[str, Mapping[str, Any]] = yaml.safe_load(
        Path(__file__).with_name("recipes.yaml").read_text(encoding="utf-8")
    )
    return found


def summaries() -> dict[str, str]:
    """What each shipped recipe is, by its name."""
    return {name: str(settings["summary"]) for name, settings in _shipped().items()}


def recipe_of(source: str, changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe called `source`, or in the YAML file `source`, with single settings replaced by `changes`.

    Setting `steps` unsets `epochs`, and the reverse. Raises UnknownName for a recipe or setting, ConfigError for a
    value or a file that cannot be used.
    """
    name, settings = _read(source)
    for key in changes or {}:
        _check_key(key, "given for this run")
    settings = _beside({**settings}, dict(changes or {}))
    settings.pop("summary", None)
    values = {key: _fitting(key, value) for key, value in settings.items()}
    if "adapts" not in values:
        message = f"{source}: the recipe says nothing of `adapts`, the part with LoRA pairs; or give it a `base`."
        raise ConfigError(message)
    return Recipe(name=name, **values)


def _read(source: str) -> tuple[str, dict[str, Any]]:
    """The name of a recipe, and its settings with those of its base."""
    shipped, path = _shipped(), Path(source)
    if source in shipped:
        return source, _with_base(source, shipped[source])
    if path.suffix.lower() not in (".yaml", ".yml"):
        unknown = UnknownName.of("recipe", source, [*shipped, "FILE.yaml"])
        raise unknown
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        message = f"{path}: the recipe cannot be read as YAML ({error})."
        raise ConfigError(message) from error
    if not isinstance(found, dict):
        message = f"{path}: expected lines `setting: value`, found {type(found).__name__}."
        raise ConfigError(message)
    for key in found:
        if key not in ("base", "summary"):
            _check_key(str(key), f"in {path}")
    return path.stem, _with_base(str(path), found)


def _with_base(source: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: value for key, value in settings.items() if key != "base"}
    base = settings.get("base")
    if base is None:
        return own
    if base not in _shipped():
        unknown = UnknownName.of("recipe", str(base), _shipped())
        unknown.add_note(f"as the base of {source}")
        raise unknown
    return _beside(_with_base(str(base), _shipped()[str(base)]), own)


def _beside(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes`; of steps and epochs the changed one counts."""
    for key, other in (("steps", "epochs"), ("epochs", "steps")):
        if changes.get(key) is not None and other not in changes:
            changes = {**changes, other: None}
    return {**settings, **changes}


def _check_key(key: str, where: str) -> None:
    if key not in _KEYS:
        unknown = UnknownName.of("setting of a recipe", key, _KEYS)
        unknown.add_note(where)
        raise unknown


def _fitting(key: str, value: Any) -> Any:
    """`value` in the type of the setting `key`. Raises ConfigError if it has another."""
    wanted = get_type_hints(Recipe)[key]
    kinds = get_args(wanted) if isinstance(wanted, UnionType) else (wanted,)
    if key == "trains" and isinstance(value, list | tuple) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, str) and str in kinds:
        return value
    if isinstance(value, int) and not isinstance(value, bool) and int in kinds:
        return value
    if isinstance(value, int | float | str) and not isinstance(value, bool) and float in kinds:
        try:
            return float(value)  # YAML reads 2e-6 as text
        except ValueError:
            pass
    names = " or ".join("null" if kind is type(None) else getattr(kind, "__name__", "list") for kind in kinds)
    message = f"The recipe's {key} is {value!r}; expected {'a list of names' if key == 'trains' else names}."
    raise ConfigError(message)
