"""The folder of a search: the settings that it belongs to, and settings as files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import yaml

from agiqa.errors import DataError
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.training.experiment import OF_THE_MACHINE, differences
from agiqa.store.disk.files import FOLDER_LOCK, write_text_atomically

KEPT = "the trials before are kept"
"""The note on a full disk: what is kept."""


def claim(path: Path, about: Mapping[str, Any]) -> None:
    """Write about.json. Raises DataError where the file is of another search."""
    if path.exists():
        try:
            there = cast("object", json.loads(path.read_bytes()))
        except ValueError:
            there = None
        if not isinstance(there, dict) or cast("dict[str, Any]", there).get("kind") != "search":
            message = f"{path} is not of a search. Choose another OUT."
            raise DataError(message)
        without = ("path", *OF_THE_MACHINE)
        different = differences(cast("dict[str, Any]", there), about, verb="there", without=without)
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            message = f"{path.parent} holds a search with other settings or data:\n{lines}\nChoose another OUT."
            raise DataError(message)
    elif any(one.name != FOLDER_LOCK for one in path.parent.iterdir()):
        message = f"{path.parent} holds files that are not of a search. Choose another OUT."
        raise DataError(message)
    write_text_atomically(path, json.dumps(about, indent=2, ensure_ascii=False) + "\n")


def configs_of(chosen: Mapping[str, Any], head: HeadConfig, train: TrainConfig) -> tuple[HeadConfig, TrainConfig]:
    """`head` and `train` with the flat settings `chosen`. Raises ConfigError for sizes that a part cannot have."""
    of_head: dict[str, Any] = {name: value for name, value in chosen.items() if name in HeadConfig.model_fields}
    of_train: dict[str, Any] = {name: value for name, value in chosen.items() if name in TrainConfig.model_fields}
    return HeadConfig(**{**head.model_dump(), **of_head}), TrainConfig(**{**train.model_dump(), **of_train})


def settings_yaml(head: HeadConfig, train: TrainConfig) -> str:
    """The text of a settings file; settings that have their defaults are left out."""
    sections = {name: changed(config) for name, config in (("head", head), ("train", train))}
    return yaml.safe_dump(sections, sort_keys=False, allow_unicode=True)


def changed(config: HeadConfig | TrainConfig) -> dict[str, Any]:
    """The settings of `config` that differ from their defaults, in plain values."""
    default = type(config)().model_dump(mode="json")
    return {name: value for name, value in config.model_dump(mode="json").items() if value != default[name]}
