"""A device without memory left: how torch and the libraries below it say so, and what users are told."""

from collections.abc import Generator
from contextlib import contextmanager

import torch

from agiqa.errors import ModelError, first_line

_WORDS = (
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)
"""In errors of those who ask for memory past torch's own allocator, and of the allocator of the CPU."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether `error` goes away with less work at a time."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _WORDS)


@contextmanager
def room_for_weights(name: str, device: torch.device) -> Generator[None]:
    """Raise ModelError where the weights of the model `name`, loaded inside, are too many for `device`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        message = (
            f"{name}: the weights do not fit into the free memory of the device {device} ({first_line(error)}). Free "
            "it of other work, use a larger one, or a --dtype of fewer bytes."
        )
        raise ModelError(message) from error
