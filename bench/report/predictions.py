"""The predictions behind a row: of each test item the mean over seeds, from the run folders or a baseline's file."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.recording.predictions import Predictions as Table
from agiqa.bench.recording.predictions import read_predictions
from agiqa.bench.recording.result_folders import RUNS
from agiqa.bench.report.reading import Results, Row
from agiqa.errors import DataError
from agiqa.heads.evaluation.runs import PREDICTIONS

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """True and predicted MOS of the test items of a row."""

    row: Row
    names: list[str]
    prompts: list[str]
    items: list[int | None]
    """Their numbers in the store; None where the tables of the runs have none."""
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
    """The predictions of a head's row; None where no run has any. Items of several folds stand together.

    Two items of a store may share name and prompt; the number of each tells them apart, where all runs tell it.
    """
    tables: list[Table] = []
    missing: list[str] = []
    for line in results.runs_of(row):
        if row.label not in line.labels:
            continue
        path = results.folder / RUNS / line.name / PREDICTIONS
        try:
            tables.append(read_predictions(path, line.labels, row.label))
        except DataError as error:
            cause = error.__cause__
            reason = "not there" if isinstance(cause, FileNotFoundError) else f"not readable ({cause!r})"
            missing.append(f"{RUNS}/{line.name}/{PREDICTIONS} is {reason}")
    numbered = all(table.items is not None for table in tables)
    found: dict[tuple[str, str, int | None], tuple[float, list[float]]] = {}
    for table in tables:
        numbers: Sequence[int | None] = (table.items if numbered else None) or [None] * len(table.names)
        items = zip(table.names, table.prompts, numbers, strict=True)
        for item, true, predicted in zip(items, table.mos.tolist(), table.predicted.tolist(), strict=True):
            found.setdefault(item, (true, []))[1].append(predicted)
    if not found:
        return None
    true, predicted = np.array([(true, np.mean(values)) for true, values in found.values()]).T
    return Predictions(
        row=row,
        names=[name for name, _, _ in found],
        prompts=[prompt for _, prompt, _ in found],
        items=[item for _, _, item in found],
        true=true,
        predicted=predicted,
        runs=len(tables),
        missing=tuple(missing),
    )
