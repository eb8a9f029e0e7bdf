"""Device, precision, CPU threads and random state of a training or prediction."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Literal

import torch

from agiqa.errors import ConfigError
from agiqa.heads.settings.config import TrainConfig

LIGHTNING_PRECISIONS: dict[str, Literal["32-true", "bf16-mixed", "16-mixed"]] = {
    "fp32": "32-true",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
}
"""Lightning's names for the precisions."""


def resolve_device(device: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`. Raises ConfigError for `cuda` without a CUDA device."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        message = "The device is set to 'cuda', and torch finds no CUDA device here. Use 'cpu' or 'auto'."
        raise ConfigError(message)
    return torch.device("cuda" if device != "cpu" and available else "cpu")


def check_precision(config: TrainConfig) -> None:
    """Raise ConfigError for a precision that the device of `config` lacks, or as `resolve_device`."""
    if config.precision == "fp16" and resolve_device(config.device).type != "cuda":
        message = "The precision 'fp16' needs a CUDA device, and this training runs on the CPU. Use 'bf16' or 'fp32'."
        raise ConfigError(message)


@contextmanager
def random_state(seed: int, device: torch.device) -> Generator[None, None, None]:
    """Seed torch within the context, and restore the caller's state after it."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


@contextmanager
def cpu_threads(threads: int | None) -> Generator[None, None, None]:
    """Set torch's CPU threads within the context; None leaves them."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
