"""What kernels and graphs on a CUDA GPU depend on, for heads and backbones alike. Torch is imported by the callers."""

import gc
import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def kernels_missing(device: "torch.device", packages: tuple[str, ...]) -> str | None:
    """The reason why kernels that need `packages` cannot run on `device`; None where they can."""
    if device.type != "cuda":
        return f"the kernels need CUDA, not {device.type}"
    missing = [package for package in packages if not _is_installed(package)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if _has_c_compiler() else "the kernels need a C compiler: install gcc, or name one in CC"


@cache
def _is_installed(package: str) -> bool:
    return find_spec(package) is not None


@cache
def _has_c_compiler() -> bool:
    """Whether Triton finds what it compiles the launchers of kernels with."""
    return bool(os.environ.get("CC")) or any(map(shutil.which, ("gcc", "clang")))


@contextmanager
def garbage_waits() -> Generator[None]:
    """Pause garbage collection: it may free an older graph, which breaks a capture.

    https://github.com/pytorch/pytorch/pull/161037
    """
    collected = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collected:
            gc.enable()
