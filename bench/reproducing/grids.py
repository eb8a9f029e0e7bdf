"""The grid of an ablation of the plan: the file that it names, with the settings of the plan in its base."""

import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from agiqa.bench.ablation.grids import as_mapping, find_grid
from agiqa.bench.reproducing.plan import Plan
from agiqa.heads.settings.config import read_yaml
from agiqa.store.disk.files import write_text_atomically


def write_grid(plan: Plan, ablation: str, path: Path) -> None:
    """Write the grid of the ablation as `path`. Raises UnknownName where there is no such grid, ConfigError as YAML."""
    file = plan.grid_file(ablation) or find_grid(plan.ablations[ablation].grid)
    content: dict[str, Any] = as_mapping(f"{file}", read_yaml(file))
    base = {**as_mapping("base", content.get("base")), **plan.ablations[ablation].settings}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text_atomically(path, yaml.safe_dump({**content, "base": base}, sort_keys=False))


@contextmanager
def merged_grid(plan: Plan, ablation: str) -> Generator[Path]:
    """The grid of the ablation as a file that is there within the block."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{ablation}.yaml"
        write_grid(plan, ablation, path)
        yield path
