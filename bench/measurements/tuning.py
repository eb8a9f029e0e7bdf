"""Memory and speed of the recipes of `agiqa tune`: `python -m agiqa.bench.measurements.tuning [--out FILE.jsonl]`.

MiniCPM-Llama3-V-2.5 in its real shape with random weights, drawn on the device, trains on made-up conversations about
one image in three slices. Needs a GPU with more than 40 GB, and some minutes.
"""

import gc
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from torch import nn

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
from agiqa.bench.measurements.random_models import SHAPES, Shape, shape_of_config
from agiqa.extract import Message
from agiqa.extract.models.compiling import compile_layers
from agiqa.extract.models.huggingface import HuggingFaceBackbone
from agiqa.extract.tuning.adapting import Trained, adapt, recompute
from agiqa.extract.tuning.estimates import GB, Load, estimate
from agiqa.extract.tuning.examples import Example
from agiqa.extract.tuning.group import Group
from agiqa.extract.tuning.learner import Learner, OutOfMemory
from agiqa.extract.tuning.recipes import Recipe, recipe_of, summaries
from agiqa.store import TOKEN_ROLES

GOALS_GB = {"published": 40.0, "light": 24.0}
"""Most memory of a recipe at one item per forward pass, with everything recomputed."""
GOAL_RATE = 0.45
"""Least share of the measured matmul rate."""
_MATMUL = 8192
_REPEATS = 20
_WARM_UP = 2
_SIDE = 512
"""Pixels of the image, squared: an overview and two slices."""


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product."""
    side = _MATMUL if device.type == "cuda" else 512
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = 0.0
    for repeats in (3, _REPEATS):  # the first are a warm-up
        _wait(device)
        started = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(left, right)
        _wait(device)
        seconds = time.perf_counter() - started
    return _REPEATS * 2 * side**3 / seconds


def made_up(backbone: HuggingFaceBackbone, tokens: int, seed: int) -> Example:
    """A conversation of `tokens` tokens about an image; the loss counts most of its text."""
    random = np.random.default_rng(seed)
    picture = Path(tempfile.gettempdir()) / f"agiqa-{random.integers(1 << 40)}.png"
    Image.fromarray(random.integers(0, 255, (_SIDE, _SIDE, 3), np.uint8)).save(picture)
    try:
        prepared = backbone.prepare([Message(role="user", content="?")], picture)
    finally:
        picture.unlink()
    more = tokens - len(prepared.token_ids)
    if more < 2:
        message = f"{tokens} tokens are too few: the image takes {len(prepared.token_ids)}."
        raise click.UsageError(message)
    words = random.integers(0, backbone.vocab_size, more).astype(np.int32)
    roles = np.full(more, TOKEN_ROLES["answer"], np.uint8)
    longer = replace(
        prepared,
        token_ids=np.concatenate([prepared.token_ids, words]),
        roles=np.concatenate([prepared.roles, roles]),
    )
    asked = more // 4  # questions, which the loss leaves out
    return Example(name=str(seed), prepared=longer, labels=np.arange(tokens - more + asked, tokens), rating=1)


def counted_flop(model: nn.Module, trained: Trained, example: Example, slices: int) -> float:
    """FLOP of one example: 6 per trained parameter and token, 4 per frozen one with gradients behind it, 2 without."""
    tokens, labels = len(example.prepared.token_ids), len(example.labels)
    patches = len(example.prepared.inputs["patches"])
    queries = slices * model.get_parameter("resampler.query").shape[0]
    sees = any(name.startswith(("vpm", "resampler")) for name in trained.parameters)
    total = 0.0
    for name, weight in model.named_parameters():
        if weight.ndim < 2 or "embed_tokens" in name or "position_embedding" in name or name == "resampler.query":
            continue
        factor = 6 if name in trained.parameters else 4
        if name.startswith("llm.lm_head"):
            total += factor * labels * weight.numel()
        elif name.startswith("llm."):
            total += factor * tokens * weight.numel()
        else:
            factor = factor if sees else 2
            if name == "resampler.attn.in_proj_weight":  # queries, keys and values
                total += factor * weight.numel() / 3 * (queries + 2 * patches)
            else:
                on_queries = name in ("resampler.proj", "resampler.attn.out_proj.weight")
                total += factor * weight.numel() * (queries if on_queries else patches)
    return total


def measured_case(
    shape: Shape, folder: Path, recipe: Recipe, tokens: int, steps: int, rate: float
) -> Mapping[str, Any]:
    """Memory and speed of `steps` steps; `rate` is that of large matrix products."""
    backbone = shape(folder, device="cuda" if torch.cuda.is_available() else "cpu")
    assert isinstance(backbone, HuggingFaceBackbone)  # it is a MiniCPM
    device = backbone.device
    backbone.load()
    trained = adapt(backbone, recipe, seed=0)
    recompute(trained, recipe.checkpointing)
    if recipe.compile == "always":
        compile_layers(trained.model)
    learner = Learner(backbone, trained, recipe, Group())
    examples = [made_up(backbone, tokens, seed) for seed in range(recipe.batch_size)]
    size = recipe.micro_batch or recipe.batch_size
    pieces = [(seed, examples[start : start + size]) for seed, start in enumerate(range(0, len(examples), size))]
    labels = sum(len(example.labels) for example in examples)
    largest = examples[0]
    longest = Load(tokens=tokens, labels=len(largest.labels), patches=len(largest.prepared.inputs["patches"]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, loss = 0.0, 0.0
    for step in range(_WARM_UP + steps):
        _wait(device)
        started = time.perf_counter()
        loss = learner.gradient(pieces, labels=labels).loss
        learner.apply(recipe.lr)
        _wait(device)
        seconds += 0.0 if step < _WARM_UP else time.perf_counter() - started
    layout = largest.prepared.layout
    assert layout is not None  # there is an image
    flop = sum(counted_flop(trained.model, trained, example, len(layout)) for example in examples) * steps
    peak = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if device.type == "cuda" else (0, 0)
    return {
        "peak_gb": peak[0] / GB,
        "reserved_gb": peak[1] / GB,
        "estimated_gb": estimate(backbone, recipe, longest.times(size), checkpointing=recipe.checkpointing).total / GB,
        "tokens_per_second": steps * len(examples) * tokens / seconds,
        "step_seconds": seconds / steps,
        "tflop_per_second": flop / seconds / 1e12,
        "matmul_tflop_per_second": rate / 1e12,
        "of_matmul_rate": flop / seconds / rate,
        "loss": loss,
        "trained_parameters": sum(weight.numel() for weight in trained.parameters.values()),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """A line per recipe, length, recomputation and number of items per forward pass."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = SHAPES[options["shape"]] if options["config"] is None else partial(shape_of_config, options["config"])
    rate = matmul_rate(device, dtype)
    cases = product(*(options[key] for key in ("recipe", "tokens", "checkpointing", "micro_batch", "compile")))
    with tempfile.TemporaryDirectory() as folder:
        for name, tokens, which, micro, compiled in cases:
            changes = {"checkpointing": which, "micro_batch": micro, "batch_size": max(micro, 2), "compile": compiled}
            recipe = recipe_of(name, changes)
            config = {"tokens": tokens, **changes, "device": device_name(device), "shape": options["shape"]}
            try:
                measured = measured_case(shape, Path(folder), recipe, tokens, options["steps"], rate)
            except OutOfMemory as error:
                measured = {"out_of_memory": str(error)}
            yield {"stage": "tune", "name": name, "config": config, "measured": measured}
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines: memory and speed, and the goals."""
    fitting = [line for line in lines if "out_of_memory" not in line["measured"]]
    columns: dict[str, Any] = {"recipe": lambda line: line["name"]}
    for key, title in (
        ("tokens", "tokens"),
        ("micro_batch", "items"),
        ("checkpointing", "recomputed"),
        ("compile", "compiled"),
    ):
        columns[title] = lambda line, key=key: str(line["config"][key])
    keys = ("peak_gb", "reserved_gb", "estimated_gb", "tokens_per_second", "of_matmul_rate")
    goals: list[list[str]] = []
    for line in fitting:
        config = line["config"]
        if config["device"] == "cpu":
            continue
        what = _case(line)
        if line["name"] in GOALS_GB and (config["micro_batch"], config["checkpointing"]) == (1, "all"):
            cells = goal_cells(line["measured"]["reserved_gb"], at_most=GOALS_GB[line["name"]])
            goals.append([f"{what}: GB", *cells])
        goals.append(
            [f"{what}: share of the matmul rate", *goal_cells(line["measured"]["of_matmul_rate"], at_least=GOAL_RATE)]
        )
    return joined(measured_table(columns, keys, fitting), goal_table(goals))


def _case(line: Line) -> str:
    config = line["config"]
    shape = f"{config['tokens']} tokens x {config['micro_batch']}"
    return f"{line['name']}, {shape}, recomputed: {config['checkpointing']}, compiled: {config['compile']}"


def _summary(line: Line) -> str:
    what, measured = _case(line), line["measured"]
    if "out_of_memory" in measured:
        return f"{what}: out of memory"
    return (
        f"{what}: {measured['peak_gb']:.1f} GB (estimate {measured['estimated_gb']:.1f}), "
        f"{measured['tokens_per_second']:.0f} tokens/s, {measured['of_matmul_rate']:.0%} of the matmul rate"
    )


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="minicpm-8b", show_default=True)
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True), help="A config.json whose shape to use instead."
)
@click.option("--recipe", multiple=True, default=tuple(summaries()), show_default=True)
@click.option("--tokens", multiple=True, type=int, default=(512, 768), show_default=True)
@click.option("--checkpointing", multiple=True, default=("all", "none"), show_default=True)
@click.option("--compile", multiple=True, default=("never", "always"), show_default=True)
@click.option("--micro-batch", multiple=True, type=int, default=(1, 2), show_default=True)
@click.option("--steps", default=4, show_default=True, type=click.IntRange(min=1), help="Timed steps of each case.")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Measure the recipes of `agiqa tune` on this machine's GPU."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


if __name__ == "__main__":
    main()
