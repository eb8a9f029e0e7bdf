"""The Lightning module of a training: steps, schedule, and the choice of the epoch by validation SRCC.

With several labels, loss and validation SRCC are means over them; a mean is undefined where one of its numbers is.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from agiqa.errors import HeadError
from agiqa.heads.data.batches import Batch, BatchLoader, LabelledItems, batches_per_epoch
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY, calibration_mask
from agiqa.heads.data.weights import item_weights
from agiqa.heads.evaluation.metrics import score
from agiqa.heads.model.encoders.kernels.cuda_graphs import training_pass
from agiqa.heads.model.head import Head
from agiqa.heads.model.losses import check_loss, get_loss
from agiqa.heads.settings.config import TrainConfig
from agiqa.heads.settings.labels import labelled_pairs
from agiqa.heads.training.closed_base import ClosedBase
from agiqa.heads.training.curves import Epoch, Outcome
from agiqa.heads.training.progress import EventLog, TrainingProgress
from agiqa.heads.training.schedule import ema_decay, lr_factor, newest_share

LEARNER = "agiqa"
"""The key of the learner's own record in a checkpoint of Lightning."""


@dataclass(frozen=True, kw_only=True)
class BestEpoch:
    """What is kept of the best epoch so far."""

    epoch: int = 0
    srcc: float = math.nan
    """Of the validation items, or NaN where it is undefined or they are too few to choose by."""
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    predictions: NDArray[np.float64]
    """Of the validation items, (items, labels), and so are the spreads."""
    spreads: NDArray[np.float64] | None = None


