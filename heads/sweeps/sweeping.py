"""Many heads over one store: features decoded once, heads trained in this process or by workers side by side."""

import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from agiqa.errors import AgiqaError, ConfigError
from agiqa.heads.data.features import FeatureSource, item_bytes, location_of
from agiqa.heads.data.keeping import (
    PackedFeatures,
    SharedFeatures,
    all_items,
    allowed_memory,
    available_memory,
    share_features,
)
from agiqa.heads.data.reopening import SourceAddress
from agiqa.heads.data.splits import PARTITION_SETTINGS, Partition, make_partition
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.sweeps.head_jobs import Attempt, HeadJob, HeadTask, JobOutcome, is_there, with_notes
from agiqa.heads.sweeps.processes import Direct, Orders, Setup, run_tasks
from agiqa.heads.sweeps.watching import HeadState, SweepWatch, watching
from agiqa.progress import say

_ALIKE = ("device", "keep", "memory")
_WORKERS_PER_GPU = 3
_GPU_BYTES_PER_WORKER = 16 << 30
"""GPU memory of the largest heads of this project at batch 32, without the features."""


def train_heads(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    *,
    workers: int | None = None,
    progress: Callable[[HeadJob, str], None] | None = None,
    watch: SweepWatch | None = None,
) -> Generator[JobOutcome]:
    """Train a head for every job on `source`, a store; yields the outcome of each, as they end.

    Each run folder has the weights, predictions and metrics that `train_head` alone gives on this device, for any
    number of `workers`; `features` and `seconds` in metrics.json are those of the sweep. Jobs may differ in everything
    but `device`, `keep` and `memory`. Their features are decoded once (see data/keeping.py), and `memory` is for all of
    them together. Jobs that read another layer, pooled row or variant are trained in turn, in the order of the first
    job on each. A job whose folder holds its head already is not trained again; an interrupted one resumes.

    `workers` are processes that train one head each at a time; 1 trains in this process. None is, on a CPU, the number
    of cores divided by the largest `threads` of the jobs; on a GPU one for every two cores and every 16 GiB that the
    features leave free, at most 3; and never more than there are jobs. Sums depend on the number of threads that share
    them, so a job has `threads` of its settings, or those of torch in this process, however many workers there are: set
    `threads` to 1 for as many heads at once as there are cores.

    A job that fails (by an AgiqaError, the disk, torch or CUDA) or whose worker dies gets the status `failed`, and the
    others go on, in a fresh worker; with 1 worker an error of CUDA may fail later jobs too. `progress` gets the lines
    that a job prints. The heads under way and the time left are shown on the error stream, or by `watch`, which may
    count other sweeps too. Workers import the script that calls this, which needs `if __name__ == "__main__":`, and the
    modules given to `agiqa.import_parts`. Parts registered in a notebook need 1 worker. Closing the generator, or
    Ctrl-C, ends them.

    Raises ConfigError at once for no jobs, a run folder named twice, or jobs that differ where they may not; HeadError
    when no worker can be started.
    """
    _check(jobs)
    if workers is not None and workers < 1:
        message = f"A sweep needs 1 worker or more, and `workers` is {workers}."
        raise ConfigError(message)
    return _train_heads(source, list(jobs), workers, progress or (lambda _job, _line: None), watch)


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
    source: FeatureSource,
    jobs: list[HeadJob],
    workers: int | None,
    on_line: Callable[[HeadJob, str], None],
    watch: SweepWatch | None,
) -> Generator[JobOutcome]:
    """`train_heads`, with a watch of its own where none is given."""
    if watch is None:
        with watching("train", len(jobs)) as own:
            yield from _train_heads(source, jobs, workers, on_line, own)
        return
    partitions = Partitions(source)
    todo: dict[str, list[HeadJob]] = {}
    read: dict[str, FeatureSource] = {}
    for job in jobs:
        try:
            reads = job.features_of(source)
            there = is_there(source, job, partitions.of(job.train))
        except AgiqaError as error:
            watch.ended(job.run.name, there=True)
            yield JobOutcome(job=job, status="failed", error=with_notes(error))
            continue
        if there:
            watch.ended(job.run.name, there=True)
            yield JobOutcome(job=job, status="there")
        else:
            read.setdefault(reads.id, reads)
            todo.setdefault(reads.id, []).append(job)
    for name, alike in todo.items():
        yield from _train_alike(read[name], alike, partitions, workers, on_line, watch)


def _train_alike(
    source: FeatureSource,
    todo: Sequence[HeadJob],
    partitions: Partitions,
    workers: int | None,
    on_line: Callable[[HeadJob, str], None],
    watch: SweepWatch,
) -> Generator[JobOutcome]:
    """Train heads that read the same features, those of `source`."""
    parts, config = [partitions.of(job.train) for job in todo], todo[0].train
    count = min(workers or default_workers(todo, features=int(item_bytes(source, all_items(parts)).sum())), len(todo))
    say(f"{len(todo)} head{'s' * (len(todo) > 1)} to train on {location_of(source)}, {count} at a time")
    shared = share_features(source, parts, config, device=resolve_device(config.device), processes=count)
    for job, ended in _attempts(source, todo, shared, count, on_line, watch):
        failed = ended.error is not None
        watch.ended(job.run.name)
        yield JobOutcome(job=job, status="failed" if failed else "trained", error=ended.error)


def _attempts(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    shared: SharedFeatures,
    workers: int,
    on_line: Callable[[HeadJob, str], None],
    watch: SweepWatch,
) -> Generator[tuple[HeadJob, Attempt]]:
    """Run every job, in this process or in `workers` others; yields each with its attempt."""
    waiting = deque(HeadTask(job=job) for job in jobs)

    def on_message(task: HeadTask, message: str | HeadState) -> None:
        if isinstance(message, HeadState):
            watch.running(task.job.run.name, message)
        else:
            on_line(task.job, message)

    orders = Orders[HeadTask](
        next_task=lambda: waiting.popleft() if waiting else None,
        on_message=on_message,
        on_question=lambda _task, question: question,
        on_pulse=watch.pulse,
    )
    if workers > 1:
        setup = Setup(
            source=SourceAddress.of(source),
            features=[PackedFeatures.of(shared)],
            threads=torch.get_num_threads(),
            on_gpu=resolve_device(jobs[0].train.device).type != "cpu",
        )
        for task, ended in run_tasks(setup, orders, workers=workers):
            yield task.job, ended
        return
    while waiting:
        task = waiting.popleft()
        yield task.job, task.run(source, shared, Direct(task=task, orders=orders))


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
