"""Where the decoded rows of one training, or of several, are kept. The batches and the numbers are the same.

device  a tensor in the memory of the GPU, which worker processes open by a CUDA handle
ram     a tensor of this process; worker processes get copies of small ones, and map larger ones
memmap  the decoded copy on disk (decoded.py), mapped; the system's page cache holds it once for all processes
stream  RAM for the rows of the first items, as many as fit; the rest is read from the store for every batch
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize
from torch import Tensor

from agiqa.errors import ConfigError, DataError, StoreError
from agiqa.heads.data.batches import BATCHES_AHEAD
from agiqa.heads.data.decoded import mapped_features
from agiqa.heads.data.features import FeatureSet, FeatureSource, item_bytes, row_bytes, row_dtype
from agiqa.heads.data.splits import Partition
from agiqa.heads.settings.config import TrainConfig
from agiqa.progress import say

_SHARE_OF_DEVICE = 0.8
_SHARE_OF_RAM = 0.6
_COPIED_BYTES = 64 << 20
"""Rows of at most this size are copied to every worker process; larger ones are mapped."""
_CPU = torch.device("cpu")
_CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True, kw_only=True)
class KeptFeatures:
    """The features of some items, and where their rows are."""

    features: FeatureSet
    keep: str
    """`device`, `ram`, `memmap` or `stream`."""
    budget: int | None = None
    """Bytes that the decoded rows may take; None for a mapped copy, whose memory the system can take back."""
    copy: Path | None = None
    """Folder of the decoded copy."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of the decoded rows that are kept."""
        return self.features.row_bytes - self.streamed_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the decoded rows that every epoch reads from the store again."""
        features = self.features
        return int(features.lengths[features.starts < 0].sum()) * row_bytes(features.source)

    def has(self, items: NDArray[np.int64]) -> bool:
        """Whether all these items are among the features."""
        return bool(np.isin(items, self.features.items).all())

    def record(self) -> dict[str, Any]:
        """The entry `features` of metrics.json."""
        return {
            "keep": self.keep,
            "kept_bytes": self.kept_bytes,
            "streamed_bytes": self.streamed_bytes,
            "budget_bytes": self.budget,
            "copy": None if self.copy is None else str(self.copy),
        }

    def line(self) -> str:
        """Where the rows are, in one line for people."""
        text = f"features: {_size(self.kept_bytes)} kept ({self.keep})"
        if self.copy is not None:
            text += f" in {self.copy}"
        if self.streamed_bytes:
            text += f", {_size(self.streamed_bytes)} read from the store in every epoch"
        return text if self.budget is None else f"{text}; allowed: {_size(self.budget)}"


def keep_features(
    source: FeatureSource, items: NDArray[np.int64], config: TrainConfig, *, device: torch.device
) -> KeptFeatures:
    """Read and check `items`, and keep their rows as `keep` and `memory` of `config` say.

    Beside the kept rows, at most two pieces of about 65,536 rows or 64 MiB are in memory at a time. Raises as
    `FeatureSet.from_store`, and ConfigError when the rows do not fit or the decoded copy cannot be written. `auto`
    then prints why and streams.
    """
    keeper = _Keeper(source, items, config, device)
    if config.keep != "auto":
        return keeper.keep(keeper.ways()[0])
    way = next(way for way in keeper.ways() if keeper.has_room(way))
    try:
        return keeper.keep(way)
    except ConfigError as error:
        if way != "memmap":
            raise
        say(f"{error} Going on with keep 'stream'.")
    return keeper.keep("stream")


class _Keeper:
    """The ways to keep the rows of some items."""

    def __init__(
        self,
        source: FeatureSource,
        items: NDArray[np.int64],
        config: TrainConfig,
        device: torch.device,
        processes: int = 1,
    ) -> None:
        self._source = source
        self._items = items
        self._config = config
        self._device = device
        self._processes = processes
        self._sizes = item_bytes(source, items)
        self._total = int(self._sizes.sum())

    def ways(self) -> list[str]:
        """The ways that the setting `keep` stands for, in the order in which they are tried.

        Without a GPU, `device` is `ram`; with several processes, `ram` is `memmap` for rows that are not small.
        """
        cpu = "ram" if self._processes == 1 or self._total <= _COPIED_BYTES else "memmap"
        instead = {"ram": cpu, "device": "device" if self._device.type == "cuda" else cpu}
        wanted = ("device", "ram", "memmap") if self._config.keep == "auto" else (self._config.keep,)
        return list(dict.fromkeys(instead.get(way, way) for way in wanted))

    def has_room(self, way: str) -> bool:
        """Whether all rows fit, in RAM with the copies for workers. The disk is checked when the copy is written."""
        copies = self._processes + 1 if way == "ram" and self._processes > 1 else 1
        return way == "memmap" or copies * self._total <= self._budget(way)

    def keep(self, way: str) -> KeptFeatures:
        """Raises ConfigError where the rows do not fit, or the copy cannot be written."""
        if way == "memmap":
            features, folder = mapped_features(self._source, self._items)
            return KeptFeatures(features=features, keep=way, copy=folder)
        budget = self._budget(way)
        if way == "stream":
            features = FeatureSet.from_store(self._source, self._items, kept=self._count_that_fits(budget))
            return KeptFeatures(features=features, keep=way, budget=budget)
        device = self._place(way)
        if self._total > budget:
            message = (
                f"The features of {len(self._items)} items take {_size(self._total)}, and keep {way!r} may take "
                f"{_size(budget)} of {device} (free: {_size(available_memory(device))}, memory: "
                f"{self._memory_setting()}). Choose keep 'auto', 'memmap' or 'stream'."
            )
            raise ConfigError(message)
        features = FeatureSet.from_store(self._source, self._items, device=device)
        return KeptFeatures(features=features, keep=way, budget=budget)

    def _budget(self, way: str) -> int:
        return allowed_memory(self._config, self._place(way))

    def _place(self, way: str) -> torch.device:
        return self._device if way == "device" else _CPU

    def _count_that_fits(self, budget: int) -> int:
        """How many of the first items fit beside the batches in flight. Raises ConfigError where not even those do."""
        if self._total <= budget:
            return len(self._items)
        largest = np.sort(self._sizes)[-(self._config.batch_size + 1) :].sum()  # one left over may join a batch
        batches = BATCHES_AHEAD + 1
        if budget < batches * largest:
            message = (
                f"Streaming holds the rows of {batches} batches at once, up to {_size(batches * int(largest))}, and "
                f"{_size(budget)} are allowed (memory: {self._memory_setting()}). Raise memory, or lower batch_size "
                f"(now {self._config.batch_size})."
            )
            raise ConfigError(message)
        return int(np.searchsorted(np.cumsum(self._sizes), budget - batches * int(largest), side="right"))

    def _memory_setting(self) -> str:
        return "not set" if self._config.memory is None else _size(self._config.memory)


@dataclass(frozen=True, kw_only=True)
class SharedFeatures:
    """Features that several trainings share; each has the same results as without sharing."""

    kept: KeptFeatures | None = None
    """The items of all trainings, ascending, with all their rows; None if every training reads its own features."""
    memory: int | None = None
    """Memory in bytes of each training that reads its own features; None leaves it to the settings."""


def share_features(
    source: FeatureSource, partitions: Sequence[Partition], config: TrainConfig, *, device: torch.device, processes: int
) -> SharedFeatures:
    """Decode the items of all `partitions` once, for trainings in so many `processes`, as `keep` and `memory` say.

    The test items are left out where only the others fit. Where nothing can be shared (`stream`, too little memory, an
    item that cannot be read) the reason is printed, and each process gets its part of the memory.
    """
    learned = _union([items for one in partitions for items in (one.train, one.validation)])
    keepers = [_Keeper(source, items, config, device, processes) for items in (all_items(partitions), learned)]
    try:
        for way in [] if config.keep == "stream" else keepers[0].ways():
            for keeper in keepers:
                if keeper.has_room(way):
                    kept = keeper.keep(way)
                    say(kept.line())
                    return SharedFeatures(kept=kept)
    except (DataError, StoreError, ConfigError) as error:
        say(f"{error}\nEvery training reads its own features, so that trainings without these items can run.")
    say("features: read by every training itself")
    memory = min(allowed_memory(config, one) for one in {_CPU, device}) // processes
    return SharedFeatures(memory=None if processes == 1 else memory)


def all_items(partitions: Sequence[Partition]) -> NDArray[np.int64]:
    """The items of any part of any of these, ascending, each once."""
    return _union([items for one in partitions for items in one.parts().values()])


def _union(groups: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The items of all groups, ascending, each once."""
    return np.unique(np.concatenate(groups))


