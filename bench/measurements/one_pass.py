"""Describing and extracting in one pass, or one after the other: `python -m agiqa.bench.measurements.one_pass`.

A model with random weights describes and rates made-up images, as in `agiqa.bench.measurements.describing`, and a store
gets the hidden states of these conversations: by `agiqa describe` and then `agiqa extract`, or by `agiqa describe
--store`. Weights are loaded before, so the second command's start is not in the numbers. With the 8B shape it needs a
GPU with 40 GB or more, two minutes, and 10 MB of disk for each image.
"""

import json
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from agiqa.bench.measurements.decoding import Work, free, synchronize
from agiqa.bench.measurements.describing import RATING, made_up_work
from agiqa.bench.measurements.measuring import (
    Line,
    device_name,
    joined,
    measured_table,
    print_tables,
    result_options,
    spelled,
)
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract import (
    DataSet,
    DescriptionSettings,
    ExtractionResult,
    ExtractionSettings,
    GenerationSettings,
    run_descriptions,
    run_extraction,
    run_stored_descriptions,
)
from agiqa.extract.data.images import checked_image
from agiqa.extract.describing.items import described_items
from agiqa.extract.models.preparing import default_workers
from agiqa.store import Store, open_store

APART, TOGETHER = "describe, then extract", "describe --store"
_WARM_UP = 16
"""Images of a first run, which is not measured: it loads libraries and kernels."""


def apart(work: Work, folder: Path, settings: DescriptionSettings, extraction: ExtractionSettings) -> ExtractionResult:
    """Two runs, one after the other."""
    out = folder / "apart.jsonl"
    run_descriptions(
        work.data,
        work.backbone,
        out,
        settings,
        rating_of=lambda _answer: None,
        workers=extraction.workers,
        opener=work.opener,
    )
    items = described_items(work.data, out, variant=extraction.variant, aspect=extraction.aspect)
    return run_extraction(items, work.backbone, folder / "apart.agiqa", extraction, opener=work.opener)


def together(
    work: Work, folder: Path, settings: DescriptionSettings, extraction: ExtractionSettings
) -> ExtractionResult:
    """One run."""
    out, path = folder / "together.jsonl", folder / "together.agiqa"
    return run_stored_descriptions(
        work.data,
        work.backbone,
        out,
        path,
        settings,
        extraction,
        rating_of=lambda _answer: None,
        opener=work.opener,
    ).extraction


def timed_line(
    name: str, work: Work, folder: Path, settings: DescriptionSettings, extraction: ExtractionSettings
) -> Line:
    """One way from image files to lines and a sealed store."""
    device, count = work.backbone.device, len(work.data.items)
    folder.mkdir()
    free(device)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started, cpu = time.perf_counter(), time.process_time()
    result = (apart if name == APART else together)(work, folder, settings, extraction)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    assert result.fill is not None  # the store is new
    filling = sum(result.seconds.values())
    measured = {
        "images_per_second": count / seconds,
        "seconds": seconds,
        "describe_seconds": seconds - filling,
        "store_seconds": filling,
        "fill_seconds": result.fill.seconds,
        "cpu_seconds": cpu,
        "reused": result.fill.reused,
        "store_gb": sum(file.stat().st_size for file in result.store.path.rglob("*") if file.is_file()) / 1e9,
        "peak_gb": torch.cuda.max_memory_reserved() / 1e9 if device.type == "cuda" else 0.0,
    }
    config = {"items": count, "tokens": float(result.store.n_tokens.mean()), "variant": extraction.variant}
    return {"stage": "one pass", "name": name, "config": config, "measured": measured}


def agreement_line(one: Store, two: Store) -> Line:
    """How far the rows of two stores are apart, where both have the same description of an item."""
    errors: list[np.ndarray[Any, Any]] = []
    for item in range(len(one.items)):
        if np.array_equal(one.item_keys[item], two.item_keys[item]):
            here, there = one.read([item]).float32(), two.read([item]).float32()
            errors.append(np.linalg.norm(here - there, axis=1) / np.linalg.norm(there, axis=1))
    rows = np.concatenate(errors) if errors else np.full(1, np.nan)
    measured = {
        "same": len(errors),
        "median_row_error": float(np.median(rows)),
        "largest_row_error": float(rows.max()),
    }
    return {"stage": "one pass agreement", "name": "rows", "config": {"items": len(one.items)}, "measured": measured}


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """A line of each way, and one of the agreement of their stores."""
    first = GenerationSettings(max_new_tokens=options["new_tokens"])
    settings = DescriptionSettings(describe=first, rate=RATING, batch_size=options["slots"])
    with made_up_work(options) as work:
        work = replace(work, data=_checked(work.data))
        device = work.backbone.device
        workers = default_workers(device, len(work.data.items))
        extraction = ExtractionSettings(variant=options["variant"], device=str(device), workers=workers)
        shape = {"model": options["model_shape"], "pixels": options["pixels"], "new_tokens": options["new_tokens"]}
        shape["device"] = device_name(device)
        few = replace(work, data=replace(work.data, items=work.data.items[:_WARM_UP]))
        timed_line(TOGETHER, few, work.folder / "warm", settings, replace(extraction, workers=0))
        for name in (APART, TOGETHER):
            line = timed_line(name, work, work.folder / name.split()[-1], settings, extraction)
            yield {**line, "config": {**line["config"], **shape}}
        stores = work.folder / TOGETHER.split()[-1] / "together.agiqa", work.folder / APART.split()[-1] / "apart.agiqa"
        line = agreement_line(*map(open_store, stores))
        yield {**line, "config": {**line["config"], **shape}}


def _checked(data: DataSet) -> DataSet:
    """`data` with the sizes and hashes of its images, which a command knows from checking them."""
    found = [(item, checked_image(item.image)) for item in data.items if item.image is not None]
    items = [replace(item, image_sha256=one.sha256, image_size=one.size) for item, one in found]
    return replace(data, items=tuple(items))


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines."""
    whole, rows = ([line for line in lines if line["stage"] == stage] for stage in ("one pass", "one pass agreement"))
    columns = {
        "name": lambda line: line["name"],
        "items": lambda line: f"{line['config']['items']}",
        "tokens": lambda line: f"{line['config']['tokens']:.0f}",
    }
    keys = ("images_per_second", "seconds", "describe_seconds", "store_seconds", "fill_seconds", "cpu_seconds")
    errors = {
        spelled(key): lambda line, key=key: f"{line['measured'][key]:.1e}"
        for key in ("median_row_error", "largest_row_error")
    }
    return joined(
        measured_table(columns, (*keys, "reused", "store_gb", "peak_gb"), whole),
        measured_table({"name": columns["name"], "items": columns["items"], **errors}, ("same",), rows),
    )


def _summary(line: Line) -> str:
    return f"{line['name']}: {json.dumps({key: float(f'{value:.4g}') for key, value in line['measured'].items()})}"


@click.command()
@click.option("--model-shape", type=click.Choice(list(SHAPES)), default="minicpm-8b", show_default=True)
@click.option("--items", default=512, show_default=True, help="Images.")
@click.option("--pixels", default=512, show_default=True, help="Side of the images in pixels.")
@click.option("--new-tokens", default=128, show_default=True, help="Tokens of each description.")
@click.option("--variant", type=click.Choice(["id", "full"]), default="id", show_default=True)
@click.option("--slots", type=int, help="Slots of the decoder [default: what the memory allows].")
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Folder for temporary images and stores.")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time `describe` and `extract` one after the other, and `describe --store`."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


if __name__ == "__main__":
    main()
