"""Image encoders of timm by name: `timm:NAME`, with pretrained weights of timm or of a file.

`NAME` is an architecture (`resnet50`), one with the tag of its weights (`vit_base_patch16_224.augreg_in21k`), or
`hf-hub:OWNER/NAME`. timm is the extra `vision`, so it is imported here only when it is needed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from agiqa.errors import ConfigError, ModelError, UnknownName, first_line, listed
from agiqa.extract.models.checkpoints import download
from agiqa.store.disk.files import refuse_lfs_pointers, sha256_of_file

TIMM = "timm:"
"""The beginning of the name of a model of timm."""
_HUB = "hf-hub:"
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ON_HUB = ("model.safetensors", "pytorch_model.bin")
"""The weight files of timm's repositories, in the order in which they are taken."""
_BUILDING = (RuntimeError, ValueError, TypeError, KeyError, AttributeError, AssertionError)


def import_timm() -> Any:
    """The module timm.

    Raises ConfigError, with the way to install it, where timm or torchvision is missing, or torchvision was compiled
    for another build of torch.
    """
    for package in ("timm", "torchvision"):
        if find_spec(package) is None:
            message = (
                f"Image encoders of timm need the package {package}, and it is not installed: "
                "pip install 'agiqa[vision]'"
            )
            raise ConfigError(message)
    try:
        return import_module("timm")
    except RuntimeError as error:  # such as "operator torchvision::nms does not exist"
        message = (
            f"Image encoders of timm need torchvision, and it cannot be imported ({error}). Install the torchvision of "
            "the same build as torch: both from PyPI, or both from the same index of PyTorch."
        )
        raise ConfigError(message) from error


@dataclass(frozen=True, kw_only=True)
class TimmModel:
    """An encoder of timm, its weights and the size of its images; nothing is downloaded before it is needed."""

    name: str
    """As the user gave it, without `timm:`."""
    file: Path | None = None
    """Of the weights; None for those that timm names."""
    image_size: int | None = None
    """Side of the square images in pixels; None for that of the weights."""

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        """timm's settings of the pretrained weights: image size, normalisation, where the weights are."""
        with torch.device("meta"):
            found: Mapping[str, Any] = self._built(pretrained=False).pretrained_cfg
        return found

    @cached_property
    def data_settings(self) -> dict[str, Any]:
        """What timm's `create_transform` needs: input_size, interpolation, mean, std, crop_pct, crop_mode."""
        side = None if self.image_size is None else (3, self.image_size, self.image_size)
        data: Any = import_timm().data
        found: dict[str, Any] = data.resolve_data_config({"input_size": side}, pretrained_cfg=dict(self.settings))
        return found

    def transform(self) -> Any:
        """From an RGB image of Pillow to normalised pixels (3, side, side), by timm's own function."""
        return import_timm().data.create_transform(**self.data_settings, is_training=False)

    def empty(self) -> Any:
        """The encoder on the device `meta`, without weights."""
        with torch.device("meta"):
            return self._built(pretrained=False, **self._size).eval()

    def loaded(self) -> Any:
        """The encoder with its weights, on the CPU. Raises ModelError if they are missing or do not fit."""
        weights = _read_weights(self.weight_file)
        classes = _classes(weights, self.settings)
        overlay = {"state_dict": weights, "num_classes": classes, "file": None}
        arguments = {"num_classes": classes, "pretrained_cfg_overlay": overlay, **self._size}
        try:
            model = self._create(pretrained=True, **arguments)
        except _BUILDING as error:
            raise self._misfit(weights, classes, error) from error
        return model.eval().requires_grad_(requires_grad=False)

    @cached_property
    def weight_file(self) -> Path:
        """The file with the weights, downloaded if timm names it. Raises ModelError if there is none."""
        if self.file is not None:
            return self.file
        if self.name.startswith(_HUB):
            repository, _, revision = self.name.removeprefix(_HUB).partition("@")
            return _of_hub(repository, revision or None, _ON_HUB)
        named = self.settings.get("hf_hub_id")
        if named:
            repository, _, revision = str(named).partition("@")
            asked = self.settings.get("hf_hub_filename")
            return _of_hub(repository, revision or None, (str(asked),) if asked else _ON_HUB)
        if self.settings.get("url"):
            return _of_url(self.name, str(self.settings["url"]))
        message = (
            f"{TIMM}{self.name}: timm names no pretrained weights for it. Give them by --weights FILE, or a name with "
            "the tag of weights, such as resnet50.a1_in1k."
        )
        raise ModelError(message)

    def hashes(self) -> dict[str, str]:
        """SHA-256 (hex) of the weights, by file name. Reads the file once."""
        return {self.weight_file.name: sha256_of_file(self.weight_file)}

    @property
    def _size(self) -> dict[str, int]:
        """The argument by which encoders of one image size, such as most transformers, are built for another."""
        fixed = self.image_size is not None and self.settings.get("fixed_input_size")
        return {"img_size": int(self.image_size or 0)} if fixed else {}

    def _built(self, **arguments: Any) -> Any:
        try:
            return self._create(**arguments)
        except _BUILDING as error:
            message = f"{TIMM}{self.name}: timm cannot build it ({first_line(error)})."
            raise ModelError(message) from error

    def _create(self, **arguments: Any) -> Any:
        try:
            return import_timm().create_model(self.name, **arguments)
        except OSError as error:
            message = (
                f"{TIMM}{self.name}: the Hugging Face hub did not provide it ({first_line(error)}). Check the spelling "
                "and the network, or name an architecture of timm and give its weights by --weights FILE."
            )
            raise ModelError(message) from error

    def _misfit(self, weights: Mapping[str, torch.Tensor], classes: int, error: Exception) -> ModelError:
        """What does not fit: shapes first, then names; `error` is timm's."""
        where = f"{TIMM}{self.name}: the weights in {self.weight_file} do not fit"
        with torch.device("meta"):
            wanted = self._built(pretrained=False, num_classes=classes, **self._size).state_dict()
        shapes = [
            f"{name} is {tuple(weights[name].shape)} in the file and {tuple(tensor.shape)} in the model"
            for name, tensor in wanted.items()
            if name in weights and weights[name].shape != tensor.shape
        ]
        missing = [name for name in wanted if name not in weights]
        unknown = [name for name in weights if name not in wanted]
        for names, what in ((shapes, "other shapes"), (missing, "missing"), (unknown, "unknown to the model")):
            if names:
                remedy = "Give the weights of this encoder"
                if self._size:
                    remedy += f", or leave --image-size {self.image_size} out"
                return ModelError(f"{where} ({len(names)} {what}): {listed(names)}. {remedy}.")
        return ModelError(f"{where} ({first_line(error)}).")


