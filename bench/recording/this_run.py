"""The commit, versions and machine of a measurement."""

import os
import platform
from importlib import metadata
from typing import Any

from agiqa.version import this_commit

_DISTRIBUTIONS = ("zarr", "numcodecs", "numpy", "torch", "h5py", "hdf5plugin", "safetensors")


def about_this_run() -> dict[str, Any]:
    """Commit, versions and machine for a result line. Raises as `agiqa.version.commit_of`."""
    versions = {found.name: found.version for found in metadata.distributions() if found.name in _DISTRIBUTIONS}
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    return {"commit": this_commit(), "versions": {"python": platform.python_version(), **versions}, **machine}
