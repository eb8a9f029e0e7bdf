"""One optimiser step of a model: the summed loss of its micro-batches, clipping, AdamW."""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from agiqa.errors import first_line
from agiqa.extract.models.batches import is_out_of_memory
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.tuning.adapting import Trained
from agiqa.extract.tuning.examples import Example
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.losses import computing, summed_loss
from agiqa.extract.tuning.recipes import Recipe

MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of each parameter."""


class OutOfMemory(Exception):
    """The device has too little memory for a forward or backward pass; the text is the library's."""


@contextmanager
def naming_memory() -> Generator[None]:
    """Raise OutOfMemory for lack of memory inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(first_line(error)) from error


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """What is known of a step before it is taken."""

    loss: float
    """Mean over all labels of the batch."""
    norm: float
    """Of the gradient, before clipping."""

    @property
    def finite(self) -> bool:
        """Whether the step may be taken."""
        return math.isfinite(self.loss) and math.isfinite(self.norm)


class Learner:
    """Changes the trained parameters of one model, in step with the other processes of a group."""

    def __init__(self, backbone: HuggingFaceBackbone, trained: Trained, recipe: Recipe, group: Group) -> None:
        """Vectors, such as biases and the scales of norms, do not decay."""
        self.backbone = backbone
        self.trained = trained
        self.recipe = recipe
        self.group = group
        self.weights = list(trained.parameters.values())
        groups = [
            {"params": [weight for weight in self.weights if weight.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [weight for weight in self.weights if weight.ndim <= 1], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            fused=backbone.device.type == "cuda",
        )

    def gradient(self, pieces: Iterable[tuple[int, Sequence[Example]]], *, labels: int) -> Gradient:
        """Compute the gradient of the mean loss over the `labels` of a batch, over all processes, and clip it.

        `pieces` are the micro-batches of this process, each with the seed of its dropout. Raises OutOfMemory.
        """
        loss = torch.zeros((), device=self.backbone.device)
        self.trained.model.train()
        with naming_memory():
            for seed, examples in pieces:
                torch.manual_seed(seed)
                with computing(self.backbone):
                    part = summed_loss(self.backbone, examples) / labels
                part.backward()
                loss += part.detach()
            for weight in self.weights:
                if weight.grad is None:  # a batch without images, or a process without a micro-batch
                    weight.grad = torch.zeros_like(weight)
            self.group.add([loss, *(weight.grad for weight in self.weights if weight.grad is not None)])
            clip = math.inf if self.recipe.clip is None else self.recipe.clip
            norm = torch.nn.utils.clip_grad_norm_(self.weights, clip)
            return Gradient(loss=float(loss), norm=float(norm))

    def apply(self, lr: float) -> None:
        """Take the step of the last `gradient`, and drop it."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        with naming_memory():  # the first step allocates the moments
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """The adapter's tensors and the moments of every parameter, by name; nothing is copied."""
        found = self.trained.tensors()
        for name, weight in self.trained.parameters.items():
            state: Mapping[str, Any] = self._optimizer.state.get(weight, {})
            found |= {f"{key}/{name}": state[key] for key in MOMENTS if key in state}
        return found

    def restore(self, tensors: Mapping[str, Tensor], *, steps: int) -> None:
        """Go back to a `state` after that many steps."""
        self.trained.restore(tensors)
        counts_on = self.backbone.device if self.backbone.device.type == "cuda" else torch.device("cpu")
        for name, weight in self.trained.parameters.items():
            if f"{MOMENTS[0]}/{name}" in tensors:
                moments = {key: tensors[f"{key}/{name}"] for key in MOMENTS}
                self._optimizer.state[weight] = {"step": torch.tensor(float(steps), device=counts_on), **moments}
