"""Estimates of a recipe's memory on the device, from the model's shape alone.

Weights, gradients and moments are counted exactly. Activations are counted by vectors per token and layer; 8-bit
optimisers, offloading and other ways to save memory are not offered.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from agiqa.errors import ModelError
from agiqa.extract.models.devices import DTYPES
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.tuning.losses import LABELS_AT_ONCE
from agiqa.extract.tuning.parts import find_parts, modules_of
from agiqa.extract.tuning.recipes import Recipe, recipe_of, summaries

GB = 1e9
TRAINED_BYTES = 16
"""Per trained parameter in float32: itself, its gradient and both moments of AdamW."""
_LIBRARIES = 0.8 * GB
"""CUDA itself, and the work space of its libraries."""
_LEFT = 0.1
"""Share of a device's memory that the choice of `settled` leaves free."""
_FULL = 4096
"""Tokens of a forward pass that keep a GPU busy: below that, more items are worth recomputing more layers."""
_COMPILED = 0.85
"""Share of the activations that compiled layers keep, at most: they keep fewer results between their operations."""
_STEPS_TO_COMPILE = 100
"""Compiling takes as long as about this many steps save (8B on an H100: 10 to 20 s for 0.06 to 0.18 s a step)."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Parameters of a model under a recipe."""

    trained: int
    lora: int
    """Trained parameters in LoRA pairs."""
    frozen: int
    tables: int
    """Trained parameters in embeddings, which have gradients for all their rows."""
    autocast: int
    """Trained parameters of which the forward pass makes a copy in the model's dtype."""

    @classmethod
    def of(cls, backbone: HuggingFaceBackbone, recipe: Recipe, model: nn.Module) -> "Counts":
        """For `model`, which may be without weights. Raises ModelError for parts that it lacks."""
        import re

        pattern, names = find_parts(backbone, model, recipe)
        whole = modules_of(model, names)
        inside = {id(weight) for module in whole.values() for weight in module.parameters()}
        tables = {
            id(module.weight)
            for part in whole.values()
            for module in part.modules()
            if isinstance(module, nn.Embedding)
        }
        lora = sum(
            recipe.rank * sum(weight.shape)
            for name, module in model.named_modules()
            if re.fullmatch(pattern, name) and isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        )
        sizes = {id(weight): weight.numel() for weight in model.parameters()}
        trained = sum(size for key, size in sizes.items() if key in inside)
        table = sum(size for key, size in sizes.items() if key in tables)
        return cls(
            trained=trained + lora,
            lora=lora,
            frozen=sum(sizes.values()) - trained,
            tables=table,
            autocast=trained - table + lora,
        )


@dataclass(frozen=True, kw_only=True)
class Load:
    """The largest forward pass of a training."""

    tokens: int
    labels: int
    patches: int
    """That the vision tower sees."""

    def times(self, items: int) -> "Load":
        """The load of as many items like this one."""
        return Load(tokens=items * self.tokens, labels=items * self.labels, patches=items * self.patches)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Memory of one recipe on one device, in bytes."""

    counts: Counts
    weights: float
    """Frozen weights, and everything per trained parameter."""
    activations: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.weights + self.activations + _LIBRARIES

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, in GB and billions of parameters."""
        return {
            "gb": round(self.total / GB, 1),
            "trained_parameters": self.counts.trained,
            "frozen_parameters": self.counts.frozen,
        }


def estimate(
    backbone: HuggingFaceBackbone, recipe: Recipe, load: Load, *, checkpointing: str, model: nn.Module | None = None
) -> Estimate:
    """The memory of `recipe` for a forward pass of `load`. `checkpointing` is one of CHECKPOINTING but auto.

    `model` is the model without weights, if built before.
    """
    model = model or backbone.empty_model()
    counts = Counts.of(backbone, recipe, model)
    size = DTYPES[backbone.logical_dtype].itemsize
    copies = counts.autocast * size if size < 4 else 0
    if recipe.batch_size > (recipe.micro_batch or 1):  # gradients of two micro-batches, while they are added
        copies += counts.tables * 4
    weights = counts.frozen * size + counts.trained * TRAINED_BYTES + copies
    return Estimate(
        counts=counts, weights=weights, activations=_activations(backbone, recipe, load, model, checkpointing)
    )


