"""A search over the settings of a head, on the training and validation items of one split.

OUT/about.json    the store, the settings that are fixed, the space, hashes of items and labels
OUT/study.log     Optuna's journal, to resume from
OUT/trials.jsonl  a line per trial that ended: settings, validation SRCC by epoch, seconds, or its error
OUT/best.yaml     the settings of the best trial, for `agiqa train --config`
OUT/lock          held by the process at work

The validation SRCC of the best of many trials is too high as an estimate: it is the largest of many values on the same
items. Train its settings again and test them on other items, as `agiqa tune-head` does.
"""

import json
import math
import os
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agiqa.errors import ConfigError, HeadError
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.keeping import PackedFeatures, SharedFeatures, share_features
from agiqa.heads.data.layers import base_of
from agiqa.heads.data.reopening import SourceAddress
from agiqa.heads.data.variants import as_variant
from agiqa.heads.model.encoders import ENCODERS
from agiqa.heads.model.encoders.base import completed
from agiqa.heads.model.head import check_sizes
from agiqa.heads.model.reading import features_for
from agiqa.heads.searching.folder import KEPT, claim, configs_of, settings_yaml
from agiqa.heads.searching.space import Choice, Space
from agiqa.heads.searching.study import Line, Pruner, SearchStudy, check_optuna
from agiqa.heads.searching.trials import SearchParts, TrialResult, TrialTask
from agiqa.heads.settings.config import CLOSED_FORMS, HeadConfig, TrainConfig
from agiqa.heads.settings.device import check_precision, resolve_device
from agiqa.heads.sweeps.head_jobs import HeadJob
from agiqa.heads.sweeps.processes import Direct, Orders, Setup, run_tasks
from agiqa.heads.sweeps.sweeping import default_workers
from agiqa.heads.sweeps.watching import HeadState, SweepWatch, watching
from agiqa.progress import Clock, say
from agiqa.store.disk.files import telling_disk_errors, working_in_folder, write_text_atomically

ABOUT, STUDY, TRIALS, BEST = "about.json", "study.log", "trials.jsonl", "best.yaml"
_FAILURES_TO_STOP = 10
"""So many failed trials without a complete one end a search."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What to search, and how."""

    head: HeadConfig
    train: TrainConfig
    """Settings of all trials, where the space does not vary them. `label`, the split and its seeds decide the items."""
    space: Space
    trials: int
    """In all, those of earlier runs included."""
    timeout: float | None = None
    """Seconds after which no further trial begins."""
    seed: int = 0
    """Of the sampler."""
    pruner: Pruner = "median"
    workers: int | None = None
    """Trials at the same time; None as in `train_heads`."""
    devices: int = 1
    """GPUs to spread the workers over."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The outcome of a search."""

    lines: list[Line]
    """Of all trials that ended, as in trials.jsonl."""
    best: Line
    """The complete trial with the highest validation SRCC; the first of equals."""
    head: HeadConfig
    train: TrainConfig
    """The settings of the best trial."""
    importance: dict[str, float]
    """As `SearchStudy.importances`."""
    timed_out: bool

    def count(self, state: str) -> int:
        """How many trials ended as `complete`, `pruned` or `failed`."""
        return sum(line["state"] == state for line in self.lines)


def run_search(
    source: FeatureSource, out: Path, settings: SearchSettings, *, clock: Clock = time.monotonic
) -> SearchResult:
    """Run the missing trials in the folder `out`; trials of earlier runs stay, and those that a kill interrupted run
    again. Only training and validation items are read.

    With 1 worker, a search that was killed and resumed has the same trials as one that was not. Raises ConfigError for
    settings, too few validation items or a missing package, BusyStore where another process searches in `out`,
    DataError for a search of other settings, space, items or labels, and HeadError where every trial failed.
    """
    _check(settings)
    source = features_for(as_variant(source, settings.train.variant), settings.head, settings.train.layer)
    parts = SearchParts.draw(source, settings.train)
    about = _about(source, parts, settings)
    for line in (*parts.warnings(), *slow_encoders(settings)):
        say(f"warning: {line}")
    with working_in_folder(out, "search", kept=KEPT):
        claim(out / ABOUT, about)
        study = SearchStudy(out / STUDY, seed=settings.seed, pruner=settings.pruner, epochs=settings.train.epochs)
        if again := study.propose_again():
            say(f"{again} interrupted trial{'s' * (again > 1)} will run again")
        if study.is_new:
            study.propose(settings.space.first(settings.head, settings.train))
        work = _Work(source, parts, settings, study, out, clock)
        timed_out = work.run()
        lines = study.lines()
        best = best_of(lines)
        if best is None:
            raise _none_complete(lines, timed_out=timed_out)
        head, train = configs_of(best["settings"], settings.head, settings.train)
        write_text_atomically(out / BEST, settings_yaml(head, train))
        return SearchResult(
            lines=lines, best=best, head=head, train=train, importance=study.importances(), timed_out=timed_out
        )


