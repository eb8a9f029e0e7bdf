"""Processes of this host with a device each. They start, import and load the model while the parent plans.

This module imports nothing heavy, so that a command can start them first of all. Each process receives what it works on
through its pipe. As arguments of the process they would serialise the start-up: what does not fit into a pipe is
written only as fast as the process reads it, which first imports all it needs, and a stopped process reads nothing.
"""

import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from itertools import takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from agiqa.errors import WorkerError
from agiqa.progress import Advance, said_to, say
from agiqa.workers import (
    MODULES_TO_PREPARE_ITEMS,
    context_of_processes,
    ctrl_c_kept_away,
    end_with_parent,
    killed_with_forker,
    new_process,
    picklable,
    start_fork_server,
)

if TYPE_CHECKING:
    from agiqa.extract.filling.fill import FillReport
    from agiqa.extract.filling.plan import PlannedItem
    from agiqa.extract.filling.targets import Target

_SECONDS_BETWEEN_SIGNS = 5.0
"""Interval at which a process shows that it is alive."""
_SIGNS = 60
"""Missing signs after which a process is killed: somebody stopped it, or its machine hangs."""
_SIGNS_TO_BEGIN = 180
"""Further signs that may be missing at first: importing on a busy machine is slow."""
_SECONDS_TO_END = 5.0
"""Time that a process has to end by itself."""
_ENGINES = "agiqa.extract.filling.engines"
"""The module that imports all that a process needs."""
_ATTEMPTS = 2
"""Processes that try a task: the first may have been killed by chance."""


@dataclass(kw_only=True)
class _Member:
    """One process."""

    name: str
    process: BaseProcess
    outbox: "SimpleQueue[tuple[Any, ...]]"
    """What a thread sends to it, in order."""
    silent: int = -_SIGNS_TO_BEGIN
    """Signs of life that were missing since its last message."""


