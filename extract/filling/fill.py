"""Fill: run the model over the units that have no commit record and store what it makes of them.

Three things happen at once: items of the next batches are prepared, the device computes, and finished units are
encoded, compressed and written by threads. A unit counts when its record is there, so a run may stop anywhere.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from numpy.typing import NDArray

from agiqa.extract.data.items import Item
from agiqa.extract.filling.model_arrays import write_model_arrays
from agiqa.extract.filling.plan import PlannedItem, prepare_planned
from agiqa.extract.filling.staging import Staging, staging_of
from agiqa.extract.filling.targets import Target, tensor_bits, tensor_of
from agiqa.extract.filling.transfers import Transfers
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner, even_batches, first_batch_size
from agiqa.extract.models.preparing import Preparation
from agiqa.store import Store, UnitWriter

WRITERS = 4
"""Threads that write units; one alone compresses, writes and checks 400 MB of hidden states a second on two cores."""
_WAITING = 2
"""Finished units that may wait for a thread, each in memory."""


@dataclass(frozen=True, kw_only=True)
class FillReport:
    """What one run of `fill` did."""

    units: int
    items: int
    tokens: int
    started: float
    """When the first batch was there, in seconds since the epoch."""
    seconds: float
    """From then to the last record."""
    waited_for_items: float
    """Seconds of these in which items were not prepared yet and the device had nothing to do; of several processes
    their sum, as of `waited_for_writers`."""
    waited_for_writers: float
    """Seconds in which as many units as memory is given to were still being compressed and written."""
    busy_units: int
    """Units of this run's share that another run was at work on."""
    batch_size: int
    """Items per batch at most, at the end."""


