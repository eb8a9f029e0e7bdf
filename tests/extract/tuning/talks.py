"""Short conversations about the demo's pictures, in the published layout, and models that learn them."""

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from agiqa.bench.demo.images import draw_data_set
from agiqa.extract import load_data_set, open_backbone
from agiqa.extract.data.items import DataSet
from agiqa.extract.data.templates import fill, template_of
from agiqa.extract.tuning.recipes import Recipe, recipe_of

WORDS = ("bad", "poor", "fair", "good", "excellent")


def write_talks(folder: Path, *, aspects: tuple[str, ...] = ("quality",), count: int = 10) -> Path:
    """The demo's data set, and a file ASPECT.json with a conversation about each picture."""
    draw_data_set(folder, count=count)
    with (folder / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for aspect in aspects:
        talks = [talk(number, row, aspect) for number, row in enumerate(rows)]
        (folder / f"{aspect}.json").write_text(json.dumps(talks))
    return folder


def talk(number: int, row: dict[str, str], aspect: str) -> dict[str, object]:
    """An entry whose texts tell the picture apart from all others."""
    word = WORDS[min(4, int(float(row[f"mos_{aspect}"])))]
    template = template_of(aspect)
    texts = (
        f"<image>\n{fill(template.describe, row['prompt'])}",
        f"Picture {number}, {word}.",
        template.rate,
        word,
    )
    turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, texts, strict=True)]
    return {"id": row["name"], "image": row["name"], "conversations": turns}


def load_talks(
    folder: Path, *, images: bool = True, variant: str = "full", files: Sequence[str] | None = None
) -> DataSet:
    """The items of `write_talks`, without those of the split test."""
    given = [str(folder / "quality.json")] if files is None else files
    data = load_data_set(folder, conversations=given, variant=variant, images=images, mos_range=None)
    return replace(data, items=tuple(item for item in data.items if item.split != "test"))


def opener_for(checkpoint: Path, adapter: Path | None = None, **options: object):
    """Opens the model on the CPU."""
    return partial(open_backbone, str(checkpoint), adapter=None if adapter is None else str(adapter), **options)


def quick(name: str = "published", **changes: object) -> Recipe:
    """A recipe for tiny models: small pairs, no dropout, a learning rate that shows."""
    settings = {"rank": 4, "alpha": 4, "dropout": 0.0, "lr": 1e-3, "steps": 4, "batch_size": 4, "micro_batch": 4}
    return recipe_of(name, settings | changes)
