"""Weights by name from safetensors into a model that was built without any, straight onto its device."""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from agiqa.errors import ModelError, listed
from agiqa.extract.models.checkpoints import Checkpoint, tensor_shapes
from agiqa.extract.models.loading import failures_of
from agiqa.extract.models.minicpm.model import MiniCPMV


def check_weights(checkpoint: Checkpoint, model: MiniCPMV) -> None:
    """Compare the heads of the weight files with `model`, which has no weights; no tensor is read.

    Raises ModelError naming tensors that are unknown to the model, missing, of another shape, or in two files.
    """
    expected = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    found: dict[str, tuple[int, ...]] = {}
    twice: list[str] = []
    with failures_of(checkpoint, "read the weights"):
        for path in _files(checkpoint):
            shapes = tensor_shapes(path)
            twice += [name for name in shapes if name in found]
            found |= shapes
    _refuse(checkpoint, "unknown", [name for name in found if name not in expected])
    _refuse(checkpoint, "missing", [name for name in expected if name not in found])
    _refuse(checkpoint, "repeated", twice)
    for name, shape in expected.items():
        if found[name] != shape:
            message = (
                f"{checkpoint.name}: the tensor {name} has shape {found[name]} in {checkpoint.folder}, and {shape} by "
                "its configuration."
            )
            raise ModelError(message)


def load_weights(checkpoint: Checkpoint, model: MiniCPMV, *, dtype: torch.dtype, device: torch.device) -> MiniCPMV:
    """`model`, which has no weights, for inference, with those of `checkpoint` as `dtype` on `device`.

    They fit, by `check_weights`. Raises ModelError for files that cannot be read.
    """
    with failures_of(checkpoint, "load the weights"):
        for path in _files(checkpoint):
            with safe_open(path, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    holder, _, last = name.rpartition(".")
                    value = nn.Parameter(tensors.get_tensor(name).to(dtype), requires_grad=False)
                    setattr(model.get_submodule(holder), last, value)
    model.restore_frequencies(device)
    return model.eval().requires_grad_(requires_grad=False)


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Those that hold tensors."""
    return [path for path in checkpoint.weight_files() if path.suffix != ".json"]


def _refuse(checkpoint: Checkpoint, kind: str, names: list[str]) -> None:
    if names:
        message = f"{checkpoint.name}: {len(names)} {kind} tensors in {checkpoint.folder}: {listed(sorted(names))}."
        raise ModelError(message)
