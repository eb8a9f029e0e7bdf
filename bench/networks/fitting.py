"""The training of one network: epochs, the choice of the epoch on validation items, and the state after each epoch.

Everything random in an epoch follows from the seed and the number of the epoch, so that a training that was killed and
goes on after a saved epoch ends with the same numbers (on a CPU to the last bit; sums on a GPU depend on its order).
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agiqa.bench.networks.architectures.contract import Network
from agiqa.bench.networks.config import NetworkConfig
from agiqa.bench.networks.crops import CropReader, Crops, Numbers, batch_count, batches, fixed_crops, random_crops
from agiqa.bench.networks.pictures import Squares
from agiqa.errors import HeadError
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY
from agiqa.heads.evaluation.metrics import score
from agiqa.heads.model.losses import get_loss
from agiqa.heads.training.curves import Epoch, Outcome

Array = NDArray[np.float64]
State = dict[str, Any]
_STAGE = "train"
_FIRST_EPOCH = 1
_TESTED_TOGETHER = 4
"""Batches of a test are so many times larger than those of training, since it keeps no gradients."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """The items of a training, as positions in the squares, with their MOS."""

    train: Numbers
    validation: Numbers
    mos: Array
    """By item of the data set; NaN for items of no part."""
    seed: int

    def scale(self) -> tuple[float, float]:
        """Mean and standard deviation of the MOS of the training items."""
        values = self.mos[self.train]
        return float(values.mean()), float(values.std()) or 1.0


@dataclass(kw_only=True)
class Progress:
    """What a training has come to: the part of its state that is not in the network and the optimiser."""

    curves: list[Epoch] = field(default_factory=list[Epoch])
    best_epoch: int = 0
    best_srcc: float = math.nan
    best_predictions: Array = field(default_factory=lambda: np.zeros(0))
    """(validation items,)."""
    best_weights: dict[str, Tensor] = field(default_factory=dict[str, Tensor])


class Trainer:
    """Trains one network on crops of squares."""

    def __init__(
        self, network: Network, squares: Squares, config: NetworkConfig, task: Task, *, device: torch.device
    ) -> None:
        """`network` begins with its weights; it is moved to `device`."""
        self.network = network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.progress = Progress()
        self._config, self._task, self._device = config, task, device
        self._reader = CropReader(squares, config, network, device)
        self._loss = get_loss(config.loss)
        self._optimizer = _optimizer(network, config, device)
        self._mean, self._sd = task.scale()
        self._steps = batch_count(len(task.train) * config.train_crops, config.batch_size)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return self._steps

    def state(self) -> State:
        """Everything to go on from, in tensors and plain values."""
        kept = self.progress
        return {
            "network": self.network.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            **self.outcome.record(),
            "best_srcc": kept.best_srcc,
            "best_weights": kept.best_weights,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        outcome = Outcome.from_record(state)
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(
            curves=outcome.curves,
            best_epoch=outcome.epoch,
            best_srcc=state["best_srcc"],
            best_predictions=outcome.validation_predictions[:, 0],
            best_weights={name: value.clone() for name, value in state["best_weights"].items()},
        )

    @property
    def outcome(self) -> Outcome:
        """The epochs so far, and the best of them."""
        kept = self.progress
        return Outcome(
            curves=kept.curves,
            epoch=kept.best_epoch,
            choice=self._choice(),
            validation_predictions=kept.best_predictions[:, None],
        )

    def train_epoch(self, on_step: Callable[[], None]) -> Epoch:
        """Train the next epoch, validate it, and keep its weights if it is the best. HeadError where it diverges."""
        started, number = time.perf_counter(), len(self.progress.curves) + 1
        config, alone = self._config, number <= self._config.alone_epochs
        generator = torch.Generator().manual_seed(_seed(self._task.seed, number))
        crops = random_crops(self._task.train, config, generator)
        torch.manual_seed(_seed(self._task.seed, number, 1))  # dropout
        self.network.train()
        for parameter in self.network.body.parameters():
            parameter.requires_grad_(not alone)
        if alone:
            self.network.body.eval()
        losses, lr = list[Tensor](), 0.0
        for place, chosen in enumerate(batches(len(crops), config.batch_size)):
            lr = self._set_lr(number, place, alone=alone)
            losses.append(self._step(crops.at(chosen)))
            on_step()
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            message = f"Training of {config.network} diverged: the loss of epoch {number} is {loss}. Lower --lr."
            raise HeadError(message)
        return self._close(number, loss, lr, started)

    def predict(self, items: Numbers) -> Array:
        """The MOS of items by the present weights, means over the test crops, on the scale of the MOS."""
        if not len(items):
            return np.zeros(0)
        self.network.eval()
        crops, scores = fixed_crops(items, self._config), list[Tensor]()
        with torch.inference_mode():
            for chosen in crops_at_once(len(crops), _TESTED_TOGETHER * self._config.batch_size):
                with self._autocast():
                    scores.append(self.network(self._reader.read(crops.at(chosen))).double())
        means = torch.cat(scores).cpu().numpy().reshape(len(items), -1).mean(axis=1)
        predicted: Array = means * self._sd + self._mean
        return predicted

    def load_best(self) -> None:
        """Give the network the weights of the chosen epoch."""
        self.network.load_state_dict(self.progress.best_weights)

    def _step(self, crops: Crops) -> Tensor:
        """One step; returns its loss."""
        targets = (self._task.mos[crops.images.numpy()] - self._mean) / self._sd
        wanted = torch.from_numpy(targets).float().to(self._device, non_blocking=True)
        with self._autocast():
            predicted = self.network(self._reader.read(crops))
        loss = self._loss(predicted.float(), wanted)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()
        return loss.detach()

    def _autocast(self) -> Any:
        by_default = "bf16" if self._device.type == "cuda" else "fp32"
        precision = by_default if self._config.precision == "auto" else self._config.precision
        return torch.autocast(self._device.type, torch.bfloat16) if precision == "bf16" else nullcontext()

    def _set_lr(self, epoch: int, step: int, *, alone: bool) -> float:
        """Set the learning rates of a step; returns that of the pretrained layers, or of the new ones alone."""
        config = self._config
        body, new = self._optimizer.param_groups
        if alone:
            body["lr"], new["lr"] = 0.0, config.alone_lr
            return config.alone_lr
        lr = config.lr * lr_factor(epoch - config.alone_epochs, step, self._steps, config)
        body["lr"], new["lr"] = lr, lr * config.new_lr_factor
        return lr

    def _close(self, number: int, loss: float, lr: float, started: float) -> Epoch:
        """Validate, add the epoch to the curves, and keep it if it is the best."""
        validation, kept = self._task.validation, self.progress
        predicted = self.predict(validation)
        found = score(predicted, self._task.mos[validation]) if len(validation) else {}
        epoch = Epoch(
            stage=_STAGE,
            epoch=number,
            lr=lr,
            train_loss=loss,
            validation_srcc=found.get("srcc"),
            validation_plcc=found.get("plcc"),
            validation_rmse=found.get("rmse"),
            seconds=time.perf_counter() - started,
        )
        kept.curves.append(epoch)
        srcc = found.get("srcc", math.nan)
        if self._chooses and not math.isnan(srcc):
            better = math.isnan(kept.best_srcc) or srcc > kept.best_srcc
        else:
            better = number == self._config.all_epochs and math.isnan(kept.best_srcc)
        if better:
            kept.best_epoch, kept.best_srcc = number, srcc if self._chooses else math.nan
            kept.best_predictions = predicted
            kept.best_weights = {
                name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()
            }
        return epoch

    @property
    def _chooses(self) -> bool:
        """Whether there are enough validation items to choose an epoch by."""
        return len(self._task.validation) >= FEWEST_TO_CHOOSE_BY

    def _choice(self) -> str:
        """How the kept epoch is chosen, for people."""
        if not len(self._task.validation):
            return "last epoch, as there are no validation items"
        if not self._chooses:
            return f"last epoch, as {len(self._task.validation)} validation items are too few to choose by"
        if math.isnan(self.progress.best_srcc):
            return "last epoch, as the validation SRCC was never defined"
        return "highest validation SRCC"


def lr_factor(epoch: int, step: int, steps: int, config: NetworkConfig) -> float:
    """The learning rate of a step (from 0) of an epoch (from 1) of `steps`, as a share of the peak."""
    done, total = (epoch - _FIRST_EPOCH) * steps + step, config.epochs * steps
    warmup = config.warmup * total
    if done < warmup:
        return (done + 1) / (warmup + 1)
    if config.schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * (done - warmup) / max(1.0, total - warmup)))
    if config.schedule == "steps":
        return config.decay ** ((epoch - _FIRST_EPOCH) // config.decay_epochs)
    return 1.0


def crops_at_once(count: int, size: int) -> list[Tensor]:
    """The places of `count` crops in batches of `size`, for a test."""
    return list(torch.arange(count).split(size))


def _optimizer(network: Network, config: NetworkConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of two groups: pretrained layers, then new ones."""
    new = [parameter for layer in network.new_layers for parameter in layer.parameters()]
    groups = [{"params": list(network.body.parameters())}, {"params": new}]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, weight_decay=config.weight_decay, fused=device.type == "cuda")


def _seed(*numbers: int) -> int:
    """A seed that follows from these numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
