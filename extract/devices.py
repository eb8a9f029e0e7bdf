"""N processes on N devices of one host fill one store.

Each begins with its own share of the units and then takes over what is left of the others' from their ends. Claims on
units, which the kernel drops when a process ends, are all that they need to agree.
"""

import multiprocessing
import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from agiqa.errors import ConfigError, WorkerError
from agiqa.extract.engines import Advance, Helper
from agiqa.extract.fill import FillReport, merged
from agiqa.extract.items import Item
from agiqa.extract.plan import TokenisedItems
from agiqa.extract.preparing import end_with_parent
from agiqa.extract.targets import Target
from agiqa.progress import said_to, say
from agiqa.store import Basis, Store, UnitWriter


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
        target: Target = self._in_process(self.helper.calibrate, tokenised, rank)
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

    def _in_process(self, task: Any, *arguments: Any) -> Any:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=context, initializer=_begin, initargs=(self.devices[0], 0)) as pool:
            try:
                return pool.submit(task, *arguments).result()
            except BrokenProcessPool as error:
                message = f"The process on {self.devices[0]} died. Run the same command again."
                raise WorkerError(message) from error


class _Crew:
    """The processes of one fill."""

    def __init__(self, helper: Helper, devices: Sequence[str]) -> None:
        self._helper = helper
        self._devices = devices
        self._context = multiprocessing.get_context("spawn")
        self._stop = self._context.Event()
        self._members: dict[Connection, tuple[str, SpawnProcess]] = {}
        self.died: list[str] = []

    def __enter__(self) -> "_Crew":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        for _, process in self._members.values():
            if kind is not None:
                process.terminate()  # a store may be left at any moment
            process.join()

    def start(self, path: Path, items: Sequence[Item], target: Target, pending: Sequence[int]) -> None:
        """Start a process per device, then send each what it has to do.

        As an argument of a process that would make the next one wait until this one has imported all it needs: what a
        pipe has no room for is written only as fast as it is read.
        """
        threads = max(1, torch.get_num_threads() // len(self._devices))
        for index, device in enumerate(self._devices):
            mine, theirs = self._context.Pipe()
            process = self._context.Process(target=_work, args=(theirs, self._stop, device, threads))
            process.start()
            theirs.close()
            self._members[mine] = (f"process {index} on {device}", process)
        for index, (connection, device) in enumerate(zip(self._members, self._devices, strict=True)):
            task = _Task(
                helper=replace(self._helper, device=device),
                path=path,
                items=items,
                target=target,
                units=striped(pending, index, len(self._devices)),
            )
            with suppress(ConnectionError):  # of one that died, which `attend` finds
                connection.send(task)

    def attend(self, advance: Advance) -> list[FillReport]:
        """Listen until all have ended; their reports. Raises the first error that one of them sends."""
        reports: list[FillReport] = []
        failure: BaseException | None = None
        listening = set(self._members)
        while listening:
            for connection in wait(list(listening)):
                assert isinstance(connection, Connection)  # nothing else is waited for
                name, process = self._members[connection]
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
                elif failure is None:
                    value.add_note(f"in {name}")
                    failure = value
                    self._stop.set()
        if failure is not None:
            raise failure
        return reports

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


def _work(connection: Connection, stop: Any, device: str, threads: int) -> None:
    """The life of one process of a crew, which finds its `_Task` in `connection`."""
    _begin(device, threads)

    try:
        task: _Task = connection.recv()
        with said_to(lambda text: connection.send(("said", text))):
            report = task.helper.fill(
                task.path,
                task.items,
                task.target,
                units=_until(stop, task.units),
                advance=lambda count: connection.send(("items", count)),
            )
        connection.send(("report", report))
    except Exception as error:  # noqa: BLE001  # it goes on in the parent
        connection.send(("error", _picklable(error)))
    connection.close()


def _until(stop: Any, units: Iterable[int]) -> Iterator[int]:
    """`units` until `stop` is set."""
    return takewhile(lambda _unit: not stop.is_set(), units)


def _begin(device: str, threads: int) -> None:
    end_with_parent()
    if threads:
        torch.set_num_threads(threads)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)


def _picklable(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001  # whatever an error's own pickling raises
        return WorkerError(f"{type(error).__name__}: {error}")
    return error
