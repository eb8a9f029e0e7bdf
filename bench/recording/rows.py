"""Rows of a table: each has the results of one head over its seeds, their means, intervals and comparison."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from agiqa.bench.recording.predictions import Predictions
from agiqa.bench.recording.result_folders import Line, scores_by_label
from agiqa.errors import DataError
from agiqa.heads.evaluation.metrics import SeedScores
from agiqa.heads.evaluation.significance import METRICS, holm

Row = Mapping[str, Any]
"""A line of rows.jsonl."""
_SUMMARISED = ("srcc", "plcc", "rmse", "slope")


def summary(label: str, planned: int, done: Sequence[Line], scores: SeedScores | None, against: Line | None) -> Line:
    """What every row says of its head: its label, how many of the `planned` results are `done`, and their means."""
    return {
        "label": label,
        "runs": planned,
        "seeds": len({line["seed"] for line in done}),
        "failed": planned - len(done),
        "seconds": round(statistics.fmean(line["seconds"] for line in done), 3) if done else None,
        "validation": validation_summary(done, label),
        "calibrated": sum(_fitted_slope(line, label) is not None for line in done),
        "test": None if scores is None else scores.score(),
        "against": against,
    }


def validation_summary(lines: Sequence[Line], label: str) -> dict[str, list[float | None]] | None:
    """Mean and standard deviation over result lines of the validation metrics; None without validation items.

    The slope of a calibrated head is the one before calibration, since calibration makes it 1.
    """
    found: list[Line] = []
    for line in lines:
        scores, fitted = scores_by_label(line, "validation").get(label), _fitted_slope(line, label)
        if scores is not None:
            found.append({**scores} if fitted is None else {**scores, "slope": fitted})
    means: dict[str, list[float | None]] = {}
    for metric in _SUMMARISED:
        values = [one[metric] for one in found if one.get(metric) is not None]
        if values:
            means[metric] = [statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None]
    return means or None


def _fitted_slope(line: Line, label: str) -> float | None:
    """The slope of the line that `calibrate` fitted to the predictions; None without it."""
    slope: float | None = scores_by_label(line, "calibration").get(label, {}).get("slope")
    return slope


def scores_over_seeds(tables: Mapping[str, Predictions], *, seedless: bool = False) -> SeedScores:
    """The scores of one row from its predictions, a table per seed, by run name; `seedless` as in `SeedScores`.

    Raises DataError where the tables are not of the same items in the same order.
    """
    (first, table), *others = tables.items()
    for name, other in others:
        if (other.names, other.prompts) != (table.names, table.prompts):
            message = f"The runs {first!r} and {name!r} of one row were tested on different items."
            raise DataError(message)
    predicted = np.stack([one.predicted for one in tables.values()])
    return SeedScores.of(predicted, table.mos, table.prompts, seedless=seedless)


def adjust_by_holm(rows: Sequence[Line]) -> None:
    """Add to each `against` the p-values of Holm's procedure, for each metric over all `rows` that have one."""
    compared = [row["against"] for row in rows if row["against"] is not None]
    for against in compared:
        against["p_holm"] = dict.fromkeys(METRICS)
    for metric in METRICS:
        tested = [against for against in compared if against["p"][metric] is not None]
        for against, value in zip(tested, holm([one["p"][metric] for one in tested]), strict=True):
            against["p_holm"][metric] = value


def score_text(test: Row | None, metric: str, *, undefined: str) -> str:
    """A test metric with its interval; `-` where there is no test, `undefined` where it has no value."""
    if test is None:
        return "-"
    if test[metric] is None:
        return undefined
    interval = test["ci"].get(metric)
    return f"{test[metric]:.4f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")