def best_of(lines: Sequence[Line]) -> Line | None:
    """The complete trial with the highest validation SRCC; None without one."""
    complete = [line for line in lines if line["state"] == "complete"]
    return max(complete, key=lambda line: float(line["validation_srcc"]), default=None)


def slow_encoders(settings: SearchSettings) -> list[str]:
    """A line on the encoders of the space that this machine runs without their kernels."""
    varied, device = settings.space.settings.get("encoder"), resolve_device(settings.train.device)
    names = varied.values if isinstance(varied, Choice) else (settings.head.encoder,)
    slow: list[str] = []
    for name in (name for name in names if name in CLOSED_FORMS):
        message = f"A search trains networks, and {name!r} is a closed form, which chooses its own settings: train it."
        raise ConfigError(message)
    for name in names:
        with torch.random.fork_rng(devices=[]):
            kernels = ENCODERS.get(name)(completed(HeadConfig(encoder=name))).to(device).kernels
        if "the kernels need" in kernels or "not installed" in kernels:
            slow.append(name)
    if not slow:
        return []
    return [
        f"{', '.join(slow)} run{'s' * (len(slow) == 1)} slowly here, without GPU kernels. --dry-run says how slowly; a "
        "space without them is given by --space FILE."
    ]


class _Work:
    """A search under way."""

    def __init__(
        self,
        source: FeatureSource,
        parts: SearchParts,
        settings: SearchSettings,
        study: SearchStudy,
        out: Path,
        clock: Clock,
    ) -> None:
        self._source, self._parts, self._settings = source, parts, settings
        self._study, self._out, self._clock = study, out, clock
        self._trials: dict[int, Any] = {}
        """Of Optuna, under way."""
        self._asked = 0
        self._ended = study.lines()
        self._deadline = math.inf if settings.timeout is None else clock() + settings.timeout
        self._timed_out = False
        self._watch: SweepWatch | None = None

    def run(self) -> bool:
        """Run the missing trials; whether the time was up before all had begun."""
        self._write()
        before, total = len(self._ended), self._settings.trials
        if before >= total:
            say(f"all {total} trials exist already")
            return False
        if before:
            say(f"{before} of {total} trials exist already")
        workers = self._workers(total - before)
        shared = self._share(workers)
        with watching("search", total, "trials", done=before) as watch:
            self._watch = watch
            orders = Orders[TrialTask](
                next_task=self._next,
                on_message=lambda task, message: _on_message(watch, task, message),
                on_question=self._judge,
                on_pulse=watch.pulse,
            )
            with closing(self._results(orders, shared, workers)) as results:
                for task, result in results:
                    self._note(self._trials.pop(task.number), task.settings, result)
        return self._timed_out

    def _results(
        self, orders: Orders[TrialTask], shared: SharedFeatures, workers: int
    ) -> Generator[tuple[TrialTask, TrialResult]]:
        if workers == 1 and self._settings.devices == 1:
            while (task := self._next()) is not None:
                yield task, task.run(self._source, shared, Direct(task=task, orders=orders))
            return
        setup = Setup(
            source=SourceAddress.of(self._source, self._parts.items),
            features=[PackedFeatures.of(shared)],
            threads=torch.get_num_threads(),
            on_gpu=resolve_device(self._settings.train.device).type != "cpu",
            environments=_environments(self._settings.devices),
        )
        yield from run_tasks(setup, orders, workers=workers)

    def _workers(self, missing: int) -> int:
        settings = self._settings
        if settings.workers is not None:
            return min(settings.workers, missing)
        if settings.devices > 1:
            return min(settings.devices, missing)
        return default_workers([HeadJob(run=Path(str(k)), train=settings.train) for k in range(missing)])

    def _share(self, workers: int) -> SharedFeatures:
        """The features of the search's items, decoded once; on the CPU where several GPUs read them."""
        config, device = self._settings.train, resolve_device(self._settings.train.device)
        if self._settings.devices > 1:
            device = torch.device("cpu")
        return share_features(self._source, [self._parts.partition], config, device=device, processes=workers)

    def _next(self) -> TrialTask | None:
        """The next trial, unless there are enough, the time is up, or all fail."""
        while len(self._ended) + len(self._trials) < self._settings.trials and not self._hopeless():
            if self._clock() >= self._deadline:
                self._timed_out = True
                return None
            trial = self._study.ask()
            chosen = self._settings.space.suggest(trial, self._settings.head)
            try:
                head, train = configs_of(chosen, self._settings.head, self._settings.train)
                check_sizes(head)
            except ConfigError as error:
                self._note(trial, chosen, TrialResult(state="failed", error=str(error)))
                continue
            self._trials[trial.number] = trial
            return TrialTask(number=trial.number, head=head, train=train, parts=self._parts, settings=chosen)
        return None

    def _judge(self, task: TrialTask, question: tuple[int, float]) -> bool:
        """Whether the trial should stop; not after its last epoch."""
        return self._study.judge(self._trials[task.number], *question) and question[0] < task.train.epochs

    def _note(self, trial: Any, chosen: Mapping[str, Any], result: TrialResult) -> None:
        """Write the line of a trial to the study and to trials.jsonl, and print it."""
        line: Line = {
            "number": trial.number,
            "state": result.state,
            "settings": dict(chosen),
            "validation_srcc": result.value,
            "epochs": len(result.curve),
            "curve": list(result.curve),
            "seconds": result.seconds,
            **({} if result.error is None else {"error": result.error}),
        }
        with telling_disk_errors(f"writing {self._out / STUDY}", KEPT):
            self._study.tell(trial, result, line)
        self._ended.append(line)
        self._write()
        assert self._watch is not None  # trials begin and end while it watches
        self._watch.ended(f"trial {trial.number}")
        best = best_of(self._ended)
        so_far = "" if best is None else f"; best so far {best['validation_srcc']:.4f} (trial {best['number']})"
        place = f"[{len(self._ended)}/{self._settings.trials}] trial {trial.number}"
        say(f"{place}: {_outcome_text(line)}{so_far}, {self._watch.left} left")

    def _write(self) -> None:
        """trials.jsonl as the study says: a kill may have come between the two."""
        lines = sorted(self._ended, key=lambda line: int(line["number"]))
        text = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        with telling_disk_errors(f"writing {self._out / TRIALS}", KEPT):
            write_text_atomically(self._out / TRIALS, text)

    def _hopeless(self) -> bool:
        return len(self._ended) >= _FAILURES_TO_STOP and all(line["state"] == "failed" for line in self._ended)


