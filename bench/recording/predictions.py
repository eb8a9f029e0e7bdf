"""Tables of predictions: name, prompt, number in the store, and true and predicted MOS of every item."""

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.recording.result_folders import KEPT
from agiqa.errors import DataError
from agiqa.heads.settings.labels import column_names, side_by_side
from agiqa.store.disk.files import telling_disk_errors

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The predictions for the test items of one label."""

    names: list[str]
    prompts: list[str]
    mos: Array
    predicted: Array
    items: list[int] | None = None
    """The number of each in its store, since name and prompt may not be unique; None in tables without it."""


def write_predictions(
    path: Path,
    labels: Sequence[str],
    names: Iterable[str],
    prompts: Iterable[str],
    mos: Array,
    predicted: Array,
    *,
    items: Iterable[int] | None = None,
    spread: Array | None = None,
) -> None:
    """Write a csv with the columns name, prompt, item, mos and predicted; of several labels mos_LABEL, predicted_LABEL.

    `mos`, `predicted` and `spread`, which makes a column of that name, have shape (items, labels). `items` are the
    numbers in the store; without them, the column is left out.
    """
    titles, values = side_by_side(labels, mos, predicted, spread)
    columns = {"name": names, "prompt": prompts} | ({} if items is None else {"item": items})
    with telling_disk_errors(f"writing {path}", KEPT):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow((*columns, *titles))
            table.writerows((*about, *row) for *about, row in zip(*columns.values(), values, strict=True))


def read_predictions(path: Path, labels: Sequence[str], label: str) -> Predictions:
    """The test items of `label`, one of the head's `labels`, from a file by `write_predictions` or by a training.

    Raises DataError, naming the file, where it is gone, has another form, or holds a number that is not finite; the
    error behind it is its cause.
    """
    at = labels.index(label)
    mos, predicted = (column_names(labels, what)[at] for what in ("mos", "predicted"))
    try:
        with path.open(encoding="utf-8", newline="") as file:
            titles, *rows = (row for row in csv.reader(file) if row)
        column = {title: place for place, title in enumerate(titles)}
        if "split" in column:
            rows = [row for row in rows if row[column["split"]] == "test"]
        if len(labels) > 1:  # an item may lack one of several labels
            rows = [row for row in rows if row[column[mos]]]
        found = Predictions(
            names=[row[column["name"]] for row in rows],
            prompts=[row[column["prompt"]] for row in rows],
            mos=np.array([float(row[column[mos]]) for row in rows]),
            predicted=np.array([float(row[column[predicted]]) for row in rows]),
            items=[int(row[column["item"]]) for row in rows] if rows and "item" in column else None,
        )
        _refuse_not_finite(found)
    except (OSError, LookupError, ValueError, csv.Error) as error:
        message = (
            f"{path} cannot be read as predictions ({error!r}). Remove its run folder, and run the same command again."
        )
        raise DataError(message) from error
    return found


def _refuse_not_finite(found: Predictions) -> None:
    """Raise ValueError for the first item with a true or predicted MOS that is not finite."""
    places = np.flatnonzero(~(np.isfinite(found.mos) & np.isfinite(found.predicted)))
    if len(places):
        message = f"{found.names[places[0]]} has a MOS that is not finite"
        raise ValueError(message)
