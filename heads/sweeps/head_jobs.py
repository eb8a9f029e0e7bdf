"""A head to be trained as one of many: what it is, whether it is there already, and one attempt at it."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from agiqa.errors import AgiqaError, HeadError
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.keeping import SharedFeatures
from agiqa.heads.data.splits import Partition
from agiqa.heads.evaluation.runs import Run, load_run
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.training.progress import LineProgress
from agiqa.heads.training.resuming import OF_THE_MACHINE, data_of, training_key
from agiqa.heads.training.starting import start_record
from agiqa.heads.training.training import train_head
from agiqa.progress import said_to

Tell = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class HeadJob:
    """A head to train, as the arguments of `train_head`."""

    run: Path
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preset: str | None = None
    start: Path | None = None
    """The run folder of the head to start from, of the settings `head`; it must be there when the job begins."""


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """What became of a job."""

    job: HeadJob
    status: Literal["trained", "there", "failed"]
    """`there`: the run folder was complete already, for the same settings, store, items and labels."""
    error: str | None = None
    """Why it failed."""

    def load(self) -> Run:
        """The run. Raises HeadError for a job that failed."""
        if self.error is not None:
            message = f"{self.job.run} was not trained: {self.error}"
            raise HeadError(message)
        return load_run(self.job.run)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """How one try ended."""

    error: str | None = None
    """None when it was trained."""
    sound: bool = True
    """Whether the process can be trusted with another job: not after an error that torch or CUDA raised."""


def attempt(source: FeatureSource, job: HeadJob, shared: SharedFeatures, tell: Tell) -> Attempt:
    """Train the head of `job`; `tell` gets every line that it says. What it raises becomes the error.

    An error of agiqa or of the system is told with its notes, one of torch (CUDA's and memory's among them) with its
    traceback. Others, faults of the program, are raised.
    """
    try:
        with said_to(tell):
            train_head(
                source,
                job.run,
                head=job.head,
                train=job.train,
                preset=job.preset,
                progress=LineProgress(tell),
                shared=shared,
                start=None if job.start is None else load_run(job.start),
            )
    except (AgiqaError, OSError) as error:
        return Attempt(error=with_notes(error))
    except (RuntimeError, MemoryError) as error:
        tell(traceback.format_exc())
        return Attempt(error=f"{type(error).__name__}: {error}", sound=False)
    return Attempt()


def with_notes(error: BaseException) -> str:
    """The message of an error and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def is_there(source: FeatureSource, job: HeadJob, partition: Partition) -> bool:
    """Whether the folder of `job` holds its head already; what is absent or empty holds none.

    Raises HeadError where something else is there: another head, one of other settings, items or labels, or no run.
    """
    if not job.run.exists() or (job.run.is_dir() and not any(job.run.iterdir())):
        return False
    run = load_run(job.run)
    problems = _differences(run, source, job, partition)
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        message = f"{job.run} holds another training:\n{lines}\nChoose another run folder, or remove it first."
        raise HeadError(message)
    return True


def _differences(run: Run, source: FeatureSource, job: HeadJob, partition: Partition) -> list[str]:
    """What is not the same about the run that is there and the job, a line each."""
    start = None if job.start is None else start_record(load_run(job.start))
    there = _settings(run.head, run.train, run.store_id, run.config.get("preset"), run.config.get("start"))
    asked = _settings(job.head, job.train, source.id, job.preset, start)
    found = [
        f"{name}: there {there[name]!r}, asked for {value!r}"
        for name, value in asked.items()
        if name not in OF_THE_MACHINE and there[name] != value
    ]
    if found or "data" not in run.config:
        return found
    device = resolve_device(job.train.device)
    key = training_key(source, partition, job.head, job.train, device=device, start=start)
    kept, data = run.config["data"], data_of(key)
    return [
        f"{kind} of {part} are not those that it was trained with"
        for kind, parts in data.items()
        for part, value in parts.items()
        if kept[kind][part] != value
    ]


def _settings(
    head: HeadConfig, train: TrainConfig, store: str, preset: str | None, start: Mapping[str, str] | None
) -> dict[str, Any]:
    """All that a head is trained with, but for items and labels; `start` as of `start_record`."""
    weights = None if start is None else start["sha256"]
    return {**head.model_dump(), **train.model_dump(), "store": store, "preset": preset, "start": weights}
