"""The runs of networks: which network, label, protocol, seed and split, and a readable name for each."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agiqa.bench.ablation.protocols import Protocol, generators_of, read_protocols
from agiqa.bench.networks.config import NetworkConfig
from agiqa.bench.networks.images import ImageSource
from agiqa.heads.data.splits import PARTITION_SETTINGS
from agiqa.heads.settings.config import TrainConfig

_OF_THE_SPLIT = ("label", "seed", *PARTITION_SETTINGS)
"""Settings of a run that are those of a head's training."""
NOT_COMPARED = ("source", "precision")
"""Settings that may differ between two runs of one name."""


@dataclass(frozen=True, kw_only=True)
class NetworkRun:
    """One training of a network, or the predictions of another tool for one seed."""

    name: str
    """Of its folder."""
    row: str
    """Of its row in tables: the name of the network or tool."""
    protocol: str
    config: Mapping[str, Any]
    """All settings in plain values: those of NetworkConfig, and of the split, label and seed."""
    store: str = ""

    @property
    def settings(self) -> Mapping[str, Any]:
        """What identifies its row."""
        return {"network": self.row}

    @property
    def label(self) -> str:
        """The label that it learns."""
        return str(self.config["label"])

    @property
    def answer(self) -> int:
        """Its seed: the folds of one seed are put together."""
        return int(self.config["seed"])

    @property
    def network(self) -> NetworkConfig:
        """The settings of the network."""
        return NetworkConfig(**{name: self.config[name] for name in NetworkConfig.model_fields if name in self.config})

    @property
    def train(self) -> TrainConfig:
        """The split, and as many epochs as the network has."""
        chosen = {name: self.config[name] for name in _OF_THE_SPLIT if self.config.get(name) is not None}
        epochs = self.network.all_epochs if "image_size" in self.config else 1
        return TrainConfig(**chosen, epochs=epochs)


@dataclass(frozen=True, kw_only=True)
class Protocols:
    """What all networks of a command are trained and tested on."""

    labels: Sequence[str]
    names: Sequence[str]
    """See bench/ablation/protocols.py."""
    seeds: Sequence[int]
    folds: int = 5
    split_seed: int = 0
    validation: float = 0.1

    def read(self, source: ImageSource) -> list[Protocol]:
        """The protocols with their splits. Raises as `read_protocols`."""
        options = {"folds": self.folds, "split_seed": self.split_seed}
        section = [{name: options} if name == "grouped" else name for name in self.names]
        return read_protocols(section, lambda: generators_of(source))


def plan_runs(networks: Sequence[NetworkConfig], protocols: Protocols, source: ImageSource) -> list[NetworkRun]:
    """A run for each network, label, protocol, seed and split. Raises as `read_protocols`."""
    return [
        _run(network.network, network.model_dump(mode="json"), label, protocol, seed, split.settings, protocols)
        for network in networks
        for label in protocols.labels
        for protocol in protocols.read(source)
        for seed in protocols.seeds
        for split in protocol.splits
    ]


def predicted_runs(
    name: str, identity: str, seeds: Sequence[int], protocols: Protocols, source: ImageSource
) -> list[NetworkRun]:
    """The runs of another tool's predictions, the file with SHA-256 `identity`. Raises as `read_protocols`."""
    return [
        _run(name, {"network": name, "predictions": identity}, label, protocol, seed, split.settings, protocols)
        for label in protocols.labels
        for protocol in protocols.read(source)
        for seed in seeds
        for split in protocol.splits
    ]


def _run(
    row: str,
    settings: Mapping[str, Any],
    label: str,
    protocol: Protocol,
    seed: int,
    split: Mapping[str, Any],
    protocols: Protocols,
) -> NetworkRun:
    drawn: dict[str, Any] = {"label": label, "seed": seed, "validation": protocols.validation}
    drawn |= {"split_seed": protocols.split_seed, **split}
    train = TrainConfig(**drawn)
    of_split = train.model_dump(mode="json", include=set(_OF_THE_SPLIT))
    shown = {"label": label, "protocol": protocol.name, "seed": seed}
    shown |= {name: split[name] for name in ("fold", "held_out") if name in split}
    spelled = ",".join([row, *(f"{name}={value}" for name, value in shown.items())])
    return NetworkRun(
        name=re.sub(r"[^\w.,=+@-]+", "_", spelled), row=row, protocol=protocol.name, config={**settings, **of_split}
    )


def recorded_run(line: Mapping[str, Any]) -> NetworkRun:
    """The run of a result line."""
    return NetworkRun(name=line["name"], row=line["row"], protocol=line["protocol"], config=line["config"])
