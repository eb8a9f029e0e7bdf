"""Where the model runs: in this process, or in N processes on N devices of this host; see `ray_driver` for clusters.

All engines fill the same units alike. The processes of one host begin with shares of the units, and then take over
what is left of the others' shares from their ends. They agree by claims on units alone, which the kernel drops when a
process ends.
"""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from agiqa.errors import WorkerError
from agiqa.extract.data.items import Item
from agiqa.extract.describing.spool import Spool
from agiqa.extract.filling.calibration import calibrated
from agiqa.extract.filling.crew import Crew
from agiqa.extract.filling.fill import Filler, FillReport, merged
from agiqa.extract.filling.plan import PlannedItem, TokenisedItems, prepare_planned
from agiqa.extract.filling.targets import Target, check_bases
from agiqa.extract.models import Backbone
from agiqa.extract.models.ahead import Ahead
from agiqa.extract.models.preparing import Opener, Preparation, default_workers
from agiqa.progress import Advance
from agiqa.store import Store, UnitWriter, open_store


class Engine(Protocol):
    """A place where the model runs."""

    def run(self, task: "Task", *, items: int, advance: Advance) -> Any:
        """Call `task` in the process that has the model, and return its answer; it prepares `items` items.

        In another process the task gets no `advance`.
        """
        ...

    def compiling(self) -> "Engine":
        """This engine, with compiled layers from now on."""
        ...

    def load(self) -> None:
        """Get ready to fill."""
        ...

    def fill(
        self, store: Store, items: Sequence[PlannedItem], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """Store what `target` needs of the model, then fill the pending units of share `part`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Here:
    """This process and its one device, an `Engine`."""

    backbone: Backbone
    preparation: Preparation[Backbone]
    batch_size: int | None
    loading: Ahead[None] | None = None
    """A thread that loads the model already."""
    compiled: bool = False
    """Whether the model's layers are compiled."""
    spool: Spool | None = None
    """Has rows that need not be computed."""

    def compiling(self) -> "Here":
        """See `Engine`."""
        return replace(self, compiled=True)

    def run(self, task: "Task", *, items: int, advance: Advance) -> Any:
        """See `Engine`."""
        del items
        self.load()
        return task(self, advance)

    def load(self) -> None:
        """See `Engine`."""
        if self.loading is not None:
            self.loading.result()
        self.backbone.load()
        if self.compiled:
            self.backbone.compile_layers()

    def fill(
        self,
        store: Store,
        items: Sequence[PlannedItem],
        target: Target,
        *,
        part: tuple[int, int] = (1, 1),
        units: Iterable[int] | None = None,
        advance: Advance,
    ) -> FillReport:
        """See `Engine`; `units`, if given, are filled instead of `part`."""
        filler = Filler(
            store,
            self.backbone,
            items,
            target=target,
            batch_size=self.batch_size,
            preparation=self.preparation,
            spool=self.spool,
        )
        self.load()
        with filler.model_arrays_written():
            return filler.fill(part=part, units=units, advance=advance)


Task = Callable[[Here, Advance], Any]


def compare_bases(here: Here, _advance: Advance, *, target: Target) -> None:
    """A task that raises HeadError unless the bases of `target` were made for the model."""
    check_bases(target, here.backbone)


def try_layers(here: Here, _advance: Advance, *, items: Sequence[PlannedItem], layers: Sequence[str]) -> None:
    """A task that runs the model on the first of `items`, and on all; raises CompilerError as `layer_states`."""
    prepared = [prepare_planned(here.backbone, one) for one in items]
    for batch in (prepared, prepared[:1]):
        here.backbone.layer_states(batch, layers)


def calibrate_target(
    here: Here, advance: Advance, *, tokenised: TokenisedItems, wanted: Target, rank: int | None
) -> Target:
    """The task `calibrated`."""
    return calibrated(
        here.backbone,
        tokenised,
        wanted,
        rank=rank,
        batch_size=here.batch_size,
        advance=advance,
        preparation=here.preparation,
    )


@dataclass(frozen=True, kw_only=True)
class ModelProcess:
    """How another process runs the model. Picklable."""

    opener: Opener
    device: str
    workers: int | None
    """Worker processes that prepare its items; None for as many as it has cores for."""
    processes: int
    """How many such processes share the machine."""
    batch_size: int | None
    compiled: bool = False
    """See `Here`."""

    @contextmanager
    def opened(self, items: int) -> Generator[Here]:
        """The model in this process; workers start at once if there are `items` to prepare."""
        backbone, workers = self.opener(device=self.device), self.workers
        if workers is None:
            workers = default_workers(backbone.device, items, processes=self.processes)
        with Preparation(backbone, workers=workers, opener=self.opener) as preparation:
            if items:
                preparation.start()
            size, compiled = self.batch_size, self.compiled
            yield Here(backbone=backbone, preparation=preparation, batch_size=size, compiled=compiled)

    def run(self, task: Task, *, items: int) -> Any:
        """The answer of `task`; `items` is how many it prepares."""
        with self.opened(items) as here:
            return here.run(task, items=items, advance=lambda _items: None)

    def fill(
        self, path: Path, items: Sequence[PlannedItem], target: Target, *, units: Iterable[int], advance: Advance
    ) -> FillReport:
        """Fill those `units` of the store at `path` that no other run is filling."""
        with self.opened(to_prepare(one.item for one in items) // self.processes) as here:
            return here.fill(open_store(path, allow_partial=True), items, target, units=units, advance=advance)


def to_prepare(items: Iterable[Item]) -> int:
    """How many `items` a fill prepares: the plan has all that the model reads of those without an image."""
    return sum(item.image is not None for item in items)


def striped(pending: Sequence[int], process: int, processes: int) -> list[int]:
    """`pending` units in the order in which `process` (from 0) tries them: its own, then the ends of the others'."""
    shares = [list(pending[first::processes]) for first in range(processes)]
    others = [shares[(process + step) % processes] for step in range(1, processes)]
    return [*shares[process], *(unit for share in others for unit in reversed(share))]


@dataclass(frozen=True, kw_only=True)
class OnDevices:
    """N processes of this host, an `Engine`. Each loads the weights itself, and this process never does."""

    process: ModelProcess
    """Of the first device; the others differ in the device only."""
    devices: Sequence[str]
    crew: Crew | None = None
    """The processes, if they have begun to load; without them each call starts its own."""

    def run(self, task: Task, *, items: int, advance: Advance) -> Any:
        """See `Engine`. In the process of the first device."""
        del advance
        with self._working(items, self.devices[:1]) as crew:
            return crew.ask(task)

    def compiling(self) -> "OnDevices":
        """See `Engine`."""
        if self.crew is not None:
            self.crew.compile()
        return replace(self, process=replace(self.process, compiled=True))

    def load(self) -> None:
        """See `Engine`; does nothing."""

    def fill(
        self, store: Store, items: Sequence[PlannedItem], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """See `Engine`. The others finish the units of a process that died.

        Raises the first error of any process, and WorkerError if units are left that no process could take over.
        """
        pending, count = UnitWriter(store).pending(part=part), len(self.devices)
        shares = [striped(pending, index, count) for index in range(count)]
        with self._working(to_prepare(one.item for one in items) // count, self.devices) as crew:
            reports = crew.fill(store.path, items, target, shares, advance)
        left = [unit for unit in UnitWriter(store).pending(part=part) if unit in set(pending)]
        if crew.died and left:
            message = (
                f"{' and '.join(crew.died)}; {len(left)} units are left. What is finished is kept: run the same "
                "command again."
            )
            raise WorkerError(message)
        return merged(reports, busy_units=len(left))

    @contextmanager
    def _working(self, items: int, devices: Sequence[str]) -> Generator[Crew]:
        """The crew of this engine, or one that ends with the block."""
        if self.crew is not None:
            yield self.crew
            return
        with Crew(len(devices), on_cpu=devices[0].startswith("cpu")) as crew:
            crew.open(self.process, devices, items=items)
            yield crew
