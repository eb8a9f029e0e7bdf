"""Speed of fine-tuning image networks: `python -m agiqa.bench.measurements.networks --help`.

Draws made-up pictures of the number and size of AGIQA-3k, decodes them once, and trains a network with random weights
for all epochs of its recipe: decoding, every epoch with its validation, and the test are timed. For the rates of all
networks of Table II, in minutes, with lines in LINES, and then into the estimates of `agiqa reproduce --dry-run`:

    python -m agiqa.bench.measurements.networks --table-ii --images 1500 --most-crops 4000 --short --out LINES
    python -m agiqa.bench.measurements.networks --table LINES --write-rates
"""

import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

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
from agiqa.bench.networks.building import RANDOM, random_network
from agiqa.bench.networks.config import TABLE_II, NetworkConfig, network_config
from agiqa.bench.networks.fitting import Task, Trainer
from agiqa.bench.networks.pictures import Squares, open_squares
from agiqa.bench.recording.tables import read_results
from agiqa.bench.reproducing.costs import RATES, with_network_rates
from agiqa.extract.data.items import Item
from agiqa.heads.settings.device import resolve_device
from agiqa.progress import say, tracked

GOAL_NETWORK, GOAL_EPOCHS, GOAL_SECONDS = "resnet50", 20, 300.0
"""The goal of issue 21: AGIQA-3k's size and 20 epochs on one H100."""
_MEASURED = ("decode_s", "epoch_s", "images_per_s", "test_s", "total_s", "peak_gb")
_GRAIN = 16
_TEST, _VALIDATION = 0.20, 0.08
"""Of the pictures; the others are trained on."""
_SHORT_EPOCHS = 3


