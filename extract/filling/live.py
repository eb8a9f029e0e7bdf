"""Features of a few items, computed now and kept in memory, with the reading methods of a store."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError
from agiqa.extract.data.items import Item
from agiqa.extract.filling.plan import item_table, position_limit, prepare_item
from agiqa.extract.filling.staging import Transfers, staging_of
from agiqa.extract.filling.targets import Target, check_basis, lm_head_of, tensor_bits
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner
from agiqa.store import Basis, Items, TokenRows, to_float32
from agiqa.store.format.arrays import storage_dtype

_SHORTEN = "The model has no more positions: give a shorter prompt, or leave the item out."
_MAKE_ROOM = "Leave it out, or use a device with more memory."


class LiveFeatures:
    """The features that `agiqa extract` would store of `items`, without a store."""

    def __init__(self, backbone: Backbone, target: Target, *, name: str) -> None:
        """No items yet; loads the model. `name` stands for the store in messages.

        Raises HeadError for a basis of another model.
        """
        self._head = lm_head_of(backbone, bent=target.encoding == "logits")
        if target.basis is not None:
            check_basis(target.basis, self._head)
        self.id = name
        self.encoding = target.encoding
        self.logical_dtype = target.logical_dtype(backbone)
        self.width = target.width(backbone)
        self.lm_head_sha256 = self._head.sha256
        self.items: Items = item_table([])
        self.n_tokens = np.zeros(0, np.int32)
        self._backbone = backbone
        self._target = target
        self._transfers = Transfers(backbone.device)
        with self._transfers.on_device():
            self._staging = staging_of(target, backbone, self._transfers)
        self._rows: list[NDArray[Any]] = []
        self._roles: list[NDArray[np.uint8]] = []

    def replace(self, items: Sequence[Item]) -> None:
        """Run the model over `items`, as one batch if memory allows; their features replace the earlier ones.

        Raises DataError for an item that cannot be prepared or is longer than the model's positions, and WorkerError
        for one that does not fit into the memory alone; both name the item.
        """
        limit = position_limit(self._backbone)
        prepared = [prepare_item(self._backbone, item, limit, truncate=False, remedy=_SHORTEN) for item in items]
        self._rows = []

        def compute(batch: Sequence[Prepared]) -> None:
            self._rows += [self._encoded(one) for one in self._backbone.hidden_states(batch)]

        names = {id(one): item.name for one, item in zip(prepared, items, strict=True)}
        runner = BatchRunner(max(1, len(items)), remedy=_MAKE_ROOM)
        runner.run(compute, prepared, name=lambda one: f"item {names[id(one)]!r}")
        self._roles = [one.roles for one in prepared]
        self.items = item_table(items)
        self.n_tokens = np.array([len(rows) for rows in self._rows], np.int32)

    def read(self, items: Sequence[int] | NDArray[Any], /) -> TokenRows:
        """As `Store.read`."""
        chosen = np.asarray(items, np.int64).tolist()
        offsets = np.concatenate([[0], np.cumsum([len(self._rows[k]) for k in chosen], dtype=np.int64)])
        rows = np.empty((int(offsets[-1]), self.width), storage_dtype(self.logical_dtype))
        roles = np.empty(int(offsets[-1]), np.uint8)
        for start, stop, item in zip(offsets[:-1].tolist(), offsets[1:].tolist(), chosen, strict=True):
            rows[start:stop], roles[start:stop] = self._rows[item], self._roles[item]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=self.logical_dtype)

    def lm_head(self) -> NDArray[np.float32]:
        """`W_lm` (V, D)."""
        return to_float32(self._head.bits, self._head.dtype)

    def basis(self) -> Basis:
        """The basis of a sketch. Raises DataError for another encoding."""
        if self._target.basis is None:
            message = f"{self.id}: {self.encoding!r} features have no basis."
            raise DataError(message)
        return self._target.basis

    def _encoded(self, states: torch.Tensor) -> NDArray[Any]:
        """The rows of one item, in the store's encoding."""
        with self._transfers.on_device():
            buffer = self._transfers.buffer(len(states), self._staging.width, self._staging.dtype)
            self._staging.put(states, buffer)
            event = self._transfers.mark()
        if event is not None:
            event.synchronize()
        return self._staging.finish(tensor_bits(buffer)[0], [(0, len(states))])[0]
