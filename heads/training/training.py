"""Training a head from a store, from the split to the run folder.

The epoch is chosen by the validation part. The test part has no say: it is scored once, after every choice is made,
and with `paper_compatible` also after every epoch, for a number that stands beside the other.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource, Joined, location_of, read_labels
from agiqa.heads.data.keeping import KeptFeatures, SharedFeatures, keep_features
from agiqa.heads.data.scales import scales_of, scales_record
from agiqa.heads.data.splits import Partition, make_partition
from agiqa.heads.evaluation.authors import author_notes, author_warnings, authors_by_part
from agiqa.heads.evaluation.calibration import Calibration, calibration_warnings
from agiqa.heads.evaluation.logistic import Mappings, fit_mappings
from agiqa.heads.evaluation.recorded_parts import record_parts
from agiqa.heads.evaluation.runs import EVENTS, Run, load_run, origin_of, refuse_taken, write_run
from agiqa.heads.evaluation.scoring import predict_items, scores_of_labels
from agiqa.heads.model.encoders.graphed import training_kernels
from agiqa.heads.model.head import check_sizes
from agiqa.heads.model.losses import check_loss
from agiqa.heads.model.pooling import check_item_roles, check_roles
from agiqa.heads.model.projection import FeatureSpec, check_encoding, usual_projection
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import check_precision, cpu_threads, resolve_device
from agiqa.heads.settings.labels import Array, by_label, columns, of_each_label, side_by_side
from agiqa.heads.training.events import check_tensorboard
from agiqa.heads.training.fitting import Fit, fit_head
from agiqa.heads.training.outcome import Outcome, epoch_warnings
from agiqa.heads.training.paper_compatible import PaperTrace, best_on_test, bias_warnings
from agiqa.heads.training.progress import LineProgress, TrainingProgress
from agiqa.heads.training.resuming import TrainingState, data_of, training_key, training_state
from agiqa.heads.training.starting import check_start, start_record, start_warnings
from agiqa.progress import say
from agiqa.version import agiqa_version


def train_head(
    source: FeatureSource,
    run: Path,
    *,
    head: HeadConfig | None = None,
    train: TrainConfig | None = None,
    progress: TrainingProgress | None = None,
    preset: str | None = None,
    restart: bool = False,
    shared: SharedFeatures | None = None,
    start: Run | None = None,
) -> Run:
    """Train a head on `source`, evaluate it, and write the folder `run`, which must be absent or empty.

    A training that was broken off goes on from the last epoch that was kept beside `run` (see resuming.py), and
    `restart` throws that away. `preset` is the name that config.json says the settings came from. `shared` are
    features that were decoded before, for several trainings (see data/keeping.py); the numbers are the same.
    Without `head` and `start` it is the default head, with the projection that reads the encoding of `source`.
    `start` is a run whose head is the beginning, with its weights, constants of the features and scale of the labels;
    without `head` this one has its settings. A refit begins there too.
    Several labels, as in `quality+correspondence`, are learned by one head; an item that lacks one is refused by name.
    Raises HeadError for a taken folder, another training kept beside it, features that the projection cannot read,
    a `start` that does not fit, or training that diverges; DataError for missing labels, no such split, NaN features;
    UnknownName and ConfigError for settings.
    """
    task = _Task(
        source=source,
        run=run,
        head=head or (_usual_head(source) if start is None else start.head),
        train=train or TrainConfig(),
        preset=preset,
        start=start,
        shared=shared,
    )
    _check(task)
    partition = make_partition(source, task.train)
    if shared is None or shared.kept is None or not shared.kept.has(partition.test):
        check_item_roles(source, partition.test, task.head.pooling)
    device, start_from = resolve_device(task.train.device), start_record(start)
    for note in (*source.notes, *source.scale_notes) if isinstance(source, Joined) else ():
        say(f"note: {note}")
    key = training_key(source, partition, task.head, task.train, device=device, start=start_from)
    saved = training_state(run, key, save_seconds=task.train.save_seconds, restart=restart)
    with cpu_threads(task.train.threads), saved as state:
        told = progress or LineProgress(lambda _: None)
        _train(task, partition, told, state, about={"start": start_from, "data": data_of(key)})
    return load_run(run)


def _usual_head(source: FeatureSource) -> HeadConfig:
    """The default head, with the projection that reads `source`."""
    usual = usual_projection(source)
    return HeadConfig() if usual is None else HeadConfig(projection=usual)


@dataclass(frozen=True, kw_only=True)
class _Task:
    """What is to be trained; the arguments of `train_head`."""

    source: FeatureSource
    run: Path
    head: HeadConfig
    train: TrainConfig
    preset: str | None
    start: Run | None
    shared: SharedFeatures | None


def _train(
    task: _Task, partition: Partition, progress: TrainingProgress, state: TrainingState, *, about: Mapping[str, Any]
) -> None:
    """Train, predict and write the run folder; `about` goes into config.json too."""
    started = time.perf_counter() - state.seconds
    source, config = task.source, task.train
    test_labels = read_labels(source, partition.test, label=config.label)
    rows = _rows_of(task, partition)
    kept = (rows.features, rows.features.positions_of(partition.test)) if rows.has(partition.test) else None
    follow = partial(PaperTrace, source, partition.test, label=config.label, batch_size=config.batch_size, kept=kept)
    trace = follow() if config.paper_compatible else None
    selection, final = _fit(task, partition, rows.features, progress, state, trace)
    fits = [selection] if final is selection else [selection, final]
    validation_labels = read_labels(source, partition.validation, label=config.label)
    calibration, guesses, of_scale = _calibrate(config, selection, final, validation_labels)
    trained = time.perf_counter()
    tested = predict_items(final.head, source, partition.test, batch_size=config.batch_size, kept=kept)
    parts = {
        "validation": (partition.validation, validation_labels, guesses),
        "test": (partition.test, test_labels, tested),
    }
    metrics: dict[str, Any] = {
        **_scores(source, config, parts, calibration, refit=final is not selection),
        "label": config.label,
        "chosen_epoch": selection.epoch,
        "chosen_by": selection.choice,
        "epochs_run": len(selection.curves),
        "refit": config.refit,
        "split": {"name": config.split, **partition.record()},
        **_remarks(task, partition, [*epoch_warnings(selection, config), *of_scale]),
        "features": rows.record(),
        "seconds": {"train": trained - started, "test": time.perf_counter() - trained},
    }
    metrics |= {"stores": _of_stores(source, source, config, parts)} if isinstance(source, Joined) else {}
    if config.paper_compatible:
        best = best_on_test(selection.curves, metrics["test"], config.label)
        metrics["warnings"] += bias_warnings(best, metrics["test"], config.label)
        metrics["paper_compatible"] = best
    write_run(
        task.run,
        head=final.head,
        config={**_record(task, final), **about},
        metrics=metrics,
        predictions=[row for name, part in parts.items() for row in _rows(source, config, name, *part)],
        curves=[epoch.row() for fit in fits for epoch in fit.curves],
        parts=record_parts(source, partition.parts()),
        partial=state.folder / "run",
        events=state.folder / EVENTS if config.tensorboard else None,
    )


def _remarks(task: _Task, partition: Partition, of_fit: Sequence[str]) -> dict[str, Any]:
    """What a reader of the metrics must know of the split, the texts of its parts, the stores and the first run.

    `of_fit` are warnings about how the head was trained.
    """
    source, parts = task.source, partition.parts()
    of_start = start_warnings(task.start, source, task.train, partition.test)
    of_stores = [*source.notes, *source.scale_notes] if isinstance(source, Joined) else []
    return {
        "warnings": [*partition.warnings(), *author_warnings(source, parts), *of_start, *of_fit],
        "notes": [*author_notes(source, parts), *of_stores],
        "text_authors": authors_by_part(source, parts),
    }


def check_settings(source: FeatureSource, head: HeadConfig, train: TrainConfig) -> None:
    """Raise what is wrong with settings for `source` on any machine: UnknownName, ConfigError or HeadError.

    As `check_sizes`, `check_encoding` and `check_loss`.
    """
    check_sizes(head)
    check_encoding(source, head.projection)
    check_loss(train)


def _check(task: _Task) -> None:
    """Raise what can be known to be wrong before any feature is read."""
    refuse_taken(task.run)
    check_settings(task.source, task.head, task.train)
    check_precision(task.train)
    if task.train.tensorboard:
        check_tensorboard()
    if task.start is not None:
        check_start(task.start, task.source, str(task.run), task.head, task.train)


def _rows_of(task: _Task, partition: Partition) -> KeptFeatures:
    """The features, kept as the settings say or shared with other trainings, with the roles that the pooling needs.

    The test part is among them where the shared ones have it, and where every epoch needs it.
    """
    source, config = task.source, task.train
    shared = task.shared or SharedFeatures()
    parts = [items for name, items in partition.parts().items() if name != "test" or config.paper_compatible]
    if shared.kept is not None:
        kept, parts = shared.kept, [items for items in partition.parts().values() if shared.kept.has(items)]
    else:
        if shared.memory is not None:
            config = config.model_copy(update={"memory": shared.memory})
        kept = keep_features(source, np.sort(np.concatenate(parts)), config, device=resolve_device(config.device))
        say(kept.line())
    used = kept.features.positions_of(np.concatenate(parts))
    check_roles(source, kept.features.subset(used), task.head.pooling)
    return kept


def _fit(
    task: _Task,
    partition: Partition,
    features: FeatureSet,
    progress: TrainingProgress,
    state: TrainingState,
    trace: PaperTrace | None,
) -> tuple[Outcome, Fit]:
    """The fit that chose the epoch, and the fit to keep: the same one, or the refit on train + validation."""
    spec, config = FeatureSpec.of(task.source), task.train
    train, validation, nothing = (
        LabelledItems.at(features, features.positions_of(part), config.label)
        for part in (partition.train, partition.validation, partition.train[:0])
    )
    if state.selection is None:
        selection = fit_head(
            features,
            spec,
            task.head,
            config,
            train=train,
            validation=validation,
            epochs=config.epochs,
            stage="train",
            progress=progress,
            state=state,
            start=task.start,
            trace=trace,
        )
        if not config.refit or not len(validation):
            return selection, selection
        state.selection = selection
    refit = fit_head(
        features,
        spec,
        task.head,
        config,
        train=train + validation,
        validation=nothing,
        epochs=state.selection.epoch,
        stage="refit",
        progress=progress,
        state=state,
        start=task.start,
    )
    return state.selection, refit


def _calibrate(
    config: TrainConfig, selection: Outcome, final: Fit, labels: Array
) -> tuple[Calibration | None, Array, list[str]]:
    """The line of each label that the head to keep predicts on from now on, where wanted; the validation predictions.

    And warnings about their scale.

    It is fitted to the validation predictions of the fit that chose the epoch, also where that is not the one to keep.
    """
    predicted = selection.validation_predictions
    if not config.calibrate:
        return None, predicted, calibration_warnings(config.labels, predicted, labels)
    calibration = Calibration.fit(predicted, labels)
    final.head.regressor.rescale(calibration.lines)
    mapped = calibration.applied(predicted)
    of_scale = calibration_warnings(config.labels, mapped, labels, calibrate=True)
    return calibration, mapped, [*calibration.warnings(config.labels), *of_scale]


def _scores(
    source: FeatureSource,
    config: TrainConfig,
    parts: Mapping[str, tuple[NDArray[np.int64], Array, Array]],
    calibration: Calibration | None,
    *,
    refit: bool,
) -> dict[str, Any]:
    """The metrics of both parts, and what was fitted to the validation part once the epoch was chosen."""
    _, labels, predicted = parts["validation"]
    mappings = [fit_mappings(*pair) for pair in zip(columns(predicted), columns(labels), strict=True)]
    validation = _metrics(source, config, *parts["validation"])
    if calibration is not None and validation is not None:
        calibration.mark(of_each_label(config.labels, validation))
    return {
        "validation": validation,
        "test": _metrics(source, config, *parts["test"], mappings=mappings),
        "logistic": by_label(config.labels, [each.record() for each in mappings]),
        "calibration": None if calibration is None else calibration.record(config.labels, refit=refit),
    }


def _metrics(
    source: FeatureSource,
    config: TrainConfig,
    items: NDArray[np.int64],
    labels: NDArray[np.float64],
    predicted: NDArray[np.float64],
    *,
    mappings: Sequence[Mappings] | None = None,
) -> dict[str, Any] | None:
    """The metrics of one part, `by_label`, with the mappings of each label; None when it has no items."""
    if not len(items):
        return None
    scores = scores_of_labels(source, items, labels, predicted, mappings=mappings)
    told: dict[str, Any] = by_label(config.labels, scores)
    return told


def _of_stores(
    source: FeatureSource,
    joined: Joined,
    config: TrainConfig,
    parts: Mapping[str, tuple[NDArray[np.int64], Array, Array]],
) -> list[dict[str, Any]]:
    """What metrics.json says of each of several stores read as one: the metrics of every part on its items.

    Metrics of all together reward a head for telling the stores apart.
    """
    told: list[dict[str, Any]] = []
    for store, items in joined.parts:
        entry: dict[str, Any] = {"store": store.id, "name": PurePosixPath(location_of(store)).name}
        for name, (chosen, labels, predicted) in parts.items():
            here = np.isin(chosen, items)
            entry[name] = _metrics(source, config, chosen[here], labels[here], predicted[here])
        told.append(entry)
    return told


def _rows(
    source: FeatureSource,
    config: TrainConfig,
    part: str,
    items: NDArray[np.int64],
    labels: NDArray[np.float64],
    predicted: NDArray[np.float64],
) -> list[Mapping[str, Any]]:
    """The rows of predictions.csv of one part; truth and prediction of each label side by side."""
    names, prompts = source.items.names, source.items.prompts
    titles, rows = side_by_side(config.labels, labels, predicted)
    return [
        {"name": names[item], "prompt": prompts[item], "split": part, "item": item}
        | dict(zip(titles, row, strict=True))
        for item, row in zip(items.tolist(), rows, strict=True)
    ]


def _record(task: _Task, fit: Fit) -> dict[str, Any]:
    """What config.json says: enough to repeat the run, and to know which features the head can read."""
    source, train, spec = task.source, task.train, FeatureSpec.of(task.source)
    device = next(fit.head.parameters()).device
    return {
        "preset": task.preset,
        "head": task.head.model_dump(),
        "train": train.model_dump(),
        "features": {
            "store": source.id,
            "encoding": spec.encoding,
            "width": spec.width,
            "logical_dtype": source.logical_dtype,
            "lm_head_sha256": spec.lm_head_sha256,
            "basis_id": spec.basis_id,
        },
        "origin": origin_of(source),
        "label": train.label,
        "labels": list(train.labels),
        "mos_ranges": scales_record(train.labels, scales_of(source, train.labels)),
        "seed": train.seed,
        "kernels": training_kernels(fit.head.encoder, train, device),
        "device": str(device),
        "agiqa": agiqa_version(),
        "torch": torch.__version__,
    }
