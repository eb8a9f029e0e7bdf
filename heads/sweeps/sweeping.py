"""Many heads over one store: features decoded once, heads trained in this process or by workers side by side."""

import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from typing import Any

import torch

from agiqa.errors import AgiqaError, ConfigError, HeadError
from agiqa.heads.data.batches import SourceAddress
from agiqa.heads.data.features import FeatureSource, item_bytes, location_of
from agiqa.heads.data.keeping import (
    PackedFeatures,
    SharedFeatures,
    all_items,
    allowed_memory,
    available_memory,
    share_features,
)
from agiqa.heads.data.splits import PARTITION_SETTINGS, Partition, make_partition
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.sweeps.head_jobs import Attempt, HeadJob, JobOutcome, attempt, is_there, with_notes
from agiqa.progress import say
from agiqa.workers import context_of_processes, ctrl_c_kept_away, end_with_parent

_ALIKE = ("device", "keep", "memory")
_WORKERS_PER_GPU = 3
_GPU_BYTES_PER_WORKER = 16 << 30
"""GPU memory of the largest heads of this project at batch 32, without the features."""
_SECONDS_TO_END = 15.0
_IMPORTED_ONCE = ("agiqa.heads.sweeps.head_jobs",)
"""Modules that the fork server imports once for all workers."""


def train_heads(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    *,
    workers: int | None = None,
    progress: Callable[[HeadJob, str], None] | None = None,
) -> Generator[JobOutcome]:
    """Train a head for every job on `source`; yields the outcome of each, as they end.

    Each run folder has the weights, predictions and metrics that `train_head` alone gives on this device, for any
    number of `workers`; `features` and `seconds` in metrics.json are those of the sweep. Jobs may differ in everything
    but `device`, `keep` and `memory`. Their features are decoded once (see data/keeping.py), and `memory` is for all of
    them together. A job whose folder holds its head already is not trained again; an interrupted one resumes.

    `workers` are processes that train one head each at a time; 1 trains in this process. None is, on a CPU, the number
    of cores divided by the largest `threads` of the jobs; on a GPU one for every two cores and every 16 GiB that the
    features leave free, at most 3; and never more than there are jobs. Sums depend on the number of threads that share
    them, so a job has `threads` of its settings, or those of torch in this process, however many workers there are: set
    `threads` to 1 for as many heads at once as there are cores.

    A job that fails (by an AgiqaError, the disk, torch or CUDA) or whose worker dies gets the status `failed`, and the
    others go on, in a fresh worker; with 1 worker an error of CUDA may fail later jobs too. `progress` gets the lines
    that a job prints. Workers import the script that calls this, which needs `if __name__ == "__main__":`; an encoder
    of your own must be registered by a module that the script imports. Closing the generator, or Ctrl-C, ends them.

    Raises ConfigError at once for no jobs, a run folder named twice, or jobs that differ where they may not; HeadError
    when no worker can be started.
    """
    _check(jobs)
    if workers is not None and workers < 1:
        message = f"A sweep needs 1 worker or more, and `workers` is {workers}."
        raise ConfigError(message)
    return _train_heads(source, list(jobs), workers, progress or (lambda _job, _line: None))


class Partitions:
    """The partitions of many jobs, drawn once for jobs with the same split settings."""

    def __init__(self, source: FeatureSource) -> None:
        """Of the items of `source`."""
        self._source = source
        self._known: dict[tuple[Any, ...], Partition] = {}

    def of(self, config: TrainConfig) -> Partition:
        """As `make_partition`; raises what it raises."""
        name = tuple(getattr(config, setting) for setting in PARTITION_SETTINGS)
        if name not in self._known:
            self._known[name] = make_partition(self._source, config)
        return self._known[name]


