"""Results of real small trainings, made once, and copies of them to spoil."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agiqa.bench.report.sections import ReportSettings
from agiqa.bench.report.writing import Report, write_report
from agiqa.store import Store, basis_from, sketch_store
from tests.bench.report import made
from tests.store.conftest import make_content, make_store

SCRIPT = "<script>alert(1)</script>"
BASE = {"projection": "hidden", "width": 8, "epochs": 2, "batch_size": 16, "lr": 0.01, "device": "cpu", "threads": 1}
GRID = [{"encoder": "none", "pooling": "mean"}, {"encoder": "gru", "pooling": "max"}]
ITEMS = 60


@dataclass(frozen=True, kw_only=True)
class Made:
    """Where the stores and results are."""

    stores: dict[str, Store]
    ablation: Path
    """Two heads of quality + correspondence, both protocols, on a store called agiqa-3k."""
    ranks: Path
    """One head on sketches of ranks 2 and 4."""
    transfer: Path
    images: Path


def stored(path: Path, data: str, seed: int) -> Store:
    """A store whose MOS can be learned: its prompts come in fours, one of them is a script."""
    rng = np.random.default_rng(seed)
    content = make_content(rng.integers(4, 12, ITEMS).tolist(), seed=seed, logical_dtype="float32")
    level = np.array([rows[:, 0].mean() for rows in content.hidden])
    quality = np.clip(2.5 + level / level.std() * 0.9 + rng.normal(0, 0.3, ITEMS), 0, 5)
    labels = {"quality": quality, "correspondence": np.clip(quality + rng.normal(0, 0.5, ITEMS), 0, 5)}
    items = replace(
        content.items,
        prompts=[SCRIPT if k < 4 else f"a | picture of ${k // 4}$ & more" for k in range(ITEMS)],
        splits=["test" if k % 4 == 3 else "train" for k in range(ITEMS)],
        generators=[f"generator {k % 3}" for k in range(ITEMS)],
        descriptions=[f"<b>item</b> {k} looks fine" for k in range(ITEMS)],
        labels=labels,
    )
    lm_head = np.random.default_rng(0).normal(size=content.lm_head.shape).astype(np.float32)
    return make_store(path, replace(content, items=items, lm_head=lm_head), data_set={"name": data})


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("results")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ours, other = stored(folder / "a.agiqa", "agiqa-3k", 1), stored(folder / "b.agiqa", "aigciqa2023", 2)
    sketches = {
        f"r{rank}": sketch_store(ours, folder / f"r{rank}.agiqa", basis=basis_from(ours, rank)).store for rank in (2, 4)
    }
    ablation = made.write_ablation(folder / "encoders", {"": ours}, GRID, label="quality+correspondence", **BASE)
    ranks = made.write_ablation(
        folder / "ranks",
        sketches,
        [{"encoder": "none"}],
        protocols=["grouped"],
        seeds=[0],
        **{**BASE, "projection": "sketch"},
    )
    transfer = made.write_transfer(
        folder / "carried", {"AGIQA-3k": ours, "AIGCIQA2023": other}, shots=[10], seeds=[0], encoder="none", **BASE
    )
    torch.set_num_threads(before)
    images = folder / "images"
    images.mkdir()
    for name in ours.items.names:
        Image.new("RGB", (64, 48), (90, 120, 200)).save(images / name)
    stores = {"ours": ours, "other": other, **sketches}
    return Made(stores=stores, ablation=ablation, ranks=ranks, transfer=transfer, images=images)


@pytest.fixture(scope="session")
def report(results: Made, tmp_path_factory: pytest.TempPathFactory) -> Report:
    """A report on all results, with images, a note that is a script, and a title."""
    folders = [results.ablation, results.ranks, results.transfer]
    to = tmp_path_factory.mktemp("page") / "report"
    return write_report(folders, to, ReportSettings(images=results.images, title="A & B", notes=[f"Mind {SCRIPT}"]))


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[Path], Path]:
    """Copies a folder of results to where a test may spoil it."""

    def make(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / folder.name, ignore=shutil.ignore_patterns("report")))

    return make
