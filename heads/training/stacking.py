"""A stack of trained runs: their weighted sum, as a run folder of its own that contains theirs.

The weights are fitted to the validation predictions of the runs, never to test items; the validation predictions of the
stack are those of folds of prompts, each mixed by weights that the other folds gave.
"""

import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from agiqa.errors import ConfigError, HeadError
from agiqa.heads.closed.combined import MixedHead
from agiqa.heads.closed.forms import Known
from agiqa.heads.closed.regressions import Positions, inner_folds
from agiqa.heads.closed.stack import STACK, Mixture, mixtures
from agiqa.heads.data.features import FeatureSource, location_of
from agiqa.heads.data.layers import JOINER, read_layer, stored_layers
from agiqa.heads.data.splits import FEWEST_TO_CHOOSE_BY, calibration_mask
from agiqa.heads.data.variants import as_variant
from agiqa.heads.evaluation.metrics import score
from agiqa.heads.evaluation.runs import PREDICTIONS, Run, load_run, refuse_taken
from agiqa.heads.evaluation.scoring import Moments
from agiqa.heads.settings.config import HeadConfig
from agiqa.heads.settings.labels import Array, column_names, labelled_pairs
from agiqa.heads.training.closed_base import known_items
from agiqa.heads.training.curves import Epoch, Outcome
from agiqa.heads.training.experiment import Experiment, differences
from agiqa.heads.training.fitting import Fit
from agiqa.heads.training.training import finish_run

Weighting = Literal["fitted", "equal"]
_VALIDATION = ("validation", "calibration")
"""The parts of predictions.csv that hold validation items."""


def stack_runs(
    runs: Sequence[Run], out: str | Path, source: FeatureSource, *, weights: Weighting = "fitted", folds: int = 5
) -> Run:
    """Write the stack of `runs`, which were trained on the same items of `source`, to the folder `out`.

    They may read different layers, or pooled rows, of it. `fitted` weights are not negative and minimise the squared
    error on validation items, but for those that all runs kept back by `calibration_share`; `equal` ones give the mean,
    such as that of several seeds. With fewer than FEWEST_TO_CHOOSE_BY validation items they are equal. Raises
    ConfigError for fewer than two runs or one that is there twice, HeadError for a taken folder and for runs of other
    items, labels or stores.
    """
    started, out = time.perf_counter(), Path(out)
    refuse_taken(out)
    experiment = _experiment(runs, out, source)
    partition = experiment.partition
    validation = np.stack([_predictions(run, _VALIDATION, partition.validation) for run in runs])
    test = [_predictions(run, ("test",), partition.test) for run in runs]
    labels = _labels(runs[0], partition.validation)
    known = known_items(experiment.source, partition.validation, labels, experiment.train)
    held_back = calibration_mask(experiment.source, partition.validation, experiment.train)
    mixing, held = _mix(validation, known, held_back, weights, folds)
    members = [run.path.absolute().name for run in runs]
    facts = {
        "kind": "runs",
        "members": members,
        "weights": {name: one.weights.tolist() for name, one in zip(experiment.train.labels, mixing, strict=True)},
    }
    tensors = {
        "mixing": torch.from_numpy(np.stack([one.weights for one in mixing])),
        "intercept": torch.tensor([one.intercept for one in mixing], dtype=torch.float64),
    }
    head = MixedHead([], tensors, facts)
    outcome = _outcome(held, labels, mixing, members, started)
    fit = Fit(head=head, **vars(outcome))
    partial = out.with_name(f".{out.name}.stack")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        finish_run(
            experiment,
            fit,
            fit,
            predict=lambda: Moments(mos=head.mix(test), spread=None),
            started=started,
            partial=partial,
            members=runs,
        )
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return load_run(out)


