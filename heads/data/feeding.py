"""Where the features of a training are kept: device, RAM, a mapped copy on disk, or the store itself for the rest.

The batches and the numbers are the same; what differs is speed, and the memory that it takes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ByteSize

from agiqa.errors import ConfigError
from agiqa.heads.data.batches import BATCHES_AHEAD
from agiqa.heads.data.decoded import mapped_features
from agiqa.heads.data.features import FeatureSet, FeatureSource, item_bytes, row_bytes
from agiqa.heads.data.memory import available_memory
from agiqa.heads.settings.config import TrainConfig
from agiqa.progress import say

_SHARE_OF_DEVICE = 0.8
_SHARE_OF_RAM = 0.6
_CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Feeding:
    """Features to train from, and what was decided about them."""

    features: FeatureSet
    keep: str
    """`device`, `ram`, `memmap` or `stream`."""
    budget: int | None
    """Bytes that the decoded features were allowed; None for a mapped copy, whose memory the system can take back."""
    copy: Path | None = None
    """The decoded copy."""

    @property
    def kept_bytes(self) -> int:
        """Bytes of the decoded rows that are kept."""
        return self.features.row_bytes - self.streamed_bytes

    @property
    def streamed_bytes(self) -> int:
        """Bytes of the decoded rows that every epoch reads from the store again."""
        features = self.features
        return int(features.lengths[features.starts < 0].sum()) * row_bytes(features.source)

    def record(self) -> dict[str, Any]:
        """What metrics.json says."""
        return {
            "keep": self.keep,
            "kept_bytes": self.kept_bytes,
            "streamed_bytes": self.streamed_bytes,
            "budget_bytes": self.budget,
            "copy": None if self.copy is None else str(self.copy),
        }

    def line(self) -> str:
        """What was decided, in one line for people."""
        text = f"features: {_size(self.kept_bytes)} kept ({self.keep})"
        if self.copy is not None:
            text += f" in {self.copy}"
        if self.streamed_bytes:
            text += f", {_size(self.streamed_bytes)} read from the store in every epoch"
        return text if self.budget is None else f"{text}; allowed: {_size(self.budget)}"


def feed(source: FeatureSource, items: NDArray[np.int64], config: TrainConfig, *, device: torch.device) -> Feeding:
    """Read and check `items` with the label of `config`, and keep their rows as its `keep` and `memory` say.

    Beside what is kept, at most two pieces of about 65,536 rows or 64 MiB are in memory at a time. Raises as
    `FeatureSet.from_store`, and ConfigError when the rows do not fit where they must, or a decoded copy cannot be
    written; with `auto` that means going on to `stream`, the reason told on the error stream.
    """
    feeder = _Feeder(source, items, config, device)
    if config.keep == "auto":
        return feeder.automatic()
    ways = {"device": feeder.device, "ram": feeder.ram, "memmap": feeder.memmap, "stream": feeder.stream}
    return ways[config.keep]()


def allowed_memory(config: TrainConfig, device: torch.device) -> int:
    """Bytes of rows that `device` may hold: those that `config` asks for, if they are free, or a share of the free."""
    free = available_memory(device)
    if config.memory is not None:
        return min(config.memory, free)
    return int(free * (_SHARE_OF_DEVICE if device.type == "cuda" else _SHARE_OF_RAM))


class _Feeder:
    """The ways to keep the rows of some items."""

    def __init__(
        self, source: FeatureSource, items: NDArray[np.int64], config: TrainConfig, device: torch.device
    ) -> None:
        self._source = source
        self._items = items
        self._config = config
        self._device = device
        self._sizes = item_bytes(source, items)
        self._total = int(self._sizes.sum())

    def automatic(self) -> Feeding:
        if self._device.type == "cuda" and self._total <= allowed_memory(self._config, self._device):
            return self.device()
        if self._total <= allowed_memory(self._config, _CPU):
            return self.ram()
        try:
            return self.memmap()
        except ConfigError as error:
            say(f"{error} Going on with keep 'stream'.")
        return self.stream()

    def device(self) -> Feeding:
        if self._device.type != "cuda":
            return self.ram()
        return self._whole("device", self._device)

    def ram(self) -> Feeding:
        return self._whole("ram", _CPU)

    def memmap(self) -> Feeding:
        features, folder = mapped_features(self._source, self._items, label=self._config.label)
        return Feeding(features=features, keep="memmap", budget=None, copy=folder)

    def stream(self) -> Feeding:
        budget = allowed_memory(self._config, _CPU)
        kept = len(self._items)
        if self._total > budget:
            kept = int(np.searchsorted(np.cumsum(self._sizes), budget - self._in_flight(budget), side="right"))
        features = FeatureSet.from_store(self._source, self._items, label=self._config.label, kept=kept)
        return Feeding(features=features, keep="stream", budget=budget)

    def _whole(self, keep: str, device: torch.device) -> Feeding:
        budget = allowed_memory(self._config, device)
        if self._total > budget:
            message = (
                f"The features of {len(self._items)} items take {_size(self._total)}, and keep {keep!r} may take "
                f"{_size(budget)} of {device} (free: {_size(available_memory(device))}, memory: "
                f"{self._asked()}). Choose keep 'auto', 'memmap' or 'stream'."
            )
            raise ConfigError(message)
        features = FeatureSet.from_store(self._source, self._items, label=self._config.label, device=device)
        return Feeding(features=features, keep=keep, budget=budget)

    def _in_flight(self, budget: int) -> int:
        """Bytes of the rows of the batches that streaming holds at once. Raises ConfigError for a smaller budget."""
        largest = np.sort(self._sizes)[-(self._config.batch_size + 1) :].sum()  # one left over may join a batch
        batches = BATCHES_AHEAD + 1
        if budget < batches * largest:
            message = (
                f"Streaming holds the rows of {batches} batches at once, up to {_size(batches * int(largest))}, and "
                f"{_size(budget)} are allowed (memory: {self._asked()}). Raise memory, or lower batch_size (now "
                f"{self._config.batch_size})."
            )
            raise ConfigError(message)
        return batches * int(largest)

    def _asked(self) -> str:
        return "not set" if self._config.memory is None else _size(self._config.memory)


def _size(size: int) -> str:
    """Bytes for people."""
    return ByteSize(size).human_readable(decimal=True, separator=" ")
