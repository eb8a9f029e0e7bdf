"""What an extraction stores of the model: the encoding of its hidden states, W_lm, constants, and a few raw logits."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.batches import BatchRunner
from agiqa.store import (
    SCALED_DTYPE,
    Basis,
    Scale,
    Store,
    UnitWriter,
    create_whole_array,
    open_store,
    save_basis,
    save_scale,
)

_PROBE_ITEMS = 2
_PROBE_ROWS = 4


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
        """Dtype of the rows when they are read."""
        if self.basis is not None:
            return self.basis.logical_dtype
        return SCALED_DTYPE if self.scale is not None else backbone.logical_dtype

    def width(self, backbone: Backbone) -> int:
        """Values per row."""
        if self.basis is not None:
            return self.basis.rank
        return backbone.vocab_size if self.encoding == "logits" else backbone.hidden_size

    def provenance(self) -> dict[str, Any]:
        """The constants in the store's provenance: not their bits, which differ between machines."""
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
    """The tensor with these `tensor_bits`."""
    if logical_dtype == "bfloat16":
        return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(bits)


@dataclass(frozen=True, kw_only=True)
class LmHead:
    """W_lm on the host."""

    bits: NDArray[Any]
    """(V, D), see `tensor_bits`."""
    dtype: str
    """Of its values."""
    sha256: str
    """Of its bits, in hex; identifies the model to bases and heads."""


def lm_head_of(backbone: Backbone, *, bent: bool = False) -> LmHead:
    """W_lm of `backbone`, which is loaded for it; `bent` and errors as in `Backbone.lm_head`."""
    backbone.load()
    bits, dtype = tensor_bits(backbone.lm_head(bent=bent))
    return LmHead(bits=bits, dtype=dtype, sha256=hashlib.sha256(bits.data).hexdigest())


def check_basis(basis: Basis, head: LmHead) -> None:
    """Raise HeadError unless `basis` was made for `head`."""
    if basis.lm_head_sha256 != head.sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, this model "
            f"has {head.sha256[:12]}. Use a basis made from this model."
        )
        raise HeadError(message)


def write_model_arrays(
    writer: UnitWriter, backbone: Backbone, target: Target, prepare: Callable[[int], Prepared]
) -> Target:
    """Load the model and store what `target` needs of it, once per store; the target with the constants stored there.

    `prepare` prepares the item at a position of the store. Raises HeadError for a basis of another model.
    """
    head = lm_head_of(backbone, bent=target.encoding == "logits")
    basis, scale = target.basis, target.scale
    if basis is not None:
        check_basis(basis, head)

    def write(group: zarr.Group) -> None:
        if target.encoding in ("hidden", "int8"):
            attributes = {"logical_dtype": head.dtype, "lm_head_sha256": head.sha256}
            create_whole_array(group, "lm_head/weight", head.bits, attributes=attributes)
        if basis is not None:
            save_basis(group, basis)
        if scale is not None:
            save_scale(group, scale)
        rows, logits = _probe(writer.store, backbone, prepare)
        probe_bits, probe_dtype = tensor_bits(logits)
        create_whole_array(group, "probe/rows", rows)
        attributes = {"logical_dtype": probe_dtype, "lm_head_sha256": head.sha256}
        create_whole_array(group, "probe/logits", probe_bits, attributes=attributes)

    writer.write_model_arrays(write)
    # another run may have stored its own rounding of the same constants first
    stored = open_store(writer.store.path, allow_partial=True)
    return replace(
        target,
        basis=None if basis is None else stored.basis(),
        scale=None if scale is None else stored.scale,
    )


def _probe(
    store: Store, backbone: Backbone, prepare: Callable[[int], Prepared]
) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Rows (n,) spread over the store and the model's own logits there, (n, V)."""
    with_tokens = np.flatnonzero(store.n_tokens > 0)
    positions = np.unique(with_tokens[np.linspace(0, len(with_tokens) - 1, _PROBE_ITEMS).astype(int)])
    rows: list[int] = []
    logits: list[torch.Tensor] = []

    def compute(alone: Sequence[int]) -> None:
        (position,) = alone
        tokens = np.unique(np.linspace(0, int(store.n_tokens[position]) - 1, _PROBE_ROWS).astype(int))
        logits.append(backbone.logits(prepare(position))[torch.from_numpy(tokens)])
        rows.extend((store.row_starts[position] + tokens).tolist())

    names = store.items.names
    BatchRunner(1).run(compute, positions.tolist(), name=lambda position: f"the logits of item {names[position]!r}")
    return np.array(rows, np.int64), torch.cat(logits)
