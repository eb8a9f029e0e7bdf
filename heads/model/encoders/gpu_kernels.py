"""What the kernels for GPUs have in common, written here or in other packages: when they run, and torch.compile."""

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import ParamSpec, TypeVar, cast

import torch
from torch import Tensor

_P = ParamSpec("_P")
_R = TypeVar("_R")


def unavailable_because(device: torch.device, packages: tuple[str, ...]) -> str | None:
    """Why kernels that need `packages` cannot run on `device`; None where they can."""
    if device.type != "cuda":
        return f"the kernels need CUDA, not {device.type}"
    missing = [package for package in packages if not _is_installed(package)]
    return f"not installed: {', '.join(missing)}" if missing else None


def is_power_of_two(channels: int) -> bool:
    """The widths that Triton's blocks can have."""
    return channels > 0 and channels & (channels - 1) == 0


def product_dtype(values: Tensor) -> torch.dtype:
    """In which dtype a matrix product of `values` is computed: autocast's where that is on, else their own."""
    kind = values.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else values.dtype


def uncompiled(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """`function` as it is, also when torch.compile compiles its caller: it has kernels of its own, or a long loop."""
    return cast("Callable[_P, _R]", torch.compiler.disable(function))


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None
