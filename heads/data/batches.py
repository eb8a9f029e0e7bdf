"""Padded batches: bucketed by length, shuffled by seed and epoch, the same wherever the rows are kept.

`BatchLoader` makes the batches of a FeatureSet. `FeatureBatches` is a data set of the same batches for training loops
of your own with `torch.utils.data.DataLoader`:

    batches = FeatureBatches(open_store(path), items, batch_size=32, seed=0, epoch=epoch, label="quality")
    for batch in DataLoader(batches, batch_size=None, num_workers=2):
        ...

Its batches and their order are the same for any number of workers, forked or spawned.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from agiqa.errors import ConfigError
from agiqa.heads.data.features import (
    FeatureSet,
    FeatureSource,
    ItemRows,
    read_checked,
    read_labels,
    token_offsets,
)
from agiqa.heads.data.reopening import SourceAddress

BATCHES_AHEAD = 2
"""Batches whose rows are read from the store while an earlier one is in use."""
_BATCHES_PER_BUCKET = 16


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some items, padded on the right to the longest of them."""

    features: Float[Tensor, "batch token channel"]
    """float32, or the store's own dtype where the rows are kept on a device; zero in the padding."""
    mask: Bool[Tensor, "batch token"]
    """True on real tokens."""
    roles: UInt8[Tensor, "batch token"]
    """Values of TOKEN_ROLES, zero in the padding."""
    lengths: Int64[Tensor, " batch"]
    targets: Float[Tensor, "batch label"] | None
    """Labels, float32."""
    positions: Int64[Tensor, " batch"]
    """The position of each item in the FeatureSet."""

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a head is called with: features, mask and roles."""
        return self.features, self.mask, self.roles

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(
            features=self.features.to(device),
            mask=self.mask.to(device),
            roles=self.roles.to(device),
            lengths=self.lengths.to(device),
            targets=None if self.targets is None else self.targets.to(device),
            positions=self.positions.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class LabelledItems:
    """Some items of a FeatureSet and their labels."""

    positions: NDArray[np.int64]
    """In the FeatureSet, (items,)."""
    labels: Float[Tensor, "item label"]
    """float64, on the CPU."""

    @classmethod
    def at(cls, features: FeatureSet, positions: NDArray[np.int64], label: str) -> "LabelledItems":
        """The items at `positions` with their labels from the store. Raises as `read_labels`."""
        labels = read_labels(features.source, features.items[positions], label=label)
        return cls(positions=positions, labels=torch.from_numpy(labels))

    def __len__(self) -> int:
        """Number of items."""
        return len(self.positions)

    def __add__(self, other: "LabelledItems") -> "LabelledItems":
        """These items, then those of `other`."""
        return LabelledItems(
            positions=np.concatenate([self.positions, other.positions]), labels=torch.cat([self.labels, other.labels])
        )


_Chosen = tuple[NDArray[np.int64], Tensor | None]
"""Positions and labels of the items of a batch."""


class BatchLoader:
    """An iterable of batches over some items of a FeatureSet; the same every time it is iterated."""

    def __init__(
        self,
        features: FeatureSet,
        items: LabelledItems | NDArray[np.int64],
        *,
        batch_size: int,
        order: tuple[int, int] | None = None,
        smallest: int = 1,
        skip: int = 0,
    ) -> None:
        """`items` are positions, or positions with labels, which become the batches' `targets`.

        `order` is (seed, epoch) of a shuffled pass; None goes from the longest item to the shortest.
        A shuffled pass has no batch under `smallest` items where there are as many; see `shuffled_plan`. The first
        `skip` batches are left out, to resume an interrupted pass. Raises ConfigError when there are fewer.
        """
        self._features = features
        positions, labels = (items.positions, items.labels) if isinstance(items, LabelledItems) else (items, None)
        plan = plan_batches(features.lengths[positions], batch_size, order=order, smallest=smallest, skip=skip)
        self._batches: list[_Chosen] = [
            (positions[chosen], None if labels is None else labels[torch.from_numpy(chosen)]) for chosen in plan
        ]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, collated where the rows of the FeatureSet are."""
        if self._features.is_streamed:
            yield from self._read_ahead()
            return
        for positions, targets in self._batches:
            yield collate(self._features, positions, targets)

    def _read_ahead(self) -> Iterator[Batch]:
        """The batches, whose rows a thread reads while earlier ones are in use; its errors are raised here."""
        reader = ThreadPoolExecutor(1, thread_name_prefix="agiqa-batches")
        coming: deque[tuple[_Chosen, Future[list[ItemRows]]]] = deque()
        try:
            for chosen in self._batches:
                coming.append((chosen, reader.submit(self._features.take, chosen[0])))
                if len(coming) > BATCHES_AHEAD:
                    yield self._next(coming)
            while coming:
                yield self._next(coming)
        finally:
            reader.shutdown(cancel_futures=True)

    def _next(self, coming: deque[tuple[_Chosen, Future[list[ItemRows]]]]) -> Batch:
        (positions, targets), read = coming.popleft()
        return pad(read.result(), positions=positions, targets=targets)


