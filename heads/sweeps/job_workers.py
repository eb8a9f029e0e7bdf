"""Worker processes that train heads side by side, each job in one of them; a worker that dies takes only its job along.

A worker is spawned, opens the source by its location, and sees the shared features where they are. It ends with this
process, however that ends, so no head is trained by nobody's order.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from agiqa.errors import AgiqaError, HeadError
from agiqa.heads.data.batches import SourceAddress
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.keeping import PackedFeatures, SharedFeatures
from agiqa.heads.sweeps.head_jobs import Attempt, HeadJob, attempt, with_notes
from agiqa.workers import ctrl_c_kept_away

_SECONDS_TO_END = 15.0


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """What every worker is started with."""

    source: SourceAddress
    features: list[PackedFeatures]
    """One, which the worker takes out: a process keeps its arguments for longer than CUDA lets it keep tensors."""
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A worker's first message. With an error it ends."""

    error: str | None = None


class _Worker:
    """One process, the pipe to it, and the job that it has."""

    def __init__(self, setup: _Setup) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, setup), daemon=True, name="agiqa-heads")
        with ctrl_c_kept_away():
            self.process.start()
        theirs.close()  # so that this end tells when the worker is gone
        self.started = False
        self.job: HeadJob | None = None

    def take(self, waiting: deque[HeadJob]) -> None:
        """Hand it the next job, unless it is gone already."""
        with suppress(OSError):  # one that is gone is found out when it is listened to
            self.pipe.send(waiting[0])
            self.job = waiting.popleft()

    def hear(self) -> Any:
        """The next message; None when the worker is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def dismiss(self, *, hurry: bool) -> None:
        """Have it leave: by itself when it is idle, by SIGTERM when it is at work or, in a `hurry`, about to start."""
        if self.job is not None or (hurry and not self.started):
            self.process.terminate()
        self.pipe.close()

    def wait(self) -> None:
        """Wait until the process that was dismissed is gone; one at work goes at the end of its step."""
        self.process.join(_SECONDS_TO_END)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()

    def obituary(self) -> str:
        """How it ended, for people."""
        self.process.join()
        code = self.process.exitcode or 0
        if code >= 0:
            return f"ended with exit code {code}; its last words are on the error stream"
        name = signal.Signals(-code).name
        cause = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"was ended by {name} (exit code {code}){cause}"


def run_jobs(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    shared: SharedFeatures,
    *,
    workers: int,
    tell: Callable[[HeadJob, str], None],
) -> Generator[tuple[HeadJob, Attempt]]:
    """Train all jobs in `workers` processes; yields each with how it ended, in the order of their ends.

    Closing the generator ends the workers; what they have saved is kept. Raises HeadError when no worker can start;
    where some can, they go on without the others.
    """
    features = [PackedFeatures.of(shared)]
    setup = _Setup(source=SourceAddress.of(source), features=features, threads=torch.get_num_threads())
    waiting, staff, hurry = deque(jobs), list[_Worker](), True
    try:
        while waiting or any(worker.job is not None for worker in staff):
            busy = sum(worker.job is not None for worker in staff)
            while len(staff) < min(workers, busy + len(waiting)):
                staff.append(_Worker(setup))
            for worker in _speaking(staff):
                message = worker.hear()
                if isinstance(message, str) and worker.job is not None:
                    tell(worker.job, message)
                elif isinstance(message, Attempt) and worker.job is not None:
                    job, worker.job = worker.job, None
                    if not message.sound:  # it leaves now, and must not get another job
                        staff.remove(worker)
                        worker.dismiss(hurry=False)
                        worker.wait()
                    yield job, message
                elif isinstance(message, _Ready) and message.error is None:
                    worker.started = True
                else:
                    staff.remove(worker)
                    yield from _lost(worker, message if isinstance(message, _Ready) else None, left=len(staff))
                    workers -= not worker.started
            for worker in staff:
                if worker.started and worker.job is None and waiting:
                    worker.take(waiting)
        hurry = False
    finally:
        for worker in staff:
            worker.dismiss(hurry=hurry)
        for worker in staff:
            worker.wait()


def _speaking(staff: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have something to say, or are gone; waits for one."""
    ready = wait([worker.pipe for worker in staff])
    return [worker for worker in staff if worker.pipe in ready]


def _lost(worker: _Worker, message: _Ready | None, *, left: int) -> Generator[tuple[HeadJob, Attempt]]:
    """The job of a worker that is gone, if it had one. Raises HeadError if it never started and no other is `left`."""
    if not worker.started and not left:
        why = f"it {worker.obituary()}" if message is None else message.error
        text = f"A worker process cannot be started: {why}"
        raise HeadError(text)
    if worker.job is not None:
        job, worker.job = worker.job, None
        yield job, Attempt(error=f"The worker that trained it {worker.obituary()}", sound=False)


def _work(pipe: "Connection[Any, Any]", setup: _Setup) -> None:
    """The life of a worker: train what is handed over, until the pipe closes."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(setup.threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # nobody wants another job
        _train_on_order(pipe, setup)
    gc.collect()  # trainings leave cycles that hold features


def _train_on_order(pipe: "Connection[Any, Any]", setup: _Setup) -> None:
    try:
        source = setup.source.open()
        shared = setup.features.pop().open(source)
    except (AgiqaError, OSError) as error:
        pipe.send(_Ready(error=with_notes(error)))
        return
    pipe.send(_Ready())
    sound = True
    while sound:
        ended = attempt(source, pipe.recv(), shared, pipe.send)
        pipe.send(ended)
        sound = ended.sound


def _end_with_parent() -> None:
    """Wait for the end of the process that started this one, then end at once: what is saved is whole."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)
