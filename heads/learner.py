"""The Lightning side of training: steps, schedule, and the choice of the epoch by validation SRCC."""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from numpy.typing import NDArray
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from agiqa.errors import HeadError
from agiqa.heads.batches import Batch, BatchLoader, batches_per_epoch
from agiqa.heads.config import TrainConfig
from agiqa.heads.features import FeatureSet
from agiqa.heads.head import Head
from agiqa.heads.losses import check_loss, get_loss
from agiqa.heads.metrics import score
from agiqa.heads.progress import TrainingProgress


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """One row of the curves. Losses are in the scale of the loss, RMSE in the unit of the labels."""

    stage: str
    epoch: int
    """From 1."""
    lr: float
    """Of the last step, before the projection's own scale."""
    train_loss: float
    validation_srcc: float | None
    """None without validation items, NaN where it is not defined."""
    validation_plcc: float | None
    validation_rmse: float | None
    seconds: float

    def line(self) -> str:
        """The epoch in one line for people."""
        text = f"epoch {self.epoch}: loss {self.train_loss:.4f}"
        if self.validation_srcc is not None and self.validation_plcc is not None:
            text += f", validation SRCC {self.validation_srcc:.4f} PLCC {self.validation_plcc:.4f}"
        return f"{text}, {self.seconds:.1f} s"

    def row(self) -> dict[str, Any]:
        """The columns of curves.csv."""
        return asdict(self)


class Learner(pl.LightningModule):
    """Trains a head on some positions of a FeatureSet, and keeps the weights of the best epoch so far."""

    def __init__(
        self,
        head: Head,
        features: FeatureSet,
        positions: NDArray[np.int64],
        config: TrainConfig,
        *,
        validation: NDArray[np.int64],
        stage: str,
        progress: TrainingProgress,
    ) -> None:
        """`validation` are positions too, possibly none: then the last epoch is the best.

        Raises UnknownName or ConfigError for the loss, as `check_loss`.
        """
        super().__init__()
        check_loss(config)
        self.head = head
        self.curves: list[Epoch] = []
        self.best_epoch = 0
        self.best_weights: dict[str, Tensor] = {}
        self.best_predictions: NDArray[np.float64] = np.full(len(validation), math.nan)
        self._best_srcc = math.nan
        self._features = features
        self._positions = positions
        self._config = config
        self._validation = validation
        self._stage = stage
        self._progress = progress
        self._loss = get_loss(config.loss)
        self._losses: list[Tensor] = []
        self._predicted: NDArray[np.float64] = np.full(len(features), math.nan)
        self._average: AveragedModel | None = None
        self._lr = 0.0
        self._started = 0.0

    def train_dataloader(self) -> BatchLoader:
        """The batches of the present epoch, as large as the loss needs them; Lightning asks anew every epoch."""
        return BatchLoader(
            self._features,
            self._positions,
            batch_size=self._config.batch_size,
            order=(self._config.seed, self.current_epoch),
            smallest=self._loss.smallest_batch,
        )

    def val_dataloader(self) -> BatchLoader:
        """The validation items, sorted by length."""
        return BatchLoader(self._features, self._validation, batch_size=self._config.batch_size)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Lightning's hook for batches that it does not know."""
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
        optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
        per_epoch = batches_per_epoch(len(self._positions), config.batch_size, smallest=self._loss.smallest_batch)
        steps = config.epochs * per_epoch
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_epoch_start(self) -> None:
        """Forget the last epoch's losses."""
        self._losses = []
        self._started = time.perf_counter()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss of one batch."""
        del batch_idx
        if batch.targets is None:
            message = "Training needs a FeatureSet that was read with a label."
            raise HeadError(message)
        scaled = self.head.regressor.scaled
        loss = self._loss(scaled(self.head(*batch.inputs)), scaled(batch.targets))
        self._losses.append(loss.detach())
        self._lr = float(self.trainer.optimizers[0].param_groups[0]["lr"])
        return loss

    def on_train_start(self) -> None:
        """Start the average at the first weights, where one is wanted."""
        if self._config.ema is not None:
            self._average = AveragedModel(self.head, multi_avg_fn=get_ema_multi_avg_fn(self._config.ema))

    @property
    def _kept(self) -> torch.nn.Module:
        """The weights that are validated and kept: the moving average, or those of the last step."""
        return self.head if self._average is None else self._average.module

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Move the average and the progress."""
        del outputs, batch, batch_idx
        if self._average is not None:
            self._average.update_parameters(self.head)
        self._progress.step()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep the predictions of one batch."""
        del batch_idx
        predicted = self._kept(*batch.inputs).double().cpu().numpy()
        self._predicted[batch.positions.cpu().numpy()] = predicted

    def on_train_epoch_end(self) -> None:
        """Close the epoch: one row of the curves, the best weights, and the word of patience.

        Raises HeadError when the loss is not finite.
        """
        number = self.current_epoch + 1
        loss = float(torch.stack(self._losses).mean())
        if not math.isfinite(loss):
            message = f"Training diverged: the loss of epoch {number} is {loss}. Lower lr (now {self._config.lr})."
            raise HeadError(message)
        metrics = self._validation_metrics()
        srcc = metrics.get("srcc")
        epoch = Epoch(
            stage=self._stage,
            epoch=number,
            lr=self._lr,
            train_loss=loss,
            validation_srcc=srcc,
            validation_plcc=metrics.get("plcc"),
            validation_rmse=metrics.get("rmse"),
            seconds=time.perf_counter() - self._started,
        )
        self.curves.append(epoch)
        self._progress.epoch(epoch.line())
        self._keep_best(number, srcc)
        patience = self._config.patience
        if patience is not None and srcc is not None and number - self.best_epoch >= patience:
            self.trainer.should_stop = True

    @property
    def choice(self) -> str:
        """How the kept epoch was chosen, in words."""
        if not len(self._validation):
            return "last epoch, as there are no validation items"
        if math.isnan(self._best_srcc):
            return "last epoch, as the validation SRCC was never defined"
        return "highest validation SRCC"

    def _validation_metrics(self) -> dict[str, float]:
        """The metrics of this epoch's validation predictions; none without validation items."""
        if not len(self._validation) or self._features.targets is None:
            return {}
        return score(self._predicted[self._validation], self._features.targets.numpy()[self._validation])

    def _keep_best(self, number: int, srcc: float | None) -> None:
        """Copy weights and predictions of an epoch that beats the kept one; an undefined SRCC is beaten by any."""
        if srcc is None:
            better = number == self.trainer.max_epochs
        else:
            better = math.isnan(self._best_srcc) or srcc > self._best_srcc
        if not better:
            return
        self._best_srcc = math.nan if srcc is None else srcc
        self.best_epoch = number
        self.best_predictions = self._predicted[self._validation].copy()
        self.best_weights = {name: value.detach().cpu().clone() for name, value in self._kept.state_dict().items()}


def lr_factor(step: int, steps: int, config: TrainConfig) -> float:
    """The learning rate of a step as a share of its peak: linear warm-up, then cosine to 0 or constant."""
    rise = math.ceil(config.warmup * steps)
    if step < rise:
        return (step + 1) / (rise + 1)
    if config.schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))