def _experiment(runs: Sequence[Run], out: Path, source: FeatureSource) -> Experiment:
    """The stack as an experiment on `source`. Raises what is wrong with the runs."""
    paths = [run.path.resolve() for run in runs]
    if len(runs) < 2 or len(set(paths)) < len(paths):
        message = f"A stack needs two runs or more, each once; given: {', '.join(str(run.path) for run in runs)}."
        raise ConfigError(message)
    first = runs[0].train
    shares = {run.train.calibration_share for run in runs}
    config = first.model_copy(
        update={
            "calibrate": False,
            "paper_compatible": False,
            "refit": False,
            "weights": "equal",
            "calibration_share": shares.pop() if len(shares) == 1 else 0.0,
        }
    )
    source = as_variant(source, first.variant)
    for run in runs:
        if run.train.labels != config.labels:
            message = f"{run.path} predicts {run.train.label}, and {runs[0].path} {config.label}: they cannot be mixed."
            raise HeadError(message)
        if run.store_id != source.id or run.config.get("data") is None:
            variant = "" if first.variant is None else f", read as the variant {first.variant!r}"
            message = (
                f"{run.path} was not trained on {location_of(source)}{variant}: a stack needs runs of one store, "
                "variant and split."
            )
            raise HeadError(message)
    head, layers = HeadConfig(encoder=STACK, projection=runs[0].head.projection), _layers_read(source, runs)
    if any(run.train.layer for run in runs):
        config = config.model_copy(update={"layer": layers})
    experiment = Experiment(source=read_layer(source, layers), run=out, head=head, train=config)
    for run in runs:
        here = replace(experiment, source=run.features_of(source), drawn=experiment.partition)
        different = differences(run.config["data"], here.data, verb="there")
        if different:
            lines = "\n".join(f"  {line}" for line in different)
            message = (
                f"{run.path} was trained or tested on other items or labels than {runs[0].path} would be today:\n"
                f"{lines}\nStack runs of the same split, and of the labels that the store has now."
            )
            raise HeadError(message)
    return experiment


def _layers_read(source: FeatureSource, runs: Sequence[Run]) -> str:
    """The layers of `source` that any of the runs reads, as in `8+last`."""
    read = {layer for run in runs for layer in run.spec.layer.split(JOINER)}
    return JOINER.join(layer for layer in stored_layers(source) if layer in read)


def _predictions(run: Run, parts: Collection[str], items: Positions) -> Array:
    """The predictions (items, labels) that the run recorded. Raises HeadError where some are missing."""
    names = column_names(run.train.labels, "predicted")
    return _columns(run, parts, items, names)


def _labels(run: Run, items: Positions) -> Array:
    """The MOS (items, labels) of validation items, on the scale of the head."""
    return _columns(run, _VALIDATION, items, column_names(run.train.labels, "mos"))


def _columns(run: Run, parts: Collection[str], items: Positions, names: Sequence[str]) -> Array:
    rows = {row["item"]: [row[name] for name in names] for row in run.predictions if row["split"] in parts}
    if set(rows) != set(items.tolist()):
        part = next(iter(parts))
        message = f"{run.path / PREDICTIONS} does not hold the {part} items of the run. Train it anew, or leave it out."
        raise HeadError(message)
    found = np.array([rows[item] for item in items.tolist()], dtype=np.float64)  # None becomes NaN
    return found.reshape(len(items), len(names))


def _mix(
    predicted: Array, known: Known, held_back: NDArray[np.bool_], weights: Weighting, folds: int
) -> tuple[list[Mixture], Array]:
    """The mixture of each label, and validation predictions (items, labels) by mixtures of other prompts.

    `predicted` is (runs, items, labels). Items `held_back` (items,) have no part in any mixture.
    """
    members, _, labels = predicted.shape
    fitted = np.flatnonzero(~held_back)
    groups = known.groups[fitted]
    if weights == "equal" or len(fitted) < FEWEST_TO_CHOOSE_BY or len(np.unique(groups)) < 2:
        return [Mixture.equal(members)] * labels, predicted.mean(axis=0)
    found = mixtures(predicted[:, fitted], known.of(fitted))
    held_out = np.stack([one.of(predicted[:, :, number].T) for number, one in enumerate(found)], axis=1)
    for kept, held in ((fitted[kept], fitted[held]) for kept, held in inner_folds(groups, folds)):
        for number, mixture in enumerate(mixtures(predicted[:, kept], known.of(kept))):
            held_out[held, number] = mixture.of(predicted[:, held, number].T)
    return found, held_out


def _outcome(
    predicted: Array, labels: Array, mixing: Sequence[Mixture], names: Sequence[str], started: float
) -> Outcome:
    """The only row of the curves, and the validation predictions."""
    pairs = labelled_pairs(predicted, labels) if len(labels) else []
    scores = [score(*pair) for pair in pairs]
    metrics = {name: float(np.mean([one[name] for one in scores])) for name in (scores[0] if scores else ())}
    errors = [float(np.mean(np.square(guess - mos)) / np.var(mos)) for guess, mos in pairs]
    epoch = Epoch(
        stage="train",
        epoch=1,
        lr=0.0,
        train_loss=float(np.mean(errors)) if errors else float("nan"),
        validation_srcc=metrics.get("srcc"),
        validation_plcc=metrics.get("plcc"),
        validation_rmse=metrics.get("rmse"),
        seconds=time.perf_counter() - started,
    )
    sums = [
        " + ".join(f"{weight:.2f} {name}" for weight, name in zip(one.weights, names, strict=True)) for one in mixing
    ]
    return Outcome(curves=[epoch], epoch=1, choice="; ".join(sums), validation_predictions=predicted)
