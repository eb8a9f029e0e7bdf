"""Memory that processes of one sweep map together.

It is made by memfd on Linux, where /dev/shm, which torch and Python use, is often as small as 64 MB in containers, and
writing beyond that ends the process; elsewhere it is a file without a name. It is gone with the last process.
"""

import mmap
import os
import tempfile
import weakref
from multiprocessing.reduction import DupFd
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor


class SharedMemory:
    """Some bytes; it travels as an argument of a process that is spawned, which then maps the same bytes."""

    def __init__(self, size: int) -> None:
        """New memory of `size` bytes, all zero. Raises OSError where there is none."""
        descriptor = _nameless_file()
        os.ftruncate(descriptor, max(size, 1))
        self._take(descriptor, size)

    def tensor(self) -> UInt8[Tensor, " byte"]:
        """The bytes, not copied."""
        return torch.frombuffer(self._map, dtype=torch.uint8)[: self._size]

    def __getstate__(self) -> dict[str, Any]:
        """For a process that is being spawned."""
        return {"size": self._size, "descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Map the memory."""
        self._take(state["descriptor"].detach(), state["size"])

    def _take(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self._size = size
        self._map = mmap.mmap(descriptor, max(size, 1))  # stays while a tensor is made of it
        weakref.finalize(self, os.close, descriptor)


def _nameless_file() -> int:
    """A descriptor of an empty file that nobody else can open."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("agiqa-features")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
