"""Opens the backbone of a model by name: the kinds of backbones, and the choice among them."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agiqa.errors import ConfigError, ModelError, UnknownName
from agiqa.extract.models.adapters import Adapter, resolve_adapter
from agiqa.extract.models.checkpoints import Checkpoint, resolve_checkpoint
from agiqa.extract.models.contract import Backbone
from agiqa.extract.models.huggingface import HuggingFaceBackbone, TextBackbone
from agiqa.extract.models.loading import load_config
from agiqa.extract.models.minicpm.backbone import MiniCPMBackbone
from agiqa.extract.models.minicpm.model import MODEL_TYPE, read_config
from agiqa.extract.models.preparing import Opener
from agiqa.extract.models.taps import TappedBackbone
from agiqa.extract.models.timm_backbone import TimmBackbone
from agiqa.extract.models.timm_models import TIMM, find_timm_model
from agiqa.extract.models.vision import VisionBackbone
from agiqa.parts import Origin
from agiqa.progress import say
from agiqa.registry import Registry

BACKBONES: Registry[type[HuggingFaceBackbone]] = Registry("backbone")
for _backbone in (TextBackbone, VisionBackbone, MiniCPMBackbone):
    BACKBONES.add(_backbone.kind, _backbone)

MERGE_RECORD = "merge.json"
"""The file in a checkpoint by `agiqa merge` that names model and adapter."""


def open_backbone(
    model: str,
    *,
    adapter: str | None = None,
    kind: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    max_slices: int | None = None,
    weights: str | Path | None = None,
    image_size: int | None = None,
    tap: str | None = None,
) -> Backbone:
    """The backbone of `model`, ready to prepare items; `load` reads its weights.

    `model` is a folder, a .gguf file, `pkg:PACKAGE[/FILE]` or a hub id (see `agiqa.extract.models.checkpoints`), or an
    image encoder `timm:NAME` (see `agiqa.extract.models.timm_models`), with `weights` of a file and an `image_size` in
    pixels in place of timm's. `tap` reads the image part of a vision-language model alone (see
    `agiqa.extract.models.taps`); `blocks` reads the blocks of a convolutional network of timm in place of its stages.
    `adapter` is the folder or hub id of a LoRA adapter (see `agiqa.extract.models.adapters`), merged on `load`.
    `kind` is text, vision, minicpm, or auto: minicpm for MiniCPM-Llama3-V-2.5, vision for image-text-to-text models
    with a processor, else text. `dtype` is bfloat16, float16, float32, or auto: the checkpoint's own, bfloat16 for
    GGUF. `device` is a torch device, or auto: CUDA if there is one. `max_slices` limits the slices of an image in
    MiniCPM-Llama3-V-2.5, by default 9. Raises UnknownName for a kind or dtype, ConfigError for a device or for
    `max_slices` with another model, ModelError for a checkpoint or adapter that is missing, damaged, or unsuitable.
    """
    if kind not in ("auto", *BACKBONES):
        raise UnknownName.of(kind="backbone", name=kind, known=["auto", *BACKBONES])
    if model.startswith(TIMM):
        given = {"--adapter": adapter, "--max-slices": max_slices}
        _refuse_options(given, f"{model} is an image encoder of timm")
        file = None if weights is None else Path(weights)
        encoder = find_timm_model(model, weights=file, image_size=image_size)
        return TimmBackbone(encoder, dtype=dtype, device=device, tap=tap)
    _refuse_options({"--weights": weights, "--image-size": image_size}, f"{model} is no image encoder timm:NAME")
    checkpoint = resolve_checkpoint(model)
    resolved = None if adapter is None else resolve_adapter(adapter)
    if resolved is not None:
        _refuse_merged(checkpoint, resolved)
    config = _read_config(checkpoint, max_slices)
    chosen = _fitting(checkpoint, config) if kind == "auto" else kind
    if type(config) not in BACKBONES.get(chosen).classes:
        message = f"{model}: the model type {config.model_type!r} cannot serve as the backbone {chosen!r}."
        raise ModelError(message)
    _check_states(BACKBONES.get(chosen))
    backbone = BACKBONES.get(chosen)(checkpoint, config, adapter=resolved, dtype=dtype, device=device)
    return backbone if tap is None else TappedBackbone(backbone, tap)


def _refuse_options(given: Mapping[str, object], why: str) -> None:
    """Raise ConfigError if any of the options is `given`."""
    wrong = [option for option, value in given.items() if value is not None]
    if wrong:
        message = f"{why}: leave out {' and '.join(wrong)}."
        raise ConfigError(message)


def check_writes_text(model: str) -> None:
    """Raise ConfigError for an image encoder, before its weights are downloaded."""
    if model.startswith(TIMM):
        message = (
            f"{model} is an image encoder, which writes no text. Give a language model or a vision-language model."
        )
        raise ConfigError(message)


def _check_states(kind: type[HuggingFaceBackbone]) -> None:
    """Raise ConfigError for a class of one's own whose hidden states no store would get: `layer_states` makes them."""
    order = [vars(one).keys() for one in kind.__mro__]

    def first(*names: str) -> int:
        return next(place for place, defined in enumerate(order) if not defined.isdisjoint(names))

    if first("hidden_states", "states") < first("layer_states", "_states_of"):
        message = (
            f"The backbone {kind.kind!r} ({kind.__module__}.{kind.__name__}) defines `hidden_states` or `states`, "
            "which extract no longer calls. Define `layer_states` instead: it gives each item's states by layer, such "
            "as {'last': states}."
        )
        raise ConfigError(message)