@dataclass(frozen=True, kw_only=True)
class PackedFeatures:
    """SharedFeatures on the way to another process: items, and CUDA handles or copies of rows that are not mapped."""

    keep: str | None
    """None where every training reads for itself."""
    budget: int | None
    memory: int | None
    items: NDArray[np.int64] | None = None
    offsets: NDArray[np.int64] | None = None
    rows: Tensor | NDArray[np.uint8] | None = None
    """A tensor on a GPU, or the bytes of rows in RAM; tensors in RAM would go through /dev/shm, which may be small."""
    roles: Tensor | NDArray[np.uint8] | None = None

    @classmethod
    def of(cls, shared: SharedFeatures) -> "PackedFeatures":
        """What another process needs to see the same rows; `shared` must live as long as it does."""
        kept = shared.kept
        if kept is None:
            return cls(keep=None, budget=None, memory=shared.memory)
        features = kept.features
        if kept.keep == "memmap":
            return cls(keep=kept.keep, budget=None, memory=None, items=features.items)
        on_gpu = features.rows.device.type == "cuda"
        return cls(
            keep=kept.keep,
            budget=kept.budget,
            memory=None,
            items=features.items,
            offsets=features.offsets.numpy(),
            rows=features.rows if on_gpu else features.rows.view(torch.uint8).numpy(),
            roles=features.roles if on_gpu else features.roles.numpy(),
        )

    def open(self, source: FeatureSource) -> SharedFeatures:
        """The features, seen from this process. Raises as `mapped_features`."""
        if self.keep is None or self.items is None:
            return SharedFeatures(memory=self.memory)
        if self.offsets is None or self.rows is None or self.roles is None:
            features, folder = mapped_features(source, self.items, checked=True)
            return SharedFeatures(kept=KeptFeatures(features=features, keep=self.keep, copy=folder))
        rows, roles = (torch.from_numpy(one) if isinstance(one, np.ndarray) else one for one in (self.rows, self.roles))
        features = FeatureSet(
            rows=rows.view(row_dtype(source)),
            starts=self.offsets[:-1],
            roles=roles,
            offsets=torch.from_numpy(self.offsets),
            items=self.items,
            source=source,
        )
        return SharedFeatures(kept=KeptFeatures(features=features, keep=self.keep, budget=self.budget))


