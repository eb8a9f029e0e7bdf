"""Features that several trainings read: decoded once, kept once, in this process or for workers beside it.

On a GPU the workers see the same memory by CUDA's handles; rows in RAM are in memory that all of them map, and a
decoded copy on disk is mapped by each. What cannot be kept once is read by every training itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import ConfigError, DataError, StoreError
from agiqa.heads.data.decoded import mapped_features
from agiqa.heads.data.features import FeatureSet, FeatureSource, as_rows, describe_items, item_bytes
from agiqa.heads.data.feeding import Feeding, allowed_memory
from agiqa.heads.data.splits import Partition
from agiqa.heads.model.pooling import check_roles
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.training.shared_memory import SharedMemory
from agiqa.progress import say

Places = dict[str, NDArray[np.int64]]
_CPU = torch.device("cpu")
_WAYS = {"auto": ("device", "ram", "memmap"), "device": ("device",), "ram": ("ram",), "memmap": ("memmap",)}


@dataclass(frozen=True, kw_only=True)
class SharedFeatures:
    """Rows of the items of several trainings; the numbers of each are those that it gets from rows of its own."""

    features: FeatureSet | None = None
    """The items ascending, all rows kept, no targets; None where every training reads for itself."""
    keep: str = "stream"
    """As of `Feeding`."""
    budget: int | None = None
    """As of `Feeding`."""
    copy: Path | None = None
    """As of `Feeding`."""
    memory: int | None = None
    """Bytes that each training may hold that reads for itself; None is what its settings say."""
    mapping: SharedMemory | None = None
    """The memory of the rows, where other processes can map it."""

    def has(self, items: NDArray[np.int64]) -> bool:
        """Whether the rows of all these items are here."""
        return self.features is not None and bool(np.isin(items, self.features.items).all())

    def feeding(self, partition: Partition, label: str, pooling: str) -> tuple[Feeding, Places]:
        """The features with the targets of one training, and where its parts are in them; `test` if it is here.

        Items of other trainings have NaN for a target. Raises as `check_roles` and `read_labels`, for the items of
        `partition` only.
        """
        features = self._require()
        parts = {name: items for name, items in partition.parts().items() if name != "test" or self.has(items)}
        places = {name: np.searchsorted(features.items, items) for name, items in parts.items()}
        learned = np.concatenate([places["train"], places["validation"]])
        values, _ = describe_items(features.source, features.items[learned], label=label)
        if values is None:
            message = f"No targets came with the label {label!r}."
            raise DataError(message)
        targets = torch.full((len(features), *values.shape[1:]), torch.nan, dtype=values.dtype)
        targets[torch.from_numpy(learned)] = values
        check_roles(features.source, _only(features, np.concatenate(list(places.values()))), pooling)
        fed = replace(features, targets=targets)
        return Feeding(features=fed, keep=self.keep, budget=self.budget, copy=self.copy), places

    def line(self) -> str:
        """What was decided, in one line for people."""
        if self.features is None:
            return "features: read by every training itself"
        return Feeding(features=self.features, keep=self.keep, budget=self.budget, copy=self.copy).line()

    def _require(self) -> FeatureSet:
        if self.features is None:
            message = "These trainings share no features."
            raise ConfigError(message)
        return self.features


def share_features(
    source: FeatureSource, partitions: Sequence[Partition], config: TrainConfig, *, device: torch.device, workers: int
) -> SharedFeatures:
    """Decode the items of all `partitions` once, and keep their rows as `keep` and `memory` of `config` say.

    The test items are left out where only the others fit. Where nothing can be shared (`stream`, too little memory, an
    item that cannot be read) the reason is said, and each of the `workers` gets its part of the memory.
    """
    learned = _union([items for one in partitions for items in (one.train, one.validation)])
    everything = all_items(partitions)
    try:
        for keep in _WAYS.get(config.keep, ()):
            for items in (everything, learned):
                found = _kept(source, items, config, keep, device=device, workers=workers)
                if found is not None:
                    say(found.line())
                    return found
    except (DataError, StoreError, ConfigError) as error:
        say(f"{error}\nEvery training reads for itself, so that those without these items are not held up.")
    devices = {_CPU, device}
    memory = None if workers == 1 else min(allowed_memory(config, one) for one in devices) // workers
    alone = SharedFeatures(memory=memory)
    say(alone.line())
    return alone


def _kept(
    source: FeatureSource,
    items: NDArray[np.int64],
    config: TrainConfig,
    keep: str,
    *,
    device: torch.device,
    workers: int,
) -> SharedFeatures | None:
    """The rows of `items` kept one way; None where that has no room for them, or there is no such memory."""
    if keep == "memmap":
        features, folder = mapped_features(source, items, label=None)
        return SharedFeatures(features=features, keep=keep, copy=folder)
    if keep == "device" and device.type != "cuda":
        if config.keep == "auto":
            return None
        keep = "ram"
    where = device if keep == "device" else _CPU
    budget = allowed_memory(config, where)
    if item_bytes(source, items).sum() > budget:
        return None
    if keep == "ram" and workers > 1:
        features, mapping = _in_shared_memory(source, items)
        return SharedFeatures(features=features, keep=keep, budget=budget, mapping=mapping)
    features = FeatureSet.from_store(source, items, label=None, device=where)
    return SharedFeatures(features=features, keep=keep, budget=budget)


def _in_shared_memory(source: FeatureSource, items: NDArray[np.int64]) -> tuple[FeatureSet, SharedMemory]:
    """The features without a label, the rows in memory that other processes can map."""
    mapping = SharedMemory(int(item_bytes(source, items).sum()))
    return FeatureSet.from_store(source, items, label=None, memory=mapping.tensor()), mapping


def _only(features: FeatureSet, positions: NDArray[np.int64]) -> FeatureSet:
    """The items at `positions`; their roles are copied, their rows are not."""
    bounds, lengths = features.offsets.numpy(), features.lengths[positions]
    roles = features.roles.cpu()
    pieces = [roles[bounds[k] : bounds[k + 1]] for k in positions.tolist()]
    return replace(
        features,
        starts=features.starts[positions],
        roles=torch.cat(pieces),
        offsets=torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)])),
        items=features.items[positions],
    )


def all_items(partitions: Sequence[Partition]) -> NDArray[np.int64]:
    """The items of any part of any of these, ascending, each once."""
    return _union([items for one in partitions for items in one.parts().values()])


def _union(groups: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The items of all groups, ascending, each once."""
    return np.unique(np.concatenate(groups))


