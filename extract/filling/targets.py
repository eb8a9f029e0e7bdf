"""What an extraction stores of the hidden states: as they are, as sketch coordinates, in eight bits, or as logits."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.extract.models import Backbone
from agiqa.store import SCALED_DTYPE, Basis, Scale


@dataclass(frozen=True, kw_only=True)
class Target:
    """The encoding of a store to be filled, with the constants that it needs."""

    encoding: str
    basis: Basis | None = None
    """Of a sketch."""
    scale: Scale | None = None
    """Of `int8`."""
    keep_logits: bool = False
    """Whether raw logits are kept beside hidden states."""

    def logical_dtype(self, backbone: Backbone) -> str:
        """Of the rows as they will be read."""
        if self.basis is not None:
            return self.basis.logical_dtype
        return SCALED_DTYPE if self.scale is not None else backbone.logical_dtype

    def width(self, backbone: Backbone) -> int:
        """Values per row."""
        if self.basis is not None:
            return self.basis.rank
        return backbone.vocab_size if self.encoding == "logits" else backbone.hidden_size

    def provenance(self) -> dict[str, Any]:
        """What the store's provenance says of the constants: not their bits, which differ between machines."""
        if self.basis is not None:
            return {"sketch": {"rank": self.basis.rank, "calibration": self.basis.calibration}}
        return {"int8": {"calibration": self.scale.calibration}} if self.scale is not None else {}


def tensor_bits(tensor: torch.Tensor) -> tuple[NDArray[Any], str]:
    """The values of `tensor` in their own bits (uint16 for bfloat16), and the name of its dtype."""
    values = tensor.detach().contiguous().cpu()
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).numpy().view(np.uint16), "bfloat16"
    return values.numpy(), str(values.dtype).removeprefix("torch.")


def tensor_of(bits: NDArray[Any], logical_dtype: str) -> torch.Tensor:
    """The tensor whose `tensor_bits` these are."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)