class Learner(pl.LightningModule):
    """Trains a head on some items of a FeatureSet, and keeps the weights of the best epoch so far."""

    def __init__(
        self,
        head: Head,
        features: FeatureSet,
        items: LabelledItems,
        config: TrainConfig,
        *,
        validation: LabelledItems,
        stage: str,
        progress: TrainingProgress,
        events: EventLog | None = None,
        test_scorer: Callable[[Head], Mapping[str, float]] | None = None,
        shares: NDArray[np.float64] | None = None,
        base: ClosedBase | None = None,
    ) -> None:
        """Without FEWEST_TO_CHOOSE_BY validation items the last epoch is the best, or `base` alone if there are some.

        The head learns the residual of `base`, if there is one. `base` alone is then epoch 0, one of those to choose.
        `test_scorer` scores the head after every epoch; its scores go into the curves and are not used for selection.
        `shares` are the soft labels of `items`, (items, labels, 5), for a loss that reads them.

        Raises UnknownName or ConfigError for the loss, as `check_loss`, and DataError as `item_weights`.
        """
        super().__init__()
        check_loss(config)
        self.head = head
        self.curves: list[Epoch] = []
        labels = len(config.labels)
        self.best = BestEpoch(predictions=np.full((len(validation), labels), math.nan))
        self.finished = False
        self._features = features
        self._items = items
        self._config = config
        self._validation = validation
        self._choosing = ~calibration_mask(features.source, features.items[validation.positions], config)
        self._stage = stage
        self._progress = progress
        self._loss = get_loss(config.loss)
        self._losses: list[Tensor] = []
        self._predicted: NDArray[np.float64] = np.full((len(features), labels), math.nan)
        self._spreads: NDArray[np.float64] | None = None
        self._shares = None if shares is None else _by_position(features, items, shares)
        self._average: AveragedModel | None = None
        if config.ema is not None:
            self._average = AveragedModel(head)
            self._decay = ema_decay(config.ema, config.epochs * steps_per_epoch(len(items), config))
        self._encode: Callable[[Tensor, Tensor], Tensor] | None = None
        self._events = events
        self._test_scorer = test_scorer
        self._random: Mapping[str, Tensor] = {}
        self._lr = 0.0
        self._started = 0.0
        self._gaps = bool(items.labels.isnan().any())
        self._weights = _weights_by_position(features, items, config)
        self._base = base
        if base is not None:
            self._predicted[:] = base.offsets.numpy()
            self._keep(0, self._validation_metrics().get("srcc"))

    @property
    def validates(self) -> bool:
        """Whether there are validation items."""
        return len(self._validation) > 0

    @property
    def chooses(self) -> bool:
        """Whether there are enough validation items to choose an epoch by."""
        return int(self._choosing.sum()) >= FEWEST_TO_CHOOSE_BY

    def train_dataloader(self) -> BatchLoader:
        """The batches of the present epoch, as large as the loss needs them; Lightning asks anew every epoch."""
        return BatchLoader(
            self._features,
            self._items,
            batch_size=self._config.batch_size,
            order=(self._config.seed, self.current_epoch),
            smallest=self._loss.smallest_batch,
        )

    def val_dataloader(self) -> BatchLoader:
        """The validation items, sorted by length."""
        return BatchLoader(self._features, self._validation, batch_size=self._config.batch_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's hook for batches of a class of ours."""
        del dataloader_idx
        return batch.to(device)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW, with the projection's own step size, and the schedule by step."""
        config, projection = self._config, self.head.projection
        projected = {id(parameter) for parameter in projection.parameters()}
        rest = [parameter for parameter in self.head.parameters() if id(parameter) not in projected]
        own_lr = config.projection_lr or config.lr * projection.lr_scale
        groups = [
            {"params": rest, "lr": config.lr},
            {"params": list(projection.parameters()), "lr": own_lr},
        ]
        # in fp16 the fused optimiser would unscale the gradients itself, too late to clip them
        fused = self.device.type == "cuda" and config.precision != "fp16"
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=fused)
        steps = config.epochs * steps_per_epoch(len(self._items), config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of all gradients; Lightning itself refuses to with a fused optimiser in any mixed precision."""
        if self._config.precision == "fp16":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val is not None:
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), gradient_clip_val)

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's losses."""
        self._losses = []
        self._started = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        del batch_idx
        if batch.targets is None:
            message = "Training needs batches with labels."
            raise HeadError(message)
        regressor = self.head.regressor
        outputs = regressor.outputs(self.head.pooled(*batch.inputs, encode=self._encode))
        predicted, _ = regressor.moments(outputs)
        predicted = predicted if self._base is None else predicted + self._base.at(batch.positions)
        loss = self._loss.over_labels(
            regressor.scaled(predicted),
            regressor.scaled(batch.targets),
            distribution=regressor.distribution(outputs),
            shares=None if self._shares is None else self._shares[batch.positions],
            weights=None if self._weights is None else self._weights[batch.positions],
            gaps=self._gaps,
        )
        self._losses.append(loss.detach())
        self._lr = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_start(self) -> None:
        """Choose the kernels of the encoder's steps, and restore the random state of a resumed training."""
        self._encode = training_pass(self.head.encoder, self._config, self.device)
        self._shares = None if self._shares is None else self._shares.to(self.device)
        self._weights = None if self._weights is None else self._weights.to(self.device)
        if self._average is not None:
            # read at every step, which must not wait for the GPU
            self._average.n_averaged = self._average.n_averaged.cpu()
        if self._random:
            torch.set_rng_state(self._random["cpu"])
            if self.device.type == "cuda" and "cuda" in self._random:
                torch.cuda.set_rng_state(self._random["cuda"], self.device)
            self._random = {}

    def drop_graphs(self) -> None:
        """Free the CUDA graphs and their memory, since the trainer may keep this learner alive for long."""
        self._encode = None

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the best epoch so far, the curves and the random state: see `restore`."""
        random = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint[LEARNER] = {
            **self.outcome.record(),
            "best_srcc": self.best.srcc,
            "best_weights": self.best.weights,
            "random": random,
            "finished": self.finished,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Lightning's hook; Lightning itself restores weights, averages, optimiser and schedule."""
        self.restore(checkpoint[LEARNER])

    def restore(self, record: Mapping[str, Any]) -> None:
        """Continue from the record that `on_save_checkpoint` added."""
        outcome = Outcome.from_record(record)
        self.curves = outcome.curves
        self.best = BestEpoch(
            epoch=outcome.epoch,
            srcc=record["best_srcc"],
            weights={name: value.clone() for name, value in record["best_weights"].items()},
            predictions=outcome.validation_predictions,
            spreads=outcome.validation_spreads,
        )
        self.finished = record["finished"]
        self._random = record["random"]

    @property
    def _kept(self) -> Head:
        """The weights that are validated and kept: the moving average, or those of the last step."""
        return self.head if self._average is None else cast("Head", self._average.module)

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Update the average and the progress."""
        del outputs, batch, batch_idx
        if self._average is not None:
            self._move(self._average)
        if self._events is not None:
            self._events.step(self.trainer.global_step, self._losses[-1], self._lr)
        self._progress.step()

    def _move(self, average: AveragedModel) -> None:
        """Move the average towards the head. `average.update_parameters` would also copy all constants, even W_lm."""
        averaged, present = ([value.detach() for value in part.parameters()] for part in (average.module, self.head))
        average.n_averaged += 1
        share = newest_share(self._decay, int(average.n_averaged))
        get_ema_multi_avg_fn(1.0 - share)(averaged, present, average.n_averaged)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the predictions of one batch."""
        del batch_idx
        # compiling the head once more, without gradients, never pays
        with torch.compiler.set_stance("force_eager"):
            predicted, spreads = self._kept.moments(*batch.inputs)
        positions, values = batch.positions.cpu().numpy(), predicted.double().cpu().numpy()
        self._predicted[positions] = values if self._base is None else values + self._base.offsets.numpy()[positions]
        if spreads is not None:
            if self._spreads is None:
                self._spreads = np.full_like(self._predicted, math.nan)
            self._spreads[positions] = spreads.double().cpu().numpy()
        self._progress.validated()

    def on_train_epoch_end(self) -> None:
        """Close the epoch: add a row to the curves, keep the best weights, and stop where `patience` says so.

        Raises HeadError when the loss is not finite.
        """
        number = self.current_epoch + 1
        loss = float(torch.stack(self._losses).mean())
        if not math.isfinite(loss):
            message = f"Training diverged: the loss of epoch {number} is {loss}. Lower lr (now {self._config.lr})."
            raise HeadError(message)
        metrics = self._validation_metrics()
        srcc, seconds = metrics.get("srcc"), time.perf_counter() - self._started
        epoch = Epoch(
            stage=self._stage,
            epoch=number,
            lr=self._lr,
            train_loss=loss,
            validation_srcc=srcc,
            validation_plcc=metrics.get("plcc"),
            validation_rmse=metrics.get("rmse"),
            seconds=seconds,
            test={} if self._test_scorer is None else self._test_scorer(self._kept),
        )
        self.curves.append(epoch)
        self._progress.epoch(epoch)
        if self._events is not None:
            self._events.epoch(self.trainer.global_step, epoch)
        self._keep_best(number, srcc)
        patience = self._config.patience
        if patience is not None and self.chooses and number - self.best.epoch >= patience:
            self.trainer.should_stop = True
        self.finished = self.trainer.should_stop or number == self.trainer.max_epochs

    @property
    def outcome(self) -> Outcome:
        """The epochs so far, and the best of them."""
        return Outcome(
            curves=self.curves,
            epoch=self.best.epoch,
            choice=self.choice,
            validation_predictions=self.best.predictions,
            validation_spreads=self.best.spreads,
        )

    @property
    def choice(self) -> str:
        """How the kept epoch was chosen, for people."""
        if not self.validates:
            return "last epoch, as there are no validation items"
        kept = "last epoch" if self._base is None else "closed form of `init` alone"
        if not self.chooses:
            return f"{kept}, as {self._choosing.sum()} validation items are too few to choose by"
        labels = self._config.labels
        what = "validation SRCC" if len(labels) == 1 else f"mean validation SRCC of {', '.join(labels)}"
        if math.isnan(self.best.srcc):
            return f"{kept}, as the {what} was never defined"
        return f"highest {what}"

    def _validation_metrics(self) -> dict[str, float]:
        """The metrics of this epoch's validation predictions, means over labels; none without validation items."""
        if not self.validates:
            return {}
        predicted = self._predicted[self._validation.positions][self._choosing]
        labels = self._validation.labels.numpy()[self._choosing]
        scores = [score(*pair) for pair in labelled_pairs(predicted, labels)]
        return {name: float(np.mean([one[name] for one in scores])) for name in scores[0]}

    def _keep_best(self, number: int, srcc: float | None) -> None:
        """Copy weights and predictions of an epoch better than the kept one; any epoch beats an undefined SRCC.

        Where there are too few validation items to choose by, the last epoch is kept, or `base` alone.
        """
        if srcc is None or not self.chooses:
            better = number == self.trainer.max_epochs and (self._base is None or not self.validates)
        else:
            better = math.isnan(self.best.srcc) or srcc > self.best.srcc
        if better:
            self._keep(number, srcc)

    def _keep(self, number: int, srcc: float | None) -> None:
        """Copy weights and predictions of epoch `number`, whose validation SRCC is `srcc`."""
        positions = self._validation.positions
        self.best = BestEpoch(
            epoch=number,
            srcc=math.nan if srcc is None or not self.chooses else srcc,
            weights={name: value.detach().cpu().clone() for name, value in self._kept.state_dict().items()},
            predictions=self._predicted[positions].copy(),
            spreads=None if self._spreads is None else self._spreads[positions].copy(),
        )


def _by_position(features: FeatureSet, items: LabelledItems, values: NDArray[np.float64]) -> Tensor:
    """The soft labels or weights of `items` at their positions in `features`, NaN elsewhere, float32."""
    found = torch.full((len(features), *values.shape[1:]), math.nan)
    found[torch.from_numpy(items.positions)] = torch.from_numpy(values).float()
    return found


def _weights_by_position(features: FeatureSet, items: LabelledItems, config: TrainConfig) -> Tensor | None:
    """The weights of `items` at their positions in `features`; None for equal ones. Raises as `item_weights`."""
    if config.weights == "equal":
        return None
    weights = item_weights(features.source, features.items[items.positions], items.labels.numpy(), config)
    return _by_position(features, items, weights)


def steps_per_epoch(items: int, config: TrainConfig) -> int:
    """Optimiser steps of one pass over so many training items."""
    return batches_per_epoch(items, config.batch_size, smallest=get_loss(config.loss).smallest_batch)
