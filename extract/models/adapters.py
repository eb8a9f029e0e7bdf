"""LoRA adapters saved with PEFT: where they are, what they contain, and their merge into the weights of any model.

| name | meaning |
|---|---|
| `path/to/folder` | adapter_config.json beside adapter_model.safetensors (or adapter_model.bin) |
| `pkg:package/folder` | a folder inside an installed Python package |
| `owner/name`, `owner/name@revision` | a repository of the hub, downloaded once into the hub's own cache |

An adapter contains LoRA pairs (Hu et al., arXiv 2106.09685) and tensors that replace the model's own
(`modules_to_save`). The library peft reads configurations and their rules. The merge is done here: every tensor must
have a place, by name and shape, and peft would sum in the dtype of the weights, where here sums are taken in float32.
"""

import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from agiqa.errors import ModelError, first_line, listed
from agiqa.extract.models.checkpoints import Source, find_source, tensor_shapes
from agiqa.extract.models.loading import name_in_model
from agiqa.progress import say
from agiqa.store.disk.files import refuse_lfs_pointers, sha256_of_file

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which peft looks for them."""
UNFINISHED = "training"
"""The folder inside that of an adapter which `agiqa tune` has not finished."""

MERGED_SETTINGS = frozenset(
    {
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias"),
        *("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern"),
        *("peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version"),
        *("lora_dropout", "inference_mode", "runtime_config"),  # of training, and of how peft itself runs
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),  # of init_lora_weights, which decides
        *("megatron_core", "qalora_group_size"),  # of megatron_config and use_qalora, which decide
    }
)
"""Settings under which the merge is exact, whatever their value. All others must be off."""
MERGED_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights unchanged.

The others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) change them before training. An adapter that peft converted back on
saving (`path_initial_model_for_weight_conversion`) says True.
"""

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)
_PREFIX = "base_model.model."
"""What peft writes before the model's own names."""
_LORA = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<layer>[AB])(?:\.default)?\.weight|lora_embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_WRAPPERS = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
"""peft's modules around the model's, in names of tensors that are saved whole."""
_ORIGINAL = ".original_module."
"""In names of the untrained copy of a replaced module, which `save_embedding_layers` saves beside the trained one."""
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Dtypes of weights that can be summed; others are quantised."""


@dataclass(frozen=True, kw_only=True)
class Adapter(Source):
    """The files of one LoRA adapter."""

    config: Any
    """peft's LoraConfig."""

    @property
    def base(self) -> str | None:
        """The model that it was made for, as its configuration names it."""
        return self.config.base_model_name_or_path or None

    def weight_file(self) -> Path:
        """The file of tensors. Raises ModelError if there is none."""
        found = next((self.folder / name for name in WEIGHTS if (self.folder / name).is_file()), None)
        if found is None:
            message = f"{self.name}: no weights in {self.folder}; expected {' or '.join(WEIGHTS)}."
            raise ModelError(message)
        return found

    def provenance(self) -> dict[str, Any]:
        """Name, revision, base and SHA-256 of both files, JSON-able. Reads the files."""
        hashes = {path.name: sha256_of_file(path) for path in (self.folder / CONFIG, self.weight_file())}
        return {"name": self.label, "revision": self.revision, "base": self.base, "files": hashes}

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor on the CPU, by its name in the file. Raises ModelError for an unreadable file."""
        return self._read(load_file, "cpu")

    def shapes(self) -> dict[str, Tensor]:
        """As `tensors`, on the device `meta`; of a safetensors file only the header is read."""
        return self._read(_empty_tensors, "meta")

    def _read(self, read: Callable[[Path], dict[str, Tensor]], device: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file by `read`, those of torch's own format on `device`."""
        path = self.weight_file()
        try:
            if path.suffix == ".safetensors":
                return read(path)
            loaded: dict[str, Tensor] = torch.load(path, map_location=device, weights_only=True)
        except _UNREADABLE as error:
            message = f"{self.name}: cannot read {path} ({first_line(error)}); download or copy it again."
            raise ModelError(message) from error
        return loaded


def _empty_tensors(path: Path) -> dict[str, Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(path).items()}


