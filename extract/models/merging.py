"""The merge of an adapter's tensors into a model: where each one goes, what does not fit, and the sums."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from agiqa.errors import listed

_PREFIX = "base_model.model."
"""What peft writes in front of the model's own names."""
_LORA = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<layer>[AB])(?:\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
"""peft's own modules around the model's, within names of tensors that are saved whole."""
_SUMMED = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Weights that `scale B A` can be added to; others are packed."""
_ORIGINAL = ".original_module."
"""Within names of what a replaced module was before: `save_embedding_layers` saves it beside the trained one."""


@dataclass(kw_only=True)
class _Pair:
    """The two factors of one module's LoRA; A is (r, in, ...), B (out, r, ...)."""

    a: Tensor | None = None
    b: Tensor | None = None
    embedding: bool = False
    """Embeddings save A as (r, vocabulary) and B as (width, r), and are themselves (vocabulary, width)."""


class Merge:
    """One adapter on one model, checked at construction and done by `run`."""

    def __init__(self, model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """`config` is peft's LoraConfig, `tensors` hold the adapter under the names of its file."""
        self.model = model
        self.config = config
        self.weights: dict[str, Tensor] = model.state_dict()
        self.whole: dict[str, Tensor] = {}
        """Tensors that replace the model's own, by the model's names."""
        self.pairs: dict[str, _Pair] = {}
        """Factors by the name of the module, as the adapter calls it."""
        self._sort(tensors)
        self._place = finder(model, self.weights)
        self.problems = tuple(self._find_problems())
        """What keeps the adapter from the model, in words."""

    def run(self) -> None:
        """Put the merged weights into the model, one by one."""
        with torch.no_grad():
            for name, tensor in self.whole.items():
                self._assign(self._place(name), tensor)
            for module, pair in self.pairs.items():
                place = self._place(f"{module}.weight")
                weight = _get(self.model, place)
                wide = torch.promote_types(weight.dtype, torch.float32)
                change = self._change(module, pair, weight, wide)
                self._assign(place, weight.to(wide) + change)

    def _sort(self, tensors: Mapping[str, Tensor]) -> None:
        for key, tensor in tensors.items():
            name = key.removeprefix(_PREFIX)
            match = _LORA.fullmatch(name)
            if match is None:
                self.whole[_WRAPPERS.sub("", name)] = tensor
                continue
            pair = self.pairs.setdefault(match["module"], _Pair(embedding=match["embedding"] is not None))
            if (match["layer"] or match["embedding"]) == "A":
                pair.a = tensor
            else:
                pair.b = tensor
        originals = [name for name in self.whole if _ORIGINAL in name]
        for name in originals:
            if name.replace(_ORIGINAL, ".") in self.whole:
                del self.whole[name]

    def _find_problems(self) -> Iterator[str]:
        strangers = [name for name in self.whole if self._place(name) not in self.weights]
        strangers += [f"{name} (LoRA)" for name in self.pairs if self._place(f"{name}.weight") not in self.weights]
        if strangers:
            yield f"{listed(strangers)} {'has' if len(strangers) == 1 else 'have'} no place in it"
        missing = list(self._missing())
        if missing:
            yield f"the adapter lacks {listed(missing)}"
        shapes = [*self._wrong_shapes()]
        if shapes:
            yield f"shapes differ: {listed(shapes)}"
        packed = [*self._packed()]
        if packed:
            yield f"weights that it changes are quantised, {listed(packed)}: give an unquantised checkpoint"

    def _missing(self) -> Iterator[str]:
        """Names of the tensors that the configuration promises and the file does not hold."""
        from peft.tuners.tuners_utils import check_target_module_exists

        for name, pair in self.pairs.items():
            yield from (f"{name}.lora_{side}" for side, factor in (("A", pair.a), ("B", pair.b)) if factor is None)
        adapted = {self._place(f"{name}.weight").removesuffix(".weight") for name in self.pairs}
        replaced = {self._place(name) for name in self.whole}
        for name, module in self.model.named_modules():
            adaptable = isinstance(module, nn.Linear | nn.Embedding | Conv1D | nn.Conv2d | nn.Conv3d)
            if adaptable and name not in adapted and check_target_module_exists(self.config, name):
                yield f"{name}.lora_A, lora_B"
            if any(name.endswith(saved) for saved in self.config.modules_to_save or ()):
                yield from (f"{name}.{key}" for key in module.state_dict() if f"{name}.{key}" not in replaced)

    def _packed(self) -> Iterator[str]:
        for name in (self._place(f"{module}.weight") for module in self.pairs):
            weight = self.weights.get(name)
            if weight is not None and weight.dtype not in _SUMMED:
                yield f"{name} ({str(weight.dtype).removeprefix('torch.')})"

    def _wrong_shapes(self) -> Iterator[str]:
        for name, tensor in self.whole.items():
            expected = self.weights.get(self._place(name))
            if expected is not None and expected.shape != tensor.shape:
                yield f"{name} is {_shape(tensor)} in the adapter and {_shape(expected)} in the model"
        for name, pair in self.pairs.items():
            weight = self.weights.get(self._place(f"{name}.weight"))
            if weight is None or pair.a is None or pair.b is None:
                continue
            factors = f"{name}.lora_A {_shape(pair.a)} and lora_B {_shape(pair.b)}"
            if not self._multiplies(self._place(f"{name}.weight"), pair, weight):
                yield f"{factors} in the adapter do not multiply to the model's {_shape(weight)}"
            elif (stated := self._stated(self.config.rank_pattern, name, self.config.r)) != len(pair.a):
                yield f"{factors} are not of the rank {stated} that the configuration states"

    def _multiplies(self, place: str, pair: _Pair, weight: Tensor) -> bool:
        a, b = pair.a, pair.b
        if a is None or b is None or min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
            return False
        product = (b.shape[0], *a.shape[1:])
        turned = pair.embedding or isinstance(_owner(self.model, place), Conv1D)
        return b[0, 0].numel() == 1 and product == tuple(
            weight.T.shape if turned and weight.ndim == 2 else weight.shape
        )

    def _change(self, module: str, pair: _Pair, weight: Tensor, wide: torch.dtype) -> Tensor:
        """`scale B A` in the shape of `weight`, on its device, in the dtype `wide`."""
        if pair.a is None or pair.b is None:
            raise AssertionError(module)  # `problems` would have named it
        a, b = (factor.to(device=weight.device, dtype=wide) for factor in (pair.a, pair.b))
        alpha = self._stated(self.config.alpha_pattern, module, self.config.lora_alpha)
        scale = alpha / (len(a) ** 0.5 if self.config.use_rslora else len(a))
        product = (b.flatten(1) @ a.flatten(1)) * scale
        turned = pair.embedding or isinstance(_owner(self.model, self._place(f"{module}.weight")), Conv1D)
        return product.T if turned else product.reshape(weight.shape)

    def _stated(self, pattern: Mapping[str, float] | None, module: str, default: float) -> float:
        """The rank or alpha of `module`, by the pattern's longest-standing rule: its first key that matches."""
        from peft.utils.other import get_pattern_key

        rules = pattern or {}
        return rules.get(get_pattern_key(list(rules), module), default)

    def _assign(self, name: str, value: Tensor) -> None:
        """Give the model a tensor of its own under `name`, so that a weight tied to it does not follow."""
        old = _get(self.model, name)
        new = value.to(device=old.device, dtype=old.dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=False)
        setattr(_owner(self.model, name), name.rpartition(".")[2], new)


def finder(model: nn.Module, weights: Mapping[str, Tensor]) -> Callable[[str], str]:
    """From a tensor's name in an adapter or a checkpoint to its name in `model`, which may be a newer one.

    transformers has moved modules between releases and renames the tensors of older checkpoints as it loads them;
    adapters were made under the older names too.
    """
    from transformers import PreTrainedModel

    renamings: list[Any] = []
    if isinstance(model, PreTrainedModel):
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming

        renamings = [entry for entry in get_model_conversion_mapping(model) if isinstance(entry, WeightRenaming)]

    def find(name: str) -> str:
        if name in weights or not renamings:
            return name
        from transformers.core_model_loading import rename_source_key

        renamed: str = rename_source_key(name, renamings, [])[0]
        return renamed if renamed in weights else name

    return find


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _get(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(_owner(model, name), name.rpartition(".")[2])
    return tensor


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
