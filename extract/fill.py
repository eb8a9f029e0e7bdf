"""Fill: run the model over the units that have no commit record and store what it makes of them."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from agiqa.errors import DataError, HeadError
from agiqa.extract.backbones import Backbone, Prepared
from agiqa.extract.items import Item
from agiqa.extract.plan import fit
from agiqa.extract.targets import Target, tensor_bits, tensor_of
from agiqa.store import (
    Basis,
    Store,
    UnitWriter,
    create_whole_array,
    load_scale,
    open_store,
    save_basis,
    save_scale,
)

_PROBE_ITEMS = 2
_PROBE_ROWS = 4


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """What one run of `fill` did."""

    units: int
    items: int
    tokens: int
    seconds: float
    busy_units: int
    """Units of this run's share that another run was at work on."""


class Filler:
    """Fills the units of one store with what one backbone makes of its items."""

    def __init__(
        self, store: Store, backbone: Backbone, items: Sequence[Item], *, target: Target, batch_size: int
    ) -> None:
        """`items` are those of the store, in its order; `batch_size` is in items."""
        self.store = store
        self.backbone = backbone
        self.items = items
        self.batch_size = batch_size
        self.writer = UnitWriter(store)
        self.target = target

    def write_model_arrays(self) -> None:
        """Load the model; store what the target needs of it (W_lm, basis, scale), and a few rows of its own logits."""
        self.backbone.load()
        bits, dtype = tensor_bits(self.backbone.lm_head(bent=self.target.encoding == "logits"))
        sha256 = hashlib.sha256(bits.data).hexdigest()
        basis, scale = self.target.basis, self.target.scale
        if basis is not None:
            _check_basis(basis, sha256)

        def write(group: zarr.Group) -> None:
            if self.target.encoding in ("hidden", "int8"):
                attributes = {"logical_dtype": dtype, "lm_head_sha256": sha256}
                create_whole_array(group, "lm_head/weight", bits, attributes=attributes)
            if basis is not None:
                save_basis(group, basis)
            if scale is not None:
                save_scale(group, scale)
            rows, logits = self._probe()
            probe_bits, probe_dtype = tensor_bits(logits)
            create_whole_array(group, "probe/rows", rows)
            attributes = {"logical_dtype": probe_dtype, "lm_head_sha256": sha256}
            create_whole_array(group, "probe/logits", probe_bits, attributes=attributes)

        self.writer.write_model_arrays(write)
        # a run beside this one may have stored its own rounding of the same constants first
        stored = open_store(self.store.path, allow_partial=True)
        self.target = replace(
            self.target,
            basis=None if basis is None else stored.basis(),
            scale=None if scale is None else load_scale(stored.group),
        )

    def fill(
        self, *, part: tuple[int, int] = (1, 1), advance: Callable[[int], None] = lambda _items: None
    ) -> FillReport:
        """Compute and write the pending units of share `part` = (K, N); `advance` gets the items done."""
        started = time.perf_counter()
        units = items = tokens = busy = 0
        for unit in self.writer.pending(part=part):
            with self.writer.claim(unit) as mine:
                if not mine:
                    busy += 1
                    continue
                tokens += self._fill_unit(unit, advance)
            units += 1
            items += len(self.store.items_of(unit))
        seconds = time.perf_counter() - started
        return FillReport(units=units, items=items, tokens=tokens, seconds=seconds, busy_units=busy)

    def _fill_unit(self, unit: int, advance: Callable[[int], None]) -> int:
        started = time.perf_counter()
        positions = self.store.items_of(unit).tolist()
        rows = np.empty((self.store.rows_used(unit), self.store.width), self.store.array("features").dtype)
        scale = np.empty(len(rows), np.float32) if self.target.scale is not None else None
        starts = self.store.row_starts[positions] - unit * self.store.geometry.unit_rows
        for batch in self._batches(positions):
            prepared = [self._prepare(positions[place]) for place in batch]
            for place, states in zip(batch, self.backbone.hidden_states(prepared), strict=True):
                where = slice(int(starts[place]), int(starts[place]) + len(states))
                rows[where], token_scale = self.target.encode(states, self.backbone)
                if scale is not None and token_scale is not None:
                    scale[where] = token_scale
            advance(len(batch))

        def logits(start: int, stop: int) -> NDArray[Any]:
            states = tensor_of(rows[start:stop], self.store.logical_dtype)
            return tensor_bits(self.backbone.project(states))[0]

        kept = logits if self.target.keep_logits else None
        self.writer.write_unit(unit, rows, seconds=time.perf_counter() - started, scale=scale, logits=kept)
        return len(rows)

    def _batches(self, positions: Sequence[int]) -> Iterator[list[int]]:
        """Places in `positions`, in batches of like length; the same whenever the unit is computed."""
        order = sorted(range(len(positions)), key=lambda place: (int(self.store.n_tokens[positions[place]]), place))
        for first in range(0, len(order), self.batch_size):
            yield order[first : first + self.batch_size]

    def _prepare(self, position: int) -> Prepared:
        item, length = self.items[position], int(self.store.n_tokens[position])
        try:
            prepared = fit(self.backbone.prepare(item.conversation, item.image), length, truncate=True)
        except DataError as error:
            error.add_note(f"while reading item {item.name!r}")
            raise
        if len(prepared.token_ids) != length:
            message = f"item {item.name!r} has changed since the store was planned. Extract to another path."
            raise DataError(message)
        return prepared

    def _probe(self) -> tuple[NDArray[np.int64], torch.Tensor]:
        """Rows (n,) spread over the store and the model's own logits there, (n, V)."""
        with_tokens = np.flatnonzero(self.store.n_tokens > 0)
        positions = np.unique(with_tokens[np.linspace(0, len(with_tokens) - 1, _PROBE_ITEMS).astype(int)])
        rows: list[int] = []
        logits: list[torch.Tensor] = []
        for position in positions.tolist():
            tokens = np.unique(np.linspace(0, int(self.store.n_tokens[position]) - 1, _PROBE_ROWS).astype(int))
            rows.extend((self.store.row_starts[position] + tokens).tolist())
            logits.append(self.backbone.logits(self._prepare(position))[torch.from_numpy(tokens)])
        return np.array(rows, np.int64), torch.cat(logits)


def check_basis(backbone: Backbone, basis: Basis) -> None:
    """Raise HeadError unless `basis` was made for the language-model head of `backbone`, which is loaded for it."""
    backbone.load()
    _check_basis(basis, hashlib.sha256(tensor_bits(backbone.lm_head())[0].data).hexdigest())


def _check_basis(basis: Basis, lm_head_sha256: str) -> None:
    if basis.lm_head_sha256 != lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, this model "
            f"has {lm_head_sha256[:12]}. Use a basis made from this model."
        )
        raise HeadError(message)