@dataclass(frozen=True, kw_only=True)
class PackedFeatures:
    """SharedFeatures on the way to another process: handles and paths, no rows."""

    about: SharedFeatures
    """Without the features."""
    items: NDArray[np.int64] | None
    starts: NDArray[np.int64] | None
    offsets: NDArray[np.int64] | None
    roles: NDArray[np.uint8] | Tensor | None
    """A tensor on a GPU only; those of the CPU would go to /dev/shm."""
    rows: Tensor | None
    """On a GPU only."""

    @classmethod
    def of(cls, shared: SharedFeatures) -> "PackedFeatures":
        """What another process needs to see the same rows; `shared` must live as long as it does."""
        features, about = shared.features, replace(shared, features=None)
        if features is None:
            return cls(about=about, items=None, starts=None, offsets=None, roles=None, rows=None)
        on_gpu = features.rows.device.type == "cuda"
        mapped = shared.keep == "memmap"
        return cls(
            about=about,
            items=features.items,
            starts=features.starts,
            offsets=features.offsets.numpy(),
            roles=None if mapped else features.roles if on_gpu else features.roles.numpy(),
            rows=features.rows if on_gpu else None,
        )

    def open(self, source: FeatureSource) -> SharedFeatures:
        """The features, seen from this process."""
        if self.items is None or self.starts is None or self.offsets is None:
            return self.about
        if self.about.copy is not None:
            features, _ = mapped_features(source, self.items, label=None, checked=True)
            return replace(self.about, features=features)
        mapping, rows, roles = self.about.mapping, self.rows, self.roles
        if mapping is not None:
            rows = as_rows(mapping.tensor(), source)
        if rows is None or roles is None:
            message = "The features in RAM were not made for other processes."
            raise ConfigError(message)
        features = FeatureSet(
            rows=rows,
            starts=self.starts,
            roles=torch.from_numpy(roles) if isinstance(roles, np.ndarray) else roles,
            offsets=torch.from_numpy(self.offsets),
            targets=None,
            items=self.items,
            source=source,
        )
        return replace(self.about, features=features)