def _activations(
    backbone: HuggingFaceBackbone, recipe: Recipe, load: Load, model: nn.Module, checkpointing: str
) -> float:
    """What all layers keep, twice what the widest layer makes while it is computed again, and the loss."""
    towers = modules_of(model, find_parts(backbone, model, recipe)[1])
    decoder = {id(layer) for layer in backbone.language_model_of(model).get_decoder().modules()}
    size = DTYPES[backbone.logical_dtype].itemsize
    kept = widest = 0.0
    for name, layer in model.named_modules():
        reads_text, trained = id(layer) in decoder, any(name.startswith(f"{path}.") for path in towers)
        if isinstance(layer, GradientCheckpointingLayer) and (reads_text or trained):
            vectors = load.tokens if reads_text else load.patches
            width, whole = _per_token(layer, lora=reads_text)
            again = checkpointing == "all" or (checkpointing == "vision" and trained)
            kept += (width if again else whole) * vectors * size
            widest = max(widest, whole * vectors * size)
    loss = min(load.labels, LABELS_AT_ONCE) * backbone.vocab_size * 4 * 4  # logits, their gradient, and two copies
    return (_COMPILED * kept if recipe.compile == "always" else kept) + 2 * widest + loss


def _per_token(layer: nn.Module, *, lora: bool) -> tuple[int, int]:
    """Numbers per token: the input of a layer, and all that it keeps for the backward pass.

    These are the outputs of its linear maps, the product of two of them, and the inputs of maps, norms and sums. A LoRA
    pair keeps its dropped-out input too.
    """
    maps = [module for module in layer.modules() if isinstance(module, nn.Linear)]
    width = min((module.in_features for module in maps), default=0)
    wide = sum(module.out_features for module in maps) + max((module.out_features for module in maps), default=0)
    return width, wide + (12 if lora else 8) * width


def recipes_that_fit(backbone: HuggingFaceBackbone, load: Load, memory: float | None) -> Mapping[str, Estimate]:
    """The estimate of every shipped recipe whose parts the model has, with everything recomputed; at most `memory`."""
    found: dict[str, Estimate] = {}
    model = backbone.empty_model()
    for name in summaries():
        try:
            one = estimate(backbone, recipe_of(name), load, checkpointing="all", model=model)
        except ModelError:
            continue  # the model lacks a part of it
        if memory is None or one.total <= memory:
            found[name] = one
    return found


def memory_of(device: torch.device) -> float | None:
    """The bytes of memory of a GPU; None for the CPU."""
    return float(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else None


def settled(
    backbone: HuggingFaceBackbone,
    recipe: Recipe,
    longest: Load,
    *,
    steps: int,
    memory: float | None,
    devices: int = 1,
) -> Recipe:
    """`recipe` with choices in place of `auto`; `longest` is the load of the largest item, `steps` those to take.

    Of what fits into `memory` by the estimates, with a tenth left: as many items per forward pass as give 4,096 tokens
    with the least recomputation, else as many as possible. A GPU compiles for 100 steps or more. On a CPU, where
    `memory` is None, items pass one by one, and nothing is recomputed.
    """
    if recipe.compile == "auto":
        pays = memory is not None and steps >= _STEPS_TO_COMPILE
        recipe = replace(recipe, compile="always" if pays else "never")
    choices = ("none", "vision", "all") if recipe.checkpointing == "auto" else (recipe.checkpointing,)
    sizes = list(_halves(max(1, recipe.batch_size // devices)))
    if recipe.micro_batch is not None or memory is None:
        sizes = [recipe.micro_batch or 1]
    found = sizes[-1], choices[0 if memory is None else -1]
    if memory is not None:
        found = _fastest(backbone, recipe, longest, sizes, choices, (1 - _LEFT) * memory) or found
    return replace(recipe, micro_batch=found[0], checkpointing=found[1])


def _fastest(
    backbone: HuggingFaceBackbone,
    recipe: Recipe,
    longest: Load,
    sizes: Sequence[int],
    choices: Sequence[str],
    memory: float,
) -> tuple[int, str] | None:
    """Items per forward pass, of `sizes` from the largest, and what is recomputed; None if nothing fits."""
    fitting: list[tuple[int, str]] = []
    model = backbone.empty_model()

    def needed(size: int, which: str) -> float:
        recipe_of_size, load = replace(recipe, micro_batch=size), longest.times(size)
        return estimate(backbone, recipe_of_size, load, checkpointing=which, model=model).total

    for which in choices:
        size = next((size for size in sizes if needed(size, which) <= memory), None)
        if size is not None:
            fitting.append((size, which))
            if size == sizes[0] or size * longest.tokens >= _FULL:
                return size, which
    return max(fitting, key=lambda one: one[0], default=None)


def _halves(share: int) -> Iterator[int]:
    """`share`, half of it, and so on down to 1."""
    while share > 0:
        yield share
        share //= 2