def default_workers(jobs: Sequence[HeadJob], *, features: int = 0) -> int:
    """The default number of workers for these jobs and so many bytes of features; see `train_heads`."""
    device = resolve_device(jobs[0].train.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        free, config = available_memory(device), jobs[0].train
        kept = features if config.keep in ("auto", "device") and features <= allowed_memory(config, device) else 0
        most = min(_WORKERS_PER_GPU, cores // 2, (free - kept) // _GPU_BYTES_PER_WORKER)
    else:
        most = cores // max(job.train.threads or torch.get_num_threads() for job in jobs)
    return max(1, min(most, len(jobs)))


def _train_heads(
    source: FeatureSource, jobs: list[HeadJob], workers: int | None, on_line: Callable[[HeadJob, str], None]
) -> Generator[JobOutcome]:
    partitions = Partitions(source)
    todo: list[HeadJob] = []
    for job in jobs:
        try:
            there = is_there(source, job, partitions.of(job.train))
        except AgiqaError as error:
            yield JobOutcome(job=job, status="failed", error=with_notes(error))
            continue
        if there:
            yield JobOutcome(job=job, status="there")
        else:
            todo.append(job)
    if not todo:
        return
    parts, config = [partitions.of(job.train) for job in todo], todo[0].train
    count = min(workers or default_workers(todo, features=int(item_bytes(source, all_items(parts)).sum())), len(todo))
    say(f"{len(todo)} head{'s' * (len(todo) > 1)} to train on {location_of(source)}, {count} at a time")
    shared = share_features(source, parts, config, device=resolve_device(config.device), processes=count)
    for job, ended in _attempts(source, todo, shared, count, on_line):
        failed = ended.error is not None
        yield JobOutcome(job=job, status="failed" if failed else "trained", error=ended.error)


def _attempts(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    shared: SharedFeatures,
    workers: int,
    on_line: Callable[[HeadJob, str], None],
) -> Generator[tuple[HeadJob, Attempt]]:
    """Run every job, in this process or in `workers` others; yields each with its attempt."""
    if workers > 1:
        yield from run_jobs(source, jobs, shared, workers=workers, on_line=on_line)
        return
    for job in jobs:
        yield job, attempt(source, job, shared, partial(on_line, job))


def _check(jobs: Sequence[HeadJob]) -> None:
    """Raise ConfigError for jobs that cannot be trained together."""
    if not jobs:
        message = "A sweep needs a job or more."
        raise ConfigError(message)
    folders: set[Any] = set()
    for job in jobs:
        place = job.run.absolute()
        if place in folders:
            message = f"Two jobs have the run folder {job.run}: each needs its own."
            raise ConfigError(message)
        folders.add(place)
        for name in _ALIKE:
            first, other = getattr(jobs[0].train, name), getattr(job.train, name)
            if first != other:
                message = (
                    f"The jobs of one sweep share features, so `{name}` must be the same: {jobs[0].run} has {first!r}, "
                    f"{job.run} has {other!r}. Sweep them one after the other."
                )
                raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class _Setup:
    """The arguments of every worker."""

    source: SourceAddress
    features: list[PackedFeatures]
    """A list of one, which the worker empties: a process keeps its arguments longer than CUDA lets it keep tensors."""
    threads: int


@dataclass(frozen=True, kw_only=True)
class _Ready:
    """A worker's first message. With an error it ends."""

    error: str | None = None


class _Worker:
    """One process, the pipe to it, and its job."""

    def __init__(self, context: BaseContext, setup: _Setup) -> None:
        self.pipe, theirs = context.Pipe()
        start: Any = context  # typed without the class of its processes
        self.process = start.Process(target=_work, args=(theirs, setup), daemon=True, name="agiqa-heads")
        with ctrl_c_kept_away():
            self.process.start()
        theirs.close()  # so that reading from this end fails once the worker is gone
        self.started = False
        self.job: HeadJob | None = None

    def take(self, waiting: deque[HeadJob]) -> None:
        """Give it the next job, unless it is gone already."""
        with suppress(OSError):  # `receive` will find that it is gone
            self.pipe.send(waiting[0])
            self.job = waiting.popleft()

    def receive(self) -> Any:
        """The next message; None when the worker is gone."""
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            return None

    def dismiss(self, *, hurry: bool) -> None:
        """End it. An idle worker exits by itself; a busy one gets SIGTERM, in a `hurry` also one that is starting."""
        if self.job is not None or (hurry and not self.started):
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


def run_jobs(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    shared: SharedFeatures,
    *,
    workers: int,
    on_line: Callable[[HeadJob, str], None],
) -> Generator[tuple[HeadJob, Attempt]]:
    """Train all jobs in `workers` processes; yields each with how it ended, in the order of their ends.

    A worker opens the source by its location, and maps the shared features. A worker that dies takes only
    its job along. Closing the generator ends the workers, and what they have saved is kept; a worker also ends when
    this process ends in any way. Raises HeadError when no worker can start; where some can, they go on alone.
    """
    features = [PackedFeatures.of(shared)]
    setup = _Setup(source=SourceAddress.of(source), features=features, threads=torch.get_num_threads())
    context = context_of_processes(_IMPORTED_ONCE, on_gpu=resolve_device(jobs[0].train.device).type != "cpu")
    waiting, staff, hurry = deque(jobs), list[_Worker](), True
    try:
        while waiting or any(worker.job is not None for worker in staff):
            busy = sum(worker.job is not None for worker in staff)
            while len(staff) < min(workers, busy + len(waiting)):
                staff.append(_Worker(context, setup))
            for worker in _with_messages(staff):
                message = worker.receive()
                if isinstance(message, str) and worker.job is not None:
                    on_line(worker.job, message)
                elif isinstance(message, Attempt) and worker.job is not None:
                    job, worker.job = worker.job, None
                    if not message.sound:  # it leaves now
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


def _with_messages(staff: Sequence[_Worker]) -> list[_Worker]:
    """The workers that have sent something or are gone; waits for one."""
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
    """The main function of a worker: train every job that it is sent, until the pipe closes."""
    end_with_parent()
    torch.set_num_threads(setup.threads)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the other end is closed
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
