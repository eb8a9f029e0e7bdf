"""Prepares items ahead of the model, in this process or in workers that each have a backbone without weights.

Workers return tensors through shared memory, if there is enough of it.
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
from typing import Any, Generic, Self, TypeVar

import torch
import torch.multiprocessing as tensors_between_processes

from agiqa.errors import ConfigError, WorkerError
from agiqa.extract.models import AnsweringModel, Backbone
from agiqa.workers import LostAnswer, Work, Workers, ctrl_c_kept_away

Opener = Callable[..., Backbone]
"""Opens another backbone of the same model: `opener(device="cpu")`. Must be picklable."""

FEWEST_ITEMS = 64
"""Below this count, starting workers costs more than it saves."""
MOST_WORKERS = 12
_AHEAD = 2
"""Prepared or waiting items per worker."""
_IMPORTED_ONCE = ["agiqa.extract.models.opening"]
"""Modules that the fork server imports once for all workers."""
_SHARED_MEMORY = Path("/dev/shm")
_SHARED_BYTES = 1 << 30
"""With less shared memory (containers often have 64 MiB), workers copy tensors through pipes."""

_Model_co = TypeVar("_Model_co", bound=AnsweringModel, covariant=True)
_Tag = TypeVar("_Tag")
_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")


def _fail(argument: object, reason: str) -> Any:
    """Raise WorkerError for an argument that no worker could prepare."""
    message = f"{argument}: {reason}. What is finished is kept."
    raise WorkerError(message)


class Preparation(Generic[_Model_co]):
    """Calls functions of a model and an argument, in order and ahead of the reader of the answers."""

    def __init__(self, backbone: _Model_co, *, workers: int = 0, opener: Opener | None = None) -> None:
        """With `workers` = 0 calls run in this process, on `backbone`. Raises ConfigError for lack of an `opener`."""
        require_opener(opener, "Worker processes", needed=workers > 0)
        self.backbone = backbone
        self.workers = workers
        self._opener = opener
        self._pool: tuple[ThreadPoolExecutor, Workers] | None = None

    def __enter__(self) -> Self:
        """Workers start at the first call, or by `start`."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the workers."""
        self.close()

    def start(self) -> None:
        """Start the workers in the background; that takes about as long as loading a model."""
        for _ in range(self.workers):
            self._submit(_nothing, "its start", _fail)

    def close(self) -> None:
        """Kill the workers; a later call would start new ones."""
        if self._pool is not None:
            threads, processes = self._pool
            self._pool = None
            processes.close()
            threads.shutdown(wait=True, cancel_futures=True)

    def each(
        self,
        function: Callable[[_Model_co, _Argument], _Answer],
        arguments: Iterable[_Argument],
        *,
        lost: Callable[[_Argument, str], _Answer] = _fail,
    ) -> Iterator[_Answer]:
        """Yield `function(backbone, argument)` of every argument, in order; raise what it raises, in its turn.

        `lost` is as in `groups`.
        """
        for _, answers in self.groups(function, ((None, [argument]) for argument in arguments), lost=lost):
            yield answers[0]

    def groups(
        self,
        function: Callable[[_Model_co, _Argument], _Answer],
        groups: Iterable[tuple[_Tag, Sequence[_Argument]]],
        *,
        lost: Callable[[_Argument, str], _Answer] = _fail,
    ) -> Iterator[tuple[_Tag, list[_Answer]]]:
        """As `each`, for arguments in groups: yield the tag and the answers of each group.

        `groups` is read only as far ahead as keeps the workers busy. `lost(argument, reason)` is the answer for an
        argument at which two workers crash or take too long; by default it raises WorkerError. Raises WorkerError,
        naming the argument, if both were killed from outside or for lack of memory.
        """
        if self.workers == 0:
            for tag, arguments in groups:
                yield tag, [function(self.backbone, argument) for argument in arguments]
            return
        waiting: deque[tuple[_Tag, list[Future[Any]]]] = deque()
        behind = 0  # items behind the first group
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
        self, function: Callable[[Any, Any], Any], argument: Any, lost: Callable[[Any, str], Any]
    ) -> "Future[Any]":
        if self._pool is None:
            assert self._opener is not None  # workers are refused without one
            begin = partial(_begin, self._opener, shares_memory=_shared_memory_suffices())
            self._pool = ThreadPoolExecutor(self.workers), Workers(context_of_workers(), begin)
        threads, processes = self._pool
        return threads.submit(_answer, processes, function, argument, lost)


def _answer(processes: Workers, function: Callable[[Any, Any], Any], argument: Any, lost: Any) -> Any:
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


def context_of_workers() -> BaseContext:
    """Processes without a GPU are forks of a server that has imported their modules: many imports would be slower."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    with ctrl_c_kept_away():
        forkserver.ensure_running()
    return context


def _nothing(_backbone: Backbone, _argument: str) -> None:
    """The call that starts a worker."""


def require_opener(opener: Opener | None, what: str, *, needed: bool) -> None:
    """Raise ConfigError if `what` is `needed` and there is no `opener`."""
    if needed and opener is None:
        message = f"{what} need an `opener` that opens the backbone again."
        raise ConfigError(message)


def default_workers(device: torch.device, items: int, *, processes: int = 1) -> int:
    """The number of workers of one of `processes` processes on this machine, which computes `items` on `device`."""
    if device.type == "cpu" or items < FEWEST_ITEMS:
        return 0
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // processes - 2))


def chosen_workers(workers: int | None, backbone: Backbone, items: int, *, opener: Opener | None) -> int:
    """`workers` if given, else `default_workers`; 0 without an `opener`."""
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
    """A pickled answer, with its tensors as bytes."""

    def __init__(self, content: bytes) -> None:
        self.content = content


def _begin(opener: Opener, *, shares_memory: bool) -> Work:
    """The beginning of a worker: open its own backbone."""
    torch.set_num_threads(1)  # the other workers use the other cores
    tensors_between_processes.set_sharing_strategy("file_descriptor")
    backbone = opener(device="cpu")

    def work(function: Callable[[Any, Any], Any], argument: Any) -> Any:
        answer = function(backbone, argument)
        return answer if shares_memory else _Packed(pickle.dumps(answer))

    return work
