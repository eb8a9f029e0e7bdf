"""Where and with what a measurement ran."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

_DISTRIBUTIONS = ("zarr", "numcodecs", "numpy", "torch", "h5py", "hdf5plugin", "safetensors")


def about_this_run() -> dict[str, Any]:
    """Commit, versions and machine, as every result line has them."""
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    versions = {found.name: found.version for found in metadata.distributions() if found.name in _DISTRIBUTIONS}
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    return {"commit": commit or None, "versions": {"python": platform.python_version(), **versions}, **machine}
