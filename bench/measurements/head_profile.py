"""Where the time of training heads goes on a GPU: `python -m agiqa.bench.measurements.head_profile`, in two minutes.

Prints markdown tables: the seconds from the start of a process to the end of the first epoch, in a process without
compiled kernels and in one that finds them; the kernels of a later step, and the time in which none runs; and the cells
of the encoders by the kernels of this package against what they replace. Features are made up, as for heads.py.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from agiqa.bench.measurements.heads import HEADS, MadeUpSource, made_up_features
from agiqa.bench.measurements.measuring import device_name, digits
from agiqa.bench.recording.tables import as_table
from agiqa.heads.closed.combined import network_of
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.model.encoders import mamba2, mlstm
from agiqa.heads.model.encoders.kernels.cuda_graphs import GraphedEncoder, training_kernels
from agiqa.heads.model.head import build_head
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import resolve_device
from agiqa.heads.training.curves import Epoch
from agiqa.heads.training.fitting import fit_head

ENCODERS = ("xlstm", "mamba2", "transformer")
_COLD_ITEMS = 128
_PROFILED, _KERNELS, _NAME = 20, 15, 60
_REPEATS = 20


class Profiled:
    """A TrainingProgress that records the kernels of some steps of the last epoch."""

    def __init__(self, first: int) -> None:
        """Steps from number `first` of the training on are recorded."""
        self._first, self._steps, self._began = first, 0, 0.0
        self._profiler: Any = None
        self.found: dict[str, Any] = {}

    def begin(self, stage: str, *, epochs: int, steps: int, done: int) -> None:
        """Nothing is shown."""

    def validated(self) -> None:
        """Nothing is shown."""

    def step(self) -> None:
        """Start or stop recording."""
        self._steps += 1
        if self._steps == self._first:
            torch.cuda.synchronize()
            self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self._profiler.start()
            self._began = time.perf_counter()
        elif self._steps == self._first + _PROFILED:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self._began
            self._profiler.stop()
            self.found = _kernels(self._profiler, seconds)

    def epoch(self, epoch: Epoch) -> None:
        """Nothing is shown."""

    def end(self) -> None:
        """Nothing to clear away."""


def _rows(profiler: Any) -> list[tuple[str, float, int]]:
    """Name, milliseconds and launches of each kind of kernel and copy, most time first."""
    kinds = [row for row in profiler.key_averages() if str(row.device_type).endswith("CUDA")]
    kinds = [row for row in kinds if not getattr(row, "is_user_annotation", False)]
    return sorted(((row.key, row.self_device_time_total / 1e3, row.count) for row in kinds), key=lambda row: -row[1])


def _kernels(profiler: Any, seconds: float) -> dict[str, Any]:
    """Milliseconds per step: in all, with a kernel at work, and of the kernels that take most."""
    rows = _rows(profiler)
    busy = sum(milliseconds for _, milliseconds, _ in rows)
    return {
        "step_ms": seconds * 1e3 / _PROFILED,
        "busy_ms": busy / _PROFILED,
        "launches": sum(count for *_, count in rows) / _PROFILED,
        "kernels": [(key[:_NAME], part / _PROFILED, count / _PROFILED) for key, part, count in rows[:_KERNELS]],
    }


@contextmanager
def clocked(seconds: defaultdict[str, float]) -> Generator[None]:
    """Adds up what Triton compiles or finds compiled, and what graphs take to be captured (compiling included)."""
    from triton import knobs  # pyright: ignore[reportMissingImports]

    def compiled(*, times: Any, cache_hit: bool, **_: Any) -> None:
        seconds["Triton, found" if cache_hit else "Triton, compiled"] += times.total / 1e6
        seconds["kernels found" if cache_hit else "kernels compiled"] += 1

    capture = GraphedEncoder.capture

    def captured(self: GraphedEncoder, tokens: Tensor, mask: Tensor) -> torch.nn.Module:
        started = time.perf_counter()
        graph = capture(self, tokens, mask)
        torch.cuda.synchronize()
        seconds["graph captures"] += time.perf_counter() - started
        seconds["graphs"] += 1
        return graph

    before = knobs.compilation.listener
    knobs.compilation.listener, GraphedEncoder.capture = compiled, captured  # type: ignore[method-assign]
    try:
        yield
    finally:
        knobs.compilation.listener, GraphedEncoder.capture = before, capture  # type: ignore[method-assign]


def _of_head(name: str, features: FeatureSet, train: TrainConfig, *, epochs: int) -> dict[str, Any]:
    """Seconds of the parts of a training of `name`, and its kernels where there is an epoch to record."""
    batch_size, settings = HEADS[name]
    config = HeadConfig(**dict[str, Any](settings), standardise=False)
    train = train.model_copy(update={"batch_size": batch_size, "epochs": epochs})
    everything, nothing = (LabelledItems.at(features, np.arange(count), "quality") for count in (len(features), 0))
    spec, seconds = FeatureSpec.of(features.source), defaultdict[str, float](float)
    gc.collect()
    torch.cuda.empty_cache()
    started = time.perf_counter()
    build_head(config, spec).to(train.device)
    seconds["build of the head (once more)"] = time.perf_counter() - started
    steps = -(-len(features) // batch_size)
    progress = Profiled(first=2 * steps + 5)
    started = time.perf_counter()
    with clocked(seconds):
        fit = fit_head(
            features, spec, config, train, train=everything, validation=nothing, epochs=epochs, stage="train",
            progress=progress,
        )  # fmt: skip
    durations = [epoch.seconds for epoch in fit.curves]
    seconds["set-up and end"] = time.perf_counter() - started - sum(durations)
    seconds["first epoch"] = durations[0]
    steady = durations[1] if epochs > 1 else 0.0
    network = network_of(fit.head)
    assert network is not None  # only networks are fitted by epochs
    return {
        "name": name,
        "ways": training_kernels(network.encoder, train, resolve_device(train.device)),
        "seconds": dict(seconds),
        "ms_per_image": steady / len(features) * 1e3,
        **progress.found,
    }


def _trained(names: Sequence[str], items: int, started: float, *, epochs: int) -> dict[str, Any]:
    """What one process measures, which began to import at `started`."""
    seconds: dict[str, float] = {"imports": time.time() - started}
    device, begun = resolve_device("cuda"), time.perf_counter()
    square = torch.ones(256, 256, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize((square @ square).device)
    seconds["CUDA"] = time.perf_counter() - begun
    features = made_up_features(MadeUpSource(count=items, tokens=477, width=4096, vocabulary=128_256), device)
    features.source.lm_head()
    train = TrainConfig(device="cuda", precision="bf16")
    heads = [_of_head(name, features, train, epochs=epochs) for name in names]
    return {"device": device_name(device), "seconds": seconds, "heads": heads}


Timed = tuple[Callable[..., Tensor], Sequence[Tensor]]


def _cells() -> dict[str, tuple[Timed, Timed]]:
    """The cells at batch 32 and L = 477: by the present kernels, and by what they replace."""
    items, tokens, device = 32, 477, "cuda"

    def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype).requires_grad_()

    rows = [drawn(items, tokens, 4, 256).transpose(1, 2) for _ in range(3)]
    gates = [drawn(items, 4, tokens, 1, dtype=torch.float32) for _ in range(2)]
    leaves = [part.detach().requires_grad_() for part in rows]
    inputs, step_sizes = drawn(items, tokens, 16, 64), drawn(items, tokens, 16, dtype=torch.float32)
    shared, rates = [drawn(items, tokens, 16) for _ in range(2)], -torch.rand(16, device=device) - 1

    def scanned(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, steps, *others: function(x, steps.square() * 0.1, rates, *others)

    def with_states(*given: Tensor) -> Tensor:
        return mlstm.mlstm_with_states(list(given[:3]), list(given[3:]))

    flat, dense, blocks = drawn(items * tokens, 1024), drawn(1024, 1024), drawn(4, 256, 256)
    return {
        "mLSTM, 4 heads of 256": ((mlstm.mlstm, [*leaves, *gates]), (with_states, [*leaves, *gates])),
        "scan of Mamba2, 16 heads of 64": (
            (scanned(mamba2.scan), [inputs, step_sizes, *shared]),
            (scanned(mamba2.ssd), [inputs, step_sizes, *shared]),
        ),
        "q, k or v of an mLSTM": (
            (lambda x, w: torch.bmm(x.unflatten(1, (4, 256)).transpose(0, 1), w.transpose(1, 2)), [flat, blocks]),
            (linear, [flat, dense]),
        ),
    }


def _timed_cell(function: Callable[..., Tensor], given: Sequence[Tensor]) -> tuple[float, float]:
    """Milliseconds forward, and forward and backward, with launches hidden behind a long kernel."""
    with torch.autocast("cuda", dtype=torch.bfloat16):
        weights = torch.randn_like(function(*given))

    def forward() -> Tensor:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return function(*given)

    def both() -> None:
        torch.autograd.grad(forward(), list(given), weights)

    return _milliseconds(forward), _milliseconds(both)


def _milliseconds(run: Callable[[], object]) -> float:
    """By the profiler's sum of kernels, which the CPU's launches do not lengthen."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(_REPEATS):
            run()
        torch.cuda.synchronize()
    return sum(milliseconds for _, milliseconds, _ in _rows(profiler)) / _REPEATS


