"""How long a search will take: a few steps of every encoder of the space, timed on items of the store."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource
from agiqa.heads.data.variants import as_variant
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.model.reading import features_for
from agiqa.heads.searching.folder import configs_of
from agiqa.heads.searching.search import SearchSettings, slow_encoders
from agiqa.heads.searching.space import Choice
from agiqa.heads.searching.trials import SearchParts
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.sweeps.head_jobs import HeadJob
from agiqa.heads.sweeps.sweeping import default_workers
from agiqa.heads.training.fitting import fit_head
from agiqa.heads.training.learner import steps_per_epoch
from agiqa.heads.training.progress import LineProgress
from agiqa.progress import Clock, said_to, track

_STEPS = (1, 4)
"""Two fits of so many steps each; their difference leaves out what a fit does once."""
_SHARE_OF_A_STEP = 0.4
"""Time of predicting an item of the validation part, as a share of training with it: no backward pass, no optimiser."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The expected time of a search."""

    seconds_per_trial: dict[str, float]
    """By encoder, unpruned, with the middle of the space in all other settings."""
    reading: float
    """Seconds to decode the features once."""
    trials: int
    workers: int
    warnings: Sequence[str]

    @property
    def seconds(self) -> float:
        """Of all trials, if each encoder has its share of them and none is stopped early."""
        mean = sum(self.seconds_per_trial.values()) / len(self.seconds_per_trial)
        return self.reading + mean * self.trials / self.workers


def estimate_search(source: FeatureSource, settings: SearchSettings, *, clock: Clock = time.perf_counter) -> Estimate:
    """Time some steps of each encoder on training items. Writes nothing; raises as `SearchParts.draw`."""
    source = features_for(as_variant(source, settings.train.variant), settings.head, settings.train.layer)
    parts = SearchParts.draw(source, settings.train)
    train = parts.partition.train
    wanted = min(len(train), _STEPS[-1] * settings.train.batch_size)
    chosen = np.sort(np.random.default_rng(settings.seed).permutation(train)[:wanted])
    started = clock()
    features = FeatureSet.from_store(source, chosen)
    reading = (clock() - started) / wanted * len(parts.items)
    varied = settings.space.settings.get("encoder")
    encoders = varied.values if isinstance(varied, Choice) else (settings.head.encoder,)
    seconds: dict[str, float] = {}
    with track("estimate", len(encoders), "encoders") as advance:
        for name in encoders:
            head, config = _middle(settings, name)
            seconds[name] = _seconds_per_trial(features, head, config, parts, clock)
            advance(1)
    workers = settings.workers or (
        settings.devices
        if settings.devices > 1
        else default_workers([HeadJob(run=Path(str(k)), train=settings.train) for k in range(settings.trials)])
    )
    return Estimate(
        seconds_per_trial=seconds,
        reading=reading,
        trials=settings.trials,
        workers=min(workers, settings.trials),
        warnings=slow_encoders(settings),
    )


def _middle(settings: SearchSettings, encoder: str) -> tuple[HeadConfig, TrainConfig]:
    """The configs in the middle of the space."""
    chosen = {
        name: values.values[len(values.values) // 2] if isinstance(values, Choice) else values.middle
        for name, values in settings.space.settings.items()
        if not name.startswith("loss.") and name != "encoder"
    }
    return configs_of({**chosen, "encoder": encoder}, settings.head, settings.train)


def _seconds_per_trial(
    features: FeatureSet, head: HeadConfig, config: TrainConfig, parts: SearchParts, clock: Clock
) -> float:
    """Seconds of a trial that is not stopped early."""
    times: list[float] = []
    steps: list[int] = []
    for count in _STEPS:
        items = np.arange(min(len(features), count * config.batch_size))
        labelled = LabelledItems.at(features, items, config.label)
        nothing = LabelledItems.at(features, items[:0], config.label)
        started = clock()
        with said_to(lambda _line: None):
            fit_head(
                features,
                FeatureSpec.of(features.source),
                head,
                config.model_copy(update={"epochs": 1}),
                train=labelled,
                validation=nothing,
                epochs=1,
                stage="estimate",
                progress=LineProgress(lambda _line: None),
            )
        times.append(clock() - started)
        steps.append(steps_per_epoch(len(items), config))
    few, many = times
    per_step = (many - few) / (steps[1] - steps[0]) if steps[1] > steps[0] and many > few else many / steps[1]
    train, validation = len(parts.partition.train), len(parts.partition.validation)
    per_epoch = per_step * (steps_per_epoch(train, config) + _SHARE_OF_A_STEP * validation / config.batch_size)
    return few + per_epoch * config.epochs
