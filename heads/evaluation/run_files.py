"""The files of a run folder: JSON objects, tables as csv, and tensors. Their meaning is described in runs.py."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from agiqa.errors import HeadError
from agiqa.store.disk.files import safetensors_errors

_TEXTS = ("name", "prompt", "split", "stage")
"""Columns of predictions.csv and curves.csv with texts; `_WHOLE` are those with whole numbers."""
_WHOLE = ("item", "epoch")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises HeadError."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        message = f"{path} does not hold the weights of a head: {error}"
        raise HeadError(message) from error


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A JSON object from a run folder. Raises HeadError."""
    try:
        content: Any = json.loads((path / name).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{path} is no run folder of a trained head: {name} cannot be read ({error})."
        raise HeadError(message) from error
    if not isinstance(content, dict):
        message = f"{path} is no run folder of a trained head: {name} holds no JSON object."
        raise HeadError(message)
    return cast("dict[str, Any]", content)


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a csv that `write_run` wrote, numbers as numbers. Raises HeadError."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {name: _value(name, cell) for name, cell in row.items()} for row in csv.DictReader(file, strict=True)
            ]
    except (OSError, TypeError, ValueError, csv.Error) as error:
        message = f"{path} cannot be read as a table of a training ({error}). Bring the file back from a copy."
        raise HeadError(message) from error


def _value(column: str, cell: str) -> str | int | float | None:
    if column in _TEXTS:
        return cell
    return None if not cell else int(cell) if column in _WHOLE else float(cell)


def write_weights(path: Path, head: nn.Module) -> None:
    """The weights as safetensors. Raises OSError for errors of the disk."""
    with safetensors_errors(path):
        save_file({name: value.contiguous().cpu() for name, value in head.state_dict().items()}, path)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON. Raises ValueError for NaN."""
    path.write_text(json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows with the columns of the first; None becomes an empty cell."""
    write_table: Callable[..., Any] = csv.DictWriter
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = write_table(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
