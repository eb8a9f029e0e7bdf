"""Items prepared ahead of the model: in this process, or in worker processes that each have a backbone without weights.

What a worker prepares reaches this process through shared memory, as long as there is enough of it.
"""

import multiprocessing
import os
import pickle
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.multiprocessing as tensors_between_processes

from agiqa.errors import ConfigError, WorkerError
from agiqa.extract.models import Backbone
from agiqa.workers import LostAnswer, Work, Workers, ctrl_c_kept_away

Opener = Callable[..., Backbone]
"""Opens the backbone of a run anew: `opener(device="cpu")`. It travels to other processes, so it must be picklable."""

FEWEST_ITEMS = 64
"""Fewer are prepared sooner than a worker process starts."""
MOST_WORKERS = 12
_AHEAD = 2
"""Items that wait per worker."""
_IMPORTED_ONCE = ["agiqa.extract.models.opening"]
"""What a worker imports before it can prepare anything, to which a model adds little."""
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_BYTES = 1 << 30
"""With less shared memory than this (containers often have 64 MiB), tensors are copied through pipes."""

_Tag = TypeVar("_Tag")
_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")


def _fail(argument: object, reason: str) -> Any:
    """Raise WorkerError for an argument that cannot be prepared."""
    message = f"{argument}: {reason}. What is finished is kept."
    raise WorkerError(message)


class Preparation:
    """Runs functions of a backbone without weights and one argument, in order and ahead of who reads the answers."""

    def __init__(self, backbone: Backbone, *, workers: int = 0, opener: Opener | None = None) -> None:
        """`workers` = 0 runs in this process, on `backbone`. Raises ConfigError for workers without an `opener`."""
        require_opener(opener, "Worker processes", needed=workers > 0)
        self.backbone = backbone
        self.workers = workers
        self._opener = opener
        self._pool: tuple[ThreadPoolExecutor, Workers] | None = None

    def __enter__(self) -> "Preparation":
        """Workers start when they are first needed."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self.close()

    def start(self) -> None:
        """Have the workers start while this process goes on: they take as long as it takes to load a model."""
        for _ in range(self.workers):
            self._submit(_nothing, "its start", _fail)

    def close(self) -> None:
        """End the workers, whatever they are at; they would start again when they are needed."""
        if self._pool is not None:
            threads, processes = self._pool
            self._pool = None
            processes.close()
            threads.shutdown(wait=True, cancel_futures=True)

    def each(
        self,
        function: Callable[[Backbone, _Argument], _Answer],
        arguments: Iterable[_Argument],
        *,
        lost: Callable[[_Argument, str], _Answer] = _fail,
    ) -> Iterator[_Answer]:
        """`function(backbone, argument)` of every argument, in order. What it raises is raised here, in its turn.

        `lost` is as in `groups`.
        """
        for _, answers in self.groups(function, ((None, [argument]) for argument in arguments), lost=lost):
            yield answers[0]

    def groups(
        self,
        function: Callable[[Backbone, _Argument], _Answer],
        groups: Iterable[tuple[_Tag, Sequence[_Argument]]],
        *,
        lost: Callable[[_Argument, str], _Answer] = _fail,
    ) -> Iterator[tuple[_Tag, list[_Answer]]]:
        """As `each`, of arguments that come in groups, and the tag of each group.

        `groups` is read as far ahead as workers are kept busy by it. `lost` answers for an argument that crashes two
        workers in turn or that neither is done with in time, given the reason; by default that is a WorkerError.
        Raises WorkerError, naming the argument, when both were killed from outside or for want of memory.
        """
        if self.workers == 0:
            for tag, arguments in groups:
                yield tag, [function(self.backbone, argument) for argument in arguments]
            return
        waiting: deque[tuple[_Tag, list[Future[Any]]]] = deque()
        behind = 0  # items that wait behind the first group
        try:
            for tag, arguments in groups:
                waiting.append((tag, [self._submit(function, argument, lost) for argument in arguments]))
                behind += len(arguments) if len(waiting) > 1 else 0
                while behind >= _AHEAD * self.workers:
                    yield _finished(waiting)
                    behind -= len(waiting[0][1])
            while waiting:
                yield _finished(waiting)
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()

    def _submit(
        self, function: Callable[[Backbone, Any], Any], argument: Any, lost: Callable[[Any, str], Any]
    ) -> "Future[Any]":
        if self._pool is None:
            assert self._opener is not None  # workers are refused without one
            begin = partial(_begin, self._opener, shares_memory=_shared_memory_suffices())
            self._pool = ThreadPoolExecutor(self.workers), Workers(_context_of_workers(), begin)
        threads, processes = self._pool
        return threads.submit(_answer, processes, function, argument, lost)


def _answer(processes: Workers, function: Callable[[Backbone, Any], Any], argument: Any, lost: Any) -> Any:
    try:
        answer = processes.ask(function, argument)
    except LostAnswer as error:
        if not error.blameless:
            return lost(argument, f"the process that prepared it {error}, twice; leave it out, or replace its image")
        message = (
            f"{argument}: the process that prepared it {error}, twice, from outside or for want of memory. What is "
            "finished is kept: run the same command again, with fewer --prepare-workers if memory is short."
        )
        raise WorkerError(message) from error
    return pickle.loads(answer.content) if isinstance(answer, _Packed) else answer


def _context_of_workers() -> BaseContext:
    """Workers are forks of a process that has imported what they need and has done nothing else.

    Each would import it anew otherwise, and a dozen that do so at once are far slower than one.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    with ctrl_c_kept_away():
        forkserver.ensure_running()
    return context


def _nothing(_backbone: Backbone, _argument: str) -> None:
    """What a worker does to get ready."""


def require_opener(opener: Opener | None, what: str, *, needed: bool) -> None:
    """Raise ConfigError where `what` needs to open the backbone anew and cannot."""
    if needed and opener is None:
        message = f"{what} open the backbone anew: give an `opener`."
        raise ConfigError(message)


def default_workers(device: torch.device, items: int, *, processes: int = 1) -> int:
    """Workers for one of `processes` processes that share this machine, each with a device that `items` are fed to."""
    if device.type == "cpu" or items < FEWEST_ITEMS:
        return 0
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // processes - 2))


def chosen_workers(workers: int | None, backbone: Backbone, items: int, *, opener: Opener | None) -> int:
    """`workers` as asked for; where that is None, `default_workers`, or none if no `opener` could start them."""
    if workers is not None:
        return workers
    return 0 if opener is None else default_workers(backbone.device, items)


def _finished(waiting: "deque[tuple[_Tag, list[Future[Any]]]]") -> tuple[_Tag, list[Any]]:
    tag, futures = waiting[0]
    answers = [future.result() for future in futures]
    waiting.popleft()
    return tag, answers


def _shared_memory_suffices() -> bool:
    return _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free >= _SHARED_BYTES


class _Packed:
    """An answer by value: its tensors as bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def _begin(opener: Opener, *, shares_memory: bool) -> Work:
    """What a worker does first: open its own backbone."""
    torch.set_num_threads(1)  # the others have the other cores
    tensors_between_processes.set_sharing_strategy("file_descriptor")
    backbone = opener(device="cpu")

    def work(function: Callable[[Backbone, Any], Any], argument: Any) -> Any:
        answer = function(backbone, argument)
        return answer if shares_memory else _Packed(pickle.dumps(answer))

    return work
