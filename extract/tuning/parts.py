"""The parts of a model that a recipe names, found in any backbone's model, with weights or without."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from agiqa.errors import ModelError, listed
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.minicpm.model import MiniCPMV
from agiqa.extract.tuning.recipes import Recipe

PARTS = ("attention", "vision", "projector", "embeddings")
"""Names that mean the same part in every model; see recipes.yaml."""

_MINICPM: Mapping[str, str] = {
    "attention": r"llm\..*layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj|o_proj)",
    "vision": "vpm",
    "projector": "resampler",
    "embeddings": "embed_tokens",
}
"""As the published adapters write them."""
_TOWERS = ("vision_tower", "visual", "vision_model", "vision_encoder", "image_tower", "vision_backbone")
_PROJECTORS = (
    *("multi_modal_projector", "mm_projector", "connector", "resampler", "aligner", "merger", "embed_vision"),
    *("vision_projection", "vision_projector", "visual_projection", "modality_projection"),
)
_ATTENTION = re.compile(r"(self_)?(attn|attention)")
"""What transformers calls the attention of a layer."""


def find_parts(backbone: HuggingFaceBackbone, model: nn.Module, recipe: Recipe) -> tuple[str, tuple[str, ...]]:
    """The regular expression of the modules with LoRA pairs, and the names of the modules that are trained whole.

    The names are as short as the configuration of an adapter may have them: each module's name ends with one of them.
    Raises ModelError naming the parts of `recipe` that `model` lacks.
    """
    known = _MINICPM if isinstance(model, MiniCPMV) else _found(backbone, model)
    modules = dict(model.named_modules())
    pattern = known.get(recipe.adapts) if recipe.adapts in PARTS else recipe.adapts
    lacking = [] if pattern and any(_adaptable(pattern, *each) for each in modules.items()) else [recipe.adapts]
    whole: list[str] = []
    for part in recipe.trains:
        named = [known[part]] if part in known else [] if part in PARTS else _matching(part, modules)
        whole += [name for name in named if name not in whole]
        lacking += [] if named else [part]
    if lacking:
        message = (
            f"{backbone.checkpoint.name}: the recipe {recipe.name} trains {listed(lacking)}, which this model does not "
            f"have. It has {', '.join(part for part in PARTS if part in known)}. Choose a recipe without what is "
            "lacking, such as light, or name the modules in a recipe of your own."
        )
        raise ModelError(message)
    assert pattern is not None  # else it is lacking
    chosen = modules_of(model, whole)
    both = [
        name
        for name, module in modules.items()
        if _adaptable(pattern, name, module) and any(f"{name}.".startswith(f"{path}.") for path in chosen)
    ]
    if both:
        message = (
            f"{backbone.checkpoint.name}: the recipe {recipe.name} trains {listed(both)} whole, and with LoRA pairs "
            "too. Change what it adapts, or what it trains."
        )
        raise ModelError(message)
    return pattern, tuple(name for name in whole if not any(name.startswith(f"{other}.") for other in whole))


def modules_of(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """The modules whose name ends with one of `names`, as peft reads `modules_to_save`; none inside another."""
    found = {
        path: module
        for path, module in model.named_modules()
        if any(path == name or path.endswith(f".{name}") for name in names)
    }
    return {path: module for path, module in found.items() if not any(path.startswith(f"{other}.") for other in found)}


def _found(backbone: HuggingFaceBackbone, model: Any) -> dict[str, str]:
    """The parts of a model of transformers, by their names in it."""
    language = backbone.language_model_of(model)
    names = {id(module): name for name, module in model.named_modules()}
    found = {"embeddings": names[id(language.get_input_embeddings())]}
    below = names.get(id(language.get_decoder()), "")
    pattern = _pattern(_projections(below, model))
    if pattern:
        found["attention"] = pattern
    for part, known in (("vision", _TOWERS), ("projector", _PROJECTORS)):
        candidates = [name for name in names.values() if name.rpartition(".")[2] in known]
        if candidates:
            found[part] = min(candidates, key=lambda name: (name.count("."), name))
    return found


def _projections(below: str, model: nn.Module) -> Iterable[str]:
    """Linear maps inside the attention of the decoder's layers."""
    for name, module in model.named_modules():
        inside = name.removeprefix(f"{below}." if below else "")
        if (not below or name.startswith(f"{below}.")) and isinstance(module, nn.Linear | Conv1D):
            words = inside.split(".")
            seen = any(word in (*_TOWERS, *_PROJECTORS) for word in words)
            if not seen and re.search(r"\.\d+\.", name) and any(_ATTENTION.fullmatch(word) for word in words[:-1]):
                yield name


def _pattern(names: Iterable[str]) -> str | None:
    """A regular expression that matches exactly `names`, but for the numbers of layers; None without names."""
    forms = sorted({re.sub(r"(?<=\.)\d+(?=\\\.)", r"\\d+", name.replace(".", r"\.")) for name in names})
    return "|".join(forms) or None


def _adaptable(pattern: str, name: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding | Conv1D) and re.fullmatch(pattern, name) is not None


def _matching(pattern: str, modules: Mapping[str, nn.Module]) -> list[str]:
    return [name for name in modules if name and re.fullmatch(pattern, name)]
