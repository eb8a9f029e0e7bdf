"""Many heads over one store: features decoded once, heads trained one after the other or side by side."""

import os
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import torch

from agiqa.errors import AgiqaError, ConfigError
from agiqa.heads.data.features import FeatureSource, item_bytes, location_of
from agiqa.heads.data.keeping import SharedFeatures, all_items, allowed_memory, available_memory, share_features
from agiqa.heads.data.splits import PARTITION_SETTINGS, Partition, make_partition
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.sweeps.head_jobs import Attempt, HeadJob, JobOutcome, attempt, is_there, with_notes
from agiqa.heads.sweeps.job_workers import run_jobs
from agiqa.progress import say

_ALIKE = ("device", "keep", "memory")
_WORKERS_PER_GPU = 3
_GPU_BYTES_PER_WORKER = 16 << 30
"""What the largest heads of this project take at batch 32, features aside."""


def train_heads(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    *,
    workers: int | None = None,
    progress: Callable[[HeadJob, str], None] | None = None,
) -> Generator[JobOutcome]:
    """Train a head for every job on `source`; yields what became of each, as they end.

    Each run folder has the weights, predictions and metrics that `train_head` alone gives on this device, for any
    number of `workers`; `features` and `seconds` in metrics.json tell of the sweep. Jobs may differ in everything but
    `device`, `keep` and `memory`. Their features are decoded once (see data/keeping.py), and `memory` is for all of
    them together. A job whose folder holds its head already is not trained again, and one that was broken off goes on.

    `workers` are processes that train one head each at a time; 1 trains in this process. None is, on a CPU, the number
    of cores divided by the largest `threads` of the jobs; on a GPU one for every two cores and every 16 GiB that the
    features leave free, at most 3; and never more than there are jobs. Sums depend on the number of threads that share
    them, so a job has `threads` of its settings, or those of torch in this process, however many workers there are: set
    `threads` to 1 for as many heads at once as there are cores.

    A job that fails (by an AgiqaError, the disk, torch or CUDA) or whose worker dies is told as failed, and the others
    go on, in a fresh worker; with 1 worker an error of CUDA may fail those after it too. `progress` gets the lines that
    a job says. Workers are spawned: a script that calls this needs `if __name__ == "__main__":`, and an encoder of
    your own must be registered by a module that the script imports. Closing the generator, or Ctrl-C, ends the workers.

    Raises ConfigError at once for no jobs, a run folder named twice, or jobs that differ where they may not; HeadError
    when no worker can be started.
    """
    _check(jobs)
    if workers is not None and workers < 1:
        message = f"A sweep needs 1 worker or more, and {workers} are asked for."
        raise ConfigError(message)
    return _train_heads(source, list(jobs), workers, progress or (lambda _job, _line: None))


class Partitions:
    """The parts of many jobs, drawn once for those that are split alike."""

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
    """How many workers train these jobs, with so many bytes of features, when nobody says; see `train_heads`."""
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
    source: FeatureSource, jobs: list[HeadJob], workers: int | None, tell: Callable[[HeadJob, str], None]
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
    for job, ended in _attempts(source, todo, shared, count, tell):
        failed = ended.error is not None
        yield JobOutcome(job=job, status="failed" if failed else "trained", error=ended.error)


def _attempts(
    source: FeatureSource,
    jobs: Sequence[HeadJob],
    shared: SharedFeatures,
    workers: int,
    tell: Callable[[HeadJob, str], None],
) -> Generator[tuple[HeadJob, Attempt]]:
    """Every job with how it ended: in this process, or in `workers` others."""
    if workers > 1:
        yield from run_jobs(source, jobs, shared, workers=workers, tell=tell)
        return
    for job in jobs:
        yield job, attempt(source, job, shared, partial(tell, job))


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
