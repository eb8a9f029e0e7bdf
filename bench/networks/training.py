"""One run of a network, from its weights to its run folder, and on from the state of a killed one.

OUT/runs/NAME/config.json       settings, data set, versions, device
OUT/runs/NAME/metrics.json      scores with intervals, the chosen epoch, the split, warnings
OUT/runs/NAME/predictions.csv   name, prompt, split, item, mos, predicted of the validation and test items
OUT/runs/NAME/curves.csv        a row per epoch
OUT/runs/NAME/network.safetensors   the weights of the chosen epoch, where they are kept
OUT/runs/.NAME.state            the state of an unfinished training
"""

import csv
import json
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from agiqa.bench.networks.architectures.contract import Network
from agiqa.bench.networks.building import Pretrained, random_network
from agiqa.bench.networks.fitting import Task, Trainer
from agiqa.bench.networks.images import ImageSource
from agiqa.bench.networks.pictures import Squares
from agiqa.bench.networks.runs import NetworkRun
from agiqa.heads.data.splits import Partition
from agiqa.heads.evaluation.calibration import calibration_fields
from agiqa.heads.evaluation.metrics import evaluate_scores
from agiqa.heads.evaluation.mos_mappings import fit_mappings
from agiqa.heads.evaluation.runs import CONFIG, CURVES, METRICS, PREDICTIONS
from agiqa.heads.settings.device import random_state
from agiqa.heads.training.curves import epoch_warnings
from agiqa.heads.training.progress import TrainingProgress
from agiqa.heads.training.resuming import CHECKPOINT, KEY, StateFile, read_checkpoint, state_folder
from agiqa.progress import say
from agiqa.store.disk.files import canonical_json, telling_disk_errors, write_text_atomically
from agiqa.version import agiqa_version

FORMAT = "agiqa.network"
WEIGHTS = "network.safetensors"
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of a command share."""

    source: ImageSource
    device: torch.device
    save_seconds: float = 30.0
    """Between two saves of the state, at the end of an epoch; 0 for every epoch."""
    keep_weights: bool = False
    """Whether the weights of the chosen epoch are written into the run folder."""


@dataclass(frozen=True, kw_only=True)
class WrittenRun:
    """A run folder as it records itself, as result lines read it."""

    config: Mapping[str, Any]
    metrics: Mapping[str, Any]


def train_network(
    run: NetworkRun,
    folder: Path,
    partition: Partition,
    squares: Squares,
    pretrained: Sequence[Pretrained],
    setting: Setting,
    progress: TrainingProgress,
) -> WrittenRun:
    """Train, test, and write the run folder `folder`. Raises HeadError where the training diverges, and ModelError."""
    started, config = time.perf_counter(), run.network
    items = np.concatenate([partition.train, partition.validation])
    mos = np.full(len(setting.source.images), np.nan)
    mos[items] = setting.source.mos(items, run.label)
    task = Task(train=partition.train, validation=partition.validation, mos=mos, seed=run.answer)
    with random_state(run.answer, setting.device), _fastest_convolutions():
        network = begun(run, pretrained)
        trainer = Trainer(network, squares, config, task, device=setting.device)
        seconds = _train(trainer, run, state_folder(folder), setting, progress)
        trainer.load_best()
        trained = time.perf_counter()
        predicted = trainer.predict(partition.test)
    outcome = trainer.outcome
    parts = {
        "validation": (partition.validation, outcome.validation_predictions[:, 0]),
        "test": (partition.test, predicted),
    }
    metrics: dict[str, Any] = {
        **part_scores(setting.source, parts, run.label),
        "label": run.label,
        "chosen_epoch": outcome.epoch,
        "chosen_by": outcome.choice,
        "epochs_run": len(outcome.curves),
        "split": {"name": run.train.split, **partition.record()},
        "warnings": [*partition.warnings(), *epoch_warnings(outcome, run.train)],
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "seconds": {"train": seconds + trained - started, "test": time.perf_counter() - trained},
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    written = WrittenRun(config=_record(run, setting), metrics=metrics)
    rows = [row for name, part in parts.items() for row in prediction_rows(setting.source, name, *part, run.label)]
    write_folder(
        folder, written, rows, [epoch.row() for epoch in outcome.curves], network if setting.keep_weights else None
    )
    shutil.rmtree(state_folder(folder), ignore_errors=True)
    return written


def begun(run: NetworkRun, pretrained: Sequence[Pretrained]) -> Network:
    """The network with the weights that it begins with; new layers by torch's random state. Raises ModelError."""
    network = random_network(run.network)
    for weights in pretrained:
        weights.give(network, run.network)
    return network