def find_timm_model(model: str, *, weights: Path | None = None, image_size: int | None = None) -> TimmModel:
    """The encoder `timm:NAME`. Raises UnknownName, with the nearest, for a name that timm does not know.

    Raises ConfigError without timm, and ModelError for a file of `weights` that is missing or of an unknown kind.
    """
    timm, name = import_timm(), model.removeprefix(TIMM)
    architecture, _, tag = name.partition(".")
    if not name.startswith(_HUB):
        if not timm.is_model(architecture):
            raise _unknown(architecture, timm.list_models(), "encoder", "`timm.list_models()` lists them")
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        if tag and tag not in tags:
            raise _unknown(tag, tags, f"set of weights of {architecture}", f"known: {', '.join(tags) or 'none'}")
    if weights is not None:
        _check_file(weights)
    return TimmModel(name=name, file=weights, image_size=image_size)


def _unknown(name: str, known: list[str], what: str, where: str) -> UnknownName:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return UnknownName(f"timm has no {what} called {name!r}.{hint} It has {len(known)}; {where}.")


def _check_file(path: Path) -> None:
    if not path.is_file():
        message = f"--weights {path}: there is no such file."
        raise ModelError(message)
    if path.suffix not in _SUFFIXES:
        message = f"--weights {path}: expected a file of tensors, {', '.join(_SUFFIXES)}."
        raise ModelError(message)
    refuse_lfs_pointers([path], ModelError)


def _of_hub(repository: str, revision: str | None, names: tuple[str, ...]) -> Path:
    for name in names:
        try:
            path = download(repository, revision, [name]) / name
        except ModelError as error:
            error.add_note("the weights of a timm encoder can also be given as a file: --weights FILE")
            raise
        if path.is_file():
            return path
    message = f"{repository}: the hub repository has no {' or '.join(names)}. Download its weights and give --weights."
    raise ModelError(message)


def _of_url(name: str, url: str) -> Path:
    from timm.models._hub import download_cached_file

    try:
        return Path(download_cached_file(url, progress=False))
    except OSError as error:
        message = f"{TIMM}{name}: {url} cannot be downloaded ({first_line(error)}). Give the file by --weights FILE."
        raise ModelError(message) from error


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file by name; in a checkpoint of a training, those of the averaged model if it has one.

    Nothing but tensors is unpickled.
    """
    import pickle

    from safetensors import SafetensorError
    from timm.models import load_state_dict

    packed = pickle.UnpicklingError, SafetensorError
    try:
        found: dict[str, Any] = load_state_dict(str(path), weights_only=True)
    except (OSError, EOFError, LookupError, RuntimeError, ValueError, AttributeError, *packed) as error:
        message = (
            f"{path}: no weights can be read from it ({first_line(error)}). Expected tensors by name, as "
            "`torch.save(model.state_dict(), FILE)` or safetensors write them."
        )
        raise ModelError(message) from error
    tensors = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        message = f"{path}: it holds no tensors by name."
        raise ModelError(message)
    return tensors


def _classes(weights: Mapping[str, torch.Tensor], settings: Mapping[str, Any]) -> int:
    """The outputs of the classifier in the file, which timm compares too; 0 without one."""
    named = settings.get("classifier")
    for name in (named,) if isinstance(named, str) else tuple(named or ()):
        if f"{name}.weight" in weights:
            return len(weights[f"{name}.weight"])
    return 0