def draw_pictures(folder: Path, count: int, pixels: int) -> list[Item]:
    """JPEG files of `pixels` x `pixels`: smooth colours with some noise, so that their size on disk is usual."""

    def draw(number: int) -> Item:
        random = np.random.default_rng(number)
        coarse = random.integers(0, 256, (_GRAIN, _GRAIN, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)
        noise = random.normal(0.0, 6.0, (pixels, pixels, 1))
        path = folder / f"{number:05d}.jpg"
        Image.fromarray(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        return Item(name=path.name, prompt="", conversation=(), image=path, image_sha256=None)

    with ThreadPoolExecutor() as threads:
        return list(tracked(threads.map(draw, range(count)), "draw", "images", total=count))


def timed_network(name: str, squares: Squares, changes: Mapping[str, Any], device: torch.device) -> Line:
    """Train a network on four fifths of the pictures, a tenth of these for validation; test it on the rest.

    The first epoch counts in no rate, as libraries choose and load their kernels in it.
    """
    config = network_config(name, {**changes, "weights": RANDOM})
    order = np.random.default_rng(1).permutation(len(squares))
    tested, held = (round(share * len(order)) for share in (_TEST, _TEST + _VALIDATION))
    test, validation, train = np.split(order, [tested, held])
    mos = np.random.default_rng(2).uniform(0.0, 5.0, len(squares))
    torch.manual_seed(0)
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    network = random_network(config)
    task = Task(train=np.sort(train), validation=np.sort(validation), mos=mos, seed=0)
    trainer = Trainer(network, squares, config, task, device=device)
    epochs = [trainer.train_epoch(lambda: None) for _ in range(config.all_epochs)]
    for epoch in epochs:
        say(f"{name}: {epoch.line(of=config.all_epochs)}")
    trained = time.perf_counter()
    trainer.predict(np.sort(test))
    ended = time.perf_counter()
    usual = float(np.median([epoch.seconds for epoch in epochs[1:] or epochs]))
    return {
        "stage": "networks",
        "name": name,
        "config": {
            "device": device_name(device),
            "images": len(squares),
            "epochs": config.all_epochs,
            "recipe_epochs": network_config(name, {}).all_epochs,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            **{
                key: getattr(config, key) for key in ("image_size", "resize", "train_crops", "test_crops", "batch_size")
            },
        },
        "measured": {
            "epoch_s": usual,
            "images_per_s": len(train) * config.train_crops / usual,
            "test_s": ended - trained,
            "total_s": ended - started,
            "peak_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0,
        },
    }


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """The lines that the command line asks for."""
    device = resolve_device(options["device"])
    changes = {name: options[name] for name in ("epochs", "alone_epochs", "image_size", "batch_size", "precision")}
    if options["short"]:
        changes |= {"epochs": _SHORT_EPOCHS, "alone_epochs": 0}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        items = draw_pictures(folder, options["images"], options["pixels"])
        for name in TABLE_II if options["table_ii"] else options["network"] or [GOAL_NETWORK]:
            config = network_config(name, changes)
            used = items[: _images_of(config, options["most_crops"])]
            started = time.perf_counter()
            squares = open_squares(used, config.resize, folder / "cache")
            decoded = time.perf_counter() - started
            line = timed_network(name, squares, changes, device)
            line["measured"] |= {"decode_s": decoded, "total_s": line["measured"]["total_s"] + decoded}
            yield line


def _images_of(config: NetworkConfig, most_crops: int | None) -> int | None:
    """How many pictures make at most so many training crops in one epoch; None for all."""
    return None if most_crops is None else int(most_crops / config.train_crops / (1.0 - _TEST - _VALIDATION))


def tables(lines: Sequence[Line]) -> str:
    """The measured numbers, and the goal."""
    columns = {
        "network": lambda line: line["name"],
        "device": lambda line: line["config"]["device"],
        "images": lambda line: f"{line['config']['images']:,}",
        "epochs": lambda line: str(line["config"]["epochs"]),
        "parameters": lambda line: f"{line['config']['parameters'] / 1e6:.2f} M",
    }
    goals = [
        [f"{line['name']}, {line['config']['epochs']} epochs, seconds", *goal_cells(value, at_most=GOAL_SECONDS)]
        for line in lines
        if line["name"] == GOAL_NETWORK
        and line["config"]["epochs"] == GOAL_EPOCHS
        and (value := line["measured"]["total_s"]) is not None
    ]
    return joined(measured_table(columns, _MEASURED, lines), goal_table(goals) if goals else "")


def rates_of(lines: Sequence[Line]) -> dict[str, float]:
    """Training crops per second by network; of several lines of a network, the last."""
    return {line["name"]: line["measured"]["images_per_s"] for line in lines}


@click.command()
@click.option(
    "--network", multiple=True, help=f"Network, such as {', '.join(TABLE_II)}; repeatable.  [default: {GOAL_NETWORK}]"
)
@click.option("--table-ii", is_flag=True, help="All networks of Table II, one after another.")
@click.option("--images", default=2982, show_default=True, help="Made-up pictures.")
@click.option("--pixels", default=512, show_default=True, help="Side of the pictures.")
@click.option("--most-crops", type=int, help="Use fewer pictures where an epoch has more training crops.")
@click.option("--short", is_flag=True, help="Three epochs of all layers; the first one warms up.")
@click.option("--epochs", type=int, help="Epochs.  [default: the recipe's]")
@click.option("--alone-epochs", type=int, help="Epochs of the new layers alone.  [default: the recipe's]")
@click.option("--image-size", type=int, help="Side of the crops.  [default: the recipe's]")
@click.option("--batch-size", type=int, help="Crops per step.  [default: the recipe's]")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--precision", type=click.Choice(["auto", "fp32", "bf16"]), default="auto", show_default=True)
@click.option("--write-rates", is_flag=True, help="Write the rates of --table into bench/reproducing/rates.yaml.")
@result_options
def main(*, out: Path | None, table: Path | None, write_rates: bool, **options: Any) -> None:
    """Time the fine-tuning of image networks on made-up pictures."""
    if write_rates:
        if table is None:
            message = "--write-rates needs --table with the result lines."
            raise click.UsageError(message)
        RATES.write_text(with_network_rates(RATES.read_text(encoding="utf-8"), rates_of(read_results(table))))
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


def _summary(line: Line) -> str:
    return f"{line['name']}: {line['measured']['epoch_s']:.2f} s per epoch, {line['measured']['total_s']:.1f} s in all"


if __name__ == "__main__":
    main()
