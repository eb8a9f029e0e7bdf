"""Where and with what a measurement ran."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from agiqa.progress import say

_DISTRIBUTIONS = ("zarr", "numcodecs", "numpy", "torch", "h5py", "hdf5plugin", "safetensors")


def recorded(
    lines: Iterable[Mapping[str, Any]], out: Path | None, told: Callable[[Mapping[str, Any]], str]
) -> list[dict[str, Any]]:
    """`lines` and where they were measured; each is said as `told` puts it, and appended to `out`, as it comes."""
    found, about = list[dict[str, Any]](), about_this_run()
    for line in lines:
        found.append({**line, **about})
        say(told(line))
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found[-1]) + "\n")
    return found


def about_this_run() -> dict[str, Any]:
    """Commit, versions and machine, as every result line has them."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {found.name: found.version for found in metadata.distributions() if found.name in _DISTRIBUTIONS}
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    return {"commit": commit or None, "versions": {"python": platform.python_version(), **versions}, **machine}