def allowed_memory(config: TrainConfig, device: torch.device) -> int:
    """Bytes of rows that `device` may hold: `memory` of `config`, if so many are free, or a share of the free bytes."""
    free = available_memory(device)
    if config.memory is not None:
        return min(config.memory, free)
    return int(free * (_SHARE_OF_DEVICE if device.type == "cuda" else _SHARE_OF_RAM))


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`: RAM within all limits on this process, or memory of a GPU."""
    if device.type != "cuda":
        return min([_free_ram(), *cgroup_rooms(Path("/proc/self/cgroup"), _CGROUPS)])
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_ram() -> int:
    """MemAvailable on Linux: free RAM, and caches that the system can drop. Elsewhere half of the machine's RAM."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cgroup_rooms(membership: Path, mounted: Path) -> list[int]:
    """Bytes left under each memory limit (cgroup v2) on the process whose groups the file `membership` lists.

    `mounted` is the folder of the root group. A group's page cache that is not in use counts as free.
    """
    if not membership.exists():
        return []
    names = [line[3:] for line in membership.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
    rooms: list[int] = []
    for name in names:
        group = mounted / name.strip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if folder.is_relative_to(mounted) and limit.exists() and (text := limit.read_text().strip()) != "max":
                used = int((folder / "memory.current").read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                rooms.append(max(0, int(text) - used + int(statistics.get("inactive_file", 0))))
    return rooms


def _size(size: int) -> str:
    """Bytes for people."""
    return ByteSize(size).human_readable(decimal=True, separator=" ")
