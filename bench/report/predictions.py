"""The predictions behind a row: of each test item the mean over seeds, from the run folders or a baseline's file."""

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.report.reading import RUNS, Results, Row

Floats = NDArray[np.float64]
_FILE = "predictions.csv"


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """True and predicted MOS of the test items of a row."""

    row: Row
    names: list[str]
    prompts: list[str]
    true: Floats
    """(items,)"""
    predicted: Floats
    """(items,): means over the runs that predicted the item."""
    runs: int
    missing: tuple[str, ...]
    """Runs whose predictions could not be read, and why."""

    @property
    def error(self) -> Floats:
        """Predicted minus true (items,)."""
        return self.predicted - self.true


def predictions_of(results: Results, row: Row) -> Predictions | None:
    """The predictions of a head's row; None where no run has any. Items of several folds stand together."""
    found: dict[tuple[str, str], tuple[float, list[float]]] = {}
    missing: list[str] = []
    runs = 0
    for line in results.runs_of(row):
        if row.label not in line.labels:
            continue
        label = row.label if len(line.labels) > 1 else None
        try:
            tested = list(_test_rows(results.folder / RUNS / line.name / _FILE, label))
        except (OSError, KeyError, ValueError, csv.Error) as error:
            reason = "not there" if isinstance(error, FileNotFoundError) else f"not readable ({error!r})"
            missing.append(f"{RUNS}/{line.name}/{_FILE} is {reason}")
            continue
        runs += 1
        for item, true, predicted in tested:
            found.setdefault(item, (true, []))[1].append(predicted)
    if not found:
        return None
    true, predicted = np.array([(true, np.mean(values)) for true, values in found.values()]).T
    return Predictions(
        row=row,
        names=[name for name, _ in found],
        prompts=[prompt for _, prompt in found],
        true=true,
        predicted=predicted,
        runs=runs,
        missing=tuple(missing),
    )


def _test_rows(path: Path, label: str | None) -> Iterator[tuple[tuple[str, str], float, float]]:
    """Name and prompt, true and predicted MOS of the test items of a run folder."""
    end = "" if label is None else f"_{label}"
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["split"] == "test":
                true, predicted = float(row[f"mos{end}"]), float(row[f"predicted{end}"])
                if not np.isfinite([true, predicted]).all():
                    message = f"{row['name']} has a MOS that is not finite"
                    raise ValueError(message)
                yield (row["name"], row["prompt"]), true, predicted
