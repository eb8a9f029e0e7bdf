"""How filling one store scales with the GPUs of a host: `python -m agiqa.bench.measurements.devices --help`.

Each device extracts the same number of made-up images, from files to a store, so that start-up costs weigh the same for
one device and for several.
"""

import shutil
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from agiqa.bench.measurements.extract import made_up_options, made_up_work
from agiqa.bench.measurements.measuring import (
    Line,
    device_name,
    goal_cells,
    goal_table,
    joined,
    measured_table,
    print_tables,
    result_options,
)
from agiqa.extract import ExtractionSettings, run_extraction

LINEAR = 0.9
"""Goal: rate as a share of the number of devices times the rate of one."""


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
    columns = {key: lambda line, key=key: str(line["config"][key]) for key in ("devices", "encoding", "items")}
    goals = [
        [f"{count} devices: share of linear", *goal_cells(line["measured"]["linear"], at_least=LINEAR)]
        for line in lines
        if (count := line["config"]["devices"]) > 1
    ]
    return joined(measured_table(columns, ["images_per_second"], lines), goal_table(goals))


@click.command()
@made_up_options(items=1000, each=" for each device")
@click.option("--devices", type=click.IntRange(min=2), multiple=True, default=(2,), show_default=True)
@click.option("--encoding", default="hidden", show_default=True)
@click.option("--workers", type=int, help="Processes that prepare items, per device [default: by the cores].")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time the fill of one store by one device and by several of this host."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


def _summary(line: Line) -> str:
    measured = line["measured"]
    rate, linear = measured["images_per_second"], measured["linear"]
    return f"{line['config']['devices']} devices: {rate:.1f} images/s, {linear:.3f} of linear"


if __name__ == "__main__":
    main()
