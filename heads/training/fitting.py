"""One fit of one head: device, precision, random state, and the Lightning trainer that runs the learner."""

import copy
import logging
import signal
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import dataclass

import lightning.pytorch as pl
import numpy as np
import torch
from jaxtyping import Float
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from numpy.typing import NDArray
from torch import Tensor

from agiqa.errors import DataError
from agiqa.heads.closed.combined import AnyHead, ResidualHead
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of
from agiqa.heads.data.scales import lines_between, scales_of
from agiqa.heads.data.soft_labels import grouping_variance, level_values, soft_labels
from agiqa.heads.evaluation.runs import Run
from agiqa.heads.model.encoders.kernels.cuda_graphs import training_kernels
from agiqa.heads.model.head import Head, build_head
from agiqa.heads.model.losses import readout_of
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import LIGHTNING_PRECISIONS, cpu_threads, random_state, resolve_device
from agiqa.heads.training.closed_base import ClosedBase, fit_base
from agiqa.heads.training.curves import Outcome
from agiqa.heads.training.learner import Learner, steps_per_epoch
from agiqa.heads.training.progress import EventLog, TrainingProgress
from agiqa.heads.training.resuming import StateFile, TrainingState
from agiqa.progress import say


@dataclass(frozen=True, kw_only=True)
class Fit(Outcome):
    """A trained head, with the weights of the chosen epoch, on the device that trained it, in evaluation mode."""

    head: AnyHead


def fit_head(
    features: FeatureSet,
    spec: FeatureSpec,
    head_config: HeadConfig,
    config: TrainConfig,
    *,
    train: LabelledItems,
    validation: LabelledItems,
    epochs: int,
    stage: str,
    progress: TrainingProgress,
    state: TrainingState | None = None,
    start: Run | None = None,
    test_scorer: Callable[[AnyHead], Mapping[str, float]] | None = None,
) -> Fit:
    """Train a head on the items `train` for `epochs`; the schedule is that of `config.epochs`.

    The head is a fresh one, calibrated on these items, or that of `start` (see experiment.py). `test_scorer` as of
    `Learner`. The features stay where they are kept; batches made elsewhere move to the device one by one. With
    `state` the fit continues from the saved epochs of this stage, and saves its own. The caller's random state is left
    as it was. Raises HeadError when training diverges, DataError when all items have the same value of a label, and as
    `build_head`.
    """
    device, base = resolve_device(config.device), None
    check_labels(features.source, train.labels, config)
    if head_config.init is not None:
        base = fit_base(features, head_config, config, train=train, validation=validation, device=device)
    with random_state(config.seed, device), cpu_threads(config.threads):
        head = build_head(head_config, spec, labels=len(config.labels), readout=readout_of(config)).to(device)
        _prepare(head, features, train, config, start, device, at_zero=base is not None)
        kept = None if state is None else state.begin(stage)
        per_epoch = steps_per_epoch(len(train), config)
        done = 0 if kept is None else len(kept["curves"])
        with _events(state, config, stage, after=None if kept is None else done * per_epoch) as events:
            learner = Learner(
                head,
                features,
                train,
                config,
                validation=validation,
                stage=stage,
                progress=progress,
                events=events,
                test_scorer=test_scorer if test_scorer is None or base is None else _adding(base, test_scorer),
                shares=begin_levels(head, features, train, config, fresh=start is None),
                base=base,
            )
            if kept is not None and kept["finished"]:
                learner.restore(kept)
            elif epochs:
                say(f"{head_config.encoder} on {device.type}: {training_kernels(head.encoder, config, device)}")
                progress.begin(stage, epochs=epochs, steps=per_epoch, done=done)
                try:
                    _run(learner, config, device, epochs=epochs, state=state, resumed=kept is not None)
                finally:
                    learner.drop_graphs()
                    progress.end()
    return _best(learner, config, base, device)


def _best(learner: Learner, config: TrainConfig, base: ClosedBase | None, device: torch.device) -> Fit:
    """The head with the weights of the kept epoch; with `base` it adds the residual to that."""
    head = copy.deepcopy(learner.head) if config.compile else learner.head  # a copy is as before torch.compile
    head.load_state_dict(learner.best.weights)
    found: AnyHead = head if base is None else ResidualHead(base.closed, head)
    return Fit(head=found.to(device).eval(), **vars(learner.outcome))


def _prepare(
    head: Head,
    features: FeatureSet,
    train: LabelledItems,
    config: TrainConfig,
    start: Run | None,
    device: torch.device,
    *,
    at_zero: bool,
) -> None:
    """Give a new head its constants, or the weights of `start`; `at_zero` for one that learns a residual."""
    if start is not None:
        start.give_weights(head)
        head.regressor.rescale(lines_between(start.scales, scales_of(features.source, config.labels)))
        return
    head.standardise(features.statistics(train.positions, device=device), train.labels)
    if at_zero:
        head.regressor.start_at_zero()


