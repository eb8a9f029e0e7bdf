"""The large sums and decompositions behind a basis, in float64 on a GPU."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.store import Moments

_BLOCK_ROWS = 8192


def moments_on_device(blocks: Iterable[torch.Tensor], width: int, device: torch.device) -> Moments:
    """As `agiqa.store.moments_of`, of hidden states (tokens, D) that are on `device`.

    Raises ConfigError where there are none.
    """
    second = torch.zeros(width, width, dtype=torch.float64, device=device)
    first, tokens = torch.zeros(width, dtype=torch.float64, device=device), 0
    for block in blocks:
        wide = block.double()
        second.addmm_(wide.T, wide)
        first += wide.sum(dim=0)
        tokens += len(block)
    return Moments.of_sums(tokens, second.cpu().numpy(), first.cpu().numpy())


def gram_on_device(weight: torch.Tensor) -> NDArray[np.float64]:
    """W^T W (D, D) of `weight` (V, D), where it is."""
    total = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=weight.device)
    for block in weight.split(_BLOCK_ROWS):
        wide = block.double()
        total.addmm_(wide.T, wide)
    gram: NDArray[np.float64] = total.cpu().numpy()
    return gram


def eigh_on_device(
    matrix: NDArray[np.float64], device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """As `numpy.linalg.eigh`, computed on `device`."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(matrix).to(device))
    return values.cpu().numpy(), vectors.cpu().numpy()
