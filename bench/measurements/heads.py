"""Speed of training heads from stored features: `python -m agiqa.bench.measurements.heads --help`.

Runs `fit_head` for two epochs on made-up features of the real shape on the device, and times the second epoch, because
the first one compiles. `--uncached` also times training without stored features: the vision tower and the language
model of an 8B model, with random weights, run before the same head at every step.
"""

import gc
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

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
from agiqa.heads.closed.combined import network_of
from agiqa.heads.data.batches import LabelledItems, collate
from agiqa.heads.data.features import FeatureSet, RowBlock
from agiqa.heads.model.encoders.kernels.cuda_graphs import training_kernels
from agiqa.heads.model.head import build_head
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.training.fitting import fit_head
from agiqa.heads.training.progress import LineProgress
from agiqa.store import Items, open_store

HEADS: Mapping[str, tuple[int, Mapping[str, Any]]] = {
    "xlstm": (32, {"encoder": "xlstm"}),
    "xlstm, last token": (32, {"encoder": "xlstm", "pooling": "last"}),
    "xlstm, max pooling": (32, {"encoder": "xlstm", "pooling": "max"}),
    "xlstm, first and last": (32, {"encoder": "xlstm", "pooling": "first-last-mean"}),
    "xlstm, w/o lm_head": (32, {"encoder": "xlstm", "projection": "hidden"}),
    "none": (32, {"encoder": "none"}),
    "mamba2": (32, {"encoder": "mamba2", "layers": 4}),
    "transformer": (32, {"encoder": "transformer", "layers": 6, "num_heads": 2, "bidirectional": True}),
    "lstm": (128, {"encoder": "lstm", "layers": 4, "bidirectional": True, "residual": False}),
    "gru": (128, {"encoder": "gru", "layers": 2, "bidirectional": True, "residual": False}),
}
"""Batch size and settings of each head; sizes as published (4 xLSTM blocks by default)."""
COMPILED = ("xlstm", "mamba2", "transformer")
GOALS = {"xlstm": 0.6, "mamba2": 0.5, "transformer": 0.4, "lstm": 0.75, "gru": 0.4}
"""Milliseconds per image."""
TABLE_IV_ROWS = tuple(name for name in HEADS if name != "xlstm, w/o lm_head")
EPOCHS, TABLE_IV_SECONDS, SPEED_UP, MEMORY_GB = 20, 220.0, 25.0, 16.0
_VISION: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
}
_SLICES, _SLICE_PIXELS, _PATCH = 3, 448, 14


@dataclass(frozen=True, kw_only=True)
class MadeUpSource:
    """A stand-in for a store of hidden states: its rows are drawn on the device, not read."""

    count: int
    tokens: int
    width: int
    vocabulary: int
    id: str = "made up"
    encoding: str = "hidden"
    logical_dtype: str = "bfloat16"
    lm_head_sha256: str = "made up"

    @property
    def items(self) -> Items:
        """Names, and random MOS from 0 to 5."""
        return _made_up_items(self.count)

    @property
    def n_tokens(self) -> NDArray[np.int32]:
        """Token counts, the same for all items."""
        return np.full(self.count, self.tokens, np.int32)

    @cached_property
    def _lm_head(self) -> NDArray[np.float32]:
        drawn = torch.randn(self.vocabulary, self.width, device=resolve_device("auto")).mul_(0.02)
        return drawn.bfloat16().float().cpu().numpy()

    def lm_head(self) -> NDArray[np.float32]:
        """Random bfloat16 values, (V, D)."""
        return self._lm_head

    def read(self, _items: Sequence[int] | NDArray[Any], /) -> RowBlock:
        """Raises: the rows are on the device."""
        raise NotImplementedError

    def basis(self) -> Any:
        """Raises: hidden states have none."""
        raise NotImplementedError


@cache
def _made_up_items(count: int) -> Items:
    names, mos = [f"{number}.png" for number in range(count)], np.random.default_rng(0).uniform(0, 5, count)
    nothing: list[str | None] = [None] * count
    return Items(
        names=names,
        prompts=names,
        splits=nothing,
        generators=nothing,
        descriptions=nothing,
        labels={"quality": mos},
    )


def made_up_features(source: MadeUpSource, device: torch.device) -> FeatureSet:
    """Random rows for `source` on `device`; all tokens have the role of an answer."""
    offsets = np.arange(source.count + 1, dtype=np.int64) * source.tokens
    rows = torch.empty(int(offsets[-1]), source.width, dtype=torch.bfloat16, device=device)
    for piece in rows.split(1 << 16):
        piece.normal_()
    return FeatureSet(
        rows=rows,
        starts=offsets[:-1],
        roles=torch.full((len(rows),), 3, dtype=torch.uint8, device=device),
        offsets=torch.from_numpy(offsets),
        items=np.arange(source.count),
        source=source,
    )


