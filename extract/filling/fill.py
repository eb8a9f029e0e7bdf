"""Fill: run the model over the units of a store that have no commit record, and write their rows.

Three things happen at the same time: workers prepare the items of the next batches, the device computes, and threads
encode, compress and write finished units. A unit counts once its record exists, so a run may stop at any moment.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray

from agiqa.extract.describing.spool import Spool
from agiqa.extract.filling.plan import PlannedItem, prepare_planned, prepared_groups
from agiqa.extract.filling.staging import Staging, Transfers, stagings_of
from agiqa.extract.filling.targets import (
    Target,
    model_arrays_written,
    rows_of,
    stored_of,
    tensor_bits,
    tensor_of,
)
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner, even_batches, first_batch_size, uploaded
from agiqa.extract.models.preparing import Preparation
from agiqa.store import Store, UnitWriter
from agiqa.store.format.layers import LAST

WRITERS = 4
"""Threads that write units; one compresses, writes and checks 400 MB of hidden states per second on two cores."""
_READERS = 4
"""Threads that read the rows of a unit that were kept while the model described."""
_WAITING = 2
"""Finished units, each in memory, that may wait for a thread."""


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """What one run of `fill` did."""

    units: int
    items: int
    tokens: int
    """That the model read; a store of pooled rows has other numbers of rows."""
    started: float
    """When the first batch was prepared, in seconds since the epoch."""
    seconds: float
    """From then to the last record."""
    waited_for_items: float
    """Seconds in which the device waited for prepared items, summed over processes."""
    waited_for_writers: float
    """Seconds in which the device waited for units to be compressed and written, summed over processes."""
    busy_units: int
    """Units of this run's share that another run was filling."""
    batch_size: int
    """Most items per batch, at the end."""
    reused: int = 0
    """Items whose rows were kept while they were described."""


def merged(reports: Sequence[FillReport], *, busy_units: int) -> FillReport:
    """The report of several processes; `seconds` run from the first batch of any to the last record of any.

    `busy_units` are the units of their share that are unfilled at the end. The processes' own counts do not add up to
    it: each counts units that its siblings hold.
    """
    began = min((report.started for report in reports if report.items), default=0.0)
    return FillReport(
        units=sum(report.units for report in reports),
        items=sum(report.items for report in reports),
        tokens=sum(report.tokens for report in reports),
        started=began,
        seconds=max((report.started + report.seconds - began for report in reports if report.items), default=0.0),
        waited_for_items=sum(report.waited_for_items for report in reports),
        waited_for_writers=sum(report.waited_for_writers for report in reports),
        busy_units=busy_units,
        batch_size=min((report.batch_size for report in reports), default=0),
        reused=sum(report.reused for report in reports),
    )


@dataclass(kw_only=True)
class _OpenUnit:
    """One unit that is being filled."""

    unit: int
    positions: list[int]
    bounds: list[tuple[int, int]]
    """Rows of each item within the unit."""
    claim: ExitStack
    """Held until the unit is written."""
    kept: dict[int, torch.Tensor]
    """Hidden states (n, D) on the host of the items, by index, that the model does not have to compute."""
    left: int
    """Other items that are not computed yet."""
    started: float = field(default_factory=time.perf_counter)
    buffers: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])
    """By layer, (rows, width) on the host; none until the first batch."""


_Batch = tuple[_OpenUnit, list[int]]
"""A unit, and the indices within it of items that run together."""
_Group = tuple[_Batch, list[Prepared]]
"""A batch and its prepared items."""


