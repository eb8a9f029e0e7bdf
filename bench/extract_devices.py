"""How filling one store scales with the GPUs of a host: `python -m agiqa.bench.extract_devices --help`.

The same made-up pictures are extracted by one device and by several, each from files to a store of its own.
"""

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from agiqa.bench.extract import Line, made_up_data
from agiqa.bench.random_models import SHAPES
from agiqa.bench.tables import as_table, digits, read_results, verdict
from agiqa.bench.this_run import recorded
from agiqa.extract import ExtractionSettings, run_extraction

LINEAR = 0.9
"""Goal: share of as many times the rate of one device."""


def measured_lines(folder: Path, options: Mapping[str, Any]) -> Iterator[Line]:
    """A line per number of devices, one device first; rates are of the fill alone, weights loaded."""
    opener = partial(SHAPES[options["model_shape"]], folder / options["model_shape"])
    backbone = opener(device=options["device"])
    data = made_up_data(
        folder / "images", backbone, items=options["items"], tokens=options["tokens"], pixels=options["pixels"]
    )
    name = torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else "cpu"
    alone: float | None = None
    for devices in (1, *options["devices"]):
        store = folder / f"{devices}.agiqa"
        settings = ExtractionSettings(encoding=options["encoding"], devices=devices, workers=options["workers"])
        report = run_extraction(data, backbone, store, settings, opener=opener).fill
        assert report is not None  # the store is new
        shutil.rmtree(store)
        rate = report.items / report.seconds
        alone = rate if alone is None else alone
        yield {
            "stage": "extract on devices",
            "config": {"devices": devices, "items": report.items, "encoding": options["encoding"], "device": name},
            "measured": {"images_per_second": rate, "linear": rate / (devices * alone)},
        }


def tables(lines: list[Line]) -> str:
    """Markdown tables of result lines: the rates, and the goal for each number of devices."""
    found = [(line["config"], line["measured"]) for line in lines]
    rows = [
        [str(config["devices"]), config["encoding"], str(config["items"]), digits(measured["images_per_second"])]
        for config, measured in found
    ]
    goals = [
        [f"{config['devices']} devices: share of linear", *verdict(measured["linear"], at_least=LINEAR)]
        for config, measured in found
        if config["devices"] > 1
    ]
    head = ["devices", "encoding", "items", "images per second"]
    return "\n\n".join([as_table(head, rows), as_table(["goal", "wanted", "measured", "met"], goals)])


@click.command()
@click.option("--model-shape", type=click.Choice(list(SHAPES)), default=next(iter(SHAPES)), show_default=True)
@click.option("--devices", type=click.IntRange(min=2), multiple=True, default=(2,), show_default=True)
@click.option("--items", default=1500, show_default=True, help="Pictures.")
@click.option("--tokens", default=477, show_default=True, help="Tokens of each on the average.")
@click.option("--pixels", default=512, show_default=True, help="Sides of the pictures.")
@click.option("--encoding", default="hidden", show_default=True)
@click.option("--workers", type=int, help="Processes that prepare items, per device [default: by the cores].")
@click.option("--device", default="auto", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where pictures and stores lie for the while.")
@click.option("--out", type=click.Path(path_type=Path), help="Append the result lines to this file.")
@click.option("--table", type=click.Path(path_type=Path, exists=True), help="Only print the tables of these lines.")
def main(**options: Any) -> None:
    """Time the fill of one store by one device and by several of this host."""
    if options["table"]:
        print(tables(read_results(options["table"])))
        return
    with tempfile.TemporaryDirectory(dir=options["folder"]) as folder:
        lines = recorded(measured_lines(Path(folder), options), options["out"], _told)
    print(tables(lines))


def _told(line: Mapping[str, Any]) -> str:
    measured = line["measured"]
    rate, linear = measured["images_per_second"], measured["linear"]
    return f"{line['config']['devices']} devices: {rate:.1f} images/s, {linear:.3f} of linear"


if __name__ == "__main__":
    main()
