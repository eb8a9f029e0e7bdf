"""Features of a few items, computed now and kept in memory, with the reading methods of a store."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import DataError, ViewRefused
from agiqa.extract.data.items import Item
from agiqa.extract.filling.plan import item_table, position_limit, prepare_item
from agiqa.extract.filling.pooling import lacking
from agiqa.extract.filling.staging import Transfers, stagings_of
from agiqa.extract.filling.targets import Target, check_bases, lm_head_of, rows_of, stored_roles, tensor_bits
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner
from agiqa.store import Basis, Items, LayerSource, TokenRows, to_float32
from agiqa.store.format.arrays import storage_dtype
from agiqa.store.reading.layers import layer_of

_SHORTEN = "The model has no more positions: give a shorter prompt, or leave the item out."
_MAKE_ROOM = "Leave it out, or use a device with more memory."


class LiveFeatures:
    """The features that `agiqa extract` would store of `items`, without a store; `Layered`, as stores are."""

    def __init__(self, backbone: Backbone, target: Target, *, name: str) -> None:
        """No items yet; loads the model. `name` stands for the store in messages.

        Raises HeadError for a basis of another model.
        """
        check_bases(target, backbone)
        self.id = self.content = self.location = name
        self.encoding = target.encoding
        self.logical_dtype = target.logical_dtype(backbone)
        self.width = target.width(backbone)
        self.layers = target.layers
        self.layer_name = target.layers[-1]
        self.layer_count: int | None = backbone.layer_count
        self.tap = target.tap
        self.pooled = tuple(str(pooling) for pooling in target.poolings)
        self.provenance: Mapping[str, Any] = {}
        self._head = lm_head_of(backbone, bent=target.encoding == "logits") if target.has_lm_head else None
        self.lm_head_sha256 = "" if self._head is None else self._head.sha256
        self.items: Items = item_table([])
        self.n_tokens = np.zeros(0, np.int32)
        self._backbone = backbone
        self._target = target
        self._transfers = Transfers(backbone.device)
        with self._transfers.on_device():
            backbone.load()
            self._stagings = stagings_of(target, backbone, self._transfers)
        self._rows: list[dict[str, NDArray[Any]]] = []
        self._roles: list[NDArray[np.uint8]] = []
        self._ids: list[NDArray[np.int32]] = []

    def replace(self, items: Sequence[Item]) -> None:
        """Run the model over `items`, as one batch if memory allows; their features replace the earlier ones.

        Raises DataError for an item that cannot be prepared or is longer than the model's positions, and WorkerError
        for one that does not fit into the memory alone; both name the item.
        """
        limit = position_limit(self._backbone)
        prepared = [prepare_item(self._backbone, item, limit, truncate=False, remedy=_SHORTEN) for item in items]
        names = {id(one): item.name for one, item in zip(prepared, items, strict=True)}
        for one in prepared:
            if (reason := lacking(self._target.poolings, one.roles)) is not None:
                message = f"item {names[id(one)]!r}: {reason}"
                raise DataError(message)
        self._rows = []

        def compute(batch: Sequence[Prepared]) -> None:
            self._rows += [self._encoded(rows) for rows in rows_of(self._backbone, self._target, batch)]

        runner = BatchRunner(max(1, len(items)), remedy=_MAKE_ROOM)
        runner.run(compute, prepared, name=lambda one: f"item {names[id(one)]!r}")
        self._roles = [stored_roles(self._backbone, self._target, one.roles) for one in prepared]
        self._ids = [one.token_ids for one in prepared]
        self.items = item_table(items)
        self.n_tokens = np.array([len(roles) for roles in self._roles], np.int32)

    def read(self, items: Sequence[int] | NDArray[Any], /) -> TokenRows:
        """As `Store.read`."""
        return self.read_layer(items, self.layer_name)

    def read_layer(self, items: Sequence[int] | NDArray[Any], layer: str, /) -> TokenRows:
        """As `Store.read_layer`."""
        chosen, (width, logical_dtype) = np.asarray(items, np.int64).tolist(), self.layer_shape(layer)
        offsets = np.concatenate([[0], np.cumsum([len(self._roles[k]) for k in chosen], dtype=np.int64)])
        rows = np.empty((int(offsets[-1]), width), storage_dtype(logical_dtype))
        roles = np.empty(int(offsets[-1]), np.uint8)
        for start, stop, item in zip(offsets[:-1].tolist(), offsets[1:].tolist(), chosen, strict=True):
            rows[start:stop], roles[start:stop] = self._rows[item][layer], self._roles[item]
        return TokenRows(rows=rows, roles=roles, offsets=offsets, logical_dtype=logical_dtype)

    def layer_shape(self, layer: str, /) -> tuple[int, str]:
        """As `Store.layer_shape`."""
        target = self._target.of(layer)
        return target.width(self._backbone), target.logical_dtype(self._backbone)

    def layer(self, name: str, /) -> LayerSource:
        """As `Store.layer`."""
        return layer_of(self, name)

    def tokens(self, items: Sequence[int] | NDArray[Any], /) -> list[tuple[NDArray[np.int32], NDArray[np.uint8]]]:
        """As `Store.tokens`."""
        return [(self._ids[k], self._roles[k]) for k in np.asarray(items, np.int64).tolist()]

    def lm_head(self) -> NDArray[np.float32]:
        """`W_lm` (V, D). Raises ViewRefused without the layer `last`."""
        if self._head is None:
            message = f"{self.id} are features of layer {self.layer_name}, which W_lm does not read."
            raise ViewRefused(message)
        return to_float32(self._head.bits, self._head.dtype)

    def basis(self) -> Basis:
        """The basis of a sketch. Raises DataError for another encoding."""
        return self.layer_basis(self.layer_name)

    def layer_basis(self, layer: str, /) -> Basis:
        """As `Store.layer_basis`. Raises DataError for another encoding."""
        basis = self._target.of(layer).basis
        if basis is None:
            message = f"{self.id}: {self.encoding!r} features have no basis."
            raise DataError(message)
        return basis

    def _encoded(self, states: Mapping[str, torch.Tensor]) -> dict[str, NDArray[Any]]:
        """The rows of one item by layer, in the store's encoding."""
        buffers: dict[str, torch.Tensor] = {}
        with self._transfers.on_device():
            for layer, staging in self._stagings.items():
                buffers[layer] = self._transfers.buffer(len(states[layer]), staging.width, staging.dtype)
                staging.put(states[layer], buffers[layer])
            event = self._transfers.mark()
        if event is not None:
            event.synchronize()
        return {
            layer: staging.finish(tensor_bits(buffers[layer])[0], [(0, len(buffers[layer]))])[0]
            for layer, staging in self._stagings.items()
        }
