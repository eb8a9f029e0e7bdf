"""Makes the parts of a model trainable that a recipe names, and reads what was trained.

LoRA pairs are peft's layers. A part that is trained whole stays where it is, in float32: in bfloat16
`0.02 - 2e-6 == 0.02`. The names of saved tensors are those that peft gives to an adapter with `modules_to_save`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from agiqa.errors import ModelError
from agiqa.extract.models.compiling import layers_of
from agiqa.extract.models.devices import DTYPES
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.tuning.parts import find_parts, modules_of
from agiqa.extract.tuning.recipes import Recipe

PREFIX = "base_model.model."
"""What peft writes before the model's own names."""
_ADAPTER = "default"
"""peft's name of the only adapter, which the names of saved tensors leave out."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model whose trained parameters are in float32; the others are frozen in the model's dtype."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    """All that is trained, by its name in the model."""
    whole: Mapping[str, nn.Module]
    """The parts that are trained whole, by their names in the model."""
    config: Any
    """peft's LoraConfig of the adapter."""

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by their names in its file, as they are now; nothing is copied."""
        found = {saved_name(name): weight.detach() for name, weight in self.parameters.items()}
        for path, module in self.whole.items():
            for name, tensor in module.state_dict().items():  # buffers too
                found.setdefault(saved_name(f"{path}.{name}"), tensor)
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors`, named as in `tensors()`, into the model."""
        with torch.no_grad():
            for name, own in self.tensors().items():
                own.copy_(tensors[name])


def saved_name(name: str) -> str:
    """The name in an adapter's file of the tensor called `name` in the model."""
    return PREFIX + name.replace(f".{_ADAPTER}.", ".")


def adapt(backbone: HuggingFaceBackbone, recipe: Recipe, *, seed: int) -> Trained:
    """Make the parts of `recipe` trainable in the loaded model of `backbone`, in place. `seed` draws the LoRA pairs.

    Raises ModelError for parts that the model lacks, quantised weights, or logits that are made in an unknown way.
    """
    from peft import LoraConfig, inject_adapter_in_model

    model = backbone.loaded()
    packed = sorted({str(weight.dtype) for weight in model.parameters()} - {str(dtype) for dtype in DTYPES.values()})
    if packed:
        message = f"{backbone.checkpoint.name}: weights are quantised ({packed[0]}); give an unquantised checkpoint."
        raise ModelError(message)
    pattern, names = find_parts(backbone, model, recipe)
    backbone.project(torch.zeros(1, backbone.hidden_size))  # finds the logit map while the model is as published
    settings: dict[str, Any] = {"r": recipe.rank, "lora_alpha": recipe.alpha, "lora_dropout": recipe.dropout}
    settings |= {"target_modules": pattern, "base_model_name_or_path": backbone.checkpoint.name}
    model.requires_grad_(requires_grad=False)
    with torch.random.fork_rng(devices=[]):  # peft draws on the CPU
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(**settings), model, adapter_name=_ADAPTER)
    whole = modules_of(model, names)
    dtype = DTYPES[backbone.logical_dtype]
    for name, module in model.named_modules():
        if any(name == path or name.startswith(f"{path}.") for path in whole):
            _keep_dtype(module, dtype)
            _train(module)
        elif ".lora_" in f".{name}":
            _train(module)
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # autocast does it
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    config = LoraConfig(**settings, modules_to_save=list(names) or None, inference_mode=True)
    return Trained(model=model, parameters=parameters, whole=whole, config=config)


def _train(module: nn.Module) -> None:
    """Replace the module's own parameters by trainable ones in float32; those tied to them stay frozen."""
    for name, weight in list(module.named_parameters(recurse=False)):
        setattr(module, name, nn.Parameter(weight.detach().to(torch.float32, copy=True)))


def _keep_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """Let embeddings give `dtype` as before: autocast leaves them out, and the model would go on in float32."""
    if isinstance(module, nn.Embedding) and dtype != torch.float32:
        module.register_forward_hook(partial(_cast, dtype))


def _cast(dtype: torch.dtype, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.to(dtype)


def recompute(trained: Trained, which: str) -> int:
    """Compute activations again in the backward pass, of all layers or of those of whole parts; how many layers do.

    `which` is one of CHECKPOINTING but auto.
    """
    count = 0
    for name, layer in layers_of(trained.model):
        inside = any(name.startswith(f"{path}.") for path in trained.whole)
        chosen = which == "all" or (which == "vision" and inside)
        settings: Any = layer
        settings.gradient_checkpointing = chosen
        settings._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        count += chosen
    return count
