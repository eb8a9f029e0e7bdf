"""A network by name, with pretrained or random weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from agiqa.bench.networks.architectures.contract import Network
from agiqa.bench.networks.architectures.dbcnn import DBCNN
from agiqa.bench.networks.architectures.encoders import check_name, timm_network
from agiqa.bench.networks.architectures.hyperiqa import HyperIQA
from agiqa.bench.networks.architectures.stairiqa import StairIQA
from agiqa.bench.networks.architectures.vil import vil_network
from agiqa.bench.networks.config import OWN, VIL_WEIGHTS, NetworkConfig
from agiqa.bench.networks.weights import State, file_weights, give_weights, holds_distortions, timm_weights
from agiqa.errors import ModelError

RANDOM = "none"
"""The setting `weights` of random weights."""
_VIL = "vil"
_WHOLE: dict[str, Callable[[], Network]] = {"hyperiqa": HyperIQA, "dbcnn": DBCNN, "stairiqa": StairIQA}


def check_network(name: str) -> None:
    """Raise UnknownName, with the nearest names, unless `name` is a network."""
    if name not in OWN:
        check_name(name, OWN)


def random_network(config: NetworkConfig) -> Network:
    """The network of `config` with random weights, by torch's random state. Raises as `timm_network`."""
    name = config.network
    if name in _WHOLE:
        return _WHOLE[name]()
    if name in OWN:
        size = "vil_base" if name == _VIL else name  # as large as the ViT beside it in Table II
        return vil_network(size, image_size=config.image_size, hidden=config.regressor_hidden)
    return timm_network(name, image_size=config.image_size, hidden=config.regressor_hidden)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """Weights that networks begin with, read once for all runs."""

    state: State
    where: str
    """The file, or timm's name."""

    def give(self, network: Network, config: NetworkConfig) -> str:
        """Load them; says into which layers. Raises ModelError as `give_weights`."""
        return give_weights(network, self.state, name=config.network, where=self.where)


def check_weights(config: NetworkConfig, files: Sequence[Path]) -> None:
    """Raise ModelError where a network needs a file of weights, before those of others are downloaded."""
    if config.needs_file and config.weights != RANDOM and not files:
        message = (
            f"timm has no pretrained weights of {config.network}. Give their file by --weights {config.network}=FILE "
            f"(the authors' are at {VIL_WEIGHTS}), or train from random weights by --no-pretrained."
        )
        raise ModelError(message)


def pretrained_weights(config: NetworkConfig, files: Sequence[Path]) -> list[Pretrained]:
    """The weights in `files`, or timm's; none for random ones.

    A file with S-CNN alone leaves VGG16's to timm. Raises ModelError where weights cannot be read or downloaded, and
    where none are known for the network (`check_weights`).
    """
    if config.weights == RANDOM:
        return []
    found = [Pretrained(state=file_weights(file), where=str(file)) for file in files]
    if found and not (config.network == "dbcnn" and all(holds_distortions(one.state) for one in found)):
        return found
    check_weights(config, files)
    name = config.pretrained or config.network
    return [Pretrained(state=timm_weights(name, image_size=config.image_size), where=name), *found]
