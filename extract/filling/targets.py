"""What an extraction stores of the model: the encoding of its hidden states, W_lm, constants, and a few raw logits."""

import hashlib
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.extract.models import Backbone, Prepared
from agiqa.extract.models.ahead import Ahead
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

    @cached_property
    def sha256(self) -> str:
        """Of its bits, in hex; identifies the model to bases and heads. The first call hashes them."""
        return hashlib.sha256(self.bits.data).hexdigest()


def lm_head_of(backbone: Backbone, *, bent: bool = False) -> LmHead:
    """W_lm of `backbone`, which is loaded for it; `bent` and errors as in `Backbone.lm_head`."""
    backbone.load()
    bits, dtype = tensor_bits(backbone.lm_head(bent=bent))
    return LmHead(bits=bits, dtype=dtype)


def check_basis(basis: Basis, head: LmHead) -> None:
    """Raise HeadError unless `basis` was made for `head`."""
    if basis.lm_head_sha256 != head.sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, this model "
            f"has {head.sha256[:12]}. Use a basis made from this model."
        )
        raise HeadError(message)


@contextmanager
def model_arrays_written(
    writer: UnitWriter, backbone: Backbone, target: Target, prepare: Callable[[int], Prepared]
) -> Generator[Target]:
    """Store what `target` needs of the model, once per store, while the block computes rows.

    Yields the target with the constants stored there. The rows depend on a basis or scale, so those are stored first.
    Otherwise a thread hashes and writes W_lm, and the end of the block waits for it. `prepare` prepares the item at a
    position of the store. The device computes nothing for this after the beginning of the block. Raises HeadError for a
    basis of another model.
    """
    arrays = partial(_Arrays.of, writer, backbone, target, prepare)
    if target.basis is not None or target.scale is not None:
        yield _write_with_constants(writer, target, arrays, lm_head_of(backbone))
    elif writer.writes_model_arrays():  # another run
        yield target
        writer.write_model_arrays(lambda group: arrays().write(group))  # if the other was killed
    elif writer.store.layout.model_commit.exists():
        yield target
    else:
        with Ahead(partial(writer.write_model_arrays, arrays().write), finishes=True) as writing:
            yield target
            writing.result()


def _write_with_constants(writer: UnitWriter, target: Target, arrays: Callable[..., "_Arrays"], head: LmHead) -> Target:
    """Store the arrays; the target with the constants that are stored, perhaps by another run in its own rounding."""
    if target.basis is not None:
        check_basis(target.basis, head)
    writer.write_model_arrays(lambda group: arrays(head=head).write(group))
    stored = open_store(writer.store.path, allow_partial=True)
    return replace(
        target,
        basis=None if target.basis is None else stored.basis(),
        scale=None if target.scale is None else stored.scale,
    )


@dataclass(frozen=True, kw_only=True)
class _Arrays:
    """What a store keeps of the model, on the host."""

    target: Target
    head: LmHead
    rows: NDArray[np.int64]
    """(n,) of the probe."""
    logits: torch.Tensor
    """(n, V), the model's own there."""

    @classmethod
    def of(
        cls,
        writer: UnitWriter,
        backbone: Backbone,
        target: Target,
        prepare: Callable[[int], Prepared],
        *,
        head: LmHead | None = None,
    ) -> "_Arrays":
        """Copied from the device, and computed there; `head` is W_lm if it was copied before."""
        head = head or lm_head_of(backbone, bent=target.encoding == "logits")
        rows, logits = _probe(writer.store, backbone, prepare)
        return cls(target=target, head=head, rows=rows, logits=logits.cpu())

    def write(self, group: zarr.Group) -> None:
        """Hash and write."""
        head, target = self.head, self.target
        if target.encoding in ("hidden", "int8"):
            attributes = {"logical_dtype": head.dtype, "lm_head_sha256": head.sha256}
            create_whole_array(group, "lm_head/weight", head.bits, attributes=attributes)
        if target.basis is not None:
            save_basis(group, target.basis)
        if target.scale is not None:
            save_scale(group, target.scale)
        probe_bits, probe_dtype = tensor_bits(self.logits)
        create_whole_array(group, "probe/rows", self.rows)
        attributes = {"logical_dtype": probe_dtype, "lm_head_sha256": head.sha256}
        create_whole_array(group, "probe/logits", probe_bits, attributes=attributes)


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
