"""What a store keeps of the model itself: W_lm, basis or scale, and a few rows of the model's own logits."""

import hashlib
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import zarr
from numpy.typing import NDArray

from agiqa.errors import HeadError
from agiqa.extract.backbones import Backbone, Prepared
from agiqa.extract.targets import Target, tensor_bits
from agiqa.store import (
    Basis,
    Store,
    UnitWriter,
    create_whole_array,
    load_scale,
    open_store,
    save_basis,
    save_scale,
)

_PROBE_ITEMS = 2
_PROBE_ROWS = 4

Prepare = Callable[[int], Prepared]
"""From an item's position in the store to what the model reads of it."""


def write_model_arrays(writer: UnitWriter, backbone: Backbone, target: Target, prepare: Prepare) -> Target:
    """Load the model and store what `target` needs of it, once per store; the target with the constants stored there.

    Raises HeadError for a basis of another model.
    """
    backbone.load()
    bits, dtype = tensor_bits(backbone.lm_head(bent=target.encoding == "logits"))
    sha256 = hashlib.sha256(bits.data).hexdigest()
    basis, scale = target.basis, target.scale
    if basis is not None:
        _check_basis(basis, sha256)

    def write(group: zarr.Group) -> None:
        if target.encoding in ("hidden", "int8"):
            attributes = {"logical_dtype": dtype, "lm_head_sha256": sha256}
            create_whole_array(group, "lm_head/weight", bits, attributes=attributes)
        if basis is not None:
            save_basis(group, basis)
        if scale is not None:
            save_scale(group, scale)
        rows, logits = _probe(writer.store, backbone, prepare)
        probe_bits, probe_dtype = tensor_bits(logits)
        create_whole_array(group, "probe/rows", rows)
        attributes = {"logical_dtype": probe_dtype, "lm_head_sha256": sha256}
        create_whole_array(group, "probe/logits", probe_bits, attributes=attributes)

    writer.write_model_arrays(write)
    # a run beside this one may have stored its own rounding of the same constants first
    stored = open_store(writer.store.path, allow_partial=True)
    return replace(
        target,
        basis=None if basis is None else stored.basis(),
        scale=None if scale is None else load_scale(stored.group),
    )


def check_basis(backbone: Backbone, basis: Basis) -> None:
    """Raise HeadError unless `basis` was made for the language-model head of `backbone`, which is loaded for it."""
    backbone.load()
    _check_basis(basis, hashlib.sha256(tensor_bits(backbone.lm_head())[0].data).hexdigest())


def _check_basis(basis: Basis, lm_head_sha256: str) -> None:
    if basis.lm_head_sha256 != lm_head_sha256:
        message = (
            f"The basis {basis.id[:12]} belongs to the language-model head {basis.lm_head_sha256[:12]}, this model "
            f"has {lm_head_sha256[:12]}. Use a basis made from this model."
        )
        raise HeadError(message)


def _probe(store: Store, backbone: Backbone, prepare: Prepare) -> tuple[NDArray[np.int64], torch.Tensor]:
    """Rows (n,) spread over the store and the model's own logits there, (n, V)."""
    with_tokens = np.flatnonzero(store.n_tokens > 0)
    positions = np.unique(with_tokens[np.linspace(0, len(with_tokens) - 1, _PROBE_ITEMS).astype(int)])
    rows: list[int] = []
    logits: list[torch.Tensor] = []
    for position in positions.tolist():
        tokens = np.unique(np.linspace(0, int(store.n_tokens[position]) - 1, _PROBE_ROWS).astype(int))
        rows.extend((store.row_starts[position] + tokens).tolist())
        logits.append(backbone.logits(prepare(position))[torch.from_numpy(tokens)])
    return np.array(rows, np.int64), torch.cat(logits)
