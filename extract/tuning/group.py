"""The processes of one training: this one alone, or one per device, which sum their gradients."""

import os
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(hours=1)
"""The longest wait for the other processes, which includes the writing of a checkpoint by the first."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """This process among `size` ones."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks to the user."""
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """Which of `count` pieces of work are this process's."""
        return list(range(self.rank, count, self.size))

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, the same to the bit in all of them."""
        if self.size > 1:
            works = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
            for work in works:
                if work is not None:
                    work.wait()


@contextmanager
def joined(rank: int, devices: Sequence[str], meeting: Path) -> Generator[Group]:
    """The group of one process per device; they meet in the file `meeting`, which must not exist before."""
    device = torch.device(devices[rank])
    if device.type == "cpu":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        init_method=meeting.resolve().as_uri(),
        rank=rank,
        world_size=len(devices),
        timeout=_PATIENCE,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        yield Group(rank=rank, size=len(devices))
    finally:
        dist.destroy_process_group()
