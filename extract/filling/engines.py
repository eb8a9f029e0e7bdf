"""Where the model runs: in this process, or in N processes on N devices of this host; see `ray_driver` for clusters.

All engines fill the same units alike. The processes of one host begin with shares of the units, and then take over
what is left of the others' shares from their ends. They agree by claims on units alone, which the kernel drops when a
process ends.
"""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from agiqa.errors import WorkerError
from agiqa.extract.data.items import Item
from agiqa.extract.filling.calibration import calibrated
from agiqa.extract.filling.fill import Filler, FillReport, merged
from agiqa.extract.filling.plan import TokenisedItems
from agiqa.extract.filling.targets import Target, check_basis, lm_head_of
from agiqa.extract.models import Backbone
from agiqa.extract.models.preparing import Opener, Preparation, default_workers
from agiqa.progress import Advance, said_to, say
from agiqa.store import Basis, Store, UnitWriter, open_store
from agiqa.workers import LostAnswer, Work, Workers, ctrl_c_kept_away, end_with_parent, killed_with_forker, picklable

_SECONDS_BETWEEN_SIGNS = 5.0
"""Interval at which a process shows that it is alive."""
_SIGNS = 60
"""Missing signs after which a process is killed: somebody stopped it, or its machine hangs."""
_SIGNS_TO_BEGIN = 180
"""Further signs that may be missing at first: importing on a busy machine is slow."""
_SECONDS_TO_END = 5.0
"""Time that a process has to end by itself."""


