"""One fit of one head: device, precision, random state, and the Lightning trainer around the learner."""

import logging
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from numpy.typing import NDArray

from agiqa.errors import ConfigError, DataError
from agiqa.heads.batches import batches_per_epoch
from agiqa.heads.config import HeadConfig, TrainConfig
from agiqa.heads.features import FeatureSet
from agiqa.heads.head import Head, build_head
from agiqa.heads.learner import Epoch, Learner
from agiqa.heads.losses import get_loss
from agiqa.heads.progress import TrainingProgress
from agiqa.heads.projection import FeatureSpec


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A trained head, with the weights of the chosen epoch, on the device that trained it, in evaluation mode."""

    head: Head
    curves: list[Epoch]
    epoch: int
    """The chosen epoch, from 1."""
    choice: str
    """How it was chosen, in words."""
    validation_predictions: NDArray[np.float64]


def fit_head(
    features: FeatureSet,
    spec: FeatureSpec,
    head_config: HeadConfig,
    config: TrainConfig,
    *,
    train: NDArray[np.int64],
    validation: NDArray[np.int64],
    epochs: int,
    stage: str,
    progress: TrainingProgress,
) -> Fit:
    """Train a fresh head on the positions `train` for `epochs`; the schedule is that of `config.epochs`.

    The features stay where they are kept; batches made elsewhere move to the device one by one.
    The caller's random state is left as it was. Raises HeadError when training diverges, DataError when all
    labels are equal, and what `build_head` raises.
    """
    device = resolve_device(config.device)
    labels = _training_labels(features, train)
    steps = epochs * batches_per_epoch(len(train), config.batch_size, smallest=get_loss(config.loss).smallest_batch)
    with _random_state(config.seed, device), _threads(config.threads):
        head = build_head(head_config, spec).to(device)
        head.calibrate(features.statistics(train), labels)
        learner = Learner(
            head,
            features,
            train,
            config,
            validation=validation,
            stage=stage,
            progress=progress,
        )
        progress.begin(stage, steps)
        try:
            with _quiet_lightning():
                _trainer(config, device, epochs=epochs, validate=len(validation) > 0).fit(learner)
        except SystemExit as stopped:  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from stopped
        finally:
            progress.end()
    head.load_state_dict(learner.best_weights)
    return Fit(
        head=head.to(device).eval(),
        curves=learner.curves,
        epoch=learner.best_epoch,
        choice=learner.choice,
        validation_predictions=learner.best_predictions,
    )


def resolve_device(device: str) -> torch.device:
    """The device of a setting. Raises ConfigError for cuda where there is none."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        message = "The device is set to 'cuda', and torch finds no CUDA device here. Use 'cpu' or 'auto'."
        raise ConfigError(message)
    return torch.device("cuda" if device != "cpu" and available else "cpu")


def _trainer(config: TrainConfig, device: torch.device, *, epochs: int, validate: bool) -> pl.Trainer:
    """A trainer that writes no files and draws no bars; one process, whatever scheduler it runs under."""
    return pl.Trainer(
        accelerator=device.type if device.type == "cpu" else "gpu",
        devices=1,
        plugins=[LightningEnvironment()],
        precision="bf16-mixed" if config.precision == "bf16" else "32-true",
        max_epochs=epochs,
        gradient_clip_val=config.gradient_clip,
        limit_val_batches=1.0 if validate else 0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def _training_labels(features: FeatureSet, train: NDArray[np.int64]) -> torch.Tensor:
    """The labels of these positions. Raises DataError when nothing can be learned from them."""
    if features.targets is None:
        message = "Training needs features that were read with a label."
        raise DataError(message)
    labels = features.targets[torch.from_numpy(train)]
    if labels.max() == labels.min():
        message = f"All {len(train)} training items have the label {float(labels[0])}: there is nothing to learn."
        raise DataError(message)
    return labels


@contextmanager
def _random_state(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Seed torch within, and give the caller's state back."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def _threads(threads: int | None) -> Generator[None, None, None]:
    """Set torch's CPU threads within."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _quiet_lightning() -> Generator[None, None, None]:
    """Hold back Lightning's notes on hardware, and its advice on settings that are meant as they are."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="GPU available but not used")
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        logger.setLevel(level)
