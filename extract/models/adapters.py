"""Adapters: what a fine-tuning saved with PEFT, by name, merged into the weights of any model.

| what to write | what it means |
|---|---|
| `path/to/folder` | adapter_config.json beside adapter_model.safetensors (or adapter_model.bin) |
| `pkg:package/folder` | a folder inside an installed Python package |
| `owner/name`, `owner/name@revision` | a repository of the hub, downloaded once into the hub's own cache |

An adapter holds LoRA pairs (Hu et al., arXiv 2106.09685) and tensors that replace the model's own
(`modules_to_save`). Configurations and their rules are read with the library peft; the merge is done here, because
every tensor must land, by name and shape, and sums must be taken in float32 whatever the model's dtype.
"""

import json
import pickle
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from agiqa.errors import ModelError, first_line
from agiqa.extract.models.checkpoints import HUB_ID, PACKAGE, download, package_path, tensor_shapes
from agiqa.extract.models.merging import Merge
from agiqa.progress import say
from agiqa.store.disk.files import refuse_lfs_pointers, sha256_of_file

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
"""In the order in which peft looks for them."""

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
"""Settings of an adapter that are merged exactly whatever they say. Any other must be off."""
MERGED_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Values of `init_lora_weights` that leave the base weights alone.

Others (PiSSA, OLoRA, CorDA, LoRA-GA, LoftQ) change them as training starts. An adapter that peft converted back when
it saved it (`path_initial_model_for_weight_conversion`) says True.
"""

_UNREADABLE = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """The files of one LoRA adapter; tensors are read when they are asked for."""

    name: str
    """As the user gave it."""
    folder: Path
    config: Any
    """peft's LoraConfig."""
    repository: str | None = None
    """The hub repository that `folder` is a snapshot of."""
    revision: str | None = None
    """Its commit."""

    @property
    def label(self) -> str:
        """The adapter's name without the folders of this machine, so that a moved one stays the same."""
        kept = self.repository or (self.name if self.name.startswith(PACKAGE) else None)
        return kept or self.folder.resolve().name

    @property
    def base(self) -> str | None:
        """The model that it was made for, in the words of its configuration."""
        return self.config.base_model_name_or_path or None

    def weight_file(self) -> Path:
        """The file of tensors. Raises ModelError when there is none."""
        found = next((self.folder / name for name in WEIGHTS if (self.folder / name).is_file()), None)
        if found is None:
            message = f"{self.name}: no weights in {self.folder}; expected {' or '.join(WEIGHTS)}."
            raise ModelError(message)
        return found

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of configuration and weights, by file name. Reads both once."""
        return {path.name: sha256_of_file(path) for path in (self.folder / CONFIG, self.weight_file())}

    def provenance(self) -> dict[str, Any]:
        """What of it changes a number, JSON-able. Hashes the files."""
        return {"name": self.label, "revision": self.revision, "base": self.base, "files": self.hashes()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor on the CPU, by its name in the file. Raises ModelError for a file that cannot be read."""
        return self._read(load_file, "cpu")

    def shapes(self) -> dict[str, torch.Tensor]:
        """As `tensors`, on the device `meta`: names and shapes alone, from the head of a safetensors file."""
        return self._read(_shapes_of, "meta")

    def _read(self, read: Callable[[Path], dict[str, torch.Tensor]], device: str) -> dict[str, torch.Tensor]:
        """The tensors of a safetensors file by `read`, those of torch's own format on `device`."""
        path = self.weight_file()
        try:
            if path.suffix == ".safetensors":
                return read(path)
            loaded: dict[str, torch.Tensor] = torch.load(path, map_location=device, weights_only=True)
        except _UNREADABLE as error:
            message = f"{self.name}: cannot read {path} ({first_line(error)}); download or copy it again."
            raise ModelError(message) from error
        return loaded


def _shapes_of(path: Path) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in tensor_shapes(path).items()}


