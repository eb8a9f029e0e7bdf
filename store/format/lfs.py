"""Git LFS pointers: the few lines that stand for a file in a clone that was made without git-lfs."""

from collections.abc import Iterable
from pathlib import Path

_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
"""Of a pointer's first line; the second is that of its earliest releases."""


def is_lfs_pointer(path: Path) -> bool:
    """Whether the file at `path` is a Git LFS pointer; False where it cannot be read."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_BEGINNINGS[0])).startswith(_BEGINNINGS)
    except OSError:
        return False


def refuse_lfs_pointers(paths: Iterable[Path], error: type[Exception]) -> None:
    """Raise `error`, naming the file, for the first of `paths` that is a Git LFS pointer."""
    for path in paths:
        if is_lfs_pointer(path):
            message = (
                f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in the repository that it is of, or "
                "download the file itself."
            )
            raise error(message)