class Crew:
    """The processes of one extraction."""

    def __init__(self, count: int, *, on_cpu: bool, workers: bool = False) -> None:
        """Start `count` processes; with `workers` each also starts the server that forks its workers.

        `on_cpu`: no process will use a GPU. Then they are forks of a server, which imports for all of them at once, and
        start in `open`: the start of a fork waits until the server has imported.
        """
        self._context = context_of_processes((*MODULES_TO_PREPARE_ITEMS, _ENGINES), on_gpu=not on_cpu)
        self._workers = workers
        self._stop = self._context.Event()
        self._members: dict[Connection, _Member] = {}
        self._opened: list[tuple[Any, int]] = []
        """What `open` sent to each."""
        self._filling = False
        self.died: list[str] = []
        self._names = [f"process {index}" for index in range(count)]
        if not on_cpu:
            self._start_all()

    def __enter__(self) -> "Crew":
        """Nothing more."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_error: object) -> None:
        """End the processes. Those that were not filling have nothing to lose and are killed."""
        for member in self._members.values():
            if not self._filling:
                member.process.kill()
            elif kind is not None:
                member.process.terminate()  # a fill may stop at any moment
        for member in self._members.values():
            member.process.join(_SECONDS_TO_END)
            member.process.kill()  # one that is stopped, or within a long computation
            member.process.join(_SECONDS_TO_END)

    def open(self, process: Any, devices: Sequence[str], *, items: int) -> None:
        """Let each process open the model on its device, start workers for `items` items, and load the weights.

        `process` is an `engines.ModelProcess`, of any device.
        """
        self._start_all()
        self._opened = [(replace(process, device=device), items) for device in devices]
        for member, message, device in zip(self._members.values(), self._opened, devices, strict=True):
            member.name = f"{member.name} on {device}"
            member.outbox.put(message)

    def compile(self) -> None:
        """Let the processes, which are open, compile the layers of the model."""
        self._opened = [(replace(process, compiled=True), items) for process, items in self._opened]
        for member in self._members.values():
            member.outbox.put(("compile",))

    def ask(self, task: Callable[..., Any]) -> Any:
        """The answer of `task` in the first process. Raises its error, and WorkerError if two processes die of it."""
        for attempt in range(1, _ATTEMPTS + 1):
            connection, member = next(iter(self._members.items()))
            member.outbox.put(("task", task))
            for _, kind, value in self._messages([connection]):
                if kind == "answer":
                    return value
                if kind == "error":
                    value.add_note(f"in {member.name}")
                    raise value
            if attempt < _ATTEMPTS:
                say(f"{self.died.pop()}; another one tries")
                self._replace(connection, member)
        message = f"{self.died.pop()}, as another one had before. Run the same command again."
        raise WorkerError(message)

    def fill(
        self,
        path: Path,
        items: "Sequence[PlannedItem]",
        target: "Target",
        units: Sequence[Sequence[int]],
        advance: Advance,
    ) -> "list[FillReport]":
        """Let each process fill those of its `units` that no other is filling; their reports.

        Returns when all processes have ended. Raises the first error that one of them sends.
        """
        self._filling = True
        for member, mine in zip(self._members.values(), units, strict=True):
            member.outbox.put(("fill", path, items, target, mine))
        reports: list[FillReport] = []
        failure: BaseException | None = None
        for member, kind, value in self._messages(self._members):
            if kind == "items":
                advance(value)
            elif kind == "report":
                reports.append(value)
            elif kind == "died":
                say(f"{value}; the others continue")
            elif kind == "error" and failure is None:
                value.add_note(f"in {member.name}")
                failure = value
                self._stop.set()
        if failure is not None:
            raise failure
        return reports

    def _start_all(self) -> None:
        """Start those that have not started yet."""
        for name in self._names[len(self._members) :]:
            self._start(name)

    def _start(self, name: str) -> _Member:
        mine, theirs = self._context.Pipe()
        process = new_process(self._context, _begin, (theirs, self._stop, self._workers))
        with ctrl_c_kept_away():
            process.start()
        theirs.close()
        member = _Member(name=name, process=process, outbox=SimpleQueue())
        threading.Thread(target=_send, args=(mine, member.outbox), daemon=True).start()
        self._members[mine] = member
        return member

    def _replace(self, connection: Connection, dead: _Member) -> None:
        """Start another process in place of the first one."""
        others = dict(self._members)
        del others[connection]
        self._members = {}
        fresh = self._start(dead.name)
        self._members |= others
        fresh.outbox.put(self._opened[0])

    def _messages(self, connections: Iterable[Connection]) -> Generator[tuple[_Member, str, Any]]:
        """Messages of processes until they have ended; `died` is one, with the reason, if a process sent no report."""
        listening, looked = set(connections), time.monotonic()
        while listening:
            ready = wait(list(listening), _SECONDS_BETWEEN_SIGNS)
            if time.monotonic() - looked >= _SECONDS_BETWEEN_SIGNS:
                looked = time.monotonic()
                self._kill_the_silent(listening)
            for connection in ready:
                assert isinstance(connection, Connection)  # nothing else is waited for
                member = self._members[connection]
                member.silent = 0
                try:
                    kind, value = connection.recv()
                except (EOFError, OSError):  # it has ended; one that was killed, perhaps within a message
                    listening.discard(connection)
                    member.process.join()
                    if member.process.exitcode != 0:
                        self.died.append(f"{member.name} {_ending(member.process.exitcode)}")
                        yield member, "died", self.died[-1]
                    continue
                if kind == "said":
                    say(f"{member.name}: {value}")
                elif kind != "alive":
                    yield member, kind, value

    def _kill_the_silent(self, listening: Iterable[Connection]) -> None:
        """Count checks, not seconds: a clock would also count the time for which this process itself was stopped."""
        for connection in listening:
            member = self._members[connection]
            member.silent += 1
            if member.silent == _SIGNS:
                say(f"{member.name} gave no sign of life for {_SIGNS * _SECONDS_BETWEEN_SIGNS:g} s: it is killed")
                member.process.kill()


def _ending(code: int | None) -> str:
    return f"was killed by signal {-code}" if code is not None and code < 0 else f"exited with code {code}"


def _send(connection: Connection, outbox: "SimpleQueue[tuple[Any, ...]]") -> None:
    """Send what comes into `outbox`, for as long as this process lives."""
    with suppress(OSError):  # the process died, which `_messages` notices
        while True:
            connection.send(outbox.get())


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


def _begin(connection: Connection, stop: Any, workers: bool) -> None:  # noqa: FBT001  # an argument of a process
    """The main function of one process. SIGTERM ends it in good order."""
    signal.signal(signal.SIGTERM, _interrupt)
    end_with_parent()
    killed_with_forker()
    parent = _Parent(connection)
    try:
        if workers:
            start_fork_server(MODULES_TO_PREPARE_ITEMS)
        import_module(_ENGINES)  # all that it needs, before the first message
        with said_to(lambda text: parent.send("said", text)):
            _work(connection, parent, stop)
    except _NotNeeded:
        pass
    except Exception as error:  # noqa: BLE001  # the parent raises it
        parent.send("error", picklable(error))
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGTERM)
    connection.close()


def _work(connection: Connection, parent: _Parent, stop: Any) -> None:
    """Open and load the model; answer tasks; fill units once."""
    import torch

    from agiqa.store import open_store

    process, items = _receive(connection)
    torch.set_num_threads(max(1, torch.get_num_threads() // process.processes))
    if process.device.startswith("cuda"):
        torch.cuda.set_device(process.device)
    with process.opened(items) as opened:
        here = opened
        here.load()
        kind, *arguments = _receive(connection)
        while kind != "fill":
            if kind == "compile":
                here = here.compiling()
            else:
                parent.send("answer", here.run(arguments[0], items=0, advance=lambda _items: None))
            kind, *arguments = _receive(connection)
        path, filled, target, units = arguments
        until_stopped = takewhile(lambda _unit: not stop.is_set(), units)
        store, advance = open_store(path, allow_partial=True), partial(parent.send, "items")
        report = here.fill(store, filled, target, units=until_stopped, advance=advance)
    parent.send("report", report)


class _NotNeeded(Exception):
    """The parent closed the pipe."""


def _receive(connection: Connection) -> Any:
    try:
        return connection.recv()
    except EOFError:
        raise _NotNeeded from None


def _interrupt(*_signal: object) -> None:
    """End the process as Ctrl-C would: with its own workers, and without beginning another unit."""
    raise KeyboardInterrupt
