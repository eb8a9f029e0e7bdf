"""The training loop: steps, validations, checkpoints, and the best adapter."""

import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agiqa.errors import ModelError, first_line, listed
from agiqa.extract.data.items import Item
from agiqa.extract.models.batches import is_out_of_memory
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.preparing import Preparation
from agiqa.extract.tuning.adapting import Trained
from agiqa.extract.tuning.examples import Example, example_of
from agiqa.extract.tuning.folder import AdapterFolder
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.losses import computing, summed_loss, validation_sums
from agiqa.extract.tuning.reporting import Reporter
from agiqa.extract.tuning.schedule import Schedule

_SUMS = 3
"""Loss, right words and labels of a validation."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """The items of a training, and the labels and tokens of each."""

    train: Sequence[Item]
    validation: Sequence[Item]
    labels: Sequence[int]
    """Of `train`."""
    tokens: Sequence[int]
    """Of `train`."""


@dataclass
class Standing:
    """How far a training is; saved with each checkpoint."""

    done: int = 0
    """Steps."""
    best_loss: float | None = None
    best_accuracy: float | None = None
    best_step: int | None = None
    stale: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """Whether it ended early."""


class OutOfMemory(Exception):
    """The device has too little memory for a forward or backward pass; the text is the library's."""


@dataclass(kw_only=True)
class Trainer:
    """One process of a training."""

    backbone: HuggingFaceBackbone
    trained: Trained
    schedule: Schedule
    material: Material
    folder: AdapterFolder
    preparation: Preparation
    reporter: Reporter
    group: Group = field(default_factory=Group)
    checkpoint_seconds: float
    standing: Standing = field(default_factory=Standing)

    def __post_init__(self) -> None:
        """Make the optimiser. Vectors, such as biases and the scales of norms, do not decay."""
        recipe, weights = self.schedule.recipe, list(self.trained.parameters.values())
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [weight for weight in weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            fused=self.backbone.device.type == "cuda",
        )

    def run(self) -> None:
        """Train from the last checkpoint to the end. Raises ModelError if a loss or gradient is not finite."""
        resumed = self._restore()
        if self.group.first:
            self.folder.begin_curves(self.standing.done if resumed else None)
        if not resumed:
            self._validate(0)
        saved = time.monotonic()
        batches, total = self._prepared(), self.schedule.steps
        while self.standing.done < total and not self.standing.stopped:
            self._step(self.standing.done, batches)
            self.standing.done += 1
            if self.schedule.validates(self.standing.done):
                self._validate(self.standing.done)
            if self.group.first and time.monotonic() - saved >= self.checkpoint_seconds:
                self._save()
                saved = time.monotonic()
        if self.group.first and not self.material.validation:
            self.folder.save_adapter(self.folder.best, self.trained.tensors(), self.trained.config)

    def _prepared(self) -> Iterator[list[Example]]:
        """The micro-batches of this process from the next step on, prepared ahead."""
        groups = (
            (None, [self.material.train[place] for place in micro])
            for step in range(self.standing.done, self.schedule.steps)
            for index, micro in enumerate(self.schedule.micro_batches(step))
            if index in self.group.share(len(self.schedule.micro_batches(step)))
        )
        for _, examples in self.preparation.groups(example_of, groups):
            yield examples

    def _step(self, step: int, batches: Iterator[list[Example]]) -> None:
        started = time.monotonic()
        batch, micro = self.schedule.batch(step), self.schedule.micro_batches(step)
        labels = sum(self.material.labels[place] for place in batch)
        loss = torch.zeros((), device=self.backbone.device)
        self.trained.model.train()
        with self._naming_memory():
            for index in self.group.share(len(micro)):
                examples = next(batches)
                torch.manual_seed(self.schedule.dropout_seed(step, index))
                with computing(self.backbone):
                    part = summed_loss(self.backbone, examples) / labels
                part.backward()
                loss += part.detach()
            norm = self._gradient(loss)
            self._refuse_nonsense(step, loss, norm, [self.material.train[place].name for place in batch])
            for group in self._optimizer.param_groups:
                group["lr"] = self.schedule.lr(step)
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self.group.first:
            tokens = sum(self.material.tokens[place] for place in batch)
            values = {"step": step + 1, "loss": float(loss), "lr": self.schedule.lr(step), "grad_norm": float(norm)}
            values |= {"tokens": tokens, "seconds": time.monotonic() - started}
            self.folder.add_curve(values)
            self.reporter.step(values)

    def _gradient(self, loss: Tensor) -> Tensor:
        """Sum gradients and loss over the processes, and clip; the norm before."""
        weights = list(self.trained.parameters.values())
        for weight in weights:
            if weight.grad is None:  # a batch without images, or a process without a micro-batch
                weight.grad = torch.zeros_like(weight)
        self.group.add([loss, *(weight.grad for weight in weights if weight.grad is not None)])
        clip = self.schedule.recipe.clip
        norm: Tensor = torch.nn.utils.clip_grad_norm_(weights, math.inf if clip is None else clip)
        return norm

    def _refuse_nonsense(self, step: int, loss: Tensor, norm: Tensor, names: Sequence[str]) -> None:
        """Raise ModelError, after keeping the state before this step, unless loss and gradient are finite."""
        if math.isfinite(float(loss)) and math.isfinite(float(norm)):
            return
        what = f"loss is {float(loss)}" if not math.isfinite(float(loss)) else f"norm of the gradient is {float(norm)}"
        if self.group.first:
            self._save()
            self.folder.save_adapter(self.folder.last_good, self.trained.tensors(), self.trained.config)
        self.group.add([loss])  # the other processes wait here for the files
        message = (
            f"Step {step + 1}: the {what}, with the items {listed(list(names), 20)}. The adapter before this "
            f"step is in {self.folder.last_good}. Look at them, or train to another ADAPTER with a lower lr (--set)."
        )
        raise ModelError(message)

    def _validate(self, done: int) -> None:
        """Validate after `done` steps, and keep the best adapter; before the first step, only note the scores."""
        if not self.material.validation:
            return
        loss, accuracy = self._validation()
        if not math.isfinite(loss):
            message = (
                f"The validation loss after step {done} is {loss}. Train to another ADAPTER with a lower lr (--set)."
            )
            raise ModelError(message)
        standing = self.standing
        if done > 0:
            better = standing.best_loss is None or loss < standing.best_loss
            standing.stale = 0 if better else standing.stale + 1
            if better:
                standing.best_loss, standing.best_accuracy, standing.best_step = loss, accuracy, done
                if self.group.first:
                    self.folder.save_adapter(self.folder.best, self.trained.tensors(), self.trained.config)
            patience = self.schedule.recipe.patience
            standing.stopped = patience > 0 and standing.stale >= patience
        if self.group.first:
            values = {"step": done, "validation_loss": loss, "word_accuracy": accuracy}
            self.folder.add_curve(values)
            self.reporter.validation(values, best=standing.best_step, stopped=standing.stopped)

    def _validation(self) -> tuple[float, float]:
        """The mean loss per label, and the share of items whose rating word would be right."""
        items, size = self.material.validation, self.schedule.recipe.micro_batch
        pieces = [list(items[start : start + size]) for start in range(0, len(items), size)]
        mine = [(None, pieces[index]) for index in self.group.share(len(pieces))]
        sums = torch.zeros(_SUMS, dtype=torch.float64, device=self.backbone.device)
        self.trained.model.eval()
        with self._naming_memory():
            for _, examples in self.preparation.groups(example_of, mine):
                with computing(self.backbone):
                    loss, right = validation_sums(self.backbone, examples)
                labels = sum(len(example.labels) for example in examples)
                sums += torch.stack([loss.double(), right.double(), loss.new_tensor(labels).double()])
        self.group.add([sums])
        loss_sum, right_sum, label_sum = sums.tolist()
        return loss_sum / label_sum, right_sum / len(items)

    @contextmanager
    def _naming_memory(self) -> Generator[None]:
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(first_line(error)) from error

    def _save(self) -> None:
        """Write a checkpoint: parameters, moments, and the standing. All else follows from the number of the step."""
        tensors = self.trained.tensors()
        for name, weight in self.trained.parameters.items():
            state: Mapping[str, Any] = self._optimizer.state.get(weight, {})
            tensors |= {f"{key}/{name}": state[key] for key in ("exp_avg", "exp_avg_sq") if key in state}
        self.folder.save_state(tensors, vars(self.standing))

    def _restore(self) -> bool:
        """Go back to the last checkpoint; False if there is none."""
        found = self.folder.load_state(str(self.backbone.device))
        if found is None:
            return False
        tensors, facts = found
        self.trained.restore(tensors)
        self.standing = Standing(**facts)
        for name, weight in self.trained.parameters.items():
            if f"exp_avg/{name}" in tensors:
                self._optimizer.state[weight] = {
                    "step": torch.tensor(float(self.standing.done), device=self._step_device()),
                    **{key: tensors[f"{key}/{name}"] for key in ("exp_avg", "exp_avg_sq")},
                }
        if self.group.first:
            self.reporter.say(f"resume after step {self.standing.done} of {self.schedule.steps}")
        return True

    def _step_device(self) -> torch.device:
        """Where AdamW counts its steps: a fused one on its device, others on the CPU."""
        return self.backbone.device if self.backbone.device.type == "cuda" else torch.device("cpu")