def timed_head(
    name: str, features: FeatureSet, *, base: Mapping[str, Any], train: TrainConfig, standardise: bool
) -> Line:
    """Epoch time, set-up time and memory of one head."""
    batch_size, settings = HEADS[name]
    merged: dict[str, Any] = {**base, **settings, "standardise": standardise}
    config = HeadConfig(**merged)
    train = train.model_copy(update={"batch_size": batch_size, "epochs": 2})
    device = resolve_device(train.device)
    everything, nothing = (LabelledItems.at(features, np.arange(count), "quality") for count in (len(features), 0))
    if device.type == "cuda":
        gc.collect()  # reference cycles hold the graphs of the previous head
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held, started = _allocated(device), time.perf_counter()
    fit = fit_head(
        features,
        FeatureSpec.of(features.source),
        config,
        train,
        train=everything,
        validation=nothing,
        epochs=2,
        stage="train",
        progress=LineProgress(lambda _: None),
    )
    epochs = [epoch.seconds for epoch in fit.curves]
    measured = {
        "ms_per_image": epochs[-1] / len(features) * 1e3,
        "epoch_seconds": epochs[-1],
        "set_up_seconds": time.perf_counter() - started - sum(epochs),
        "first_epoch_seconds": epochs[0],
        "peak_gb": (_allocated(device, peak=True) - held) / 1e9,
    }
    network = network_of(fit.head)
    assert network is not None  # only networks are fitted by epochs
    return {
        "stage": "heads",
        "name": f"{name}, compiled" if train.compile else name,
        "config": {
            "batch_size": batch_size,
            "projection": config.projection,
            "precision": train.precision,
            "kernels": training_kernels(network.encoder, train, device),
            "parameters": sum(parameter.numel() for parameter in fit.head.parameters()),
        },
        "measured": measured,
    }


def _allocated(device: torch.device, *, peak: bool = False) -> int:
    """Bytes that torch holds on a GPU; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()


class UncachedModel:
    """The forward pass in front of M3-AGIQA's head: vision tower and language model of 8B, random weights."""

    def __init__(self, device: torch.device, width: int) -> None:
        """Shapes of the so400m vision tower and of Llama 3 8B, in bfloat16."""
        from transformers import LlamaConfig, LlamaModel, SiglipVisionConfig, SiglipVisionModel

        language = LlamaConfig(
            vocab_size=128, hidden_size=width, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        )  # fmt: skip
        vision = SiglipVisionConfig(**_VISION, image_size=_SLICE_PIXELS, patch_size=_PATCH)
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.device(device):
                self.language, self.vision = LlamaModel(language).eval(), SiglipVisionModel(vision).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        self._device, self._width = device, width

    @torch.no_grad()
    def hidden_states(self, batch: int, tokens: int) -> Tensor:
        """The final hidden states of `batch` conversations of `tokens`, each with three slices of an image."""
        pixels = torch.randn(batch * _SLICES, 3, _SLICE_PIXELS, _SLICE_PIXELS, device=self._device).bfloat16()
        self.vision(pixel_values=pixels)
        embedded = torch.randn(batch, tokens, self._width, device=self._device).bfloat16()
        states: Tensor = self.language(inputs_embeds=embedded, use_cache=False).last_hidden_state
        return states


def uncached_lines(features: FeatureSet, tokens: int, base: Mapping[str, Any], train: TrainConfig) -> Iterator[Line]:
    """Milliseconds per image, at batch 1 and 32: of a step that runs the whole model, and of the model alone."""
    device = resolve_device(train.device)
    model = UncachedModel(device, features.rows.shape[1])
    merged: dict[str, Any] = {**base, "encoder": "xlstm"}
    head = build_head(HeadConfig(**merged), FeatureSpec.of(features.source)).to(device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-5)
    for batch_size, steps in ((1, 10), (32, 3)):
        chosen = LabelledItems.at(features, np.arange(batch_size), "quality")
        batch = collate(features, chosen.positions, chosen.labels)

        def step(batch: Any = batch, size: int = batch_size) -> None:
            states = model.hidden_states(size, tokens).float()
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=train.precision == "bf16"):
                loss = (head(states, batch.mask, batch.roles) - batch.targets).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        alone = _milliseconds(lambda size=batch_size: model.hidden_states(size, tokens), steps, device) / batch_size
        whole = _milliseconds(step, steps, device) / batch_size
        measured = {"ms_per_image": whole, "model_ms_per_image": alone, "epoch_seconds": whole * len(features) / 1e3}
        yield {"stage": "uncached", "name": "xlstm", "config": {"batch_size": batch_size}, "measured": measured}


def _milliseconds(run: Any, steps: int, device: torch.device) -> float:
    run()
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(steps):
        run()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / steps * 1e3


def tables(lines: Sequence[Line]) -> str:
    """Markdown tables of result lines: the heads, the model that stored features replace, and the goals."""
    heads, uncached = ([line for line in lines if line["stage"] == stage] for stage in ("heads", "uncached"))
    of_head = {
        "head": lambda line: line["name"],
        "projection": lambda line: line["config"]["projection"],
        "batch": lambda line: str(line["config"]["batch_size"]),
    }
    of_model = {"uncached": lambda line: f"uncached {line['name']}", "batch": of_head["batch"]}
    return joined(
        measured_table(
            of_head, ("ms_per_image", "epoch_seconds", "first_epoch_seconds", "set_up_seconds", "peak_gb"), heads
        ),
        measured_table(of_model, ("ms_per_image", "model_ms_per_image", "epoch_seconds"), uncached),
        goal_table(_goal_rows(heads, uncached)),
    )


