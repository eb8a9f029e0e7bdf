"""A tiny plan with what it needs: published folders of pictures, and a hub's cache with a tiny model and adapters."""

import csv
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from agiqa.extract import open_backbone
from agiqa.extract.data.templates import template_of
from tests.extract.models.test_adapters import random_adapter
from tests.extract.models.test_merging import PUBLISHED
from tests.extract.small_sets import save_noise
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COUNT = 24
SEED = 0
"""Of an adapter with which the tiny model answers every question."""
HEAD = {"encoder": "gru", "layers": 1, "width": 8, "epochs": 2, "batch_size": 8, "projection": "vocabulary"}


def write_published(folder: Path, *, seed: int) -> Path:
    """AGIQA-3k's own layout: data.csv without a split, images, and M3-AGIQA's conversation files that have one."""
    random = np.random.default_rng(seed)
    wording = template_of("quality")
    rows: list[list[Any]] = []
    talks: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number in range(COUNT):
        name, prompt, mos = f"sd1.5_normal_{number:03d}.jpg", f"a picture {number // 2}", random.uniform(0.2, 4.8)
        save_noise(folder / "all" / name, seed=100 * seed + number, brightness=mos / 5.0)
        rows.append([name, prompt, round(mos, 3), 0.5, round(random.uniform(0.2, 4.8), 3), 0.5])
        texts = [wording.describe.replace("{prompt}", prompt), "clear", wording.rate, "fair"]
        turns = [{"role": ("user", "assistant")[k % 2], "content": text} for k, text in enumerate(texts)]
        entry = {"id": str(number), "image": f"data/agiqa-3k/images/{name}", "conversations": turns}
        talks["test" if number % 4 == 3 else "train"].append(entry)
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        header = ["name", "prompt", "mos_quality", "std_quality", "mos_align", "std_align"]
        csv.writer(file).writerows([header, *rows])
    (folder / "quality_train.json").write_text(json.dumps(talks["train"]))
    (folder / "quality_test_res.json").write_text(json.dumps(talks["test"]))
    return folder


def write_hub(cache: Path) -> Path:
    """The cache of the hub with someone/tiny-minicpm and the adapter someone/tiny-ft."""
    model = write_minicpm_checkpoint(_snapshot(cache, "someone/tiny-minicpm"))
    backbone = open_backbone(str(model), device="cpu")
    backbone.load()
    torch.manual_seed(SEED)  # peft draws the factors of the adapter from the global generator
    random_adapter(backbone._model, _snapshot(cache, "someone/tiny-ft"), **PUBLISHED)
    return cache


def _snapshot(cache: Path, name: str) -> Path:
    """The folder of the only commit of a repository."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


PLAN: dict[str, Any] = {
    "model": "someone/tiny-minicpm",
    "options": {
        "describe": {"device": "cpu", "max-new-tokens": 6, "batch-size": 24},
        "extract": {"device": "cpu"},
        "ablate": {"train-workers": 1},
        "transfer": {"config": "head.yaml", "split": "published", "seeds": 2, "shots": "", "train-workers": 1},
        "baseline": {
            "image-size": 32,
            "no-pretrained": True,
            "epochs": 1,
            "batch-size": 8,
            "workers": 0,
            "device": "cpu",
            "seeds": 1,
            "protocol": ["published"],
        },
    },
    "data": {
        "agiqa-3k": {"importer": "agiqa-3k", "images": COUNT, "side": 64, "max_slices": 1},
        "aigciqa2023": {"importer": "agiqa-3k", "images": COUNT, "side": 64, "max_slices": 1},
    },
    "descriptions": {
        "tuned": {"data": "agiqa-3k", "adapter": "someone/tiny-ft", "aspect": "agiqa3k_quality_v0"},
        "untuned": {"data": "agiqa-3k"},
        "other": {"data": "aigciqa2023", "adapter": "someone/tiny-ft", "aspect": "agiqa3k_quality_v0"},
    },
    "stores": {
        "tuned": {"descriptions": ["tuned"], "variant": "full"},
        "untuned": {"descriptions": ["untuned"], "variant": "full"},
        "other": {"descriptions": ["other"], "variant": "id"},
    },
    "ablations": {
        "ours": {"stores": {"main": "tuned"}, "grid": "ours.yaml", "variant": "id"},
        "talks": {
            "stores": {"main": "tuned", "untuned": "untuned"},
            "grid": "talks.yaml",
            "settings": {"width": 4},
        },
    },
    "transfers": {"there": {"source": "tuned", "target": "other", "variant": "id"}},
    "networks": {"agiqa-3k": {"data": "agiqa-3k", "labels": ["quality"], "models": ["test_resnet"]}},
    "tables": {
        "table-ii": {
            "number": "II",
            "title": "ours",
            "heads": [{"paper": "M3-AGIQA", "data": "agiqa-3k", "ablation": "ours", "row": "ours"}],
            "networks": ["agiqa-3k"],
        },
        "table-iv": {
            "number": "IV",
            "title": "conversations",
            "heads": [
                {
                    "paper": "no fine-tuning, whole conversation",
                    "data": "agiqa-3k",
                    "ablation": "talks",
                    "row": "store=untuned,variant=full",
                }
            ],
        },
        "table-v": {
            "number": "V",
            "title": "words",
            "words": [{"paper": "with fine-tuning", "descriptions": "tuned"}],
        },
        "table-vi": {"number": "VI", "title": "transfer", "transfers": ["there"]},
    },
}
"""Tables II, IV, V and VI in miniature."""


def write_plan(folder: Path) -> Path:
    """PLAN with its grids, as files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    protocols = ["published", {"grouped": {"folds": 2}}]
    ours = {"base": {**HEAD, "device": "cpu"}, "runs": [{"name": "ours"}], "seeds": [0], "protocols": protocols}
    talks = {
        **ours,
        "base": {**HEAD, "device": "cpu"},
        "grid": {"store": ["main", "untuned"], "variant": ["question", "full"]},
    }
    del talks["runs"], talks["base"]["width"]
    head = {
        "head": {name: HEAD[name] for name in ("encoder", "layers", "width")},
        "train": {"epochs": 2, "device": "cpu"},
    }
    plan = deepcopy(PLAN)
    plan["options"]["transfer"]["config"] = str(folder / "head.yaml")
    for name, content in (("plan", plan), ("ours", ours), ("talks", talks), ("head", head)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "plan.yaml"
