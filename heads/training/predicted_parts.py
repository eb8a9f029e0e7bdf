"""The predictions of the parts of a training: metrics, the lines fitted to them, and rows of predictions.csv."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agiqa.heads.data.features import FeatureSource, Joined, location_of, read_labels
from agiqa.heads.data.scales import scales_of
from agiqa.heads.evaluation.calibration import Calibration, calibration_warnings
from agiqa.heads.evaluation.conformal import ConformalScores, ScoreKind, interval_records, kind_of_readout
from agiqa.heads.evaluation.mos_mappings import Mappings, fit_mappings
from agiqa.heads.evaluation.scoring import Moments, scores_of_labels
from agiqa.heads.model.losses import readout_of
from agiqa.heads.settings.labels import Array, by_label, labelled_pairs, of_each_label, side_by_side
from agiqa.heads.training.curves import Outcome
from agiqa.heads.training.experiment import Experiment
from agiqa.heads.training.fitting import Fit


@dataclass(frozen=True, kw_only=True)
class PredictedPart:
    """Items of one part with their labels and predictions."""

    source: FeatureSource
    names: Sequence[str]
    """Of the labels."""
    items: NDArray[np.int64]
    labels: Array
    """(items, labels), as are the predictions."""
    predictions: Array
    spreads: Array | None
    """Of the predictions; None for a head that predicts none."""
    scores: ScoreKind
    """What makes the intervals of the head."""

    @classmethod
    def of(cls, experiment: Experiment, items: NDArray[np.int64], predictions: Moments) -> "PredictedPart":
        """`predictions` with the labels of `items`."""
        labels = read_labels(experiment.source, items, label=experiment.train.label)
        names = experiment.train.labels
        return cls(
            source=experiment.source,
            names=names,
            items=items,
            labels=labels,
            predictions=predictions.mos,
            spreads=predictions.spread,
            scores=kind_of_readout(readout_of(experiment.train)),
        )

    def metrics(
        self,
        *,
        among: NDArray[np.int64] | None = None,
        mappings: Sequence[Mappings] | None = None,
        errors_of: "PredictedPart | None" = None,
    ) -> dict[str, Any] | None:
        """The metrics, `by_label`, on the items that are also in `among`, with the `mappings`; None without items.

        Also the coverage of intervals that are made from the errors of the predictions `errors_of`, if given.
        """
        chosen = slice(None) if among is None else np.isin(self.items, among)
        items = self.items[chosen]
        if not len(items):
            return None
        spreads = None if self.spreads is None else self.spreads[chosen]
        predicted = Moments(mos=self.predictions[chosen], spread=spreads)
        found = scores_of_labels(
            self.source,
            items,
            self.labels[chosen],
            predicted,
            mappings=mappings,
            names=self.names,
            scales=scales_of(self.source, self.names),
        )
        if errors_of is not None:
            errors = ConformalScores.of(self.scores, errors_of.predictions, errors_of.labels, errors_of.spreads)
            generators = [self.source.items.generators[k] for k in items]
            records = interval_records(errors, predicted.mos, spreads, self.labels[chosen], generators)
            found = [{**score, "intervals": record} for score, record in zip(found, records, strict=True)]
        scores: dict[str, Any] = by_label(self.names, found)
        return scores

    def subset(self, chosen: NDArray[np.bool_]) -> "PredictedPart":
        """The items where `chosen` (items,) is True."""
        spreads = None if self.spreads is None else self.spreads[chosen]
        return replace(
            self,
            items=self.items[chosen],
            labels=self.labels[chosen],
            predictions=self.predictions[chosen],
            spreads=spreads,
        )

    def divided(self, held_back: NDArray[np.bool_]) -> "dict[str, PredictedPart]":
        """The validation items, without those that are `held_back` (items,) to make intervals, and these, by part."""
        parts = {"validation": self.subset(~held_back)}
        return {**parts, "calibration": self.subset(held_back)} if held_back.any() else parts

    def rows(self, part: str) -> list[dict[str, Any]]:
        """The rows of predictions.csv, label and prediction side by side."""
        names, prompts = self.source.items.names, self.source.items.prompts
        titles, rows = side_by_side(self.names, self.labels, self.predictions, self.spreads)
        return [
            {"name": names[item], "prompt": prompts[item], "split": part, "item": item}
            | dict(zip(titles, row, strict=True))
            for item, row in zip(self.items.tolist(), rows, strict=True)
        ]


def calibrate(
    experiment: Experiment, selection: Outcome, final: Fit, choosing: NDArray[np.bool_]
) -> tuple[PredictedPart, Calibration | None, list[str]]:
    """The validation predictions, the line of each label where wanted, and warnings about their scale.

    The lines are put into the head of `final`. They are fitted to the validation predictions of the fit that chose the
    epoch, also where another fit is kept; of the items that were `choosing` (items,).
    """
    names, validation = experiment.train.labels, experiment.partition.validation
    moments = Moments(mos=selection.validation_predictions, spread=selection.validation_spreads)
    predicted = PredictedPart.of(experiment, validation, moments)
    guesses, labels = predicted.predictions[choosing], predicted.labels[choosing]
    if not experiment.train.calibrate:
        return predicted, None, calibration_warnings(names, guesses, labels)
    calibration = Calibration.fit(guesses, labels)
    final.head.rescale(calibration.lines)
    mapped = calibration.applied(predicted.predictions)
    of_scale = calibration_warnings(names, mapped[choosing], labels, calibrate=True)
    slopes = np.array([slope for slope, _ in calibration.lines])
    spreads = None if predicted.spreads is None else predicted.spreads * slopes
    mapped_part = replace(predicted, predictions=mapped, spreads=spreads)
    return mapped_part, calibration, [*calibration.warnings(names), *of_scale]


def scores_of_parts(
    parts: dict[str, PredictedPart], calibration: Calibration | None, *, refitted: bool
) -> dict[str, Any]:
    """The metrics of both parts, and what was fitted to the validation part once the epoch was chosen."""
    fitted_to, names = parts["validation"], parts["validation"].names
    pairs = labelled_pairs(fitted_to.predictions, fitted_to.labels)
    mappings = [fit_mappings(*pair) for pair in pairs]
    validation = fitted_to.metrics()
    if calibration is not None and validation is not None:
        calibration.mark(of_each_label(names, validation))
    return {
        "validation": validation,
        "test": parts["test"].metrics(mappings=mappings, errors_of=parts.get("calibration", fitted_to)),
        "logistic": by_label(names, [each.record() for each in mappings]),
        "calibration": None if calibration is None else calibration.record(names, refit=refitted),
    }


def scores_by_store(joined: Joined, parts: dict[str, PredictedPart]) -> list[dict[str, Any]]:
    """The metrics of every part on the items of each of several stores that are read as one.

    The metrics on all stores together also reward a head that only tells the stores apart.
    """
    return [
        {"store": store.id, "name": PurePosixPath(location_of(store)).name}
        | {name: part.metrics(among=items) for name, part in parts.items()}
        for store, items in joined.parts
    ]