def _measured_cells() -> list[list[str]]:
    rows: list[list[str]] = []
    for name, (present, former) in _cells().items():
        try:
            now, before = _timed_cell(*present), _timed_cell(*former)
        except (ImportError, RuntimeError) as error:
            rows.append([name, f"{type(error).__name__}: {error}"[:200], "", "", "", ""])
            continue
        cells = [digits(value) for value in (before[0], now[0], before[1], now[1], before[1] / now[1])]
        rows.append([name, *cells])
    return rows


def _in_a_process(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """`_trained` for an epoch of few items in a new process, whose compiled kernels go to TRITON_CACHE_DIR."""
    out = folder / "measured.json"
    command = [sys.executable, "-m", "agiqa.bench.measurements.head_profile", "--heads", ";".join(names)]
    subprocess.run([*command, "--child", str(out), "--started", str(time.time())], check=True)
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def _start_table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Seconds until the end of the first epoch."""
    rows: list[list[str]] = []
    for process, found in runs.items():
        starts: dict[str, dict[str, float]] = {"": found["seconds"]}
        starts |= {head["name"]: head["seconds"] for head in found["heads"]}
        for name, parts in starts.items():
            rows += [[process, name, part, digits(seconds)] for part, seconds in parts.items()]
    return as_table(["process", "head", "part", "seconds (or number)"], rows)


def _kernel_table(head: Mapping[str, Any]) -> str:
    """The kernels of a step."""
    rows = [[key, digits(part), f"{part / head['busy_ms']:.1%}", digits(count)] for key, part, count in head["kernels"]]
    title = (
        f"**{head['name']}**: {head['ms_per_image']:.3f} ms per image; a recorded step {head['step_ms']:.2f} ms, "
        f"kernels {head['busy_ms']:.2f} ms ({head['launches']:.0f} of them), nothing running "
        f"{head['step_ms'] - head['busy_ms']:.2f} ms"
    )
    return f"{title}\n\n{as_table(['kernel', 'ms per step', 'share', 'launches'], rows)}"


@click.command()
@click.option("--items", default=2385, show_default=True, help="Made-up items.")
@click.option("--heads", default=";".join(ENCODERS), show_default=True, help="Rows of heads.py, by semicolons.")
@click.option("--epochs", default=3, show_default=True, help="Epochs; the third is recorded.")
@click.option("--no-cells", is_flag=True, help="Leave out the cells.")
@click.option("--child", type=click.Path(path_type=Path), hidden=True)
@click.option("--started", type=float, default=0.0, hidden=True)
def main(*, items: int, heads: str, epochs: int, no_cells: bool, child: Path | None, started: float) -> None:
    """Profile the training of heads on a GPU."""
    names, began = [name.strip() for name in heads.split(";")], time.time()
    if child is not None:
        child.write_text(json.dumps(_trained(names, _COLD_ITEMS, started, epochs=1)))
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "triton")
        cold = _in_a_process(Path(folder), names)
        click.echo(f"# the process without compiled kernels took {time.time() - began:.0f} s", err=True)
        warm = _trained(names, items, time.time(), epochs=epochs)
        cells = [] if no_cells else _measured_cells()
    click.echo(f"{warm['device']}, torch {torch.__version__}\n")
    click.echo(_start_table({"nothing compiled": cold, "all compiled": warm}))
    for head in warm["heads"]:
        click.echo(f"\n{head['ways']}\n{_kernel_table(head) if 'step_ms' in head else ''}")
    if not no_cells:
        click.echo("\nCells, bfloat16, batch 32, L = 477, ms of kernels:\n")
        columns = ["cell", "forward before", "now", "both ways before", "now", "times faster"]
        click.echo(as_table(columns, cells))


if __name__ == "__main__":
    main()
