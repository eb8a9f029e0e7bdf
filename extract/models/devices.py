"""The device and the dtype of a model, by name."""

import torch

from agiqa.errors import ConfigError, UnknownName

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def checked_dtype(name: str) -> str:
    """`name`, one of DTYPES. Raises UnknownName."""
    if name not in DTYPES:
        raise UnknownName.of(kind="dtype", name=name, known=["auto", *DTYPES])
    return name


def device_named(device: str) -> torch.device:
    """The device of this name, `auto` for the GPU if there is one. Raises ConfigError for one that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        message = f"No device is called {device!r}; use auto, cpu, cuda or cuda:N."
        raise ConfigError(message) from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        message = f"The device {device!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices."
        raise ConfigError(message)
    return chosen
