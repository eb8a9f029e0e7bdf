"""Speed of filling a store: `python -m agiqa.bench.measurements.extract --help`.

Times `agiqa extract` on made-up images and conversations of the real size, from files to a sealed store on disk. In the
same run it times forward passes (vision tower and language model) on the same batches, which are prepared and copied to
the device before the clock starts: the bare ones of transformers, padded and not compiled, and agiqa's own. The model
has random weights.
"""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image

from agiqa.bench.measurements.measuring import (
    Command,
    Line,
    device_name,
    digits,
    goal_cells,
    goal_table,
    joined,
    measured_table,
    print_tables,
    result_options,
)
from agiqa.bench.measurements.random_models import SHAPES
from agiqa.bench.recording.tables import as_table
from agiqa.extract import (
    Backbone,
    DataSet,
    ExtractionResult,
    ExtractionSettings,
    Item,
    Message,
    Prepared,
    run_extraction,
)
from agiqa.extract.data.images import read_image_file
from agiqa.extract.data.templates import templates
from agiqa.extract.filling.plan import LengthRule, prepare_planned, tokenise
from agiqa.extract.filling.staging import Transfers
from agiqa.extract.models.batches import even_batches
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.models.preparing import Opener, Preparation, default_workers

ENCODINGS = ("hidden", "sketch", "logits")
RATIO, IMAGES_PER_SECOND, MEMORY_GB = 1.15, 52.0, 12.0
"""Goals: multiple of the bare rate, images per second, and GPU memory beside the weights."""
_DIFFERENT = 64
"""Number of distinct images; the others are copies."""
_NOISE = 64 << 20
"""Bytes of noise, repeated to make a file."""
_BATCHES_AT_ONCE = 8
"""Prepared batches on the device while their forward passes are timed."""
_WORDS = ("sharp", "blurry", "a", "dog", "with", "good", "colours", "and", "noise", "in", "the", "background")
_OWN_RATE = "forward_images_per_second"
"""Of agiqa's own forward passes; lines of earlier releases, with other goals, do not have it."""
_PHASES = ("plan", "load", "calibrate", "model", "fill", "seal")


