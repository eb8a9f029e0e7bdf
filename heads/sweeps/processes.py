"""Tasks over one store in worker processes: each has the store open and the decoded features mapped, and does one task
at a time. A task may send messages to the main process, and ask it questions.
"""

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

import torch

from agiqa.errors import AgiqaError, HeadError
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.keeping import PackedFeatures, SharedFeatures
from agiqa.heads.data.reopening import SourceAddress
from agiqa.workers import context_of_processes, ctrl_c_kept_away, end_with_parent, new_process

_SECONDS_TO_END = 15.0
_SECONDS_BETWEEN_PULSES = 2.0
_IMPORTED_ONCE = ("agiqa.heads.sweeps.head_jobs",)
"""Modules that the fork server imports once for all workers."""
Answer = TypeVar("Answer")


@runtime_checkable
class Channel(Protocol):
    """How a task reaches the main process."""

    def tell(self, message: Any) -> None:
        """Send a picklable message."""

    def ask(self, question: Any) -> Any:
        """Send a picklable question, and wait for the answer."""


@runtime_checkable
class Task(Protocol[Answer]):
    """A piece of work; it must be picklable, and what it returns too."""

    def run(self, source: FeatureSource, shared: SharedFeatures, channel: Channel, /) -> Answer:
        """Do it."""
        ...

    def lost(self, reason: str, /) -> Answer:
        """What it returns where its worker died for this reason."""
        ...

    def spoils(self, answer: Answer, /) -> bool:
        """Whether the process cannot be trusted with another task after this answer."""
        ...


AnyTask = TypeVar("AnyTask", bound=Task[Any])


@dataclass(frozen=True, kw_only=True)
class Orders(Generic[AnyTask]):
    """What the main process decides while workers are at work."""

    next_task: Callable[[], AnyTask | None]
    """The next task; None where there is none now. It is called again after each answer."""
    on_message: Callable[[AnyTask, Any], None]
    """Gets what a task tells."""
    on_question: Callable[[AnyTask, Any], Any]
    """Answers what a task asks."""
    on_pulse: Callable[[], None] = lambda: None
    """Called every few seconds, also while all workers are silent."""


@dataclass(frozen=True, kw_only=True)
class _Told:
    message: Any


@dataclass(frozen=True, kw_only=True)
class _Asked:
    question: Any


