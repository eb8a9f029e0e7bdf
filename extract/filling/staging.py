"""From hidden states on the device to the rows of a store: what crosses to the host, and what is done there."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.extract.filling.targets import Target
from agiqa.extract.filling.transfers import Transfers
from agiqa.extract.models import Backbone
from agiqa.store import from_float32, to_float32

LOGIT_ROWS = 512
"""Rows of raw logits that are on the device at once: 131 MB with a vocabulary of 128,256."""

Bounds = Sequence[tuple[int, int]]
"""First row and one past the last of each item within its unit."""


@dataclass(frozen=True, kw_only=True)
class Staging:
    """One encoding's way from the device to the store."""

    dtype: torch.dtype
    """Of what crosses."""
    width: int
    """Values per token that cross."""
    put: Callable[[torch.Tensor, torch.Tensor], None]
    """`put(states, out)`: hidden states (n, D) on the device into rows (n, width) of a host buffer, without waiting."""
    finish: Callable[[NDArray[Any], Bounds], tuple[NDArray[Any], NDArray[np.float32] | None]]
    """The bits that crossed as rows of the store, and the scale of each token for `int8`; run by other threads."""


def staging_of(target: Target, backbone: Backbone, transfers: Transfers) -> Staging:
    """How rows of `target` are made of what `backbone`, which is loaded, computes.

    A sketch is computed where the hidden states are. On the CPU that is the rounding of `Basis.coordinates`, item by
    item; on a GPU `coordinates_on_device`, so that only coordinates cross.
    """
    dtype: torch.dtype = getattr(torch, backbone.logical_dtype)
    if target.encoding == "logits":
        dtype = backbone.lm_head(bent=True).dtype

        def put_logits(states: torch.Tensor, out: torch.Tensor) -> None:
            for start in range(0, len(states), LOGIT_ROWS):
                rows = slice(start, start + LOGIT_ROWS)
                transfers.download(backbone.project(states[rows]), out[rows])

        return Staging(dtype=dtype, width=backbone.vocab_size, put=put_logits, finish=_as_they_are)
    if target.basis is not None and backbone.device.type != "cpu":
        wanted: torch.dtype = getattr(torch, target.basis.logical_dtype)
        to_coordinates = torch.from_numpy(target.basis.map).to(backbone.device)

        def put_coordinates(states: torch.Tensor, out: torch.Tensor) -> None:
            transfers.download(coordinates_on_device(states, to_coordinates).to(wanted), out)

        return Staging(dtype=wanted, width=target.basis.rank, put=put_coordinates, finish=_as_they_are)
    finish = _as_they_are if target.basis is None and target.scale is None else _encoder(target, backbone.logical_dtype)
    return Staging(dtype=dtype, width=backbone.hidden_size, put=transfers.download, finish=finish)


def coordinates_on_device(states: torch.Tensor, to_coordinates: torch.Tensor) -> torch.Tensor:
    """`Basis.coordinates` of states (n, D) in float32, (n, r), where both tensors are; TF32 stays off meanwhile.

    Sums run in another order than NumPy's: coordinates differ by about 1e-6 of their largest.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.inference_mode():
            return torch.nn.functional.linear(states.float(), to_coordinates)
    finally:
        torch.set_float32_matmul_precision(precision)


def _as_they_are(staged: NDArray[Any], _bounds: Bounds) -> tuple[NDArray[Any], None]:
    return staged, None


def _encoder(
    target: Target, logical_dtype: str
) -> Callable[[NDArray[Any], Bounds], tuple[NDArray[Any], NDArray[np.float32] | None]]:
    """Encodes hidden states on the host, item by item as ever, so that the bits are the same in every process."""

    def finish(staged: NDArray[Any], bounds: Bounds) -> tuple[NDArray[Any], NDArray[np.float32] | None]:
        if target.scale is not None:
            encoded = [target.scale.encode(to_float32(staged[start:stop], logical_dtype)) for start, stop in bounds]
            return np.concatenate([rows for rows, _ in encoded]), np.concatenate([scale for _, scale in encoded])
        assert target.basis is not None  # staging_of chose
        basis = target.basis
        items = [basis.coordinates(to_float32(staged[start:stop], logical_dtype)) for start, stop in bounds]
        return np.concatenate([from_float32(rows, basis.logical_dtype) for rows in items]), None

    return finish
