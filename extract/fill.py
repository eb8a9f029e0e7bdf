"""Fill: run the model over the units that have no commit record and store what it makes of them."""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from agiqa.errors import DataError, HeadError
from agiqa.extract.backbones import Backbone, Prepared
from agiqa.extract.items import Item
from agiqa.extract.plan import fit
from agiqa.store import Basis, Store, UnitWriter, create_whole_array, from_float32, open_store, save_basis

_PROBE_ITEMS = 2
_PROBE_ROWS = 4
CALIBRATION_ITEMS = 256


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

    def __init__(self, store: Store, backbone: Backbone, items: Sequence[Item], *, batch_size: int) -> None:
        """`items` are those of the store, in its order; `batch_size` is in items."""
        self.store = store
        self.backbone = backbone
        self.items = items
        self.batch_size = batch_size
        self.writer = UnitWriter(store)
        self._basis: Basis | None = None

    def write_model_arrays(self, basis: Basis | None) -> None:
        """Load the model, and store W_lm (or the basis of a sketch) and a few rows of its own logits."""
        self.backbone.load()
        bits, dtype = tensor_bits(self.backbone.lm_head())
        sha256 = hashlib.sha256(bits.tobytes()).hexdigest()
        if basis is not None:
            _check_basis(basis, sha256)

        def write(group: zarr.Group) -> None:
            if basis is None:
                attributes = {"logical_dtype": dtype, "lm_head_sha256": sha256}
                create_whole_array(group, "lm_head/weight", bits, attributes=attributes)
            else:
                save_basis(group, basis)
            rows, logits = self._probe()
            probe_bits, probe_dtype = tensor_bits(logits)
            create_whole_array(group, "probe/rows", rows)
            create_whole_array(group, "probe/logits", probe_bits, attributes={"logical_dtype": probe_dtype})

        self.writer.write_model_arrays(write)
        if basis is not None:  # a run beside this one may have stored its own rounding of the same basis first
            self._basis = open_store(self.store.path, allow_partial=True).basis()

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
        starts = self.store.row_starts[positions] - unit * self.store.geometry.unit_rows
        for batch in self._batches(positions):
            prepared = [self._prepare(positions[place]) for place in batch]
            for place, states in zip(batch, self.backbone.hidden_states(prepared), strict=True):
                rows[int(starts[place]) :][: len(states)] = self._encode(states)
            advance(len(batch))
        self.writer.write_unit(unit, rows, seconds=time.perf_counter() - started)
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

    def _encode(self, states: torch.Tensor) -> NDArray[Any]:
        if self._basis is None:
            return tensor_bits(states)[0]
        coordinates = self._basis.coordinates(states.float().cpu().numpy())
        return from_float32(coordinates, self.store.logical_dtype)

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
    _check_basis(basis, hashlib.sha256(tensor_bits(backbone.lm_head())[0].tobytes()).hexdigest())


def _check_basis(basis: Basis, lm_head_sha256: str) -> None:
    if basis.lm_head_sha256 != lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, this model "
            f"has {lm_head_sha256[:12]}. Use a basis made from this model."
        )
        raise HeadError(message)


def tensor_bits(tensor: torch.Tensor) -> tuple[NDArray[Any], str]:
    """The values of `tensor` in their own bits (uint16 for bfloat16), and the name of its dtype."""
    values = tensor.detach().contiguous().cpu()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return values.numpy(), str(values.dtype).removeprefix("torch.")