def plan_batches(
    lengths: NDArray[np.int64],
    batch_size: int,
    *,
    order: tuple[int, int] | None,
    smallest: int = 1,
    skip: int = 0,
) -> list[NDArray[np.int64]]:
    """`sorted_plan` or, with (seed, epoch), `shuffled_plan`, from batch number `skip` on.

    Raises ConfigError when there are fewer than `skip` batches.
    """
    if order is None:
        plan = sorted_plan(lengths, batch_size)
    else:
        plan = shuffled_plan(lengths, batch_size, *order, smallest=smallest)
    if not 0 <= skip <= len(plan):
        message = f"Of {len(plan)} batches {skip} cannot be skipped; another epoch has an order of its own."
        raise ConfigError(message)
    return plan[skip:]


def sorted_plan(lengths: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Batches from the longest items to the shortest, so that too little memory shows in the first batch."""
    return _cut(np.argsort(-lengths, kind="stable"), batch_size)


def shuffled_plan(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int, *, smallest: int = 1
) -> list[NDArray[np.int64]]:
    """Batches of items of like length, in random order: shuffle, sort within buckets of 16 batches, cut, shuffle.

    A last batch of fewer than `smallest` items joins the batch before it, which is then larger than `batch_size`: a
    loss that compares items needs two.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    batches: list[NDArray[np.int64]] = []
    for bucket in _cut(shuffled, batch_size * _BATCHES_PER_BUCKET):
        batches += _cut(bucket[np.argsort(lengths[bucket], kind="stable")], batch_size)
    if len(batches) > batches_per_epoch(len(lengths), batch_size, smallest=smallest):
        batches[-2:] = [np.concatenate(batches[-2:])]
    return [batches[k] for k in random.permutation(len(batches))]


def batches_per_epoch(items: int, batch_size: int, *, smallest: int = 1) -> int:
    """How many batches `shuffled_plan` makes."""
    whole, left = divmod(items, batch_size)
    return whole + (left >= smallest or (left > 0 and whole == 0))


def collate(features: FeatureSet, positions: NDArray[np.int64], targets: Tensor | None = None) -> Batch:
    """The batch of these items, made on the device of their rows; `targets` are their labels (items, labels)."""
    if features.rows.device.type == "cpu":
        if not features.is_streamed and int(features.lengths[positions].max()) == 1:
            return _of_single_rows(features, positions, targets)
        return pad(features.take(positions), positions=positions, targets=targets)
    return gather(features, positions, targets)


def _of_single_rows(features: FeatureSet, positions: NDArray[np.int64], targets: Tensor | None) -> Batch:
    """As `pad`, for items of one row each: one gather takes a tenth of the time of copies of single rows."""
    rows = features.rows.index_select(0, torch.from_numpy(features.starts[positions])).float()
    return Batch(
        features=rows[:, None],
        mask=torch.ones((len(positions), 1), dtype=torch.bool),
        roles=features.roles[features.offsets[torch.from_numpy(positions)]][:, None],
        lengths=torch.ones(len(positions), dtype=torch.int64),
        targets=None if targets is None else targets.float(),
        positions=torch.from_numpy(positions),
    )


def pad(items: Sequence[ItemRows], *, positions: NDArray[np.int64], targets: Tensor | None) -> Batch:
    """The batch of these items on the CPU.

    Each item is copied whole, which takes a third of the time of one gather of all tokens and a masked fill.
    """
    lengths = torch.tensor([len(item.rows) for item in items])
    longest = int(lengths.max())
    padded = torch.empty((len(items), longest, items[0].rows.shape[1]))
    for row, item in enumerate(items):
        length = len(item.rows)
        padded[row, :length] = item.rows
        padded[row, length:] = 0.0
    return Batch(
        features=padded,
        mask=torch.arange(longest) < lengths[:, None],
        roles=pad_sequence([item.roles for item in items], batch_first=True),
        lengths=lengths,
        targets=None if targets is None else targets.float(),
        positions=torch.from_numpy(positions),
    )


def gather(features: FeatureSet, positions: NDArray[np.int64], targets: Tensor | None) -> Batch:
    """The batch of items whose rows all are on a device: one gather there, without a loop of small copies.

    The CPU does not wait for the device, which still works on earlier batches.
    """
    device = features.rows.device
    chosen = torch.from_numpy(positions)
    of_items = torch.stack([chosen, features.offsets[chosen], features.offsets[chosen + 1]])
    on_device, starts, ends = _upload(of_items, device)
    lengths = ends - starts
    steps = torch.arange(int(features.lengths[positions].max()), device=device)
    mask = steps < lengths[:, None]
    index = torch.where(mask, starts[:, None] + steps, starts[:, None])
    rows = features.rows.index_select(0, index.flatten()).view(*index.shape, -1)
    roles = features.roles.index_select(0, index.flatten()).view(index.shape)
    return Batch(
        features=rows.masked_fill_(~mask[..., None], 0.0),
        mask=mask,
        roles=roles.masked_fill_(~mask, 0),
        lengths=lengths,
        targets=None if targets is None else _upload(targets.float(), device),
        positions=on_device,
    )


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on `device`, copied from pinned memory: the CPU would wait for any other copy."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _cut(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Consecutive pieces of at most `size`."""
    return [order[start : start + size] for start in range(0, len(order), size)]


class FeatureBatches(Dataset[Batch]):
    """The batches of one epoch over some items. A batch is read from the store when its number is asked for."""

    def __init__(
        self,
        source: FeatureSource,
        items: Sequence[int] | NDArray[Any],
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        label: str | None = None,
        smallest: int = 1,
        skip: int = 0,
    ) -> None:
        """The batches of a shuffled `BatchLoader` over a FeatureSet of `items`; `positions` are positions in `items`.

        `label` is one name, or several as in `quality+correspondence`. `skip` leaves out the first batches, to resume
        in the middle of an epoch. Raises DataError for missing labels and items without tokens (for NaN and inf when
        the batch is read), and ConfigError when `skip` is too large.
        """
        self._source = source
        self._items = np.asarray(items, dtype=np.int64)
        self._labels = None if label is None else torch.from_numpy(read_labels(source, self._items, label=label))
        lengths = np.diff(token_offsets(source, self._items))
        self._plan = plan_batches(lengths, batch_size, order=(seed, epoch), smallest=smallest, skip=skip)
        source.read(self._items[:1])  # the store reads its index now, since Zarr may not run in a forked worker

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        """One batch, on the CPU."""
        positions = self._plan[number]
        read = dict(read_checked(self._source, self._items[positions]))
        targets = None if self._labels is None else self._labels[torch.from_numpy(positions)]
        return pad([read[k] for k in range(len(positions))], positions=positions, targets=targets)

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: the address of the store in place of the open store."""
        state = self.__dict__.copy()
        return {**state, "_source": SourceAddress.of(self._source, self._items)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the store again. Raises HeadError when another store has taken its place."""
        self.__dict__.update(state | {"_source": state["_source"].open()})
