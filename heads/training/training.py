"""Training a head from a store, from the split to the run folder.

The epoch is chosen on the validation part. The test part is never used for selection: it is scored once, after every
choice is made, and with `paper_compatible` also after every epoch, for a number that is reported beside the other.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
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
from agiqa.heads.evaluation.calibration import Calibration, calibration_warnings
from agiqa.heads.evaluation.leaks import author_notes, author_warnings, authors_by_part
from agiqa.heads.evaluation.mos_mappings import Mappings, fit_mappings
from agiqa.heads.evaluation.recorded_parts import record_parts
from agiqa.heads.evaluation.runs import EVENTS, Run, load_run, origin_of, write_run
from agiqa.heads.evaluation.scoring import predict_items, scores_of_labels
from agiqa.heads.model.encoders.kernels.cuda_graphs import training_kernels
from agiqa.heads.model.pooling import check_item_roles, check_roles
from agiqa.heads.model.projection import FeatureSpec, usual_projection
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import cpu_threads
from agiqa.heads.settings.labels import Array, by_label, columns, of_each_label, side_by_side
from agiqa.heads.training.curves import Outcome, TestScorer, best_on_test, bias_warnings, epoch_warnings
from agiqa.heads.training.experiment import Experiment, start_warnings
from agiqa.heads.training.fitting import Fit, fit_head
from agiqa.heads.training.progress import LineProgress, TrainingProgress
from agiqa.heads.training.resuming import TrainingState, training_state
from agiqa.progress import say
from agiqa.version import agiqa_version


def train_head(
    source: FeatureSource,
    run: str | Path,
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

    An interrupted training resumes from the last epoch that was saved beside `run` (see resuming.py), and
    `restart` discards them. `preset` is the name of the settings in config.json. `shared` are features that were
    decoded before, for several trainings (see data/keeping.py); the numbers are the same.
    Without `head` and `start` it is the default head, with the projection that reads the encoding of `source`.
    `start` is a run whose head is the beginning, with its weights, constants of the features and scale of the labels;
    without `head` this head has its settings. A refit begins there too.
    Several labels, as in `quality+correspondence`, are learned by one head; an item without one of them is an error.
    Raises HeadError for a taken folder, another training kept beside it, features that the projection cannot read,
    a `start` that does not fit, or training that diverges; DataError for missing labels, no such split, NaN features;
    UnknownName and ConfigError for settings.
    """
    experiment = Experiment(
        source=source,
        run=Path(run),
        head=head or (_usual_head(source) if start is None else start.head),
        train=train or TrainConfig(),
        preset=preset,
        start=start,
    )
    experiment.check()
    shared, test = shared or SharedFeatures(), experiment.partition.test
    if shared.kept is None or not shared.kept.has(test):
        check_item_roles(source, test, experiment.head.pooling)
    for note in _store_notes(source):
        say(f"note: {note}")
    saved = training_state(
        experiment.run, experiment.key(), save_seconds=experiment.train.save_seconds, restart=restart
    )
    with cpu_threads(experiment.train.threads), saved as state:
        _train(experiment, shared, progress or LineProgress(lambda _: None), state)
    return load_run(run)


def _usual_head(source: FeatureSource) -> HeadConfig:
    """The default head, with the projection that reads `source`."""
    usual = usual_projection(source)
    return HeadConfig() if usual is None else HeadConfig(projection=usual)