def resolve_adapter(adapter: str) -> Adapter:
    """The adapter that `adapter` names (see the table above).

    Raises ModelError when there is no such folder or repository, it holds no PEFT adapter, one that is no plain LoRA,
    or a Git LFS pointer.
    """
    path = package_path(adapter) if adapter.startswith(PACKAGE) else Path(adapter).expanduser()
    repository = revision = None
    if not path.is_dir():
        match = HUB_ID.fullmatch(adapter)
        if match is None or path.exists():
            message = f"{adapter}: no such folder; expected an adapter's folder with {CONFIG}, or a hub id owner/name."
            raise ModelError(message)
        repository = match["repo"]
        path = download(repository, match["revision"], [CONFIG, *WEIGHTS])
        revision = path.name
    refuse_lfs_pointers([path / name for name in (CONFIG, *WEIGHTS)], ModelError)
    return Adapter(
        name=adapter, folder=path, config=_read_config(adapter, path), repository=repository, revision=revision
    )


def apply_adapter(model: torch.nn.Module, adapter: Adapter, *, name: str) -> torch.nn.Module:
    """`model`, its weights merged with `adapter` in place: W + scale B A, or the saved tensor itself.

    Sums are taken in float32 at least and rounded once to the dtype of the weight, on its device. A weight that two
    modules share stays as it was where the adapter does not name it. `name` is the model's, for messages; a base of
    another name is told and no error.

    Raises ModelError, and leaves the model alone, when a tensor of the adapter has no place in the model or another
    shape, or one is missing; the message names them.
    """
    merge = Merge(model, adapter.config, adapter.tensors())
    _refuse_misfits(merge, adapter, name)
    if adapter.base and Path(adapter.base).name.lower() != Path(name.partition("@")[0]).name.lower():
        say(f"note: the adapter {adapter.name} says it was made for {adapter.base!r}; all its tensors fit {name}")
    merge.run()
    return model


def check_adapter(model: torch.nn.Module, adapter: Adapter, *, name: str) -> None:
    """Raise what `apply_adapter` would, reading no tensor: `model` may be on the device `meta`, without weights."""
    _refuse_misfits(Merge(model, adapter.config, adapter.shapes()), adapter, name)


def _refuse_misfits(merge: Merge, adapter: Adapter, name: str) -> None:
    if merge.problems:
        made_for = f", made for {adapter.base!r}," if adapter.base else ""
        message = f"{name}: the adapter {adapter.name}{made_for} does not fit this model: {'; '.join(merge.problems)}."
        raise ModelError(message)


def _read_config(name: str, folder: Path) -> Any:
    """peft's LoraConfig from `folder`. Raises ModelError when there is none, or it asks for more than plain LoRA."""
    path = folder / CONFIG
    if not path.is_file():
        whole = " It holds a whole model: give it as the model." if (folder / "config.json").is_file() else ""
        message = f"{name}: no {CONFIG} in {folder}, so it is no PEFT adapter.{whole}"
        raise ModelError(message)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{name}: cannot read {path} ({error})."
        raise ModelError(message) from error
    if not isinstance(raw, dict) or raw.get("peft_type") != "LORA":
        found = raw.get("peft_type") if isinstance(raw, dict) else type(raw).__name__
        message = f"{name}: {path} describes {found!r}, not a LoRA adapter (peft_type LORA)."
        raise ModelError(message)
    _refuse_more_than_lora(name, raw)
    from peft import LoraConfig

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of keys that a newer peft wrote: those that matter are refused above
            return LoraConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as error:
        message = f"{name}: {path} is no LoRA configuration that peft understands ({first_line(error)})."
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
    """Whether W + scale B A is exact under this setting: it is one of those that we merge, or off."""
    if key in MERGED_SETTINGS:
        return True
    if key == "init_lora_weights":
        return (value.lower() if isinstance(value, str) else value) in MERGED_STARTS
    default = defaults.get(key)
    return value == default or not (value or default)
