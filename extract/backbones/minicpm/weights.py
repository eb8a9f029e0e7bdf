"""Weights by name from safetensors into a model that was built without any, straight onto its device."""

import torch
from safetensors import safe_open
from torch import nn

from agiqa.errors import ModelError, listed
from agiqa.extract.backbones.loading import failures_of
from agiqa.extract.backbones.minicpm.model import MiniCPMV
from agiqa.extract.checkpoints import Checkpoint


def load_weights(checkpoint: Checkpoint, model: MiniCPMV, *, dtype: torch.dtype, device: torch.device) -> MiniCPMV:
    """`model`, which has no weights, for inference, with those of `checkpoint` as `dtype` on `device`.

    Raises ModelError naming tensors that are missing, of another shape, or unknown to the model.
    """
    left = dict(model.named_parameters())
    with failures_of(checkpoint, "load the weights"):
        for path in checkpoint.weight_files():
            if path.suffix == ".json":
                continue
            with safe_open(path, framework="pt", device=str(device)) as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    if name not in left:
                        _refuse(checkpoint, "unknown", [name for name in tensors.keys() if name not in left])  # noqa: SIM118
                    _set(checkpoint, model, name, tensors.get_tensor(name).to(dtype), left.pop(name).shape)
    if left:
        _refuse(checkpoint, "missing", sorted(left))
    model.restore_frequencies(device)
    return model.eval().requires_grad_(requires_grad=False)


def _set(checkpoint: Checkpoint, model: MiniCPMV, name: str, value: torch.Tensor, shape: torch.Size) -> None:
    if value.shape != shape:
        message = (
            f"{checkpoint.name}: the tensor {name} has shape {tuple(value.shape)} in {checkpoint.folder}, and "
            f"{tuple(shape)} by its configuration."
        )
        raise ModelError(message)
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, nn.Parameter(value, requires_grad=False))


def _refuse(checkpoint: Checkpoint, kind: str, names: list[str]) -> None:
    message = f"{checkpoint.name}: {len(names)} {kind} tensors in {checkpoint.folder}: {listed(names)}."
    raise ModelError(message)
