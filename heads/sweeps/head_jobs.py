"""A head to be trained as one of many: what it is, whether it exists already, and one attempt to train it."""

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from agiqa.errors import AgiqaError, HeadError
from agiqa.heads.data.features import FeatureSource
from agiqa.heads.data.keeping import SharedFeatures
from agiqa.heads.data.splits import Partition
from agiqa.heads.data.variants import as_variant
from agiqa.heads.evaluation.own_parts import code_of, recorded_parts
from agiqa.heads.evaluation.runs import Run, load_run
from agiqa.heads.model.reading import features_for
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.sweeps.processes import Channel
from agiqa.heads.sweeps.watching import StateProgress
from agiqa.heads.training.experiment import OF_THE_MACHINE, Experiment, differences, layer_to_read
from agiqa.heads.training.training import train_head
from agiqa.progress import said_to


@dataclass(frozen=True, kw_only=True)
class HeadJob:
    """A head to train, as the arguments of `train_head`."""

    run: Path
    head: HeadConfig = field(default_factory=HeadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    preset: str | None = None
    start: Path | None = None
    """The run folder of the head to start from, of the settings `head`; it must exist when the job begins."""

    def features_of(self, store: FeatureSource) -> FeatureSource:
        """What the head reads of `store`. Raises as `features_for`, and HeadError where `start` is no run."""
        start = None if self.start is None else load_run(self.start)
        return features_for(as_variant(store, self.train.variant), self.head, layer_to_read(self.train, start))

    def experiment(self, store: FeatureSource, *, drawn: Partition) -> Experiment:
        """The job on `store`, with its partition. Raises as `features_of`."""
        start = None if self.start is None else load_run(self.start)
        source = self.features_of(store)
        return Experiment(
            source=source, run=self.run, head=self.head, train=self.train, preset=self.preset, start=start, drawn=drawn
        )


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """The result of a job."""

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
    """How one attempt ended."""

    error: str | None = None
    """None when it was trained."""
    sound: bool = True
    """Whether the process can be trusted with another job: not after an error that torch or CUDA raised."""


@dataclass(frozen=True, kw_only=True)
class HeadTask:
    """A job for `run_tasks`. It tells every line that the training prints, and each HeadState."""

    job: HeadJob

    def run(self, source: FeatureSource, shared: SharedFeatures, channel: Channel, /) -> Attempt:
        """Train the head.

        An error of agiqa or of the system is returned with its notes. One of torch, CUDA or memory is returned too, and
        its traceback is told. All others are faults of the program, and are raised.
        """
        job = self.job
        try:
            with said_to(channel.tell):
                train_head(
                    source,
                    job.run,
                    head=job.head,
                    train=job.train,
                    preset=job.preset,
                    progress=StateProgress(channel.tell, channel.tell, job.train),
                    shared=shared,
                    start=None if job.start is None else load_run(job.start),
                )
        except (AgiqaError, OSError) as error:
            return Attempt(error=with_notes(error))
        except (RuntimeError, MemoryError) as error:
            channel.tell(traceback.format_exc())
            return Attempt(error=f"{type(error).__name__}: {error}", sound=False)
        return Attempt()

    def lost(self, reason: str, /) -> Attempt:
        """The attempt of a worker that died."""
        return Attempt(error=reason, sound=False)

    def spoils(self, answer: Attempt, /) -> bool:
        """After an error of torch or CUDA."""
        return not answer.sound


def with_notes(error: BaseException) -> str:
    """The message of an error and its notes."""
    return "\n".join([str(error), *getattr(error, "__notes__", ())])


def is_there(source: FeatureSource, job: HeadJob, partition: Partition) -> bool:
    """Whether the folder of `job` holds its head already. An absent or empty folder holds none.

    Raises HeadError where the folder holds anything else: a head of other settings, items or labels, or no run.
    """
    if not job.run.exists() or (job.run.is_dir() and not any(job.run.iterdir())):
        return False
    run = load_run(job.run)
    problems = _differences(run, job.experiment(source, drawn=partition))
    if problems:
        lines = "\n".join(f"  {line}" for line in problems)
        message = f"{job.run} holds another training:\n{lines}\nChoose another run folder, or remove it first."
        raise HeadError(message)
    return True


def _differences(run: Run, wanted: Experiment) -> list[str]:
    """What differs between a run and the experiment, a line each; data only where the settings are the same."""
    there = Experiment(source=wanted.source, run=run.path, head=run.head, train=run.train).settings()
    there["train"] |= {"layer": run.spec.layer}
    there |= {"store": run.store_id, "start": (run.config.get("start") or {}).get("sha256")}
    there |= code_of(recorded_parts(run.config))
    settings = {"preset": wanted.preset, **wanted.settings()}
    found = differences({"preset": run.config.get("preset"), **there}, settings, verb="there", without=OF_THE_MACHINE)
    if found or "data" not in run.config:
        return found
    return differences(run.config["data"], wanted.data, verb="there")
