"""Batches for training loops of one's own: a data set for `torch.utils.data.DataLoader`, with workers or without.

    batches = FeatureBatches(open_store(path), items, batch_size=32, seed=0, epoch=epoch, label="quality")
    for batch in DataLoader(batches, batch_size=None, num_workers=2):
        ...

The batches and their order are the same for any number of workers, forked or spawned.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from agiqa.errors import HeadError
from agiqa.heads.data.batches import Batch, pad, plan_batches
from agiqa.heads.data.features import FeatureSource, describe_items, items_identity, location_of, read_checked
from agiqa.store import Store, StoreUnion, open_store, union
from agiqa.store.sharing.remotes import is_url


class FeatureBatches(Dataset[Batch]):
    """The batches of one epoch over some items, each read from the store when it is asked for by its number."""

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
        """The same batches as a shuffled `BatchLoader` over a FeatureSet of `items` makes; `positions` are in `items`.

        `label` is one name, or several as in `quality+correspondence`. `skip` leaves out the first batches, to go on in
        the middle of an epoch. Raises DataError for missing labels and items without tokens (for NaN and inf when
        the batch is read), and ConfigError when `skip` is too large.
        """
        self._source = source
        self._items = np.asarray(items, dtype=np.int64)
        self._targets, offsets = describe_items(source, self._items, label=label)
        self._plan = plan_batches(np.diff(offsets), batch_size, order=(seed, epoch), smallest=smallest, skip=skip)
        source.read(self._items[:1])  # has the store read its index now, since Zarr may not run in a forked worker

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._plan)

    def __getitem__(self, number: int) -> Batch:
        """One batch, on the CPU."""
        positions = self._plan[number]
        read = dict(read_checked(self._source, self._items[positions]))
        return pad([read[k] for k in range(len(positions))], positions=positions, targets=self._targets)

    def __getstate__(self) -> dict[str, Any]:
        """For a spawned worker: how to open the store, not the open store."""
        state = self.__dict__.copy()
        return {**state, "_source": SourceAddress.of(self._source, self._items)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Open the store again. Raises HeadError when other items have its place by now."""
        self.__dict__.update(state | {"_source": state["_source"].open()})


def _opener(source: FeatureSource) -> Callable[[], FeatureSource]:
    """What opens `source` again in another process; a source that is no store travels as it is."""
    if isinstance(source, StoreUnion):
        return partial(_open_union, [_opener(store) for store in source.stores])
    if isinstance(source, Store):
        place = source.location if is_url(source.location) else source.path.absolute()
        return partial(open_store, place, allow_partial=not source.is_sealed)
    return partial(_as_it_is, source)


def _open_union(openers: Sequence[Callable[[], Any]]) -> Any:
    return union([reopen() for reopen in openers])


def _as_it_is(source: FeatureSource) -> FeatureSource:
    return source


@dataclass(frozen=True, kw_only=True)
class SourceAddress:
    """How another process opens a source again: its location, not what is open; it can be pickled."""

    items: NDArray[np.int64]
    """Those that it is opened for."""
    identity: str
    """Of these items."""
    reopen: Callable[[], FeatureSource]

    @classmethod
    def of(cls, source: FeatureSource, items: NDArray[np.int64] | None = None) -> "SourceAddress":
        """The address of `source`, for some items or all; one that is no store travels as it is."""
        wanted = np.arange(len(source.n_tokens)) if items is None else items
        return cls(items=wanted, identity=items_identity(source, wanted), reopen=_opener(source))

    def open(self) -> FeatureSource:
        """The source. Raises HeadError when other items have its place by now, and what opening a store raises."""
        source = self.reopen()
        if len(source.n_tokens) <= self.items.max() or items_identity(source, self.items) != self.identity:
            message = (
                f"The store {location_of(source)} that a worker opened has other items: it was replaced meanwhile."
            )
            raise HeadError(message)
        return source
