"""How much memory is free: of the machine, within the limits that a container or scheduler sets, and of a GPU."""

import os
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")


def available_memory(device: torch.device) -> int:
    """Bytes that this process may still take on `device`: RAM of the machine, or memory of a GPU."""
    if device.type != "cuda":
        return min([_free_ram(), *cgroup_rooms(Path("/proc/self/cgroup"), _CGROUPS)])
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def _free_ram() -> int:
    """What Linux calls available: free, or held by caches that it can drop. Elsewhere half of the machine's RAM."""
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def cgroup_rooms(membership: Path, mounted: Path) -> list[int]:
    """Bytes left under each memory limit (cgroup v2) on the process whose groups the file `membership` lists.

    `mounted` is the folder of the root group. A group's page cache that is not in use counts as free.
    """
    if not membership.exists():
        return []
    names = [line[3:] for line in membership.read_text(encoding="utf-8").splitlines() if line.startswith("0::")]
    rooms: list[int] = []
    for name in names:
        group = mounted / name.strip("/")
        for folder in (group, *group.parents):
            limit = folder / "memory.max"
            if folder.is_relative_to(mounted) and limit.exists() and (text := limit.read_text().strip()) != "max":
                used = int((folder / "memory.current").read_text())
                statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                rooms.append(max(0, int(text) - used + int(statistics.get("inactive_file", 0))))
    return rooms