@dataclass(frozen=True, kw_only=True)
class _Done:
    answer: Any
    spoilt: bool


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A worker's first message. With an error it ends."""

    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The arguments of every worker."""

    source: SourceAddress
    features: list[PackedFeatures]
    """A list of one, which the worker empties: a process keeps its arguments longer than CUDA lets it keep tensors."""
    threads: int
    on_gpu: bool
    environments: Sequence[Mapping[str, str]] = field(default_factory=lambda: ({},))
    """Environment variables of the workers, by turns."""


@dataclass(frozen=True, kw_only=True)
class Direct(Generic[AnyTask]):
    """The channel of a task in the main process itself."""

    task: AnyTask
    orders: Orders[AnyTask]

    def tell(self, message: Any) -> None:
        """Pass it on."""
        self.orders.on_message(self.task, message)

    def ask(self, question: Any) -> Any:
        """Pass it on."""
        return self.orders.on_question(self.task, question)


class _Piped:
    """The channel of a task in a worker."""

    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self._pipe = pipe

    def tell(self, message: Any) -> None:
        self._pipe.send(_Told(message=message))

    def ask(self, question: Any) -> Any:
        self._pipe.send(_Asked(question=question))
        return self._pipe.recv()


class _Worker(Generic[AnyTask]):
    """One process, the pipe to it, and its task."""

    def __init__(self, context: BaseContext, setup: Setup, environment: Mapping[str, str]) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = new_process(context, _work, (theirs, setup, environment), daemon=True, name="agiqa-heads")
        with ctrl_c_kept_away():
            self.process.start()
        theirs.close()  # so that reading from this end fails once the worker is gone
        self.environment = environment
        self.started = False
        self.task: AnyTask | None = None

    def take(self, waiting: deque[AnyTask]) -> None:
        """Give it the next task, unless it is gone already."""
        with suppress(OSError):  # `receive` will find that it is gone
            self.pipe.send(waiting[0])
            self.task = waiting.popleft()

    def answer(self, value: Any) -> None:
        """Answer its question, unless it is gone."""
        with suppress(OSError):
            self.pipe.send(value)

    def receive(self) -> Any:
        """The next message; None when the worker is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def dismiss(self, *, hurry: bool) -> None:
        """End it. An idle worker exits by itself; a busy one gets SIGTERM, in a `hurry` also one that is starting."""
        if self.task is not None or (hurry and not self.started):
            self.process.terminate()
        self.pipe.close()

    def wait(self) -> None:
        """Wait until the dismissed process is gone; one at work leaves at the end of its step."""
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def obituary(self) -> str:
        """How it ended, for people."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}; its last output is on the error stream"
        name = signal.Signals(-code).name
        cause = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was ended by {name} (exit code {code}){cause}"


def run_tasks(setup: Setup, orders: Orders[AnyTask], *, workers: int) -> Generator[tuple[AnyTask, Any]]:
    """Do all tasks in `workers` processes; yields each with its answer, in the order of their ends.

    A worker opens the source by its location, and maps the shared features. A worker that dies takes only its task
    along. Closing the generator ends the workers, and what they have saved is kept; a worker also ends when this
    process ends in any way. Raises HeadError when no worker can start; where some can, they go on alone.
    """
    context = context_of_processes(_IMPORTED_ONCE, on_gpu=setup.on_gpu)
    waiting, staff, hurry = deque[AnyTask](), list[_Worker[AnyTask]](), True
    try:
        while _refilled(waiting, staff, orders, workers) or any(worker.task is not None for worker in staff):
            busy = sum(worker.task is not None for worker in staff)
            while len(staff) < min(workers, busy + len(waiting)):
                staff.append(_Worker(context, setup, _least_used(setup.environments, staff)))
            for worker in _with_messages(staff):
                message = worker.receive()
                if worker.task is not None and isinstance(message, _Told):
                    orders.on_message(worker.task, message.message)
                elif worker.task is not None and isinstance(message, _Asked):
                    worker.answer(orders.on_question(worker.task, message.question))
                elif worker.task is not None and isinstance(message, _Done):
                    task, worker.task = worker.task, None
                    if message.spoilt:  # it leaves now
                        staff.remove(worker)
                        worker.dismiss(hurry=False)
                        worker.wait()
                    yield task, message.answer
                elif isinstance(message, _Ready) and message.error is None:
                    worker.started = True
                else:
                    staff.remove(worker)
                    yield from _lost(worker, message if isinstance(message, _Ready) else None, left=len(staff))
                    workers -= not worker.started
            orders.on_pulse()
            for worker in staff:
                if worker.started and worker.task is None and waiting:
                    worker.take(waiting)
        hurry = False
    finally:
        for worker in staff:
            worker.dismiss(hurry=hurry)
        for worker in staff:
            worker.wait()


def _refilled(
    waiting: deque[AnyTask], staff: Sequence[_Worker[AnyTask]], orders: Orders[AnyTask], workers: int
) -> bool:
    """Fetch a task for each worker without one; whether any task waits."""
    busy = sum(worker.task is not None for worker in staff)
    while len(waiting) < workers - busy and (task := orders.next_task()) is not None:
        waiting.append(task)
    return bool(waiting)


def _least_used(environments: Sequence[Mapping[str, str]], staff: Sequence[_Worker[Any]]) -> Mapping[str, str]:
    """The environment that the fewest workers have; the first of equals."""
    return min(environments, key=lambda one: sum(worker.environment is one for worker in staff))


def _with_messages(staff: Sequence[_Worker[AnyTask]]) -> list[_Worker[AnyTask]]:
    """The workers that have sent something or are gone; waits for one, but not for long."""
    ready = wait([worker.pipe for worker in staff], timeout=_SECONDS_BETWEEN_PULSES)
    return [worker for worker in staff if worker.pipe in ready]


def _lost(worker: _Worker[AnyTask], message: _Ready | None, *, left: int) -> Generator[tuple[AnyTask, Any]]:
    """The task of a worker that is gone, if it had one. Raises HeadError if it never started and no other is `left`."""
    if not worker.started and not left:
        why = f"it {worker.obituary()}" if message is None else message.error
        text = f"A worker process cannot be started: {why}"
        raise HeadError(text)
    if worker.task is not None:
        task, worker.task = worker.task, None
        yield task, task.lost(f"The worker that trained it {worker.obituary()}")


def _work(pipe: "Connection[Any, Any]", setup: Setup, environment: Mapping[str, str]) -> None:
    """The main function of a worker: do every task that it is sent, until the pipe closes."""
    os.environ.update(environment)  # before CUDA begins, and not in the main process: a fork server keeps its own
    end_with_parent()
    torch.set_num_threads(setup.threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end is closed
        _work_on_order(pipe, setup)
    gc.collect()  # trainings leave cycles that hold features


def _work_on_order(pipe: "Connection[Any, Any]", setup: Setup) -> None:
    try:
        source = setup.source.open()
        shared = setup.features.pop().open(source)
    except (AgiqaError, OSError) as error:
        pipe.send(_Ready(error="\n".join([str(error), *getattr(error, "__notes__", ())])))
        return
    pipe.send(_Ready())
    spoilt = False
    while not spoilt:
        task: Task[Any] = pipe.recv()
        answer = task.run(source, shared, _Piped(pipe))
        spoilt = task.spoils(answer)
        pipe.send(_Done(answer=answer, spoilt=spoilt))
