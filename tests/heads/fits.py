"""Fits of heads without a run folder."""

from typing import Any

import numpy as np

from agiqa.heads import HeadConfig, LineProgress, TrainConfig
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.training.fitting import Fit, fit_head
from tests.heads.conftest import MemoryStore


def fit_everything(store: MemoryStore, config: TrainConfig, head: HeadConfig, **more: Any) -> tuple[FeatureSet, Fit]:
    """The features of every item, and a fit on them without validation; `more` are arguments of `fit_head`."""
    features = FeatureSet.from_store(store, range(len(store.features)))
    everything, nothing = (LabelledItems.at(features, np.arange(count), config.label) for count in (len(features), 0))
    return features, fit_head(
        features,
        FeatureSpec.of(store),
        head,
        config,
        train=everything,
        validation=nothing,
        epochs=config.epochs,
        stage="train",
        progress=LineProgress(lambda _: None),
        **more,
    )