def _train(experiment: Experiment, shared: SharedFeatures, progress: TrainingProgress, state: TrainingState) -> None:
    """Train, predict and write the run folder."""
    started = time.perf_counter() - state.seconds
    source, config, partition = experiment.source, experiment.train, experiment.partition
    rows = _keep_rows(experiment, shared)
    test = partition.test
    kept = (rows.features, rows.features.positions_of(test)) if rows.has(test) else None
    scorer = None
    if config.paper_compatible:
        scorer = TestScorer(source, test, label=config.label, batch_size=config.batch_size, kept=kept)
    selection, final = _fit(experiment, rows.features, progress, state, scorer)
    refitted = final is not selection
    validation, calibration, of_scale = _calibrate(experiment, selection, final)
    trained = time.perf_counter()
    predicted = predict_items(final.head, source, test, batch_size=config.batch_size, kept=kept)
    parts = {"validation": validation, "test": _Predicted.of(experiment, test, predicted)}
    metrics: dict[str, Any] = {
        **_scores(parts, calibration, refitted=refitted),
        "label": config.label,
        "chosen_epoch": selection.epoch,
        "chosen_by": selection.choice,
        "epochs_run": len(selection.curves),
        "refit": config.refit,
        "split": {"name": config.split, **partition.record()},
        **_remarks(experiment, [*epoch_warnings(selection, config), *of_scale]),
        "features": rows.record(),
        "seconds": {"train": trained - started, "test": time.perf_counter() - trained},
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    metrics |= {"stores": _scores_by_store(source, parts)} if isinstance(source, Joined) else {}
    if config.paper_compatible:
        best = best_on_test(selection.curves, metrics["test"], config.label)
        metrics["warnings"] += bias_warnings(best, metrics["test"], config.label)
        metrics["paper_compatible"] = best
    write_run(
        experiment.run,
        head=final.head,
        config=_record(experiment, final),
        metrics=metrics,
        predictions=[row for name, part in parts.items() for row in part.rows(name)],
        curves=[epoch.row() for fit in ([selection, final] if refitted else [selection]) for epoch in fit.curves],
        parts=record_parts(source, partition.parts()),
        partial=state.folder / "run",
        events=state.folder / EVENTS if config.tensorboard else None,
    )


def _store_notes(source: FeatureSource) -> list[str]:
    """Notes on several stores that are read as one."""
    return [*source.notes, *source.scale_notes] if isinstance(source, Joined) else []


def _remarks(experiment: Experiment, of_fit: Sequence[str]) -> dict[str, Any]:
    """Notes and warnings about the split, the texts of its parts, the stores, and the head at the start.

    `of_fit` are warnings about how the head was trained.
    """
    source, partition = experiment.source, experiment.partition
    parts, of_start = partition.parts(), start_warnings(experiment, partition.test)
    return {
        "warnings": [*partition.warnings(), *author_warnings(source, parts), *of_start, *of_fit],
        "notes": [*author_notes(source, parts), *_store_notes(source)],
        "text_authors": authors_by_part(source, parts),
    }


def _keep_rows(experiment: Experiment, shared: SharedFeatures) -> KeptFeatures:
    """The features, kept as the settings say or shared with other trainings, with the roles that the pooling needs.

    The test part is among them where the shared ones have it, and where every epoch needs it.
    """
    source, config, parts = experiment.source, experiment.train, experiment.partition.parts()
    if shared.kept is not None:
        kept = shared.kept
    else:
        if shared.memory is not None:
            config = config.model_copy(update={"memory": shared.memory})
        wanted = [items for name, items in parts.items() if name != "test" or config.paper_compatible]
        kept = keep_features(source, np.sort(np.concatenate(wanted)), config, device=experiment.device)
        say(kept.line())
    here = np.concatenate([items for items in parts.values() if kept.has(items)])
    check_roles(source, kept.features.subset(kept.features.positions_of(here)), experiment.head.pooling)
    return kept


def _fit(
    experiment: Experiment,
    features: FeatureSet,
    progress: TrainingProgress,
    state: TrainingState,
    scorer: TestScorer | None,
) -> tuple[Outcome, Fit]:
    """The fit that chose the epoch, and the fit to keep: the same one, or the refit on train + validation."""
    config, partition = experiment.train, experiment.partition
    train, validation, nothing = (
        LabelledItems.at(features, features.positions_of(items), config.label)
        for items in (partition.train, partition.validation, partition.train[:0])
    )
    spec, start = FeatureSpec.of(experiment.source), experiment.start
    fit = partial(fit_head, features, spec, experiment.head, config, progress=progress, state=state, start=start)
    if state.selection is None:
        selection = fit(train=train, validation=validation, epochs=config.epochs, stage="train", test_scorer=scorer)
        if not config.refit or not len(validation):
            return selection, selection
        state.selection = selection
    refit = fit(train=train + validation, validation=nothing, epochs=state.selection.epoch, stage="refit")
    return state.selection, refit


@dataclass(frozen=True, kw_only=True)
class _Predicted:
    """Items of one part with their labels and predictions."""

    source: FeatureSource
    names: Sequence[str]
    """Of the labels."""
    items: NDArray[np.int64]
    labels: Array
    """(items, labels), as are the predictions."""
    predictions: Array

    @classmethod
    def of(cls, experiment: Experiment, items: NDArray[np.int64], predictions: Array) -> "_Predicted":
        """`predictions` with the labels of `items`."""
        labels = read_labels(experiment.source, items, label=experiment.train.label)
        names = experiment.train.labels
        return cls(source=experiment.source, names=names, items=items, labels=labels, predictions=predictions)

    def metrics(
        self, *, among: NDArray[np.int64] | None = None, mappings: Sequence[Mappings] | None = None
    ) -> dict[str, Any] | None:
        """The metrics, `by_label`, on the items that are also in `among`, with the `mappings`; None without items."""
        chosen = slice(None) if among is None else np.isin(self.items, among)
        items = self.items[chosen]
        if not len(items):
            return None
        pair = self.labels[chosen], self.predictions[chosen]
        scores: dict[str, Any] = by_label(self.names, scores_of_labels(self.source, items, *pair, mappings=mappings))
        return scores

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The rows of predictions.csv, label and prediction side by side."""
        names, prompts = self.source.items.names, self.source.items.prompts
        titles, rows = side_by_side(self.names, self.labels, self.predictions)
        return [
            {"name": names[item], "prompt": prompts[item], "split": part, "item": item}
            | dict(zip(titles, row, strict=True))
            for item, row in zip(self.items.tolist(), rows, strict=True)
        ]


def _calibrate(
    experiment: Experiment, selection: Outcome, final: Fit
) -> tuple[_Predicted, Calibration | None, list[str]]:
    """The validation predictions, the line of each label where wanted, and warnings about their scale.

    The lines are put into the head of `final`. They are fitted to the validation predictions of the fit that chose the
    epoch, also where another fit is kept.
    """
    names, validation = experiment.train.labels, experiment.partition.validation
    predicted = _Predicted.of(experiment, validation, selection.validation_predictions)
    if not experiment.train.calibrate:
        return predicted, None, calibration_warnings(names, predicted.predictions, predicted.labels)
    calibration = Calibration.fit(predicted.predictions, predicted.labels)
    final.head.regressor.rescale(calibration.lines)
    mapped = calibration.applied(predicted.predictions)
    of_scale = calibration_warnings(names, mapped, predicted.labels, calibrate=True)
    return replace(predicted, predictions=mapped), calibration, [*calibration.warnings(names), *of_scale]


def _scores(parts: dict[str, _Predicted], calibration: Calibration | None, *, refitted: bool) -> dict[str, Any]:
    """The metrics of both parts, and what was fitted to the validation part once the epoch was chosen."""
    fitted_to, names = parts["validation"], parts["validation"].names
    pairs = zip(columns(fitted_to.predictions), columns(fitted_to.labels), strict=True)
    mappings = [fit_mappings(*pair) for pair in pairs]
    validation = fitted_to.metrics()
    if calibration is not None and validation is not None:
        calibration.mark(of_each_label(names, validation))
    return {
        "validation": validation,
        "test": parts["test"].metrics(mappings=mappings),
        "logistic": by_label(names, [each.record() for each in mappings]),
        "calibration": None if calibration is None else calibration.record(names, refit=refitted),
    }


def _scores_by_store(joined: Joined, parts: dict[str, _Predicted]) -> list[dict[str, Any]]:
    """The metrics of every part on the items of each of several stores that are read as one.

    The metrics on all stores together also reward a head that only tells the stores apart.
    """
    return [
        {"store": store.id, "name": PurePosixPath(location_of(store)).name}
        | {name: part.metrics(among=items) for name, part in parts.items()}
        for store, items in joined.parts
    ]


def _record(experiment: Experiment, fit: Fit) -> dict[str, Any]:
    """config.json: everything to repeat the run, and to know which features the head can read."""
    source, train, spec = experiment.source, experiment.train, FeatureSpec.of(experiment.source)
    device = next(fit.head.parameters()).device
    return {
        "preset": experiment.preset,
        "head": experiment.recorded_head,
        "train": train.model_dump(),
        "features": {
            "store": source.id,
            "encoding": spec.encoding,
            "width": spec.width,
            "logical_dtype": source.logical_dtype,
            "lm_head_sha256": spec.lm_head_sha256,
            "basis_id": spec.basis_id,
        },
        "location": location_of(source),
        "origin": origin_of(source),
        "label": train.label,
        "labels": list(train.labels),
        "mos_ranges": scales_record(train.labels, scales_of(source, train.labels)),
        "seed": train.seed,
        "kernels": training_kernels(fit.head.encoder, train, device),
        "device": str(device),
        "agiqa": agiqa_version(),
        "torch": torch.__version__,
        "start": experiment.start_record,
        "data": experiment.data,
        **({"own_parts": [part.as_dict() for part in experiment.own_parts]} if experiment.own_parts else {}),
    }
