from collections.abc import Callable
from pathlib import Path

import pytest

from agiqa.bench.demo_images import draw_data_set


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 60 pictures (12 prompts) of seed 0."""
    out = tmp_path_factory.mktemp("drawn")
    draw_data_set(out, count=60, seed=0)
    return out


@pytest.fixture(scope="session")
def files_of() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file below a folder, by relative path."""

    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    return read
