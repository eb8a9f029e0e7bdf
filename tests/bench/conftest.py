from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from agiqa.bench.demo.images import draw_data_set
from agiqa.store import Store
from tests.store.conftest import make_content, make_store


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


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """48 items of 16 prompts and three generators, whose MOS is chance."""
    count, rng = 48, np.random.default_rng(2)
    content = make_content(rng.integers(3, 6, count).tolist(), width=6, seed=2, logical_dtype="float32")
    items = replace(
        content.items,
        prompts=[f"prompt {k // 3}" for k in range(count)],
        splits=["test" if k % 4 == 0 else "train" for k in range(count)],
        generators=[("one", "two", "three")[k % 3] for k in range(count)],
        labels={"quality": rng.uniform(0, 5, count)},
    )
    return make_store(tmp_path_factory.mktemp("store") / "set.agiqa", replace(content, items=items))