class Filler:
    """One fill of a store with the features that one backbone computes."""

    def __init__(
        self,
        store: Store,
        backbone: Backbone,
        items: Sequence[PlannedItem],
        *,
        target: Target,
        batch_size: int | None = None,
        preparation: Preparation[Backbone] | None = None,
        spool: Spool | None = None,
    ) -> None:
        """`items` are those of the store, in its order; without a `batch_size` (items) the device's memory decides.

        Rows that `spool` kept of the last layer are taken from there, in place of running the model.
        """
        self.store = store
        self.backbone = backbone
        self.items = items
        self.target = target
        self.writer = UnitWriter(store)
        self._batch_size = batch_size
        self._preparation = preparation or Preparation(backbone)
        self._spool = spool if target.layers == (LAST,) and target.tap is None else None
        self._transfers = Transfers(backbone.device)
        self._open: dict[int, _OpenUnit] = {}
        self._units = self._written_items = self._tokens = self._busy = self._reused = 0
        self._waited_for_items = self._waited_for_writers = 0.0

    @contextmanager
    def model_arrays_written(self) -> Generator[None]:
        """Store what the target needs of the model, while the block fills, see `targets.model_arrays_written`."""
        arguments = self.writer, self.backbone, self.target
        with model_arrays_written(*arguments, lambda at: prepare_planned(self.backbone, self.items[at])) as target:
            self.target = target
            yield

    def fill(
        self,
        *,
        part: tuple[int, int] = (1, 1),
        units: Iterable[int] | None = None,
        advance: Callable[[int], None] = lambda _items: None,
    ) -> FillReport:
        """Compute and write the pending units of share `part` = (K, N), or `units`; `advance` gets the items done.

        `units` is read as late as possible; units that other runs hold or have finished are passed over.
        """
        self.backbone.load()
        longest, layers = max(item.length for item in self.items), len(self.target.layers)
        size = self._batch_size or first_batch_size(self.backbone, longest, layers=layers)
        runner = BatchRunner(size)
        pending = self.writer.pending(part=part) if units is None else units
        started, began = time.perf_counter(), time.time()
        try:
            with self._transfers.on_device(), _Writes() as writes:
                stagings = stagings_of(self.target, self.backbone, self._transfers)
                images = any(item.item.image is not None for item in self.items)
                groups = prepared_groups(self._preparation, self._batches(pending, runner), images=images)
                for number, ((unit, indices), prepared) in enumerate(self._awaited(self._transfers.sent(groups))):
                    if number == 0:
                        started, began, self._waited_for_items = time.perf_counter(), time.time(), 0.0
                    if not unit.buffers:
                        self._waited_for_writers += writes.wait_for_room()
                        rows = self.store.rows_used(unit.unit)
                        unit.buffers = {
                            layer: self._transfers.buffer(rows, one.width, one.dtype) for layer, one in stagings.items()
                        }
                        advance(self._take_kept(unit, stagings))
                    self._compute(runner, unit, indices, prepared, stagings)
                    unit.left -= len(indices)
                    if unit.left == 0:
                        writes.submit(self._writer_of(unit, stagings, self._transfers.mark()))
                    advance(len(indices))
        finally:
            for unit in self._open.values():
                unit.claim.close()
        return FillReport(
            units=self._units,
            items=self._written_items,
            tokens=self._tokens,
            started=began,
            seconds=time.perf_counter() - started,
            waited_for_items=self._waited_for_items,
            waited_for_writers=self._waited_for_writers,
            busy_units=self._busy,
            batch_size=runner.size,
            reused=self._reused,
        )

    def _awaited(self, groups: Iterator[_Group]) -> Iterator[_Group]:
        """`groups`, counting the time that the device waits for each."""
        while True:
            began = time.perf_counter()
            group = next(groups, None)
            self._waited_for_items += time.perf_counter() - began
            if group is None:
                return
            yield group

    def _batches(self, units: Iterable[int], runner: BatchRunner) -> Iterator[tuple[_Batch, list[PlannedItem]]]:
        """Batches of the units that this run can claim; a unit has the same batches in every run.

        A unit of which all rows were kept has one batch, without items.
        """
        for number in units:
            claim = ExitStack()
            if not claim.enter_context(self.writer.claim(number)):
                claim.close()
                self._busy += 1
                continue
            positions = self.store.items_of(number).tolist()
            starts = (self.store.row_starts[positions] - number * self.store.geometry.unit_rows).tolist()
            rows = self.store.n_tokens[positions].tolist()
            bounds = [(start, start + count) for start, count in zip(starts, rows, strict=True)]
            planned = [self.items[position] for position in positions]
            kept = self._kept_states(planned)
            others = [index for index in range(len(planned)) if index not in kept]
            unit = _OpenUnit(unit=number, positions=positions, bounds=bounds, claim=claim, kept=kept, left=len(others))
            self._open[number] = unit
            for batch in even_batches([planned[index].length for index in others], runner.size) or [[]]:
                indices = [others[place] for place in batch]
                yield (unit, indices), [planned[index] for index in indices]

    def _kept_states(self, planned: Sequence[PlannedItem]) -> dict[int, torch.Tensor]:
        """Of the items of a unit whose states were kept, those states (n, D), by index."""
        if self._spool is None:
            return {}
        with ThreadPoolExecutor(_READERS) as pool:
            found = list(pool.map(self._spool.read, [one.item for one in planned], [one.token_ids for one in planned]))
        return {index: states for index, states in enumerate(found) if states is not None}

    def _take_kept(self, unit: _OpenUnit, stagings: Mapping[str, Staging]) -> int:
        """Start copying the rows that were kept into the unit's buffers; of how many items."""
        kept, unit.kept = unit.kept, {}
        for index, states in kept.items():
            if stagings[LAST].copies and not self.target.poolings:  # the device has nothing to do
                unit.buffers[LAST][slice(*unit.bounds[index])] = states
                continue
            roles = self.items[unit.positions[index]].roles
            rows = stored_of(self.backbone, self.target, {LAST: uploaded(states, self.backbone.device)}, roles)
            self._stage(rows, unit, index, stagings)
        self._reused += len(kept)
        return len(kept)

    def _compute(
        self,
        runner: BatchRunner,
        unit: _OpenUnit,
        indices: list[int],
        prepared: list[Prepared],
        stagings: Mapping[str, Staging],
    ) -> None:
        """Compute one batch, and start copying its rows into the unit's buffers."""

        def compute(batch: Sequence[tuple[int, Prepared]]) -> None:
            inputs = self._transfers.upload([item for _, item in batch])
            for (index, _), rows in zip(batch, rows_of(self.backbone, self.target, inputs), strict=True):
                self._stage(rows, unit, index, stagings)

        def name(item: tuple[int, Prepared]) -> str:
            return str(self.items[unit.positions[item[0]]])

        runner.run(compute, list(zip(indices, prepared, strict=True)), name=name)
        self._tokens += sum(len(item.token_ids) for item in prepared)

    def _stage(
        self, rows: Mapping[str, torch.Tensor], unit: _OpenUnit, index: int, stagings: Mapping[str, Staging]
    ) -> None:
        """Start copying the rows of one item, by layer, into the unit's buffers."""
        start, stop = unit.bounds[index]
        for layer, staging in stagings.items():
            staging.put(rows[layer], unit.buffers[layer][start:stop])

    def _writer_of(
        self, unit: _OpenUnit, stagings: Mapping[str, Staging], computed: "torch.cuda.Event | None"
    ) -> Callable[[], None]:
        """The job of a writing thread, which first waits for the event `computed` of the device."""
        *others, last = stagings

        def write() -> None:
            with unit.claim:
                del self._open[unit.unit]
                if computed is not None:
                    computed.synchronize()
                buffers, unit.buffers = unit.buffers, {}
                found = {
                    layer: one.finish(tensor_bits(buffers[layer])[0], unit.bounds) for layer, one in stagings.items()
                }
                rows, scale = found[last]
                kept = self._kept_logits(rows) if self.target.keep_logits else None
                self.writer.write_unit(
                    unit.unit,
                    rows,
                    seconds=time.perf_counter() - unit.started,
                    scale=scale,
                    logits=kept,
                    layers={layer: found[layer][0] for layer in others},
                    layer_scales={layer: values for layer in others if (values := found[layer][1]) is not None} or None,
                )

        self._units += 1
        self._written_items += len(unit.positions)
        return write

    def _kept_logits(self, rows: NDArray[Any]) -> Callable[[int, int], NDArray[Any]]:
        def logits(start: int, stop: int) -> NDArray[Any]:
            with self._transfers.on_device():
                states = tensor_of(rows[start:stop], self.store.logical_dtype)
                return tensor_bits(self.backbone.project(states))[0]

        return logits


class _Writes:
    """Threads that write units, with a short queue; the next call raises the error of a failed write."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="agiqa-write")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> "_Writes":
        return self

    def submit(self, write: Callable[[], None]) -> None:
        """Call `write` as soon as a thread is free."""
        self._running.append(self._pool.submit(write))

    def wait_for_room(self) -> float:
        """Wait until memory may hold one more unit; the seconds waited."""
        began = time.perf_counter()
        while len(self._running) >= WRITERS + _WAITING:
            self._running.popleft().result()
        return time.perf_counter() - began

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for all writes; after Ctrl-C only for those that have begun."""
        try:
            if error is None:
                while self._running:
                    self._running.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=isinstance(error, KeyboardInterrupt))