def _events(
    state: TrainingState | None, config: TrainConfig, stage: str, *, after: int | None
) -> AbstractContextManager[EventLog | None]:
    """The event log of a stage, continued `after` a step; None where there is none to write."""
    if state is None or not config.tensorboard:
        return nullcontext()
    return closing(state.events(stage, after=after))


def _adding(
    base: ClosedBase, scorer: Callable[[AnyHead], Mapping[str, float]]
) -> Callable[[Head], Mapping[str, float]]:
    """`scorer` of a network and the closed form whose residual it learns."""
    return lambda network: scorer(ResidualHead(base.closed, network))


def begin_levels(
    head: Head, features: FeatureSet, train: LabelledItems, config: TrainConfig, *, fresh: bool
) -> NDArray[np.float64] | None:
    """The soft labels of the items `train`, (items, labels, 5); None for a head without levels.

    A `fresh` head takes its levels from the scale of the labels, and begins at their shares. Raises as `soft_labels`.
    """
    readout = head.regressor.levels
    if readout is None:
        return None
    items, labels = features.items[train.positions], train.labels.numpy()
    levels = readout.levels.double().cpu().numpy()
    if fresh:
        levels = level_values(scales_of(features.source, config.labels), labels)
    shares = soft_labels(features.source, items, labels, config, levels)
    if fresh:
        rounded = config.soft_labels == "gaussian"
        grouping = grouping_variance(levels) if rounded else np.zeros(len(levels))
        readout.begin(*(torch.from_numpy(values) for values in (levels, grouping, shares.mean(axis=0))))
    return shares


def _run(
    learner: Learner,
    config: TrainConfig,
    device: torch.device,
    *,
    epochs: int,
    state: TrainingState | None,
    resumed: bool,
) -> None:
    """Train up to `epochs`, from the checkpoint of `state` if `resumed`. Signals raise what Python raises."""
    try:
        with _quiet_lightning():
            trainer = _trainer(learner, config, device, epochs=epochs, state=state)
            trainer.fit(learner, ckpt_path=state.path if state is not None and resumed else None)
    except SIGTERMException as stopped:
        raise SystemExit(128 + signal.SIGTERM) from stopped
    except SystemExit as stopped:  # what Lightning makes of Ctrl-C
        raise KeyboardInterrupt from stopped


def _trainer(
    learner: Learner, config: TrainConfig, device: torch.device, *, epochs: int, state: TrainingState | None
) -> pl.Trainer:
    """A trainer of one process under any scheduler, which writes nothing but the checkpoints of `state`."""
    return pl.Trainer(
        accelerator=device.type if device.type == "cpu" else "gpu",
        devices=1,
        plugins=[LightningEnvironment(), StateFile()],
        callbacks=[] if state is None else [state],
        precision=LIGHTNING_PRECISIONS[config.precision],
        max_epochs=epochs,
        gradient_clip_val=config.gradient_clip,
        limit_val_batches=1.0 if learner.validates else 0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=state is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def check_labels(source: FeatureSource, labels: Float[Tensor, "items label"], config: TrainConfig) -> None:
    """Raise DataError when nothing can be learned from these labels of training items of `source`."""
    names, where = config.labels, location_of(source)
    if labels.shape[1] != len(names):
        message = f"Training on the label {config.label!r} needs {len(names)} per item, and has {labels.shape[1]}."
        raise DataError(message)
    if len(labels) == 1:
        message = (
            f"{where}: the training part is a single item: there is nothing to learn. Change the split, `validation` "
            "or `training_items`."
        )
        raise DataError(message)
    for name, values in zip(names, labels.unbind(1), strict=True):
        column = values[~values.isnan()]
        if not len(column):
            message = f"{where}: none of {len(labels)} training items has a {name} MOS. Leave the label out."
            raise DataError(message)
        if column.max() == column.min():
            which = "label" if len(names) == 1 else f"{name} label"
            message = (
                f"{where}: all {len(column)} training items have the {which} {float(column[0])}: there is nothing to "
                "learn. Change the split, train on more items, or another label."
            )
            raise DataError(message)


@contextmanager
def _quiet_lightning() -> Generator[None, None, None]:
    """Silence Lightning's notes on hardware, and its advice on settings that are intended."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="GPU available but not used")
            # gradient scaling skips the steps that overflow, also the first
            warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler\.step\(\)` before")
            warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated")
            yield
    finally:
        logger.setLevel(level)
