"""The version of agiqa, from the metadata of the installed distribution, and the commit of its code."""

import os
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agiqa.errors import ConfigError

COMMIT = "AGIQA_COMMIT"
"""The environment variable that holds the commit of the code."""
_COMMIT = re.compile(r"[0-9a-fA-F]{7,40}(-dirty)?")


def agiqa_version() -> str:
    """The installed version, or `0+source` when run from a tree that was never installed."""
    try:
        return version("agiqa")
    except PackageNotFoundError:
        return "0+source"


def this_commit() -> str | None:
    """The commit of the code that runs. Raises as `commit_of`."""
    return commit_of(Path(__file__).resolve())


def commit_of(file: Path) -> str | None:
    """The commit of `file`, a part of the code, with `-dirty` where its tree was changed; None if unknown.

    The environment variable AGIQA_COMMIT comes first, for containers and copies without `.git`. Otherwise git answers,
    but only where it tracks `file` itself: a virtual environment may lie in the repository of something else. Raises
    ConfigError for an AGIQA_COMMIT that is not 7 to 40 hex digits, with or without `-dirty`.
    """
    commit = os.environ.get(COMMIT)
    if commit:
        if not _COMMIT.fullmatch(commit):
            message = (
                f"{COMMIT} is {commit!r}, and a commit is 7 to 40 hex digits, with `-dirty` at the end for a changed "
                f"tree. Set it to what `git describe --always --dirty --exclude=*` says, or not at all."
            )
            raise ConfigError(message)
        return commit
    if _git(file, "ls-files", "--error-unmatch", "--", file.name) is None:
        return None
    return _git(file, "describe", "--always", "--dirty", "--exclude=*") or None


def _git(file: Path, *arguments: str) -> str | None:
    """The answer of git in the folder of `file`; None where git fails or is not installed."""
    try:
        asked = subprocess.run(["git", "-C", str(file.parent), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None
