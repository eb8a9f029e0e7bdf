"""One trial of a search: a head trained on the training items, and judged by the validation items after every epoch.

A search never reads a test item: `SearchParts` does not hold the test part, so a trial cannot ask for its features or
labels.
"""

import hashlib
import math
import time
import traceback
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agiqa.errors import AgiqaError, ConfigError
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource, items_identity, location_of, read_labels
from agiqa.heads.data.keeping import SharedFeatures, keep_features
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY, Partition, make_partition
from agiqa.heads.model.pooling import check_roles
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.sweeps.head_jobs import with_notes
from agiqa.heads.sweeps.processes import Channel
from agiqa.heads.sweeps.watching import StateProgress
from agiqa.heads.training.curves import Epoch
from agiqa.heads.training.experiment import check_settings
from agiqa.heads.training.fitting import fit_head
from agiqa.progress import said_to

STAGE = "train"
_FEW = 100
"""With fewer validation items a warning says how little they tell."""


@dataclass(frozen=True, kw_only=True)
class SearchParts:
    """The items of a search: those that train and those that judge."""

    partition: Partition
    """With an empty test part."""
    tested: int
    """How many items the test part has, which the search does not read."""

    @classmethod
    def draw(cls, source: FeatureSource, config: TrainConfig) -> "SearchParts":
        """The parts of a training with `config`. Raises as `make_partition`, and ConfigError for too few items."""
        drawn = make_partition(source, config)
        count = len(drawn.validation)
        if count < FEWEST_TO_CHOOSE_BY:
            message = (
                f"{location_of(source)}: a search compares heads on validation items. There are {count}, and it needs "
                f"{FEWEST_TO_CHOOSE_BY}. Raise `validation` (now {config.validation:g}), or search on a larger store."
            )
            raise ConfigError(message)
        return cls(partition=replace(drawn, test=drawn.test[:0]), tested=len(drawn.test))

    @property
    def items(self) -> NDArray[np.int64]:
        """All items of the search, ascending."""
        return np.union1d(self.partition.train, self.partition.validation)

    def warnings(self) -> list[str]:
        """What a reader of the validation scores must know."""
        leak, count = self.partition.validation_leak, len(self.partition.validation)
        found: list[str] = []
        if count < _FEW:
            found.append(
                f"only {count} validation items compare the trials, so the best trial may be a lucky one. A larger "
                "share `validation` tells trials apart better."
            )
        if leak.same:
            found.append(
                f"{leak.same} of {count} validation items have a prompt that also occurs in training{leak.note()}: the "
                "search favours heads that know these prompts. The split 'grouped' holds out whole prompts."
            )
        return found

    def record(self, source: FeatureSource, label: str) -> dict[str, Any]:
        """Counts, and hashes of items and labels: what a search must find unchanged to go on."""
        parts = {"train": self.partition.train, "validation": self.partition.validation}
        return {
            "counts": {name: len(items) for name, items in parts.items()} | {"test, not read": self.tested},
            "items": {name: items_identity(source, items) for name, items in parts.items()},
            "labels": {
                name: hashlib.sha256(read_labels(source, items, label=label).tobytes()).hexdigest()
                for name, items in parts.items()
            },
        }


@dataclass(frozen=True, kw_only=True)
class TrialResult:
    """How a trial ended."""

    state: Literal["complete", "pruned", "failed"]
    curve: tuple[float | None, ...] = ()
    """Validation SRCC after each epoch; None where undefined."""
    value: float | None = None
    """The largest of `curve`, which chooses the epoch; None for a failed trial."""
    seconds: float = 0.0
    error: str | None = None
    sound: bool = True
    """Whether the process can be trusted with another trial: not after an error that torch or CUDA raised."""


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """A trial for `run_tasks`. It tells each HeadState, and asks after each epoch, by its number and validation SRCC,
    whether it should stop.
    """

    number: int
    """Of the trial in Optuna's study."""
    head: HeadConfig
    train: TrainConfig
    parts: SearchParts
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    """What the space chose, flat."""

    def run(self, source: FeatureSource, shared: SharedFeatures, channel: Channel, /) -> TrialResult:
        """Train and judge. Errors are returned as by a head of a sweep."""
        started, curve = time.monotonic(), list[float | None]()
        try:
            with said_to(lambda _line: None):
                self._fit(source, shared, _Judged(channel, self.train, curve))
        except _StoppedEarly:
            return _result("pruned", curve, started)
        except (AgiqaError, OSError) as error:
            return _result("failed", curve, started, error=with_notes(error))
        except (RuntimeError, MemoryError) as error:
            channel.tell(traceback.format_exc())
            return _result("failed", curve, started, error=f"{type(error).__name__}: {error}", sound=False)
        if all(value is None for value in curve):
            return _result("failed", curve, started, error="the validation SRCC was never defined")
        return _result("complete", curve, started)

    def lost(self, reason: str, /) -> TrialResult:
        """The result of a worker that died."""
        return TrialResult(state="failed", error=reason, sound=False)

    def spoils(self, answer: TrialResult, /) -> bool:
        """After an error of torch or CUDA."""
        return not answer.sound

    def _fit(self, source: FeatureSource, shared: SharedFeatures, progress: "_Judged") -> None:
        check_settings(source, self.head, self.train)
        features, label = self._features(source, shared), self.train.label
        train, validation = (
            LabelledItems.at(features, features.positions_of(items), label)
            for items in (self.parts.partition.train, self.parts.partition.validation)
        )
        check_roles(source, features.subset(features.positions_of(self.parts.items)), self.head.pooling)
        fit_head(
            features,
            FeatureSpec.of(source),
            self.head,
            self.train,
            train=train,
            validation=validation,
            epochs=self.train.epochs,
            stage=STAGE,
            progress=progress,
        )

    def _features(self, source: FeatureSource, shared: SharedFeatures) -> FeatureSet:
        """Those that the trials share, or the items of the search alone."""
        if shared.kept is not None:
            return shared.kept.features
        config = self.train
        if shared.memory is not None:
            config = config.model_copy(update={"memory": shared.memory})
        return keep_features(source, self.parts.items, config, device=resolve_device(config.device)).features


class _StoppedEarly(Exception):
    """The main process has decided to stop this trial."""


class _Judged(StateProgress):
    """Asks after each epoch whether to go on."""

    def __init__(self, channel: Channel, config: TrainConfig, curve: list[float | None]) -> None:
        super().__init__(lambda _line: None, channel.tell, config)
        self._channel, self._curve = channel, curve

    def epoch(self, epoch: Epoch) -> None:
        """Raise _StoppedEarly where the answer is to stop."""
        super().epoch(epoch)
        srcc = epoch.validation_srcc
        value = None if srcc is None or math.isnan(srcc) else srcc
        self._curve.append(value)
        if value is not None and self._channel.ask((epoch.epoch, value)):
            raise _StoppedEarly


def _result(
    state: Literal["complete", "pruned", "failed"],
    curve: list[float | None],
    started: float,
    *,
    error: str | None = None,
    sound: bool = True,
) -> TrialResult:
    defined = [value for value in curve if value is not None]
    return TrialResult(
        state=state,
        curve=tuple(curve),
        value=max(defined) if defined and state != "failed" else None,
        seconds=round(time.monotonic() - started, 3),
        error=error,
        sound=sound,
    )