def part_scores(
    source: ImageSource, parts: Mapping[str, tuple[NDArray[np.int64], Array]], label: str
) -> dict[str, Any]:
    """The metrics of each part, items and predictions; None for a part without items.

    Mappings are fitted to the validation part, and applied to the test part.
    """
    found: dict[str, Any] = {}
    mappings = None
    for name, (items, predicted) in parts.items():
        if not len(items):
            found[name] = None
            continue
        mos, prompts = source.mos(items, label), [source.items.prompts[item] for item in items]
        fitted = mappings.fitted if mappings is not None else None
        found[name] = {
            **evaluate_scores(predicted, mos, prompts, mappings=fitted),
            **calibration_fields(predicted, mos),
        }
        if name == "validation":
            mappings = fit_mappings(predicted, mos)
    return found


def prediction_rows(
    source: ImageSource, part: str, items: NDArray[np.int64], predicted: Array, label: str
) -> list[dict[str, Any]]:
    """The rows of predictions.csv of one part."""
    columns, mos = source.items, source.mos(items, label).tolist() if len(items) else []
    return [
        {
            "name": columns.names[item],
            "prompt": columns.prompts[item],
            "split": part,
            "item": item,
            "mos": true,
            "predicted": value,
        }
        for item, true, value in zip(items.tolist(), mos, predicted.tolist(), strict=True)
    ]


def write_folder(
    folder: Path,
    written: WrittenRun,
    predictions: Sequence[Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]] = (),
    network: Network | None = None,
) -> None:
    """Write a run folder beside `folder`, and rename it to that."""
    partial = state_folder(folder) / "run"
    with telling_disk_errors(f"writing {folder}", "the epochs that were saved are kept"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if network is not None:
            save_file(
                {name: value.cpu().contiguous() for name, value in network.state_dict().items()}, partial / WEIGHTS
            )
        for name, rows in ((PREDICTIONS, predictions), (CURVES, curves)):
            if rows:
                _write_csv(partial / name, rows)
        for name, content in ((METRICS, written.metrics), (CONFIG, written.config)):
            (partial / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(rows[0])
        table.writerows(row.values() for row in rows)


def _train(trainer: Trainer, run: NetworkRun, folder: Path, setting: Setting, progress: TrainingProgress) -> float:
    """Train all epochs, from the saved one on; returns the seconds of those that were done before."""
    key = canonical_json(_key(run, setting))
    before = _resume(trainer, folder, key)
    epochs, done = run.network.all_epochs, len(trainer.progress.curves)
    saved_at = time.monotonic()
    progress.begin(run.name, epochs=epochs, steps=trainer.steps, done=done)
    try:
        for number in range(done + 1, epochs + 1):
            progress.epoch(trainer.train_epoch(progress.step))
            if number < epochs and time.monotonic() - saved_at >= setting.save_seconds:
                _save(trainer, folder, key)
                saved_at = time.monotonic()
    finally:
        progress.end()
    return before


def _resume(trainer: Trainer, folder: Path, key: str) -> float:
    """Restore the saved state of the same training; returns the seconds of its epochs. Another state is discarded."""
    path = folder / CHECKPOINT
    if not path.exists():
        return 0.0
    if not (folder / KEY).is_file() or (folder / KEY).read_text(encoding="utf-8") != key:
        say(f"{folder} holds the state of another training, or of other versions: training starts anew")
        path.unlink()
        return 0.0
    trainer.restore(read_checkpoint(path))
    curves = trainer.progress.curves
    say(f"going on after epoch {len(curves)}, kept in {folder}")
    return sum(epoch.seconds for epoch in curves)


def _save(trainer: Trainer, folder: Path, key: str) -> None:
    """Replace the saved state."""
    with telling_disk_errors(f"saving the training to {folder}", "the epochs saved before are kept"):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / CHECKPOINT).exists():
            write_text_atomically(folder / KEY, key)
        StateFile().save_checkpoint(trainer.state(), folder / CHECKPOINT)


def _key(run: NetworkRun, setting: Setting) -> dict[str, Any]:
    """Everything that the numbers depend on."""
    settings = {name: value for name, value in run.config.items() if name != "source"}
    versions = {"agiqa": agiqa_version(), "torch": torch.__version__, "device": setting.device.type}
    return {**settings, "data": setting.source.id, **versions}


def _record(run: NetworkRun, setting: Setting) -> dict[str, Any]:
    """config.json."""
    device = torch.cuda.get_device_name(setting.device) if setting.device.type == "cuda" else "cpu"
    return {
        "format": FORMAT,
        "version": 1,
        "settings": dict(run.config),
        "data": {"id": setting.source.id, "name": setting.source.data_set.name, "path": setting.source.location},
        "device": device,
        "agiqa": agiqa_version(),
        "torch": torch.__version__,
    }


@contextmanager
def _fastest_convolutions() -> Generator[None]:
    """Let cuDNN time its convolutions, which pays for batches of one shape."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