def merged(reports: Sequence[FillReport], *, busy_units: int) -> FillReport:
    """What several processes did side by side; `seconds` are from the first batch of any to the last record of any.

    `busy_units` are those of their share that none of them has filled at the end. What each of them counts are those of
    the others too.
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
    )


@dataclass(kw_only=True)
class _OpenUnit:
    """One unit on its way."""

    unit: int
    positions: list[int]
    bounds: list[tuple[int, int]]
    """Rows of each item within the unit."""
    claim: ExitStack
    """Held until the unit is written."""
    left: int
    """Items that are not computed yet."""
    started: float = field(default_factory=time.perf_counter)
    buffer: torch.Tensor | None = None


_Batch = tuple[_OpenUnit, list[int]]
"""Places of items within a unit that run together."""
_Group = tuple[_Batch, list[Prepared]]
"""A batch, and what the model reads of its items."""


class Filler:
    """Fills the units of one store with what one backbone makes of its items."""

    def __init__(
        self,
        store: Store,
        backbone: Backbone,
        items: Sequence[Item],
        *,
        target: Target,
        batch_size: int | None = None,
        preparation: Preparation | None = None,
    ) -> None:
        """`items` are those of the store, in its order; `batch_size` is in items, None lets the device decide."""
        self.store = store
        self.backbone = backbone
        self.items = items
        self.batch_size = batch_size
        self.writer = UnitWriter(store)
        self.target = target
        self.preparation = preparation or Preparation(backbone)

    def write_model_arrays(self) -> None:
        """Load the model; store what the target needs of it (W_lm, basis, scale), and a few rows of its own logits."""
        self.target = write_model_arrays(
            self.writer,
            self.backbone,
            self.target,
            lambda position: prepare_planned(self.backbone, self.planned(position)),
        )

    def fill(
        self,
        *,
        part: tuple[int, int] = (1, 1),
        units: Iterable[int] | None = None,
        advance: Callable[[int], None] = lambda _items: None,
    ) -> FillReport:
        """Compute and write the pending units of share `part` = (K, N), or of `units`; `advance` gets the items done.

        `units` is read as late as it can be, and those that other runs hold or have finished are passed over.
        """
        self.backbone.load()
        size = self.batch_size or first_batch_size(self.backbone, int(self.store.n_tokens.max(initial=0)))
        pending = self.writer.pending(part=part) if units is None else units
        return _Fill(self, BatchRunner(size)).run(pending, advance)

    def planned(self, position: int) -> PlannedItem:
        """The item at `position` of the store."""
        return PlannedItem(item=self.items[position], length=int(self.store.n_tokens[position]))


class _Fill:
    """One call of `Filler.fill`."""

    def __init__(self, filler: Filler, runner: BatchRunner) -> None:
        self.filler = filler
        self.store = filler.store
        self.backbone = filler.backbone
        self.runner = runner
        self.transfers = Transfers(filler.backbone.device)
        self.open: dict[int, _OpenUnit] = {}
        self.units = self.written_items = self.tokens = self.busy = 0
        self.waited_for_items = self.waited_for_writers = 0.0

    def run(self, units: Iterable[int], advance: Callable[[int], None]) -> FillReport:
        """Fill `units`."""
        started, began = time.perf_counter(), time.time()
        try:
            with self.transfers.on_device(), _Writes() as writes:
                staging = staging_of(self.filler.target, self.backbone, self.transfers)
                groups = self.filler.preparation.groups(prepare_planned, self._batches(units))
                for number, ((unit, places), prepared) in enumerate(self._awaited(self.transfers.sent(groups))):
                    if number == 0:
                        started, began, self.waited_for_items = time.perf_counter(), time.time(), 0.0
                    if unit.buffer is None:
                        self.waited_for_writers += writes.wait_for_room()
                        rows = self.store.rows_used(unit.unit)
                        unit.buffer = self.transfers.buffer(rows, staging.width, staging.dtype)
                    self._compute(unit, places, prepared, staging)
                    unit.left -= len(places)
                    if unit.left == 0:
                        writes.submit(self._writer_of(unit, staging, self.transfers.mark()))
                    advance(len(places))
        finally:
            for unit in self.open.values():
                unit.claim.close()
        return FillReport(
            units=self.units,
            items=self.written_items,
            tokens=self.tokens,
            started=began,
            seconds=time.perf_counter() - started,
            waited_for_items=self.waited_for_items,
            waited_for_writers=self.waited_for_writers,
            busy_units=self.busy,
            batch_size=self.runner.size,
        )

    def _awaited(self, groups: Iterator[_Group]) -> Iterator[_Group]:
        """`groups`, and how long each kept the device waiting."""
        while True:
            began = time.perf_counter()
            group = next(groups, None)
            self.waited_for_items += time.perf_counter() - began
            if group is None:
                return
            yield group

    def _batches(self, units: Iterable[int]) -> Iterator[tuple[_Batch, list[PlannedItem]]]:
        """Batches of the units that can be claimed; the same for a unit whenever it is computed."""
        for number in units:
            claim = ExitStack()
            if not claim.enter_context(self.filler.writer.claim(number)):
                claim.close()
                self.busy += 1
                continue
            positions = self.store.items_of(number).tolist()
            starts = (self.store.row_starts[positions] - number * self.store.geometry.unit_rows).tolist()
            lengths = self.store.n_tokens[positions].tolist()
            bounds = [(start, start + length) for start, length in zip(starts, lengths, strict=True)]
            unit = _OpenUnit(unit=number, positions=positions, bounds=bounds, claim=claim, left=len(positions))
            self.open[number] = unit
            for places in even_batches(lengths, self.runner.size):
                yield (unit, places), [self.filler.planned(positions[place]) for place in places]

    def _compute(self, unit: _OpenUnit, places: list[int], prepared: list[Prepared], staging: Staging) -> None:
        """Bring the rows of one batch on their way into the unit's buffer."""
        buffer = unit.buffer
        assert buffer is not None  # run made it

        def compute(batch: Sequence[tuple[int, Prepared]]) -> None:
            uploaded = self.transfers.upload([item for _, item in batch])
            for (place, _), states in zip(batch, self.backbone.hidden_states(uploaded), strict=True):
                start, stop = unit.bounds[place]
                staging.put(states, buffer[start:stop])

        def name(item: tuple[int, Prepared]) -> str:
            return str(self.filler.planned(unit.positions[item[0]]))

        self.runner.run(compute, list(zip(places, prepared, strict=True)), name=name)

    def _writer_of(self, unit: _OpenUnit, staging: Staging, computed: "torch.cuda.Event | None") -> Callable[[], None]:
        """What a thread does once the device has `computed` the unit."""

        def write() -> None:
            with unit.claim:
                del self.open[unit.unit]
                if computed is not None:
                    computed.synchronize()
                buffer, unit.buffer = unit.buffer, None
                assert buffer is not None  # run made it
                rows, scale = staging.finish(tensor_bits(buffer)[0], unit.bounds)
                kept = self._kept_logits(rows) if self.filler.target.keep_logits else None
                seconds = time.perf_counter() - unit.started
                self.filler.writer.write_unit(unit.unit, rows, seconds=seconds, scale=scale, logits=kept)

        self.units += 1
        self.written_items += len(unit.positions)
        self.tokens += self.store.rows_used(unit.unit)
        return write

    def _kept_logits(self, rows: NDArray[Any]) -> Callable[[int, int], NDArray[Any]]:
        def logits(start: int, stop: int) -> NDArray[Any]:
            with self.transfers.on_device():
                states = tensor_of(rows[start:stop], self.store.logical_dtype)
                return tensor_bits(self.backbone.project(states))[0]

        return logits


class _Writes:
    """Threads that write units, a few ahead; what fails in one of them is raised by whoever uses it next."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="agiqa-write")
        self._running: deque[Future[None]] = deque()

    def __enter__(self) -> "_Writes":
        return self

    def submit(self, write: Callable[[], None]) -> None:
        """Write when a thread is free."""
        self._running.append(self._pool.submit(write))

    def wait_for_room(self) -> float:
        """Wait until there may be one more unit in memory; the seconds that it took."""
        began = time.perf_counter()
        while len(self._running) >= WRITERS + _WAITING:
            self._running.popleft().result()
        return time.perf_counter() - began

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the writes to end; after Ctrl-C only for those that have begun."""
        try:
            if error is None:
                while self._running:
                    self._running.popleft().result()
        finally:
            self._pool.shutdown(wait=True, cancel_futures=isinstance(error, KeyboardInterrupt))
