"""N processes on N devices of one host fill one store.

Each begins with its own share of the units and then takes over what is left of the others' from their ends. Claims on
units, which the kernel drops when a process ends, are all that they need to agree.
"""

import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from agiqa.errors import ConfigError, WorkerError
from agiqa.extract.data.items import Item
from agiqa.extract.filling.engines import Advance, Helper
from agiqa.extract.filling.fill import FillReport, merged
from agiqa.extract.filling.plan import TokenisedItems
from agiqa.extract.filling.targets import Target
from agiqa.progress import said_to, say
from agiqa.store import Basis, Store, UnitWriter
from agiqa.workers import LostAnswer, Work, Workers, ctrl_c_kept_away, end_with_parent, killed_with_forker, picklable

_SECONDS_BETWEEN_SIGNS = 5.0
"""A process shows that it is alive so often."""
_SIGNS = 60
"""As many that fail to come, and the process is killed: somebody stopped it, or its machine did."""
_SIGNS_TO_BEGIN = 180
"""As many more that may fail to come before the first: importing on a busy machine is slow."""
_SECONDS_TO_END = 5.0
"""What a process that is told to end may take."""


def devices_of_host(device: torch.device, count: int) -> list[str]:
    """`count` devices of the kind of `device`. Raises ConfigError where the host has fewer, or one is named."""
    if device.type != "cuda":
        return [str(device)] * count
    if str(device) != "cuda":
        message = f"--devices {count} uses the first {count} GPUs; give --device cuda, not {device}."
        raise ConfigError(message)
    there = torch.cuda.device_count()
    if count > there:
        message = (
            f"--devices {count} was asked for, but torch sees {there} CUDA devices. Give fewer; it sees none that "
            "CUDA_VISIBLE_DEVICES leaves out."
        )
        raise ConfigError(message)
    return [f"cuda:{index}" for index in range(count)]


def striped(pending: Sequence[int], process: int, processes: int) -> list[int]:
    """`pending` units in the order in which `process` (from 0) tries them: its own, then the ends of the others'."""
    shares = [list(pending[first::processes]) for first in range(processes)]
    others = [shares[(process + step) % processes] for step in range(1, processes)]
    return [*shares[process], *(unit for share in others for unit in reversed(share))]


@dataclass(frozen=True, kw_only=True)
class OnDevices:
    """N processes of this host, an `Engine`."""

    helper: Helper
    """Of the first device; the others differ in the device only."""
    devices: Sequence[str]

    def check_basis(self, basis: Basis) -> None:
        """See `Engine`. Runs in a process of its own, so that this one never holds the weights."""
        self._in_process(self.helper.check_basis, basis)

    def calibrate(self, tokenised: TokenisedItems, *, rank: int | None, advance: Advance) -> Target:
        """See `Engine`. On the first device, in a process of its own."""
        del advance
        target: Target = self._in_process(partial(self.helper.calibrate, rank=rank), tokenised)
        return target

    def load(self) -> None:
        """See `Engine`. Every process loads the weights by itself."""

    def fill(
        self, store: Store, items: Sequence[Item], target: Target, *, part: tuple[int, int], advance: Advance
    ) -> FillReport:
        """See `Engine`. What a process that died has not finished is done by the others.

        Raises what any of them raises, and WorkerError where they all died or what is left cannot be taken over.
        """
        pending = UnitWriter(store).pending(part=part)
        with _Crew(self.helper, self.devices) as crew:
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

    def _in_process(self, task: Callable[[Any], Any], argument: Any) -> Any:
        workers = Workers(multiprocessing.get_context("spawn"), partial(_begin_tasks, self.devices[0]), limited=False)
        try:
            return workers.ask(task, argument)
        except LostAnswer as error:
            message = f"The process on {self.devices[0]} {error}, twice. Run the same command again."
            raise WorkerError(message) from error
        finally:
            workers.close()