def _refuse_merged(checkpoint: Checkpoint, adapter: Adapter) -> None:
    """Raise ModelError if `agiqa merge` has made `checkpoint` with this very `adapter`: it would count twice."""
    path = checkpoint.folder / MERGE_RECORD
    if not path.is_file():
        return
    merged = checkpoint.read_settings(MERGE_RECORD, "the record of `agiqa merge`").get("adapter")
    if isinstance(merged, dict) and merged.get("files") == adapter.provenance()["files"]:
        message = (
            f"{checkpoint.name} is merged with the adapter {adapter.name} already ({path}). Leave the adapter out, or "
            "give the model that it was made for."
        )
        raise ModelError(message)


def opener_of(model: str, *, adapter: str | None, dtype: str, max_slices: int | None, **image_options: Any) -> Opener:
    """A picklable function that opens the model: `opener(device=DEVICE)`, as `open_backbone`."""
    return partial(open_backbone, model, adapter=adapter, dtype=dtype, max_slices=max_slices, **image_options)


def opened(opener: Opener, device: str) -> Backbone:
    """The backbone on `device`, its tensor headers checked. Says so where `auto` found no GPU."""
    backbone = opener(device=device)
    if device == "auto" and backbone.device.type == "cpu":
        say("no GPU found: the model runs on the CPU")
    backbone.check_tensors()
    return backbone


def open_checked(
    model: str, *, adapter: str | None, dtype: str, device: str, max_slices: int | None, **image_options: Any
) -> Backbone:
    """As `open_backbone`, with the checks of `opened`."""
    return opened(opener_of(model, adapter=adapter, dtype=dtype, max_slices=max_slices, **image_options), device)


def devices_of_host(device: torch.device, count: int) -> list[str]:
    """`count` devices of the kind of `device`. Raises ConfigError if the host has fewer, or `device` has a number."""
    if device.type != "cuda":
        return [str(device)] * count
    if str(device) != "cuda":
        message = f"--devices {count} uses the first {count} GPUs; give --device cuda, not {device}."
        raise ConfigError(message)
    there = torch.cuda.device_count()
    if count > there:
        message = (
            f"--devices {count} was asked for, but torch sees {there} CUDA devices. Give fewer; it sees none that "
            "CUDA_VISIBLE_DEVICES leaves out."
        )
        raise ConfigError(message)
    return [f"cuda:{index}" for index in range(count)]


def _read_config(checkpoint: Checkpoint, max_slices: int | None) -> Any:
    """The configuration of a model of transformers, or of MiniCPM-Llama3-V-2.5."""
    if checkpoint.raw_config.get("model_type") == MODEL_TYPE:
        config = read_config(checkpoint)
        return config if max_slices is None else replace(config, slices=max_slices)
    if max_slices is not None:
        message = (
            f"{checkpoint.name}: --max-slices is for MiniCPM-Llama3-V-2.5, whose images are cut here; leave it out."
        )
        raise ConfigError(message)
    return load_config(checkpoint)


def _fitting(checkpoint: Checkpoint, config: Any) -> str:
    """The kind of backbone for a model; one of your own comes before those of agiqa."""
    for kind in BACKBONES:
        backbone = BACKBONES.get(kind)
        if not Origin.of(backbone).is_built_in and type(config) in backbone.classes:
            return kind
    if type(config) in MiniCPMBackbone.classes:
        return MiniCPMBackbone.kind
    if type(config) in VisionBackbone.classes and checkpoint.has_processor:
        return "vision"
    if type(config) in TextBackbone.classes:
        return "text"
    message = (
        f"{checkpoint.name}: the model type {config.model_type!r} is neither a causal language model nor an "
        "image-text-to-text model with its processor (processor_config.json or preprocessor_config.json)."
    )
    raise ModelError(message)