def _goal_rows(heads: Sequence[Line], uncached: Sequence[Line]) -> Iterator[list[str]]:
    found = {line["name"]: line for line in heads}
    on_gpu = any(line["measured"]["peak_gb"] for line in heads)
    for name, most in GOALS.items() if on_gpu else ():
        for measured in (name, f"{name}, compiled"):
            if measured in found:
                value = found[measured]["measured"]["ms_per_image"]
                yield [f"{measured}, ms per image", *goal_cells(value, at_most=most)]
    if on_gpu and set(TABLE_IV_ROWS) <= found.keys():
        of_rows = [found[name]["measured"] for name in TABLE_IV_ROWS]
        seconds = sum(
            row["set_up_seconds"] + row["first_epoch_seconds"] + (EPOCHS - 1) * row["epoch_seconds"] for row in of_rows
        )
        yield [f"nine heads of Table IV x {EPOCHS} epochs, s", *goal_cells(seconds, at_most=TABLE_IV_SECONDS)]
    peaks = [line["measured"]["peak_gb"] for line in heads if line["config"]["batch_size"] == 32]
    if on_gpu and peaks:
        yield ["GPU memory at batch 32, features aside, GB", *goal_cells(max(peaks), at_most=MEMORY_GB)]
    for line in uncached:
        if line["config"]["batch_size"] == 32 and line["name"] in found:
            ratio = line["measured"]["ms_per_image"] / found[line["name"]]["measured"]["ms_per_image"]
            yield ["times faster than uncached at batch 32", *goal_cells(ratio, at_least=SPEED_UP)]


@click.command()
@click.option("--store", type=click.Path(path_type=Path, exists=True), help="Train on this sketch store, on the CPU.")
@click.option("--items", default=2385, show_default=True, help="Made-up items.")
@click.option("--tokens", default=477, show_default=True, help="Tokens per item.")
@click.option("--channels", default=4096, show_default=True, help="Hidden size D.")
@click.option("--vocabulary", default=128_256, show_default=True, help="Vocabulary V.")
@click.option("--width", default=512, show_default=True, help="Width d of the heads.")
@click.option("--heads", default="", help=f"Rows, separated by semicolons, of {'; '.join(HEADS)} [default: all].")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option("--precision", default="bf16", show_default=True, help="bf16 or fp32.")
@click.option("--standardise", is_flag=True, help="Calibrate the projection too, which counts as set-up.")
@click.option("--compile", is_flag=True, help="Compile encoder blocks, and time only encoders that have such blocks.")
@click.option("--uncached", is_flag=True, help="Also time steps with an 8B model in them (needs a large GPU).")
@result_options
def main(*, out: Path | None, table: Path | None, **options: Any) -> None:
    """Time the training of heads from stored features."""
    print_tables(measured_lines(options), tables, _summary, out=out, table=table)


def _summary(line: Line) -> str:
    return f"{line['stage']} {line['name']}: {line['measured']['ms_per_image']:.3f} ms per image"


def measured_lines(options: Mapping[str, Any]) -> Generator[Line]:
    """The lines that the command line asks for."""
    names = [name.strip() for name in options["heads"].split(";") if name.strip()] or list(HEADS)
    for name in names:
        if name not in HEADS:
            message = f"No row is called {name!r}. Known, separated by semicolons: {'; '.join(HEADS)}."
            raise click.ClickException(message)
    train = TrainConfig(device=options["device"], precision=options["precision"], compile=options["compile"])
    device = resolve_device(train.device)
    base: dict[str, Any] = {"width": options["width"]}
    shape: Line = {"device": device_name(device)}
    if options["store"]:
        source = open_store(options["store"])
        base["projection"] = "sketch"
        features = FeatureSet.from_store(source, source.items.in_split("train"))
        names = [name for name in names if "projection" not in HEADS[name][1] and "pooling" not in HEADS[name][1]]
    else:
        shapes = {name: options[name] for name in ("tokens", "vocabulary")}
        made_up = MadeUpSource(count=options["items"], width=options["channels"], **shapes)
        features = made_up_features(made_up, device)
    shape |= {"items": len(features), "rows": int(features.offsets[-1]), "channels": features.rows.shape[1]}
    shape |= {"width": options["width"]}
    for name in (name for name in names if not train.compile or HEADS[name][1]["encoder"] in COMPILED):
        line = timed_head(name, features, base=base, train=train, standardise=options["standardise"])
        yield {**line, "config": {**line["config"], **shape}}
    if options["uncached"]:
        for line in uncached_lines(features, options["tokens"], base, train):
            yield {**line, "config": {**line["config"], **shape}}


if __name__ == "__main__":
    main()