def resolve_adapter(adapter: str) -> Adapter:
    """The adapter of this name (see the table above).

    Raises ModelError if there is no such folder or repository, if it contains no PEFT adapter or more than plain LoRA,
    or if one of its files is a Git LFS pointer.
    """
    source = find_source(adapter, [CONFIG, *WEIGHTS], f"no such folder; expected an adapter's folder with {CONFIG}")
    refuse_lfs_pointers([source.folder / name for name in (CONFIG, *WEIGHTS)], ModelError)
    return Adapter(**vars(source), config=_read_config(source))


def _read_config(source: Source) -> Any:
    """peft's LoraConfig. Raises ModelError if there is none, or if it asks for more than plain LoRA."""
    path = source.folder / CONFIG
    if not path.is_file():
        hint = " It holds a whole model: give it as the model." if (source.folder / "config.json").is_file() else ""
        if (source.folder / UNFINISHED).is_dir():
            hint = " Its training has not ended: run the same `agiqa tune` again."
        message = f"{source.name}: no {CONFIG} in {source.folder}, so it is no PEFT adapter.{hint}"
        raise ModelError(message)
    raw = source.read_settings(CONFIG, "the configuration of an adapter")
    if raw.get("peft_type") != "LORA":
        message = f"{source.name}: {path} describes {raw.get('peft_type')!r}, not a LoRA adapter (peft_type LORA)."
        raise ModelError(message)
    _refuse_more_than_lora(source.name, raw)
    from peft import LoraConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about keys of a newer peft: those that matter are refused above
            return LoraConfig.from_pretrained(str(source.folder))
    except (TypeError, ValueError, KeyError) as error:
        message = f"{source.name}: {path} is no LoRA configuration that peft understands ({first_line(error)})."
        raise ModelError(message) from error


def _refuse_more_than_lora(name: str, raw: Mapping[str, Any]) -> None:
    from peft import LoraConfig, __version__

    defaults = LoraConfig().to_dict()
    used = [
        f"{key} = {value!r}{'' if key in defaults else f' (unknown to peft {__version__}, which is installed)'}"
        for key, value in raw.items()
        if not _is_merged(key, value, defaults)
    ]
    if used:
        message = (
            f"{name}: the adapter uses {', '.join(used)}, which agiqa cannot merge. Merge it with peft "
            "(merge_and_unload, save_pretrained) and give the folder as the model."
        )
        raise ModelError(message)


