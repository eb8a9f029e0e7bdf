"""Training a head from a store, from the split to the run folder.

The epoch is chosen on the validation part. The test part is never used for selection: it is scored once, after every
choice is made, and with `paper_compatible` also after every epoch, for a number that is reported beside the other.
"""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.heads.closed.choosing import closed_notes
from agiqa.heads.closed.combined import AnyHead, MixedHead, ResidualHead, network_of
from agiqa.heads.closed.heads import ClosedHead
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of
from agiqa.heads.data.keeping import KeptFeatures, SharedFeatures, keep_features
from agiqa.heads.data.layers import base_of, joined_stores, layer_of
from agiqa.heads.data.scales import scales_of, scales_record
from agiqa.heads.data.splits import calibration_mask
from agiqa.heads.data.variants import as_variant
from agiqa.heads.evaluation.conformal import kind_of_readout
from agiqa.heads.evaluation.leaks import author_notes, author_warnings, authors_by_part
from agiqa.heads.evaluation.recorded_parts import record_parts
from agiqa.heads.evaluation.runs import CLOSED, EVENTS, SCORE_KIND, Run, load_run, origin_of, write_run
from agiqa.heads.evaluation.scoring import Moments, predict_moments
from agiqa.heads.model.encoders.kernels.cuda_graphs import training_kernels
from agiqa.heads.model.pooling import check_item_roles, check_roles
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.model.reading import default_settings_of, features_for, reading_notes
from agiqa.heads.model.readouts import VALUE
from agiqa.heads.settings.config import HeadConfig, TrainConfig
from agiqa.heads.settings.device import cpu_threads
from agiqa.heads.training.closed_fitting import fit_closed
from agiqa.heads.training.curves import Outcome, TestScorer, best_on_test, bias_warnings, epoch_warnings
from agiqa.heads.training.experiment import Experiment, layer_to_read, start_warnings
from agiqa.heads.training.fitting import Fit, fit_head
from agiqa.heads.training.predicted_parts import PredictedPart, calibrate, scores_by_store, scores_of_parts
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
    Without `head` and `start` it is the default head, by `default_settings_of` the source. The layer and the pooled row
    that the settings name are read; without `layer` that of `start`, or the last one that `source` has.
    `start` is a run whose head is the beginning, with its weights, constants of the features and scale of the labels;
    without `head` this head has its settings. A refit begins there too.
    With `variant` in `train`, `source` is read as that conversation, and the run belongs to it.
    Several labels, as in `quality+correspondence`, are learned by one head; an item without one of them is an error.
    Raises HeadError for a taken folder, another training kept beside it, features that the projection cannot read,
    a `start` that does not fit, or training that diverges; DataError for missing labels, no such split, NaN features;
    UnknownName and ConfigError for settings.
    """
    train = train or TrainConfig()
    source = as_variant(source, train.variant)
    if head is None:
        head, train = _default_head(source, train) if start is None else (start.head, train)
    source = features_for(source, head, layer_to_read(train, start))
    experiment = Experiment(
        source=source,
        run=Path(run),
        head=head,
        train=train,
        preset=preset,
        start=start,
    )
    experiment.check()
    shared, test = shared or SharedFeatures(), experiment.partition.test
    if not experiment.head.is_closed and (shared.kept is None or not shared.kept.has(test)):
        check_item_roles(source, test, experiment.head.pooling)
    for note in [*_store_notes(source), *reading_notes(source, experiment.head)]:
        say(f"note: {note}")
    saved = training_state(
        experiment.run, experiment.key(), save_seconds=experiment.train.save_seconds, restart=restart
    )
    with cpu_threads(experiment.train.threads), saved as state:
        _train(experiment, shared, progress or LineProgress(lambda _: None), state)
    return load_run(run)


def _default_head(source: FeatureSource, train: TrainConfig) -> tuple[HeadConfig, TrainConfig]:
    """The default head on `source`, and `train` with the layer that it reads."""
    given = {name: getattr(train, name) for name in train.model_fields_set}
    found = {**default_settings_of(source)(given)}
    layer = found.pop("layer", train.layer)
    return HeadConfig(**found), train.model_copy(update={"layer": layer})


def _train(experiment: Experiment, shared: SharedFeatures, progress: TrainingProgress, state: TrainingState) -> None:
    """Train, predict and write the run folder."""
    started = time.perf_counter() - state.seconds
    source, config, partition = experiment.source, experiment.train, experiment.partition
    rows = _keep_rows(experiment, shared)
    test = partition.test
    kept = (rows.features, rows.features.positions_of(test)) if rows is not None and rows.has(test) else None
    scorer = None
    if config.paper_compatible:
        scorer = TestScorer(source, test, label=config.label, batch_size=config.batch_size, kept=kept)
    if rows is None or experiment.head.is_closed:
        selection, final = fit_closed(experiment, rows, progress, scorer)
    else:
        selection, final = _fit(experiment, rows.features, progress, state, scorer)
    finish_run(
        experiment,
        selection,
        final,
        predict=lambda: predict_moments(final.head, source, test, batch_size=config.batch_size, kept=kept),
        started=started,
        partial=state.folder / "run",
        rows=rows,
        events=state.folder / EVENTS if config.tensorboard and not experiment.head.is_closed else None,
    )


def finish_run(
    experiment: Experiment,
    selection: Outcome,
    final: Fit,
    *,
    predict: Callable[[], Moments],
    started: float,
    partial: Path,
    rows: KeptFeatures | None = None,
    events: Path | None = None,
    members: Sequence[Run] = (),
) -> None:
    """Score a trained head and write its run folder, which is made at `partial`.

    `selection` chose the epoch and has the validation predictions, `final` is the head to keep. `predict` gives the
    predictions of the test items, on the scale of the labels. `started` is the value of `time.perf_counter` at the
    beginning; `members` are the runs of a stack.
    """
    source, config, partition = experiment.source, experiment.train, experiment.partition
    refitted, fits = final is not selection, [selection]
    if final.curves is not selection.curves:  # those of a closed form have no epochs
        fits.append(final)
    held_back = calibration_mask(source, partition.validation, config)
    of_validation, calibration, of_scale = calibrate(experiment, selection, final, ~held_back)
    trained = time.perf_counter()
    parts = of_validation.divided(held_back)
    parts["test"] = PredictedPart.of(experiment, partition.test, predict())
    metrics: dict[str, Any] = {
        **scores_of_parts(parts, calibration, refitted=refitted),
        **_choice(config, selection, refitted=refitted),
        "split": {"name": config.split, **partition.record()},
        "warnings": [*_warnings(experiment, selection, held_back), *of_scale],
        "notes": _notes(experiment, final.head, members),
        "text_authors": authors_by_part(source, partition.parts()),
        **_layer_facts(experiment, final),
        "features": None if rows is None else rows.record(),
        "seconds": {"train": trained - started, "test": time.perf_counter() - trained},
        "trained_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    metrics |= _of_stores(source, parts)
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
        curves=[epoch.row() for fit in fits for epoch in fit.curves],
        parts=record_parts(source, partition.parts()),
        partial=partial,
        events=events,
        members=[run.path for run in members],
    )


def _choice(config: TrainConfig, selection: Outcome, *, refitted: bool) -> dict[str, Any]:
    """What was learned, and how the epoch was chosen."""
    return {
        "label": config.label,
        "chosen_epoch": selection.epoch,
        "chosen_by": selection.choice,
        "epochs_run": len(selection.curves),
        "refit": config.refit or refitted,
    }


def _of_stores(source: FeatureSource, parts: dict[str, PredictedPart]) -> dict[str, Any]:
    """The metrics of each of several stores that are read as one; none for a single store."""
    joined = joined_stores(source)
    return {} if joined is None else {"stores": scores_by_store(joined, parts)}


def _store_notes(source: FeatureSource) -> list[str]:
    """Notes on several stores that are read as one."""
    joined = joined_stores(source)
    return [] if joined is None else [*joined.notes, *joined.scale_notes]


def _layer_facts(experiment: Experiment, fit: Fit) -> dict[str, Any]:
    """The layer, or layers, that the head read, and the learned weight of each where it sums them."""
    network = network_of(fit.head)
    weights = None if network is None else network.layer_weights
    return {"layer": layer_of(experiment.source)} | ({} if weights is None else {"layer_weights": weights})


def _warnings(experiment: Experiment, selection: Outcome, held_back: NDArray[np.bool_]) -> list[str]:
    """Warnings about the split, the texts of its parts, the head at the start, and the choice of the epoch.

    `held_back` are validation items (items,) that did not choose it. A closed form has no epochs to choose from.
    """
    partition = experiment.partition
    found = [*partition.warnings(), *author_warnings(experiment.source, partition.parts())]
    found += start_warnings(experiment, partition.test)
    if not experiment.head.is_closed:
        found += epoch_warnings(selection, experiment.train, calibration=int(held_back.sum()))
    return found


def _notes(experiment: Experiment, head: AnyHead, members: Sequence[Run]) -> list[str]:
    """Notes on the texts of the parts, the stores, and what the head, or each of `members`, reads."""
    source, parts = experiment.source, experiment.partition.parts()
    found = [*author_notes(source, parts), *_store_notes(source), *reading_notes(source, experiment.head)]
    closed = head.closed if isinstance(head, ResidualHead) else head
    if isinstance(closed, ClosedHead):
        found += closed_notes(experiment.head, source, closed.facts)
    found += [note for run in members for note in run.metrics["notes"]]
    return list(dict.fromkeys(found))


def _keep_rows(experiment: Experiment, shared: SharedFeatures) -> KeptFeatures | None:
    """The features, kept as the settings say or shared with other trainings, with the roles that the pooling needs.

    The test part is among them where the shared ones have it, and where every epoch needs it. A closed form reads each
    item once, so that none are kept for it.
    """
    if experiment.head.is_closed:
        return shared.kept
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


def _record(experiment: Experiment, fit: Fit) -> dict[str, Any]:
    """config.json: everything to repeat the run, and to know which features the head can read."""
    source, train, spec = experiment.source, experiment.train, FeatureSpec.of(experiment.source)
    device, head = experiment.device, fit.head
    closed = (
        head.closed if isinstance(head, ResidualHead) else head if isinstance(head, ClosedHead | MixedHead) else None
    )
    network = network_of(head)
    readout = VALUE if network is None else network.regressor.readout
    return {
        "preset": experiment.preset,
        "head": experiment.recorded_head,
        "train": train.model_dump(),
        "features": {
            "store": base_of(source).id,
            "encoding": spec.encoding,
            "width": spec.width,
            "logical_dtype": source.logical_dtype,
            "lm_head_sha256": spec.lm_head_sha256,
            "basis_id": spec.basis_id,
            "layer": spec.layer,
            "pooled": list(spec.pooled),
            "tap": spec.tap,
        },
        "location": location_of(base_of(source)),
        "origin": origin_of(source),
        "readout": readout,
        SCORE_KIND: kind_of_readout(readout),
        "label": train.label,
        "labels": list(train.labels),
        "mos_ranges": scales_record(train.labels, scales_of(source, train.labels)),
        "seed": train.seed,
        "kernels": "closed form" if network is None else training_kernels(network.encoder, train, device),
        "device": str(device),
        "agiqa": agiqa_version(),
        "torch": torch.__version__,
        "start": experiment.start_record,
        "data": experiment.data,
        **({} if closed is None else {CLOSED: closed.facts}),
        **({"own_parts": [part.as_dict() for part in experiment.own_parts]} if experiment.own_parts else {}),
    }
