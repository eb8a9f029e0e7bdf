"""Pretrained weights of networks: timm's by name, or a file's, whose shapes are compared with the network's."""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from agiqa.bench.networks.architectures.contract import Network
from agiqa.bench.networks.architectures.dbcnn import DBCNN, S_CNN
from agiqa.bench.networks.architectures.encoders import MeanOfConvolutions, size_of
from agiqa.bench.networks.architectures.vil import ViLEncoder
from agiqa.bench.networks.vil_names import renamed
from agiqa.errors import ModelError, first_line, listed
from agiqa.extract.models.timm_models import import_timm

State = dict[str, Tensor]
_NESTED = ("state_dict", "model", "model_state_dict", "params")
"""Where checkpoints of training scripts keep the weights."""
_PREFIXES = ("module.", "model.", "encoder.", "backbone.")
_DISTORTIONS = "S-CNN"


def timm_weights(name: str, *, image_size: int) -> State:
    """timm's pretrained weights `name`, downloaded unless they are cached, without the classifier.

    They are those for images of `image_size` pixels where the shapes of a network depend on it.

    Raises ModelError where timm has none of this name, or they cannot be downloaded.
    """
    timm = import_timm()
    remedy = "Give a file by --weights, or train from random weights by --no-pretrained."
    if not timm.is_model_pretrained(name):
        message = f"timm has no pretrained weights {name!r}. {remedy}"
        raise ModelError(message)
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0, **size_of(name, image_size))
    except (OSError, RuntimeError, ValueError) as error:
        message = f"The pretrained weights {name!r} of timm cannot be loaded ({first_line(error)}). {remedy}"
        raise ModelError(message) from error
    return cast("State", model.state_dict())


def file_weights(path: Path) -> State:
    """The tensors of a safetensors file, or of a checkpoint of torch. Raises ModelError for anything else."""
    try:
        found: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except (OSError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError, ValueError) as error:
        message = (
            f"{path} cannot be read as weights ({first_line(error)}). Give a safetensors file, or a state dict that "
            "torch.save wrote."
        )
        raise ModelError(message) from error
    for key in _NESTED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    tensors = {str(name): value for name, value in dict(found).items() if isinstance(value, Tensor)}
    if not tensors:
        message = f"{path} holds no named tensors."
        raise ModelError(message)
    return tensors


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex. Raises ModelError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        message = f"{path} cannot be read ({error})."
        raise ModelError(message) from error


def give_weights(network: Network, state: State, *, name: str, where: str) -> str:
    """Load `state`, from the file or weights `where`, into the network `name`; says into which of its layers.

    They are for the whole network, for its body, or (DBCNN) for S-CNN; other tensors, such as those of a classifier,
    are left out. Raises ModelError, naming both sides, where tensors are missing or have other shapes.
    """
    whole = f"all of {name}"
    parts: dict[str, nn.Module] = {whole: network, f"the body of {name}": network.body}
    if isinstance(network, DBCNN):
        parts[_DISTORTIONS] = nn.ModuleDict({"features": network.distortion})
        parts["VGG16"] = nn.ModuleDict({"features": network.content})
    state = _cleaned(state, network)
    matching = {what: len(state.keys() & part.state_dict().keys()) for what, part in parts.items()}
    what = max(matching, key=lambda part: (matching[part], -len(parts[part].state_dict())))
    if not matching[what]:
        ours = listed(sorted(network.body.state_dict()), 3)
        message = f"{where} does not fit {name}: it has {listed(sorted(state), 3)}, and the network has {ours}."
        raise ModelError(message)
    part = parts[what]
    wanted = part.state_dict()
    state = _resized(state, wanted)
    missing = sorted(key for key in wanted if key not in state and not key.endswith("num_batches_tracked"))
    if missing:
        message = f"{where} lacks tensors of {what}: {listed(missing)}."
        raise ModelError(message)
    for key, value in wanted.items():
        if key in state and state[key].shape != value.shape:
            message = (
                f"{where} has {key!r} of shape {tuple(state[key].shape)}, and {name} expects {tuple(value.shape)}. "
                "Give weights of the same network, for images of the same size."
            )
            raise ModelError(message)
    part.load_state_dict({key: value for key, value in state.items() if key in wanted}, strict=False)
    if isinstance(network, DBCNN):
        network.knows_distortions |= what in (_DISTORTIONS, whole)
    return what


def holds_distortions(state: State) -> bool:
    """Whether weights of a file are those of S-CNN: only its first convolution makes 48 channels."""
    first = next((value for name, value in state.items() if name.endswith("features.0.weight")), None)
    return first is not None and len(first) == S_CNN[0][0]


def _cleaned(state: State, network: Network) -> State:
    """`state` without prefixes of wrappers, and published names of ViL become ours."""
    own = network.state_dict().keys()
    if state.keys() >= {key for key in own if not key.endswith("num_batches_tracked")}:
        return state
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    if isinstance(network.body, ViLEncoder):
        state = renamed(state)
    if isinstance(network, DBCNN) or isinstance(network.body, MeanOfConvolutions):
        state = {key: value for key, value in state.items() if key.startswith("features.")}
    return state


def _resized(state: State, wanted: Mapping[str, Tensor]) -> State:
    """`state` with position embeddings for the image size of the network."""
    found = dict(state)
    for key in ("pos_embed", "positions"):
        ours, theirs = wanted.get(key), state.get(key)
        if ours is None or theirs is None or ours.shape == theirs.shape or ours.shape[-1] != theirs.shape[-1]:
            continue
        if ours.ndim == 4 and theirs.ndim == 4:
            grid = theirs.permute(0, 3, 1, 2).float()
            resized = nn.functional.interpolate(grid, ours.shape[1:3], mode="bicubic", align_corners=False)
            found[key] = resized.permute(0, 2, 3, 1)
        elif ours.ndim == 3 and theirs.ndim == 3:
            side = round((ours.shape[1] - 1) ** 0.5)
            if side * side == ours.shape[1] - 1:
                found[key] = import_timm().layers.resample_abs_pos_embed(theirs, [side, side])
    return found