def _is_merged(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    """Whether W + scale B A is exact under this setting."""
    if key in MERGED_SETTINGS:
        return True
    if key == "init_lora_weights":
        return (value.lower() if isinstance(value, str) else value) in MERGED_STARTS
    default = defaults.get(key)
    return value == default or not (value or default)


def apply_adapter(model: nn.Module, adapter: Adapter, *, name: str) -> nn.Module:
    """`model`, its weights merged with `adapter` in place: W + scale B A, or the saved tensor itself.

    Sums are taken in float32 at least and rounded once to the dtype of the weight, on its device. Of tied weights only
    the one that the adapter names changes. `name` is the model's, for messages; a base of another name is only noted.

    Raises ModelError, and leaves the model unchanged, if a tensor of the adapter is missing, has no place in the model,
    or another shape; the message names it.
    """
    fit_adapter(model, adapter, name=name).run()
    return model


def fit_adapter(model: nn.Module, adapter: Adapter, *, name: str) -> "Merge":
    """The merge of `adapter` with `model`, which may be on the device `meta`. Raises ModelError as `apply_adapter`."""
    merge = Merge(model, adapter.config, adapter.tensors())
    _refuse_misfits(merge, adapter, name)
    if adapter.base and Path(adapter.base).name.lower() != Path(name.partition("@")[0]).name.lower():
        say(f"note: the adapter {adapter.name} says it was made for {adapter.base!r}; all its tensors fit {name}")
    return merge


def check_adapter(model: nn.Module, adapter: Adapter, *, name: str) -> None:
    """Raise what `apply_adapter` would raise, from headers alone; `model` may be on the device `meta`."""
    _refuse_misfits(Merge(model, adapter.config, adapter.shapes()), adapter, name)


def _refuse_misfits(merge: "Merge", adapter: Adapter, name: str) -> None:
    problems = list(merge.problems())
    if problems:
        made_for = f", made for {adapter.base!r}," if adapter.base else ""
        message = f"{name}: the adapter {adapter.name}{made_for} does not fit this model: {'; '.join(problems)}."
        raise ModelError(message)


@dataclass(kw_only=True)
class _Pair:
    """The LoRA factors of one module; A is (r, in, ...), B (out, r, ...)."""

    module: str
    """As the adapter names it."""
    place: str
    """The model's name of its weight."""
    transposed: bool
    """Whether the weight is (in, out), as in embeddings and GPT-2."""
    a: Tensor | None = None
    b: Tensor | None = None

    def product(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """B A (out, in x ...)."""
        assert self.a is not None and self.b is not None  # noqa: PT018 - else `problems` names it
        a, b = (factor.to(device=device, dtype=dtype) for factor in (self.a, self.b))
        return b.flatten(1) @ a.flatten(1)

    def fits(self, weight: Tensor) -> bool:
        """Whether B A has the shape of `weight`."""
        a, b = self.a, self.b
        if a is None or b is None or min(a.ndim, b.ndim) < 2 or a.shape[0] != b.shape[1]:
            return False
        shape = weight.T.shape if self.transposed and weight.ndim == 2 else weight.shape
        return b[0, 0].numel() == 1 and (b.shape[0], *a.shape[1:]) == tuple(shape)


class Merge:
    """One adapter on one model: which tensors it changes, and what they become."""

    def __init__(self, model: nn.Module, config: Any, tensors: Mapping[str, Tensor]) -> None:
        """`config` is peft's LoraConfig; `tensors` have the names of the adapter's file."""
        self.model = model
        self.config = config
        self.weights: dict[str, Tensor] = model.state_dict()
        self.whole: dict[str, Tensor] = {}
        """Tensors that replace the model's own, as the adapter names them without peft's wrappers."""
        self.pairs: dict[str, _Pair] = {}
        """By module, as the adapter names it."""
        self._place = name_in_model(model, self.weights)
        for key, tensor in tensors.items():
            self._add(key.removeprefix(_PREFIX), tensor)
        for name in [name for name in self.whole if _ORIGINAL in name]:
            if name.replace(_ORIGINAL, ".") in self.whole:
                del self.whole[name]

    def _add(self, name: str, tensor: Tensor) -> None:
        match = _LORA.fullmatch(name)
        if match is None:
            self.whole[_WRAPPERS.sub("", name)] = tensor
            return
        module, embedding = match["module"], match["embedding"]
        if module not in self.pairs:
            place = self._place(f"{module}.weight")
            transposed = embedding is not None or (
                place in self.weights and isinstance(_owner(self.model, place), Conv1D)
            )
            self.pairs[module] = _Pair(module=module, place=place, transposed=transposed)
        setattr(self.pairs[module], (match["layer"] or match["embedding"]).lower(), tensor)

    def problems(self) -> Iterator[str]:
        """What keeps the adapter from fitting the model, in words."""
        strangers = [name for name in self.whole if self._place(name) not in self.weights]
        strangers += [f"{pair.module} (LoRA)" for pair in self.pairs.values() if pair.place not in self.weights]
        if strangers:
            yield f"{listed(strangers)} {'has' if len(strangers) == 1 else 'have'} no place in it"
        missing = list(self._missing())
        if missing:
            yield f"the adapter lacks {listed(missing)}"
        shapes = list(self._wrong_shapes())
        if shapes:
            yield f"shapes differ: {listed(shapes)}"
        weights = {pair.place: self.weights[pair.place] for pair in self.pairs.values() if pair.place in self.weights}
        packed = [
            f"{name} ({str(weight.dtype).removeprefix('torch.')})"
            for name, weight in weights.items()
            if weight.dtype not in _FLOATS
        ]
        if packed:
            yield f"weights that it changes are quantised, {listed(packed)}: give an unquantised checkpoint"

    def _missing(self) -> Iterator[str]:
        """Tensors that the configuration promises and the file lacks."""
        from peft.tuners.tuners_utils import check_target_module_exists

        for pair in self.pairs.values():
            yield from (f"{pair.module}.lora_{side}" for side in "AB" if getattr(pair, side.lower()) is None)
        adapted = {pair.place.removesuffix(".weight") for pair in self.pairs.values()}
        replaced = {self._place(name) for name in self.whole}
        for name, module in self.model.named_modules():
            adaptable = isinstance(module, nn.Linear | nn.Embedding | Conv1D | nn.Conv2d | nn.Conv3d)
            if adaptable and name not in adapted and check_target_module_exists(self.config, name):
                yield f"{name}.lora_A, lora_B"
            if any(name.endswith(saved) for saved in self.config.modules_to_save or ()):
                yield from (f"{name}.{key}" for key in module.state_dict() if f"{name}.{key}" not in replaced)

    def _wrong_shapes(self) -> Iterator[str]:
        for name, tensor in self.whole.items():
            expected = self.weights.get(self._place(name))
            if expected is not None and expected.shape != tensor.shape:
                yield f"{name} is {tuple(tensor.shape)} in the adapter and {tuple(expected.shape)} in the model"
        for pair in self.pairs.values():
            weight = self.weights.get(pair.place)
            if weight is None or pair.a is None or pair.b is None:
                continue
            factors = f"{pair.module}.lora_A {tuple(pair.a.shape)} and lora_B {tuple(pair.b.shape)}"
            stated = self._stated(self.config.rank_pattern, pair.module, self.config.r)
            if not pair.fits(weight):
                yield f"{factors} in the adapter do not multiply to the model's {tuple(weight.shape)}"
            elif stated != len(pair.a):
                yield f"{factors} are not of the rank {stated} that the configuration states"

    def _stated(self, pattern: Mapping[str, float] | None, module: str, default: float) -> float:
        """The rank or alpha of `module`: that of the first key of `pattern` that matches."""
        from peft.utils.other import get_pattern_key

        rules = pattern or {}
        return rules.get(get_pattern_key(list(rules), module), default)

    @cached_property
    def changes(self) -> Mapping[str, Sequence[Tensor | _Pair]]:
        """By the model's name of each tensor that changes: what replaces it, then what is added to it."""
        found: dict[str, list[Tensor | _Pair]] = {}
        for name, tensor in self.whole.items():
            found.setdefault(self._place(name), []).append(tensor)
        for pair in self.pairs.values():
            found.setdefault(pair.place, []).append(pair)
        return found

    def run(self) -> None:
        """Put the merged weights into the model, one by one."""
        for name in self.changes:
            self._assign(name, self.merged(name, _get(self.model, name)))

    def merged(self, name: str, weight: Tensor) -> Tensor:
        """What `weight`, the model's tensor `name`, becomes, in its dtype and on its device."""
        with torch.no_grad():
            for change in self.changes.get(name, ()):
                if isinstance(change, _Pair):
                    wide = torch.promote_types(weight.dtype, torch.float32)
                    product = change.product(weight.device, wide) * self._scale(change)
                    product = product.T if change.transposed else product.reshape(weight.shape)
                    weight = (weight.to(wide) + product).to(weight.dtype)
                else:
                    weight = change.to(device=weight.device, dtype=weight.dtype)
        return weight

    def _scale(self, pair: _Pair) -> float:
        rank = self._stated(self.config.rank_pattern, pair.module, self.config.r)  # that of the factors, by `problems`
        alpha = self._stated(self.config.alpha_pattern, pair.module, self.config.lora_alpha)
        return alpha / (rank**0.5 if self.config.use_rslora else rank)

    def _assign(self, name: str, value: Tensor) -> None:
        """Give the model a tensor of its own under `name`, so that weights tied to it do not change."""
        old = _get(self.model, name)
        new = nn.Parameter(value, requires_grad=False) if isinstance(old, nn.Parameter) else value
        setattr(_owner(self.model, name), name.rpartition(".")[2], new)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _get(model: nn.Module, name: str) -> Tensor:
    tensor: Tensor = getattr(_owner(model, name), name.rpartition(".")[2])
    return tensor
