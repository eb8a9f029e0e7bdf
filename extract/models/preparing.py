"""Prepares items ahead of the model, in this process or in workers that each have a backbone without weights.

Workers return tensors through shared memory, if there is enough of it.
"""

import os
import pickle
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import torch
import torch.multiprocessing as tensors_between_processes

from agiqa.errors import AgiqaError, ConfigError, WorkerError
from agiqa.extract.models import AnsweringModel, Backbone
from agiqa.workers import MODULES_TO_PREPARE_ITEMS, LostAnswer, Work, Workers, context_of_processes

Opener = Callable[..., Backbone]
"""Opens another backbone of the same model: `opener(device="cpu")`. Must be picklable."""

FEWEST_ITEMS = 64
"""Below this count, starting workers costs more than it saves."""
FEWEST_TEXTS = 20_000
"""The same for items without images: a millisecond each, and only the plan prepares them."""
MOST_WORKERS = 12
_AHEAD = 2
"""Prepared or waiting items per worker."""
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


def _never(_argument: object) -> bool:
    return False


class Preparation(Generic[_Model_co]):
    """Calls functions of a model and an argument, in order and ahead of the reader of the answers."""

    def __init__(self, backbone: _Model_co, *, workers: int = 0, opener: Opener | None = None) -> None:
        """With `workers` = 0 calls run in this process, on `backbone`. Raises ConfigError for lack of an `opener`."""
        require_opener(opener, "Worker processes", needed=workers > 0)
        self.backbone = backbone
        self.workers = workers
        self._opener = opener
        self._pool: _Pool | None = None

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
        if self.workers and self._pool is None:
            assert self._opener is not None  # workers are refused without one
            self._pool = _Pool(self.workers, self._opener)

    def close(self) -> None:
        """Kill the workers; a later call would start new ones."""
        if self._pool is not None:
            pool, self._pool = self._pool, None
            pool.close()

    def each(
        self,
        function: Callable[[_Model_co, _Argument], _Answer],
        arguments: Iterable[_Argument],
        *,
        lost: Callable[[_Argument, str], _Answer] = _fail,
        is_safe: Callable[[_Argument], bool] = _never,
    ) -> Iterator[_Answer]:
        """Yield `function(backbone, argument)` of every argument, in order; raise what it raises, in its turn.

        `lost` and `is_safe` are as in `groups`.
        """
        groups = ((None, [argument]) for argument in arguments)
        for _, answers in self.groups(function, groups, lost=lost, is_safe=is_safe):
            yield answers[0]

    def groups(
        self,
        function: Callable[[_Model_co, _Argument], _Answer],
        groups: Iterable[tuple[_Tag, Sequence[_Argument]]],
        *,
        lost: Callable[[_Argument, str], _Answer] = _fail,
        is_safe: Callable[[_Argument], bool] = _never,
    ) -> Iterator[tuple[_Tag, list[_Answer]]]:
        """As `each`, for arguments in groups: yield the tag and the answers of each group.

        `groups` is read only as far ahead as keeps the workers busy. `lost(argument, reason)` is the answer for an
        argument at which two workers crash or take too long; by default it raises WorkerError. Raises WorkerError,
        naming the argument, if both were killed from outside or for lack of memory. While the workers start, threads
        of this process answer for arguments that are safe: that can crash no decoder, as an image that was decoded
        before.
        """
        if self.workers == 0:
            for tag, arguments in groups:
                yield tag, [function(self.backbone, argument) for argument in arguments]
            return
        waiting: deque[tuple[_Tag, list[Future[Any]]]] = deque()
        behind = 0  # items behind the first group
        try:
            for tag, arguments in groups:
                waiting.append((tag, [self._submit(function, argument, lost, is_safe) for argument in arguments]))
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
        self,
        function: Callable[[Any, Any], Any],
        argument: Any,
        lost: Callable[[Any, str], Any],
        is_safe: Callable[[Any], bool],
    ) -> "Future[Any]":
        self.start()
        assert self._pool is not None  # it was started
        return self._pool.threads.submit(self._answered, self._pool, function, argument, lost, is_safe)

    def _answered(self, pool: "_Pool", function: Any, argument: Any, lost: Any, is_safe: Any) -> Any:
        """In a thread of the pool: the answer of a worker, or, before they have started, of this process."""
        if not pool.has_started() and is_safe(argument):
            return function(self.backbone, argument)
        pool.wait()
        return _answer(pool.processes, function, argument, lost)


class _Pool:
    """Workers, and a thread for each that waits for its answers."""

    def __init__(self, count: int, opener: Opener) -> None:
        """Start them in the background."""
        begin = partial(_begin, opener, shares_memory=_shared_memory_suffices())
        self.processes = Workers(context_of_processes(MODULES_TO_PREPARE_ITEMS), begin)
        self.threads = ThreadPoolExecutor(count, thread_name_prefix="agiqa-prepare")
        self._left = count
        self._changed = threading.Condition()
        for _ in range(count):  # daemons: one that waits for a fork server must not hold up the end of this process
            threading.Thread(target=self._start_one, daemon=True).start()

    def has_started(self) -> bool:
        """Whether all workers are ready, or have failed to start."""
        return self._left <= 0

    def wait(self) -> None:
        """Wait until the workers have started, or the pool is closed."""
        with self._changed:
            self._changed.wait_for(self.has_started)

    def close(self) -> None:
        """Kill the workers."""
        self.processes.close()
        self._count_down(self._left)
        self.threads.shutdown(wait=True, cancel_futures=True)

    def _start_one(self) -> None:
        with suppress(LostAnswer, AgiqaError, OSError, EOFError):  # whoever asks next gets such an error too
            self.processes.ask(_nothing, "its start")
        self._count_down(1)

    def _count_down(self, count: int) -> None:
        with self._changed:
            self._left -= count
            self._changed.notify_all()


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


def _nothing(_backbone: Backbone, _argument: str) -> None:
    """The call that starts a worker."""


def require_opener(opener: Opener | None, what: str, *, needed: bool) -> None:
    """Raise ConfigError if `what` is `needed` and there is no `opener`."""
    if needed and opener is None:
        message = f"{what} need an `opener` that opens the backbone again."
        raise ConfigError(message)


def default_workers(device: torch.device, items: int, *, processes: int = 1, fewest: int = FEWEST_ITEMS) -> int:
    """The number of workers of one of `processes` processes on this machine, which computes `items` on `device`."""
    if device.type == "cpu" or items < fewest:
        return 0
    return max(1, min(MOST_WORKERS, len(os.sched_getaffinity(0)) // processes - 2))


def chosen_workers(
    workers: int | None, backbone: Backbone, items: int, *, opener: Opener | None, fewest: int = FEWEST_ITEMS
) -> int:
    """`workers` if given, else `default_workers`; 0 without an `opener`."""
    if workers is not None:
        return workers
    return 0 if opener is None else default_workers(backbone.device, items, fewest=fewest)


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
