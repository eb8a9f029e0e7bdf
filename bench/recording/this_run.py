"""Where and with what a measurement ran."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from agiqa.errors import ConfigError
from agiqa.progress import say

COMMIT = "AGIQA_COMMIT"
"""The environment variable that says the commit of the code."""
_COMMIT = re.compile(r"[0-9a-fA-F]{7,40}(-dirty)?")
_HERE = Path(__file__).resolve()
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
    """Commit, versions and machine, as every result line has them. Raises as `commit_of`."""
    versions = {found.name: found.version for found in metadata.distributions() if found.name in _DISTRIBUTIONS}
    machine = {"cpus": len(os.sched_getaffinity(0)), "machine": platform.platform()}
    return {"commit": this_commit(), "versions": {"python": platform.python_version(), **versions}, **machine}


def this_commit() -> str | None:
    """The commit of the code that runs. Raises as `commit_of`."""
    return commit_of(_HERE)


def commit_of(file: Path) -> str | None:
    """The commit that `file`, a part of the code, is of, with `-dirty` where its tree was changed; None if unknown.

    It is what the environment variable AGIQA_COMMIT says, which is for containers and copies without `.git`. Where
    that is not set or empty, git is asked, and its answer counts only where it tracks `file` itself: a virtual
    environment may lie in the repository of something else. Raises ConfigError for an AGIQA_COMMIT that is not 7 to 40
    hex digits, with or without `-dirty`.
    """
    told = os.environ.get(COMMIT)
    if told:
        if not _COMMIT.fullmatch(told):
            message = (
                f"{COMMIT} is {told!r}, and a commit is 7 to 40 hex digits, with `-dirty` at the end for a changed "
                f"tree. Set it to what `git describe --always --dirty --exclude=*` says, or not at all."
            )
            raise ConfigError(message)
        return told
    if _git(file, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    return _git(file, "describe", "--always", "--dirty", "--exclude=*") or None


def _git(file: Path, *arguments: str) -> str | None:
    """What git answers in the folder of `file`; None where it fails, or is not there."""
    try:
        asked = subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None
