"""Protocols: the splits that a head is trained and tested on. The test parts of all splits are scored together.

published                    the split of the data set; its test prompts may also occur in training
grouped                      k folds of whole prompts: every item is tested once, by a head that never saw its prompt
leave-one-generator-out      every item is tested once, by a head that never saw an image of its generator

A grid file lists them, each with its options if it has any:

protocols: [published, {grouped: {folds: 5, split_seed: 0, seed_per_fold: false}}, leave-one-generator-out]
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from agiqa.errors import ConfigError, UnknownName, listed
from agiqa.heads.data.features import FeatureSource, ItemSource, location_of
from agiqa.heads.data.layers import stored_layers
from agiqa.heads.settings.config import TrainConfig

PUBLISHED, GROUPED, GENERATORS = "published", "grouped", "leave-one-generator-out"
PROTOCOLS = (PUBLISHED, GROUPED, GENERATORS)
SPLIT_SETTINGS = ("split", "folds", "fold", "held_out", "test_share")
"""Training settings that a protocol decides."""
PART_SETTINGS = ("fold", "held_out")
"""The ones that only choose the test part: runs that differ in nothing else share a row."""
_GROUPED_OPTIONS: Mapping[str, Any] = {"folds": 5, "split_seed": None, "seed_per_fold": False}
_NAMES = {"published": PUBLISHED, "grouped": "one group held out", "folds": GROUPED, "generator": GENERATORS}


@dataclass(frozen=True, kw_only=True)
class Split:
    """One training of a protocol."""

    settings: Mapping[str, Any]
    """Training settings; they override those of the grid."""
    shown: Mapping[str, Any]
    """The settings that differ between the splits of a protocol; they are part of the name of a run."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Splits whose test parts are scored together."""

    name: str
    splits: tuple[Split, ...]
    seed_per_fold: bool = False
    """Whether each seed trains only its share of the splits; the test parts of all seeds are then scored together."""

    def of_seed(self, number: int, seeds: int) -> tuple[Split, ...]:
        """The splits that seed `number` of `seeds` trains."""
        return self.splits[number::seeds] if self.seed_per_fold else self.splits


def protocol_of(config: TrainConfig) -> str:
    """The protocol of a training outside `protocols`."""
    return _NAMES[config.split]


def read_protocols(section: object, generators: Callable[[], Sequence[str]]) -> list[Protocol]:
    """The protocols of a grid file's `section`; `generators` returns the generators in the data.

    Raises UnknownName for unknown protocols and options, and ConfigError for a section of another form, a protocol that
    is named twice, and data with fewer than two generators.
    """
    if not isinstance(section, list) or not section:
        message = f"`protocols` needs a list of {', '.join(PROTOCOLS)}, found {section!r}."
        raise ConfigError(message)
    found = [_protocol(*_entry(entry), generators) for entry in cast("list[object]", section)]
    names = [protocol.name for protocol in found]
    if len(set(names)) < len(names):
        message = f"`protocols` names one twice: {', '.join(names)}. Keep each once."
        raise ConfigError(message)
    return found


def _entry(entry: object) -> tuple[str, dict[str, Any]]:
    """Name and options of one entry."""
    if isinstance(entry, str):
        return entry, {}
    if isinstance(entry, dict) and len(cast("dict[object, object]", entry)) == 1:
        ((name, options),) = cast("dict[object, object]", entry).items()
        if isinstance(options, dict):
            return str(name), {str(key): value for key, value in cast("dict[object, Any]", options).items()}
    message = f"{entry!r} is no protocol: give a name, or a name with its options, as in {{grouped: {{folds: 5}}}}."
    raise ConfigError(message)


def _protocol(name: str, options: dict[str, Any], generators: Callable[[], Sequence[str]]) -> Protocol:
    if name not in PROTOCOLS:
        kind = "protocol"
        raise UnknownName.of(kind, name, PROTOCOLS)
    known = _GROUPED_OPTIONS if name == GROUPED else {}
    for option in options:
        if option not in known:
            kind = f"option of the protocol {name}"
            raise UnknownName.of(kind, option, known)
    if name == PUBLISHED:
        return Protocol(name=name, splits=(Split(settings={"split": "published"}, shown={}),))
    if name == GROUPED:
        return _folds({**known, **options})
    return Protocol(name=name, splits=tuple(_left_out(generator) for generator in _at_least_two(generators())))


def _folds(options: Mapping[str, Any]) -> Protocol:
    folds, split_seed = options["folds"], options["split_seed"]
    if not isinstance(folds, int) or folds < 2:
        message = f"`folds` is a whole number from 2 on, found {folds!r}."
        raise ConfigError(message)
    if not isinstance(options["seed_per_fold"], bool):
        message = f"`seed_per_fold` is true or false, found {options['seed_per_fold']!r}."
        raise ConfigError(message)
    shared = {"split": "folds", "folds": folds, **({} if split_seed is None else {"split_seed": split_seed})}
    splits = tuple(Split(settings={**shared, "fold": fold}, shown={"fold": fold}) for fold in range(folds))
    return Protocol(name=GROUPED, splits=splits, seed_per_fold=options["seed_per_fold"])


def _left_out(generator: str) -> Split:
    return Split(settings={"split": "generator", "held_out": generator}, shown={"held_out": generator})


def _at_least_two(generators: Sequence[str]) -> Sequence[str]:
    if len(generators) < 2:
        message = (
            f"The protocol {GENERATORS} needs the generators of the images, two or more, and the item table has "
            f"{len(generators)}. Join a column `generator` with `agiqa store labels`."
        )
        raise ConfigError(message)
    return generators


def generators_of(*sources: ItemSource) -> list[str]:
    """The generators of the images, sorted. Raises ConfigError if they differ between the stores."""
    first, *others = ({name for name in source.items.generators if name is not None} for source in sources)
    for source, found in zip(sources[1:], others, strict=True):
        if found != first:
            message = (
                f"{location_of(source)} has images of other generators than {location_of(sources[0])}: "
                f"{listed(sorted(found ^ first))} in one of them only. Leave generators out separately for each store, "
                "or join the same column with `agiqa store labels`."
            )
            raise ConfigError(message)
    return sorted(first)


def layers_of(*sources: FeatureSource) -> list[str]:
    """The layers of the stores, ascending. Raises ConfigError if they differ between the stores."""
    first, *others = (stored_layers(source) for source in sources)
    for source, found in zip(sources[1:], others, strict=True):
        if found != first:
            message = (
                f"{location_of(source)} has the layers {listed(found)}, and {location_of(sources[0])} has "
                f"{listed(first)}: `layer: all` needs the same ones. List the layers that both have."
            )
            raise ConfigError(message)
    return list(first)
