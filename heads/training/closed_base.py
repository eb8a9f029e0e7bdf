"""The closed form whose residual a network learns, with its out-of-fold predictions of the training items.

In-sample predictions would leave residuals that are too small, and of another distribution than those of new items.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from agiqa.heads.closed.choosing import form_of
from agiqa.heads.closed.forms import Known, fold_groups
from agiqa.heads.closed.heads import ClosedHead
from agiqa.heads.closed.pooled import Kept
from agiqa.heads.closed.regressions import Array, Positions
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.data.weights import item_weights
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.progress import say


@dataclass(frozen=True, kw_only=True)
class ClosedBase:
    """A closed form, fitted to all training items."""

    closed: ClosedHead
    offsets: Float[Tensor, "items label"]
    """Its predictions by position in the FeatureSet, float64: out-of-fold ones for training items, NaN where none is
    needed."""
    _on: dict[torch.device, Tensor] = field(default_factory=dict[torch.device, Tensor], repr=False)

    def at(self, positions: Tensor) -> Float[Tensor, "batch label"]:
        """The offsets at `positions`, float32, on their device."""
        device = positions.device
        if device not in self._on:
            self._on[device] = self.offsets.float().to(device)
        return self._on[device][positions]


def fit_base(
    features: FeatureSet,
    head: HeadConfig,
    config: TrainConfig,
    *,
    train: LabelledItems,
    validation: LabelledItems,
    device: torch.device,
) -> ClosedBase:
    """Fit the closed form `head.init`. Raises as its `fit`."""
    form, source = form_of(head, label=config.label, folds=config.inner_folds, device=device), features.source
    places = np.concatenate([train.positions, validation.positions])
    inputs = form.read(source, features.items[places], Kept(features=features))
    first, held = np.split(np.arange(len(places)), [len(train)])
    known = known_items(source, features.items[train.positions], train.labels.numpy(), config)
    closed, folded = form.fit_and_fold(inputs.of(first), known)
    offsets = torch.full((len(features), len(config.labels)), torch.nan, dtype=torch.float64)
    offsets[torch.from_numpy(train.positions)] = torch.from_numpy(folded)
    offsets[torch.from_numpy(validation.positions)] = torch.from_numpy(closed.scores(inputs.of(held)))
    say(f"init {head.init}: {'; '.join(fit_line(fit) for fit in closed.facts['fits'])}")
    return ClosedBase(closed=closed, offsets=offsets)


def known_items(source: FeatureSource, items: Positions, labels: Array, config: TrainConfig) -> Known:
    """The prompts, as `fold_groups`, and weights of `items` beside their `labels`. Raises as `item_weights`."""
    prompts = source.items.prompts
    groups = fold_groups(prompt_groups([prompts[item] for item in items]))
    return Known(labels=labels, groups=groups, weights=item_weights(source, items, labels, config))


def fit_line(fit: Mapping[str, Any]) -> str:
    """A regression in words, such as `ridge, strength 1000`, or the weights of a stack."""
    if "weights" in fit:
        return "stack, " + " + ".join(f"{weight:.2f} {name}" for name, weight in fit["weights"].items())
    width = f", width {fit['width']:g}" if "width" in fit else ""
    return f"{fit['regression']}, strength {fit['strength']:g}{width}"