class _Crew:
    """The processes of one fill."""

    def __init__(self, helper: Helper, devices: Sequence[str]) -> None:
        self._helper = helper
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
                process.terminate()  # a store may be left at any moment
        for _, process in self._members.values():
            process.join(_SECONDS_TO_END)
            process.kill()  # one that is stopped, or within a long computation
            process.join(_SECONDS_TO_END)

    def start(self, path: Path, items: Sequence[Item], target: Target, pending: Sequence[int]) -> None:
        """Start a process per device, then send each what it has to do, from a thread.

        As an argument of a process that would make the next one wait until this one has imported all it needs: what a
        pipe has no room for is written only as fast as it is read, and a process that is stopped reads nothing.
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
            task = _Task(
                helper=replace(self._helper, device=device),
                path=path,
                items=items,
                target=target,
                units=striped(pending, index, len(self._devices)),
            )
            threading.Thread(target=_send, args=(connection, task), daemon=True).start()

    def attend(self, advance: Advance) -> list[FillReport]:
        """Listen until all have ended; their reports. Raises the first error that one of them sends."""
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
                except (EOFError, OSError):  # of one that was killed, perhaps within a message
                    listening.discard(connection)
                    process.join()
                    if process.exitcode != 0:
                        self._lost(name, process.exitcode)
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
        """Looks are counted: the clock would also count the time for which this process itself was stopped."""
        for connection in listening:
            self._silent[connection] += 1
            name, process = self._members[connection]
            if self._silent[connection] == _SIGNS:
                say(f"{name} gave no sign of life for {_SIGNS * _SECONDS_BETWEEN_SIGNS:g} s: it is killed")
                process.kill()

    def _lost(self, name: str, code: int | None) -> None:
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"
        self.died.append(f"{name} {how}")
        say(f"{self.died[-1]}; the others go on")


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What one process of a crew is given."""

    helper: Helper
    path: Path
    items: Sequence[Item]
    target: Target
    units: list[int]


def _send(connection: Connection, task: _Task) -> None:
    with suppress(OSError):  # of one that died, which `attend` finds
        connection.send(task)


class _Line:
    """The way to the parent for all threads of a process, one of which shows that the process is alive."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        threading.Thread(target=self._show_life, daemon=True).start()

    def send(self, kind: str, value: Any) -> None:
        with self._lock:
            self._connection.send((kind, value))

    def _show_life(self) -> None:
        with suppress(OSError):  # the line is closed
            while True:
                self.send("alive", None)
                time.sleep(_SECONDS_BETWEEN_SIGNS)


def _work(connection: Connection, stop: Any, device: str, threads: int) -> None:
    """The life of one process of a crew, which finds its `_Task` in `connection`. SIGTERM ends it in good order."""
    signal.signal(signal.SIGTERM, _end)
    end_with_parent()
    killed_with_forker()
    _begin(device, threads)
    line = _Line(connection)
    try:
        task: _Task = connection.recv()
        with said_to(lambda text: line.send("said", text)):
            report = task.helper.fill(
                task.path,
                task.items,
                task.target,
                units=_until(stop, task.units),
                advance=lambda count: line.send("items", count),
            )
        line.send("report", report)
    except Exception as error:  # noqa: BLE001  # it goes on in the parent
        line.send("error", picklable(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    connection.close()


def _end(*_signal: object) -> None:
    """Have the process end as Ctrl-C would: its own workers too, and no unit is begun any more."""
    raise KeyboardInterrupt


def _until(stop: Any, units: Iterable[int]) -> Iterator[int]:
    """`units` until `stop` is set."""
    return takewhile(lambda _unit: not stop.is_set(), units)


def _begin(device: str, threads: int) -> None:
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def _begin_tasks(device: str) -> Work:
    _begin(device, 0)
    return _do


def _do(task: Callable[[Any], Any], argument: Any) -> Any:
    return task(argument)