class Engine(Protocol):
    """A place where the model runs."""

    def run(self, task: "Task", *, items: int, advance: Advance) -> Any:
        """Call `task` in the process that has the model, and return its answer; it prepares `items` items.

        In another process the task gets no `advance`.
        """
        ...

    def load(self) -> None:
        """Get ready to fill."""
        ...

    def fill(
        self, store: Store, items: Sequence[Item], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """Store what `target` needs of the model, then fill the pending units of share `part`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Here:
    """This process and its one device, an `Engine`."""

    backbone: Backbone
    preparation: Preparation[Backbone]
    batch_size: int | None

    def run(self, task: "Task", *, items: int, advance: Advance) -> Any:
        """See `Engine`."""
        del items
        return task(self, advance)

    def load(self) -> None:
        """See `Engine`."""
        self.backbone.load()

    def fill(
        self,
        store: Store,
        items: Sequence[Item],
        target: Target,
        *,
        part: tuple[int, int] = (1, 1),
        units: Iterable[int] | None = None,
        advance: Advance,
    ) -> FillReport:
        """See `Engine`; `units`, if given, are filled instead of `part`."""
        filler = Filler(
            store, self.backbone, items, target=target, batch_size=self.batch_size, preparation=self.preparation
        )
        filler.write_model_arrays()
        return filler.fill(part=part, units=units, advance=advance)


Task = Callable[[Here, Advance], Any]


def compare_basis(here: Here, _advance: Advance, *, basis: Basis) -> None:
    """A task that raises HeadError unless `basis` was made for the model."""
    check_basis(basis, lm_head_of(here.backbone))


def calibrate_target(here: Here, advance: Advance, *, tokenised: TokenisedItems, rank: int | None) -> Target:
    """The task `calibrated`."""
    return calibrated(
        here.backbone,
        tokenised,
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

    @contextmanager
    def opened(self, items: int) -> Generator[Here]:
        """The model in this process; workers start at once if there are `items` to prepare."""
        backbone, workers = self.opener(device=self.device), self.workers
        if workers is None:
            workers = default_workers(backbone.device, items, processes=self.processes)
        with Preparation(backbone, workers=workers, opener=self.opener) as preparation:
            if items:
                preparation.start()
            yield Here(backbone=backbone, preparation=preparation, batch_size=self.batch_size)

    def run(self, task: Task, *, items: int) -> Any:
        """The answer of `task`; `items` is how many it prepares."""
        with self.opened(items) as here:
            return task(here, lambda _items: None)

    def fill(
        self, path: Path, items: Sequence[Item], target: Target, *, units: Iterable[int], advance: Advance
    ) -> FillReport:
        """Fill those `units` of the store at `path` that no other run is filling."""
        with self.opened(len(items) // self.processes) as here:
            return here.fill(open_store(path, allow_partial=True), items, target, units=units, advance=advance)


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

    def run(self, task: Task, *, items: int, advance: Advance) -> Any:
        """See `Engine`. On the first device, in a process of its own."""
        del advance
        begin = partial(_begin_task, self.devices[0])
        workers = Workers(multiprocessing.get_context("spawn"), begin, limited=False)
        try:
            return workers.ask(partial(self.process.run, items=items), task)
        except LostAnswer as error:
            message = f"The process on {self.devices[0]} {error}, twice. Run the same command again."
            raise WorkerError(message) from error
        finally:
            workers.close()

    def load(self) -> None:
        """See `Engine`; does nothing."""

    def fill(
        self, store: Store, items: Sequence[Item], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """See `Engine`. The others finish the units of a process that died.

        Raises the first error of any process, and WorkerError if units are left that no process could take over.
        """
        pending = UnitWriter(store).pending(part=part)
        with _Crew(self.process, self.devices) as crew:
            crew.start(store.path, items, target, pending)
            reports = crew.attend(advance)
        left = [unit for unit in UnitWriter(store).pending(part=part) if unit in set(pending)]
        if crew.died and left:
            message = (
                f"{' and '.join(crew.died)}; {len(left)} units are left. What is finished is kept: run the same "
                "command again."
            )
            raise WorkerError(message)
        return merged(reports, busy_units=len(left))


class _Crew:
    """The processes of one fill."""

    def __init__(self, process: ModelProcess, devices: Sequence[str]) -> None:
        self._process = process
        self._devices = devices
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._members: dict[Connection, tuple[str, SpawnProcess]] = {}
        self._silent: dict[Connection, int] = {}
        self.died: list[str] = []

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        for _, process in self._members.values():
            if kind is not None:
                process.terminate()  # a fill may stop at any moment
        for _, process in self._members.values():
            process.join(_SECONDS_TO_END)
            process.kill()  # one that is stopped, or within a long computation
            process.join(_SECONDS_TO_END)

    def start(self, path: Path, items: Sequence[Item], target: Target, pending: Sequence[int]) -> None:
        """Start a process per device, then send each its arguments for `ModelProcess.fill`, from a thread.

        As arguments of the process they would serialise the start-up: what does not fit into a pipe is written only
        as fast as the process reads it, which first imports all it needs, and a stopped process reads nothing.
        """
        threads = max(1, torch.get_num_threads() // len(self._devices))
        for index, device in enumerate(self._devices):
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._stop, device, threads))
            with ctrl_c_kept_away():
                process.start()
            theirs.close()
            self._members[mine] = (f"process {index} on {device}", process)
            self._silent[mine] = -_SIGNS_TO_BEGIN
        for index, (connection, device) in enumerate(zip(self._members, self._devices, strict=True)):
            units = striped(pending, index, len(self._devices))
            arguments = replace(self._process, device=device), path, items, target, units
            threading.Thread(target=_send, args=(connection, arguments), daemon=True).start()

    def attend(self, advance: Advance) -> list[FillReport]:
        """Listen until all processes have ended; their reports. Raises the first error that one of them sends."""
        reports: list[FillReport] = []
        failure: BaseException | None = None
        listening, looked = set(self._members), time.monotonic()
        while listening:
            ready = wait(list(listening), _SECONDS_BETWEEN_SIGNS)
            if time.monotonic() - looked >= _SECONDS_BETWEEN_SIGNS:
                looked = time.monotonic()
                self._kill_the_silent(listening)
            for connection in ready:
                assert isinstance(connection, Connection)  # nothing else is waited for
                name, process = self._members[connection]
                self._silent[connection] = 0
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):  # it has ended; one that was killed, perhaps within a message
                    listening.discard(connection)
                    process.join()
                    if process.exitcode != 0:
                        self._note_death(name, process.exitcode)
                    continue
                if kind == "items":
                    advance(value)
                elif kind == "said":
                    say(f"{name}: {value}")
                elif kind == "report":
                    reports.append(value)
                elif kind == "error" and failure is None:
                    value.add_note(f"in {name}")
                    failure = value
                    self._stop.set()
        if failure is not None:
            raise failure
        return reports

    def _kill_the_silent(self, listening: Iterable[Connection]) -> None:
        """Count checks, not seconds: a clock would also count the time for which this process itself was stopped."""
        for connection in listening:
            self._silent[connection] += 1
            name, process = self._members[connection]
            if self._silent[connection] == _SIGNS:
                say(f"{name} gave no sign of life for {_SIGNS * _SECONDS_BETWEEN_SIGNS:g} s: it is killed")
                process.kill()

    def _note_death(self, name: str, code: int | None) -> None:
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
        self.died.append(f"{name} {how}")
        say(f"{self.died[-1]}; the others continue")


def _send(connection: Connection, arguments: tuple[Any, ...]) -> None:
    with suppress(OSError):  # the process died, which `attend` notices
        connection.send(arguments)


class _Parent:
    """The connection to the parent for all threads of a process; one of them shows that the process is alive."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        threading.Thread(target=self._show_life, daemon=True).start()

    def send(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def _show_life(self) -> None:
        with suppress(OSError):  # the connection is closed
            while True:
                self.send("alive", None)
                time.sleep(_SECONDS_BETWEEN_SIGNS)


def _work(connection: Connection, stop: Any, device: str, threads: int) -> None:
    """The main function of one process of a crew, which receives its arguments. SIGTERM ends it in good order."""
    signal.signal(signal.SIGTERM, _interrupt)
    end_with_parent()
    killed_with_forker()
    torch.set_num_threads(threads)
    _use(device)
    parent = _Parent(connection)
    try:
        process, path, items, target, units = connection.recv()
        until_stopped = takewhile(lambda _unit: not stop.is_set(), units)
        with said_to(lambda text: parent.send("said", text)):
            advance = partial(parent.send, "items")
            report = process.fill(path, items, target, units=until_stopped, advance=advance)
        parent.send("report", report)
    except Exception as error:  # noqa: BLE001  # the parent raises it
        parent.send("error", picklable(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    connection.close()


def _interrupt(*_signal: object) -> None:
    """End the process as Ctrl-C would: with its own workers, and without beginning another unit."""
    raise KeyboardInterrupt


def _use(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def _begin_task(device: str) -> Work:
    _use(device)
    return lambda function, argument: function(argument)
