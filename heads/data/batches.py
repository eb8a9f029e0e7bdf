"""Padded batches of a FeatureSet: bucketed by length, shuffled by seed and epoch, the same wherever rows are kept."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agiqa.errors import ConfigError
from agiqa.heads.data.features import FeatureSet, ItemRows

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
    """Where each item stands in the FeatureSet."""

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


class BatchLoader:
    """An iterable of batches over `positions` of a FeatureSet; the same every time it is iterated."""

    def __init__(
        self,
        features: FeatureSet,
        positions: NDArray[np.int64],
        *,
        batch_size: int,
        order: tuple[int, int] | None = None,
        smallest: int = 1,
        skip: int = 0,
    ) -> None:
        """`order` is (seed, epoch) of a shuffled pass; None goes from the longest item to the shortest.

        A shuffled pass has no batch under `smallest` items where there are as many; see `shuffled_plan`. The first
        `skip` batches are left out, which resumes a pass that was broken off after so many. Raises ConfigError when
        there are fewer.
        """
        self._features = features
        plan = plan_batches(features.lengths[positions], batch_size, order=order, smallest=smallest, skip=skip)
        self._batches = [positions[chosen] for chosen in plan]

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        """The batches, collated where the rows of the FeatureSet are."""
        if self._features.is_streamed:
            yield from self._read_ahead()
            return
        for positions in self._batches:
            yield collate(self._features, positions)

    def _read_ahead(self) -> Iterator[Batch]:
        """The batches, whose rows a thread reads while earlier ones are in use; its errors are raised here."""
        reader = ThreadPoolExecutor(1, thread_name_prefix="agiqa-batches")
        coming: deque[tuple[NDArray[np.int64], Future[list[ItemRows]]]] = deque()
        try:
            for positions in self._batches:
                coming.append((positions, reader.submit(self._features.take, positions)))
                if len(coming) > BATCHES_AHEAD:
                    yield self._next(coming)
            while coming:
                yield self._next(coming)
        finally:
            reader.shutdown(cancel_futures=True)

    def _next(self, coming: deque[tuple[NDArray[np.int64], Future[list[ItemRows]]]]) -> Batch:
        positions, read = coming.popleft()
        return pad(read.result(), positions=positions, targets=self._features.targets)


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
    """Batches from the longest items to the shortest, so that memory that does not suffice shows at once."""
    return _cut(np.argsort(-lengths, kind="stable"), batch_size)


def shuffled_plan(
    lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int, *, smallest: int = 1
) -> list[NDArray[np.int64]]:
    """Batches of items of like length, in random order: shuffle, sort within buckets of 16 batches, cut, shuffle.

    Items left over that are fewer than `smallest` join the batch before them, which is then larger than
    `batch_size`: a loss that compares items needs two.
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


def collate(features: FeatureSet, positions: NDArray[np.int64]) -> Batch:
    """The batch of these items, made on the device of their rows."""
    if features.rows.device.type == "cpu":
        return pad(features.take(positions), positions=positions, targets=features.targets)
    return gather(features, positions)


def pad(items: Sequence[ItemRows], *, positions: NDArray[np.int64], targets: Tensor | None) -> Batch:
    """The batch of these items on the CPU; `targets` are those of all positions.

    Each item is copied whole, which takes a third of the time of one gather of all tokens and a masked fill.
    """
    lengths = torch.tensor([len(item.rows) for item in items])
    longest = int(lengths.max())
    padded = torch.empty((len(items), longest, items[0].rows.shape[1]))
    for row, item in enumerate(items):
        length = len(item.rows)
        padded[row, :length] = item.rows
        padded[row, length:] = 0.0
    chosen = torch.from_numpy(positions)
    return Batch(
        features=padded,
        mask=torch.arange(longest) < lengths[:, None],
        roles=pad_sequence([item.roles for item in items], batch_first=True),
        lengths=lengths,
        targets=None if targets is None else targets[chosen].float(),
        positions=chosen,
    )


def gather(features: FeatureSet, positions: NDArray[np.int64]) -> Batch:
    """The batch of items that all are kept on a device: one gather there, without a loop of small copies.

    The CPU does not wait for the device, which has work left from the batches before.
    """
    device = features.rows.device
    chosen = torch.from_numpy(positions)
    of_items = torch.stack([chosen, features.offsets[chosen], features.offsets[chosen + 1]])
    places, starts, ends = _upload(of_items, device)
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
        targets=None if features.targets is None else _upload(features.targets[chosen].float(), device),
        positions=places,
    )


def _upload(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor on `device`: the copy from pinned memory is queued there, where another would be waited for."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


def _cut(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Consecutive pieces of at most `size`."""
    return [order[start : start + size] for start in range(0, len(order), size)]
