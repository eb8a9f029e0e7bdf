"""Small arrays onto a device without waiting for what it is at work on."""

from typing import Any

import torch
from numpy.typing import NDArray


def uploaded(values: NDArray[Any] | torch.Tensor, device: torch.device) -> torch.Tensor:
    """`values` on `device`. A copy from ordinary memory would wait for all earlier work; pinned memory does not."""
    tensor = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