def write_images(folder: Path, count: int, pixels: int) -> list[Path]:
    """`count` PNG files: smooth colours with noise on them, about as hard to decode as photographs."""
    folder.mkdir(parents=True)
    paths = [folder / f"{number:05d}.png" for number in range(count)]
    random = np.random.default_rng(0)
    for number, path in enumerate(paths):
        if number >= _DIFFERENT:
            shutil.copyfile(paths[number % _DIFFERENT], path)
            continue
        coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((pixels, pixels), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + random.integers(-12, 13, smooth.shape, dtype=np.int16), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(path, compress_level=1)
    return paths


def made_up_data(folder: Path, backbone: Backbone, *, items: int, tokens: int, pixels: int) -> DataSet:
    """Images, checked as those of a real data set, with conversations of 0.9 to 1.1 times `tokens` tokens."""
    paths = write_images(folder, items, pixels)
    random = np.random.default_rng(1)
    short, long = (len(backbone.prepare(_conversation(random, words), paths[0]).token_ids) for words in (0, 200))
    words = max(0.0, (tokens - short) / (long - short) * 200)
    found: list[Item] = []
    hashes = [read_image_file(path).sha256 for path in paths[:_DIFFERENT]]
    for number, path in enumerate(paths):
        conversation = _conversation(random, round(words * random.uniform(0.9, 1.1)))
        item = Item(
            name=path.name,
            prompt="made up",
            conversation=conversation,
            image=path,
            image_sha256=hashes[number % _DIFFERENT],
            image_size=(pixels, pixels),
            labels={"quality": float(random.uniform(0, 5))},
            split="train",
            generator=None,
            description=conversation[1].content,
        )
        found.append(item)
    return DataSet(name="made up", items=tuple(found), skipped=())


def made_up_options(*, items: int, each: str = "") -> Callable[[Command], Command]:
    """Add the options that `made_up_work` reads; `items` is the default of `--items`, `each` ends its help text."""
    where = "Folder for temporary images and stores."
    options = (
        click.option("--model-shape", type=click.Choice(list(SHAPES)), default=next(iter(SHAPES)), show_default=True),
        click.option("--items", default=items, show_default=True, help=f"Images{each}."),
        click.option("--tokens", default=477, show_default=True, help="Average tokens per conversation."),
        click.option("--pixels", default=512, show_default=True, help="Side of the images in pixels."),
        click.option("--device", default="auto", show_default=True),
        click.option("--folder", type=click.Path(path_type=Path), help=where),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@contextmanager
def made_up_work(options: Mapping[str, Any]) -> Generator[tuple[Path, Opener, Backbone, DataSet]]:
    """A temporary folder, a function that opens the model, the model itself, and made-up data for it."""
    with tempfile.TemporaryDirectory(dir=options["folder"]) as made:
        folder = Path(made)
        opener = partial(SHAPES[options["model_shape"]], folder / options["model_shape"])
        backbone = opener(device=options["device"])
        sizes = {name: options[name] for name in ("items", "tokens", "pixels")}
        yield folder, opener, backbone, made_up_data(folder / "images", backbone, **sizes)


def _conversation(random: np.random.Generator, words: int) -> tuple[Message, ...]:
    template = templates()["quality"]
    description = " ".join(_WORDS[number] for number in random.integers(0, len(_WORDS), words)) or "-"
    return (
        Message(role="user", content=template.describe),
        Message(role="assistant", content=description),
        Message(role="user", content=template.rate),
    )


def measured_line(
    encoding: str, data: DataSet, backbone: Backbone, opener: Opener, folder: Path, options: Mapping[str, Any]
) -> Line:
    """The line of one extraction, with the bare forward pass on the same batches."""
    settings = ExtractionSettings(
        encoding=encoding,
        rank=options["rank"] if encoding == "sketch" else None,
        layers=options["layers"],
        pool_tokens=options["pool_tokens"] or (),
        batch_size=options["batch_size"],
        workers=options["workers"],
    )
    weights = _start_counting(backbone.device)
    result = run_extraction(data, backbone, folder / f"{encoding}.agiqa", settings, opener=opener)
    peak = _peak(backbone.device)
    report, seconds = result.fill, dict(result.seconds)
    if report is None:
        message = f"{folder} holds a finished store; give an empty --folder."
        raise click.ClickException(message)
    seconds["model"] = seconds["fill"] - report.seconds
    seconds["fill"] = report.seconds
    bare, forward = forward_rates(data, backbone, opener, result, report.batch_size, options)
    size = sum(file.stat().st_size for file in result.store.path.rglob("*") if file.is_file())
    disk = {"disk_mb_per_second": disk_rate(folder, size)} if encoding == "logits" else {}
    items, store = report.items, result.store
    rows = [store.array(store.array_of_layer(layer)) for layer in store.layers]
    stored = int(store.n_tokens.sum()) * sum(one.dtype.itemsize * one.shape[1] for one in rows)
    measured = {
        "images_per_second": items / report.seconds,
        "bare_images_per_second": bare,
        "ratio": items / report.seconds / bare,
        _OWN_RATE: forward,
        "whole_images_per_second": items / (sum(seconds.values()) - seconds["load"]),
        "row_mb_per_second": stored / report.seconds / 1e6,
        "peak_gb": (peak - weights) / 1e9,
        "store_gb": size / 1e9,
        **disk,
        **{f"{phase}_seconds": seconds.get(phase, 0.0) for phase in _PHASES},
    }
    config = {
        "items": items,
        "tokens": round(report.tokens / items, 1),
        "layers": ",".join(store.layers),
        "pooled": ",".join(store.pooled),
        "batch_size": report.batch_size,
        "weights_gb": round(weights / 1e9, 2),
        "width": store.width,
    }
    return {"stage": "extract", "name": encoding, "config": config, "measured": measured}


def disk_rate(folder: Path, size: int) -> float:
    """The speed in MB/s of writing `size` bytes of noise to one plain file in `folder`, fsync included."""
    noise, left = os.urandom(_NOISE), size
    with tempfile.TemporaryFile(dir=folder) as file:
        started = time.perf_counter()
        while left > 0:
            left -= file.write(noise[:left])
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started) / 1e6


def forward_rates(
    data: DataSet,
    backbone: Backbone,
    opener: Opener,
    result: ExtractionResult,
    batch_size: int,
    options: Mapping[str, Any],
) -> tuple[float, float]:
    """Images per second of transformers' forward passes, and of agiqa's, on the store's batches on the device.

    Runs the first batches of the store until they hold `bare_items` images, a few at a time. The first batch runs
    twice, so that what a first use costs does not count.
    """
    assert isinstance(backbone, HuggingFaceBackbone)  # as all shapes are
    store, transfers, images = result.store, Transfers(backbone.device), 0
    planned = tokenise(data, backbone, LengthRule()).planned
    lengths = [one.length for one in planned]
    groups = [
        [int(positions[place]) for place in places]
        for positions in (store.items_of(unit) for unit in range(store.geometry.units))
        for places in even_batches([lengths[position] for position in positions.tolist()], batch_size)
    ]
    counts = accumulate(len(group) for group in groups)
    groups = groups[: next((n for n, count in enumerate(counts, 1) if count >= options["bare_items"]), None)]
    wanted = ((None, [planned[position] for position in group]) for group in groups)
    workers = options["workers"]
    workers = default_workers(backbone.device, len(lengths)) if workers is None else workers
    seconds = [0.0, 0.0]
    with Preparation(backbone, workers=workers, opener=opener) as preparation, transfers.on_device():
        prepared = (transfers.upload(batch) for _, batch in preparation.groups(prepare_planned, wanted))
        while batches := [batch for _, batch in zip(range(_BATCHES_AT_ONCE), prepared, strict=False)]:
            for way, compute in enumerate((backbone.states, backbone.hidden_states)):
                if not images:
                    _seconds(compute, batches[:1], backbone.device)
                seconds[way] += _seconds(compute, batches, backbone.device)
            images += sum(len(batch) for batch in batches)
    return images / seconds[0], images / seconds[1]


def _seconds(
    compute: Callable[[list[Prepared]], Any], batches: Sequence[list[Prepared]], device: torch.device
) -> float:
    _synchronize(device)
    started = time.perf_counter()
    with torch.inference_mode():
        for batch in batches:
            compute(batch)
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _start_counting(device: torch.device) -> int:
    """Reset the GPU's peak memory. Returns the bytes in use now, which are the weights."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    """The peak of the bytes that torch reserved on a GPU, including its cache; 0 on a CPU."""
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines: rates, phases, and the goals."""
    encoding = {"encoding": lambda line: line["name"]}
    kept = {
        key.replace("_", " "): lambda line, key=key: str(line["config"][key])
        for key in ("items", "tokens", "batch_size")
    }
    rates = ["images_per_second", "bare_images_per_second", "ratio", "whole_images_per_second", "row_mb_per_second"]
    if all(_OWN_RATE in line["measured"] for line in lines):
        rates.insert(3, _OWN_RATE)
    phases = (*(f"{phase}_seconds" for phase in _PHASES), "peak_gb", "store_gb")
    raw = [line for line in lines if "disk_mb_per_second" in line["measured"]]
    rows = [[line["name"], digits(_stored_rate(line)), digits(line["measured"]["disk_mb_per_second"])] for line in raw]
    return joined(
        measured_table({**encoding, **kept}, rates, lines),
        measured_table(encoding, phases, lines),
        as_table(["encoding", "stored MB per second", "plain file MB per second"], rows),
        goal_table(_goal_rows(lines)),
    )


def _stored_rate(line: Line) -> float:
    """MB/s of compressed bytes, to compare with a plain file."""
    return float(line["measured"]["store_gb"]) * 1e3 / float(line["measured"]["fill_seconds"])


def _goal_rows(lines: Sequence[Line]) -> Iterator[list[str]]:
    """The goals, for lines from a GPU. For raw logits there is a goal for memory only."""
    for line in lines:
        name, measured = line["name"], line["measured"]
        if not measured["peak_gb"]:
            continue
        if name != "logits" and _OWN_RATE in measured:
            yield [f"{name}: multiple of the bare rate", *goal_cells(measured["ratio"], at_least=RATIO)]
            rate = measured["images_per_second"]
            yield [f"{name}: images per second", *goal_cells(rate, at_least=IMAGES_PER_SECOND)]
        yield [f"{name}: GPU memory beside the weights, GB", *goal_cells(measured["peak_gb"], at_most=MEMORY_GB)]


@click.command()
@made_up_options(items=512)
@click.option("--logit-items", default=16, show_default=True, help="Images of the run that stores raw logits.")
@click.option("--bare-items", default=512, show_default=True, help="Images of the forward passes, at least.")
@click.option("--encodings", default=",".join(ENCODINGS), show_default=True, help="Separated by commas.")
@click.option("--rank", default=512, show_default=True, help="Rank of the sketch.")
@click.option("--layers", default="last", show_default=True, help="Layers to store, as `agiqa extract` reads them.")
@click.option("--pool-tokens", help="Pooled rows in place of tokens, as `agiqa extract` reads them.")
@click.option("--batch-size", type=int, help="Items per forward pass [default: what the memory allows].")
@click.option("--workers", type=int, help="Processes that prepare items [default: by the cores].")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time extraction from files to a sealed store, and the forward passes of the same batches."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


def _summary(line: Line) -> str:
    measured = line["measured"]
    return f"{line['name']}: {measured['images_per_second']:.1f} images/s, {measured['ratio']:.3f} times the bare rate"


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """A line per encoding that the command line asks for."""
    with made_up_work(options) as (folder, opener, backbone, data):
        started = time.perf_counter()
        backbone.load()
        load = time.perf_counter() - started
        backbone.hidden_states([backbone.prepare(item.conversation, item.image) for item in data.items[:2]])  # warm up
        device = device_name(backbone.device)
        shape = {"model": options["model_shape"], "pixels": options["pixels"], "device": device}
        for encoding in options["encodings"].split(","):
            few = DataSet(name=data.name, items=data.items[: options["logit_items"]], skipped=())
            line = measured_line(encoding, few if encoding == "logits" else data, backbone, opener, folder, options)
            shutil.rmtree(folder / f"{encoding}.agiqa")
            line["measured"]["load_seconds"] = load
            yield {**line, "config": {**line["config"], **shape}}


if __name__ == "__main__":
    main()
