"""The fit of a closed form: on training items alone for the validation scores, then on training and validation items.

There is no epoch to choose, so validation items would be idle: the head that is kept is fitted to them too. All choices
are made by folds of whole prompts within the items of the fit. Validation predictions, and what is fitted to them, are
those of the fit that has not seen them.
"""

import math
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch

from agiqa.heads.closed.choosing import form_of
from agiqa.heads.closed.forms import Known
from agiqa.heads.closed.heads import ClosedHead, Inputs
from agiqa.heads.closed.pooled import Kept
from agiqa.heads.closed.words import WORDS
from agiqa.heads.data.features import read_labels
from agiqa.heads.data.keeping import KeptFeatures
from agiqa.heads.evaluation.metrics import score
from agiqa.heads.settings.labels import labelled_pairs
from agiqa.heads.training.closed_base import fit_line, known_items
from agiqa.heads.training.curves import Epoch, Outcome
from agiqa.heads.training.experiment import Experiment
from agiqa.heads.training.fitting import Fit, check_labels
from agiqa.heads.training.progress import TrainingProgress
from agiqa.progress import say


def fit_closed(
    experiment: Experiment,
    rows: KeptFeatures | None,
    progress: TrainingProgress,
    scorer: Callable[[ClosedHead], Mapping[str, float]] | None,
) -> tuple[Outcome, Fit]:
    """The fit to the training items, with its validation predictions, and the fit to keep.

    `rows` are features in memory, if some are; `scorer` as that of `Learner`. Raises DataError for items that lack what
    the form reads and as `check_labels`, and ConfigError for more items than it can hold.
    """
    started, partition, head = time.perf_counter(), experiment.partition, experiment.head
    form = form_of(head, label=experiment.train.label, folds=experiment.train.inner_folds, device=experiment.device)
    say(f"{head.encoder} on {experiment.device.type}: closed form")
    progress.begin("train", epochs=1, steps=1, done=0)
    try:
        items = np.concatenate([partition.train, partition.validation])
        inputs = form.read(experiment.source, items, None if rows is None else Kept(features=rows.features))
        labels = read_labels(experiment.source, items, label=experiment.train.label)
        if head.encoder != WORDS:
            check_labels(experiment.source, torch.from_numpy(labels[: len(partition.train)]), experiment.train)
        known, first = known_items(experiment.source, items, labels, experiment.train), np.arange(len(partition.train))
        chosen = form.fit(inputs.of(first), known.of(first))
        final = form.fit(inputs, known) if len(partition.validation) else chosen
        test = {} if scorer is None else scorer(final)
        outcome = _outcome(chosen, inputs, known, len(first), started, test)
        progress.step()
        progress.epoch(outcome.curves[0])
    finally:
        progress.end()
    fit = Fit(head=final.to(experiment.device).eval(), **vars(outcome))
    return (outcome if len(partition.validation) else fit), fit


def _outcome(
    head: ClosedHead,
    inputs: Inputs,
    known: Known,
    trained: int,
    started: float,
    test: Mapping[str, float],
) -> Outcome:
    """The only row of the curves, and the validation predictions: those of the items from number `trained` on.

    `test` are the test scores of the head to keep, which is the only one to report.
    """
    held = np.arange(trained, len(known.labels))
    predicted, labels = head.scores(inputs.of(held)), known.labels[held]
    scores = [score(*pair) for pair in labelled_pairs(predicted, labels)] if len(held) else []
    metrics = {name: float(np.mean([one[name] for one in scores])) for name in (scores[0] if scores else ())}
    variances = np.nanvar(known.labels[:trained], axis=0)
    losses = [fit["inner_rmse"] ** 2 / spread for fit, spread in zip(head.facts["fits"], variances, strict=False)]
    epoch = Epoch(
        stage="train",
        epoch=1,
        lr=0.0,
        train_loss=float(np.mean(losses)) if losses else math.nan,
        validation_srcc=metrics.get("srcc"),
        validation_plcc=metrics.get("plcc"),
        validation_rmse=metrics.get("rmse"),
        seconds=time.perf_counter() - started,
        test=test,
    )
    choice = "; ".join(fit_line(fit) for fit in head.facts["fits"]) or "nothing is fitted"
    return Outcome(
        curves=[epoch],
        epoch=1,
        choice=f"inner folds ({choice})" if losses else choice,
        validation_predictions=predicted,
    )
