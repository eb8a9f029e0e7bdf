"""The training loop: steps, validations, checkpoints, and the best adapter."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch

from agiqa.errors import ModelError, listed
from agiqa.extract.data.items import Item
from agiqa.extract.models import Backbone
from agiqa.extract.models.preparing import Preparation
from agiqa.extract.tuning.examples import Example, example_of
from agiqa.extract.tuning.folder import AdapterFolder
from agiqa.extract.tuning.learner import Gradient, Learner, naming_memory
from agiqa.extract.tuning.losses import computing, validation_sums
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


@dataclass(kw_only=True)
class Trainer:
    """One process of a training."""

    learner: Learner
    schedule: Schedule
    material: Material
    folder: AdapterFolder
    preparation: Preparation[Backbone]
    reporter: Reporter
    checkpoint_seconds: float
    standing: Standing = field(default_factory=Standing)
    _whole: int | None = field(default=None, init=False)
    """Steps after which the model is as it is now; None from the change of its weights to the end of a step."""

    @property
    def first(self) -> bool:
        """Whether this process writes the files."""
        return self.learner.group.first

    def run(self) -> None:
        """Train from the last checkpoint to the end. Raises ModelError if a loss or gradient is not finite.

        Ctrl-C leaves a checkpoint, unless it comes while weights change or a validation runs.
        """
        resumed = self._restore()
        if self.first:
            self.folder.begin_curves(self.standing.done if resumed else None)
        if not resumed:
            self._validate(0)
        try:
            self._train()
        except KeyboardInterrupt:
            if self.first and self._whole == self.standing.done:
                self._save()
            raise
        if self.first and not self.material.validation:
            self._save_adapter(self.folder.best)

    def _train(self) -> None:
        saved, self._whole = time.monotonic(), self.standing.done
        batches, total = self._prepared(), self.schedule.steps
        while self.standing.done < total and not self.standing.stopped:
            self._step(self.standing.done, batches)
            self.standing.done += 1
            if self.schedule.validates(self.standing.done):
                self._validate(self.standing.done)
            self._whole = self.standing.done
            if self.first and time.monotonic() - saved >= self.checkpoint_seconds:
                self._save()
                saved = time.monotonic()

    def _prepared(self) -> Iterator[list[Example]]:
        """The micro-batches of this process from the next step on, prepared ahead."""
        groups = (
            (None, [self.material.train[place] for place in micro])
            for step in range(self.standing.done, self.schedule.steps)
            for index, micro in enumerate(self.schedule.micro_batches(step))
            if index in self.learner.group.share(len(self.schedule.micro_batches(step)))
        )
        for _, examples in self.preparation.groups(example_of, groups):
            yield examples

    def _step(self, step: int, batches: Iterator[list[Example]]) -> None:
        started = time.monotonic()
        batch, count = self.schedule.batch(step), len(self.schedule.micro_batches(step))
        labels, lr = sum(self.material.labels[place] for place in batch), self.schedule.lr(step)
        mine = ((self.schedule.dropout_seed(step, index), next(batches)) for index in self.learner.group.share(count))
        gradient = self.learner.gradient(mine, labels=labels)
        if not gradient.finite:
            self._give_up(step, gradient, [self.material.train[place].name for place in batch])
        self._whole = None
        self.learner.apply(lr)
        if self.first:
            tokens = sum(self.material.tokens[place] for place in batch)
            values = {"step": step + 1, "loss": gradient.loss, "lr": lr, "grad_norm": gradient.norm, "tokens": tokens}
            values["seconds"] = time.monotonic() - started
            self.folder.add_curve(values)
            self.reporter.step(values)

    def _give_up(self, step: int, gradient: Gradient, names: Sequence[str]) -> NoReturn:
        """Keep the adapter before this step, and raise ModelError."""
        what = "norm of the gradient" if math.isfinite(gradient.loss) else "loss"
        value = gradient.norm if math.isfinite(gradient.loss) else gradient.loss
        if self.first:
            self._save()
            self._save_adapter(self.folder.last_good)
        self.learner.group.add([torch.zeros(1, device=self.learner.backbone.device)])  # wait for the files
        message = (
            f"Step {step + 1}: the {what} is {value}, with the items {listed(list(names), 20)}. Look at them, or "
            f"train to another ADAPTER with a lower lr. The adapter before this step is in {self.folder.last_good}."
        )
        raise ModelError(message)

    def _validate(self, done: int) -> None:
        """Validate after `done` steps, and keep the best adapter; before the first step, only note the scores."""
        if not self.material.validation:
            return
        standing = self.standing
        loss, accuracy, odd = self._validation()
        if not math.isfinite(loss):
            where = f", with the items {listed(odd, 20)}. Look at them" if odd else ". Look at the validation items"
            best = "" if standing.best_step is None else f" The best adapter so far is in {self.folder.best}."
            message = (
                f"The validation loss after step {done} is {loss}{where}, or train to another ADAPTER with a lower lr."
                f"{best}"
            )
            raise ModelError(message)
        better = done > 0 and (standing.best_loss is None or loss < standing.best_loss)
        if better:
            standing.best_loss, standing.best_accuracy, standing.best_step = loss, accuracy, done
        if done > 0:
            standing.stale = 0 if better else standing.stale + 1
            standing.stopped = 0 < self.schedule.recipe.patience <= standing.stale
        if self.first:
            values = {"step": done, "validation_loss": loss, "word_accuracy": accuracy}
            self.folder.add_curve(values)
            self.reporter.validation(values, best=standing.best_step, stopped=standing.stopped)
            if better:
                self._save()  # first: a run that resumes from an earlier step may find another one the best
                self._save_adapter(self.folder.best)

    def _validation(self) -> tuple[float, float, list[str]]:
        """The mean loss per label, the share of right rating words, and items of this process without a finite loss.

        The items are those of whole forward passes.
        """
        items, recipe = self.material.validation, self.schedule.recipe
        size = recipe.micro_batch or recipe.batch_size
        pieces = [list(items[start : start + size]) for start in range(0, len(items), size)]
        mine = [(None, pieces[index]) for index in self.learner.group.share(len(pieces))]
        sums = torch.zeros(_SUMS, dtype=torch.float64, device=self.learner.backbone.device)
        losses: list[tuple[torch.Tensor, list[str]]] = []
        self.learner.trained.model.eval()
        # compiled code would be compiled once more, without gradients
        with naming_memory(), torch.compiler.set_stance("force_eager"):
            for _, examples in self.preparation.groups(example_of, mine):
                with computing(self.learner.backbone):
                    loss, right = validation_sums(self.learner.backbone, examples)
                labels = sum(example.count for example in examples)
                losses.append((loss, [example.name for example in examples]))
                sums += torch.stack([loss.double(), right.double(), loss.new_tensor(labels).double()])
        self.learner.group.add([sums])
        loss_sum, right_sum, label_sum = sums.tolist()
        odd = (
            [] if math.isfinite(loss_sum) else [name for loss, names in losses if not loss.isfinite() for name in names]
        )
        return loss_sum / label_sum, right_sum / len(items), odd

    def _save(self) -> None:
        """Write a checkpoint. What is not in it follows from the number of the step."""
        self.folder.save_state(self.learner.state(), vars(self.standing))

    def _save_adapter(self, folder: Path) -> None:
        self.folder.save_adapter(folder, self.learner.trained.tensors(), self.learner.trained.config)

    def _restore(self) -> bool:
        """Go back to the last checkpoint; False if there is none."""
        with naming_memory():
            found = self.folder.load_state(str(self.learner.backbone.device))
        if found is None:
            return False
        tensors, facts = found
        self.standing = Standing(**facts)
        self.learner.restore(tensors, steps=self.standing.done)
        if self.first:
            if self.standing.best_step == self.standing.done:
                self._save_adapter(self.folder.best)  # a kill may have come between checkpoint and adapter
            self.reporter.say(f"resume after step {self.standing.done} of {self.schedule.steps}")
        return True
