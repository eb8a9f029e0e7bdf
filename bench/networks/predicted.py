"""Predictions of any other tool, from a csv: name, predicted, and the seed of each if there are several."""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.networks.images import ImageSource
from agiqa.bench.networks.runs import NetworkRun
from agiqa.bench.networks.training import FORMAT, WrittenRun, part_scores, prediction_rows, write_folder
from agiqa.errors import DataError
from agiqa.heads.data.splits import Partition
from agiqa.version import agiqa_version

NAME, PREDICTED, SEED = "name", "predicted", "seed"


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """The predictions of one tool."""

    name: str
    """Of its row."""
    path: Path
    sha256: str
    by_seed: Mapping[int, Mapping[str, float]]
    """By seed and name of the item."""

    @property
    def seeds(self) -> list[int]:
        """The seeds, ascending."""
        return sorted(self.by_seed)

    def of(self, names: Sequence[str], seed: int) -> NDArray[np.float64]:
        """The predictions for some items. Raises DataError that lists those without one."""
        found = self.by_seed[seed]
        missing = [name for name in names if name not in found]
        if missing:
            which = f" for the seed {seed}" if len(self.by_seed) > 1 else ""
            problems = [f"no prediction of {name!r}{which}, a test item" for name in missing]
            raise DataError.from_problems(str(self.path), problems)
        return np.array([found[name] for name in names])


def read_predicted(name: str, path: Path, source: ImageSource) -> Predicted:
    """The predictions in the csv `path`. Raises DataError, which lists all faults of the file.

    Faults are missing columns, values that are no finite numbers, an item twice, and items that `source` lacks.
    """
    try:
        content = path.read_bytes()
        rows = list(csv.DictReader(content.decode("utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        message = f"{path} cannot be read as a csv ({error})."
        raise DataError(message) from error
    header = list(rows[0]) if rows else []
    if not {NAME, PREDICTED} <= set(header):
        message = (
            f"{path} needs the columns {NAME} and {PREDICTED}, and has: {', '.join(map(str, header)) or 'no rows'}."
        )
        raise DataError(message)
    known, problems = set(source.items.names), list[str]()
    by_seed: dict[int, dict[str, float]] = {}
    for number, row in enumerate(rows, 2):
        item, seed, value = row[NAME], _whole(row.get(SEED) or "0"), _finite(row[PREDICTED])
        where = f"line {number}"
        if item not in known:
            problems.append(f"{where}: {item!r} is no item of {source.location}")
        elif value is None or seed is None:
            problems.append(
                f"{where}: {row[PREDICTED]!r} (seed {row.get(SEED)!r}) is no finite number with a whole seed"
            )
        elif item in by_seed.setdefault(seed, {}):
            problems.append(f"{where}: {item!r} is there twice")
        else:
            by_seed[seed][item] = value
    if problems:
        raise DataError.from_problems(str(path), problems)
    return Predicted(name=name, path=path, sha256=hashlib.sha256(content).hexdigest(), by_seed=by_seed)


def write_predicted(
    run: NetworkRun, folder: Path, partition: Partition, predicted: Predicted, source: ImageSource
) -> WrittenRun:
    """The run folder of one seed and split. Raises DataError for test items without a prediction."""
    names = [source.items.names[item] for item in partition.test]
    values = predicted.of(names, run.answer)
    parts = {"validation": (partition.validation[:0], values[:0]), "test": (partition.test, values)}
    scores = part_scores(source, parts, run.label)
    scale = source.data_set.mos_range
    warnings = partition.warnings()
    if scale is not None and not (values.min() >= scale[0] and values.max() <= scale[1]):
        scores["test"] |= {"rmse": None, "ci": {**scores["test"]["ci"], "rmse": None}}
        warnings.append(f"Predictions of {run.row} leave the scale of the MOS, {scale[0]:g} to {scale[1]:g}: no RMSE.")
    metrics = {
        **scores,
        "label": run.label,
        "split": {"name": run.train.split, **partition.record()},
        "warnings": warnings,
        "seconds": {"train": 0.0, "test": 0.0},
        "trained_at": datetime.fromtimestamp(predicted.path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
    }
    config = {"format": FORMAT, "version": 1, "settings": dict(run.config), "agiqa": agiqa_version()}
    written = WrittenRun(config=config, metrics=metrics)
    write_folder(folder, written, prediction_rows(source, "test", partition.test, values, run.label))
    return written


def _whole(text: str) -> int | None:
    return int(text) if text.strip().isdecimal() else None


def _finite(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None