def _on_message(watch: SweepWatch, task: TrialTask, message: HeadState | str) -> None:
    if isinstance(message, HeadState):
        watch.running(f"trial {task.number}", message)
    else:
        say(message)


def _outcome_text(line: Line) -> str:
    if "error" in line:
        return f"failed ({line['error'].splitlines()[0]})"
    pruned = f", stopped after epoch {line['epochs']}" if line["state"] == "pruned" else ""
    return f"validation SRCC {line['validation_srcc']:.4f}{pruned}, {line['seconds']:.1f} s"


def _check(settings: SearchSettings) -> None:
    """Raise ConfigError for settings that a search cannot have."""
    check_optuna()
    check_precision(settings.train)
    if settings.trials < 1 or (settings.workers is not None and settings.workers < 1) or settings.devices < 1:
        counts = f"trials {settings.trials}, workers {settings.workers}, devices {settings.devices}"
        message = f"A search needs 1 or more of each: {counts}."
        raise ConfigError(message)
    if settings.devices > 1:
        found = torch.cuda.device_count() if resolve_device(settings.train.device).type == "cuda" else 0
        if found < settings.devices:
            message = f"--devices {settings.devices} needs as many GPUs, and torch finds {found} here."
            raise ConfigError(message)
        if settings.train.keep == "device":
            message = (
                "keep 'device' holds the features on one GPU. With several devices choose 'auto', 'ram' or 'memmap'."
            )
            raise ConfigError(message)


def _environments(devices: int) -> Sequence[Mapping[str, str]]:
    """The variables that show each worker one GPU."""
    if devices == 1:
        return ({},)
    visible = os.environ.get(_VISIBLE, "")
    names = [name.strip() for name in visible.split(",") if name.strip()] or [str(k) for k in range(devices)]
    return tuple({_VISIBLE: name} for name in names[:devices])


def _about(source: FeatureSource, parts: SearchParts, settings: SearchSettings) -> dict[str, Any]:
    return {
        "kind": "search",
        "store": {"id": source.id, "path": location_of(base_of(source))},
        "head": settings.head.model_dump(mode="json"),
        "train": settings.train.model_dump(mode="json"),
        "space": {f"space of {name}": values for name, values in settings.space.record().items()},
        "search": {"seed": settings.seed, "pruner": settings.pruner},
        **parts.record(source, settings.train.label),
    }


def _none_complete(lines: Sequence[Line], *, timed_out: bool) -> HeadError:
    errors = [line["error"].splitlines()[0] for line in lines if "error" in line]
    if timed_out and not errors:
        return HeadError("The time was up before a trial was complete. Raise --timeout, or lower `epochs`.")
    first = f" The first: {errors[0]}" if errors else ""
    return HeadError(f"None of {len(lines)} trials gave a head.{first}")
