"""How filling one store scales with the GPUs of a host: `python -m agiqa.bench.measurements.devices --help`.

One device and several extract as many made-up pictures each, from files to a store: what a process loses when it begins
then weighs the same in all of them.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from agiqa.bench.measurements.extract import made_up_options, made_up_work
from agiqa.bench.measurements.measuring import Line, device_name, print_tables, result_options
from agiqa.bench.recording.tables import as_table, digits, verdict
from agiqa.extract import ExtractionSettings, run_extraction

LINEAR = 0.9
"""Goal: share of as many times the rate of one device."""


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """A line per number of devices, one device first; rates are of the fill alone, weights loaded."""
    counts = (1, *options["devices"])
    with made_up_work({**options, "items": options["items"] * max(counts)}) as (folder, opener, backbone, data):
        name = device_name(backbone.device)
        alone: float | None = None
        for devices in counts:
            store = folder / f"{devices}.agiqa"
            few = replace(data, items=data.items[: devices * options["items"]])
            settings = ExtractionSettings(encoding=options["encoding"], devices=devices, workers=options["workers"])
            report = run_extraction(few, backbone, store, settings, opener=opener).fill
            assert report is not None  # the store is new
            shutil.rmtree(store)
            rate = report.items / report.seconds
            alone = rate if alone is None else alone
            yield {
                "stage": "extract on devices",
                "config": {"devices": devices, "items": report.items, "encoding": options["encoding"], "device": name},
                "measured": {
                    "images_per_second": rate,
                    "linear": rate / (devices * alone),
                    "waited_for_items": report.waited_for_items / devices,
                    "waited_for_writers": report.waited_for_writers / devices,
                    "seconds": report.seconds,
                },
            }


def tables(lines: Sequence[Line]) -> str:
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
@made_up_options(items=1000, each=" for each device")
@click.option("--devices", type=click.IntRange(min=2), multiple=True, default=(2,), show_default=True)
@click.option("--encoding", default="hidden", show_default=True)
@click.option("--workers", type=int, help="Processes that prepare items, per device [default: by the cores].")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time the fill of one store by one device and by several of this host."""
    print_tables(measured_lines(options), tables, _told, out=out, table=table)


def _told(line: Mapping[str, Any]) -> str:
    measured = line["measured"]
    rate, linear = measured["images_per_second"], measured["linear"]
    return f"{line['config']['devices']} devices: {rate:.1f} images/s, {linear:.3f} of linear"


if __name__ == "__main__":
    main()
