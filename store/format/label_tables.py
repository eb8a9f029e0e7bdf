"""Label tables: a csv with one row per image. Its columns, and how its cells are read, whoever reads them."""

import csv
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from agiqa.errors import DataError
from agiqa.store.format.lfs import refuse_lfs_pointers
from agiqa.store.format.scales import MosRange

ASPECT_COLUMNS = {
    "mos": "quality",
    "mos_quality": "quality",
    "mos_align": "correspondence",
    "mos_alignment": "correspondence",
    "mos_correspondence": "correspondence",
    "mos_authenticity": "authenticity",
}
"""Aspect by column name, as AGIQA-3k, AIGCIQA2023 and AIGIQA-20k call them."""

ASPECT_NAMES = {column.removeprefix("mos_"): aspect for column, aspect in ASPECT_COLUMNS.items() if "_" in column}
"""Aspect by the name that files and their columns give it: `align` and `alignment` are correspondence."""

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One row as it is written."""

    number: int
    """The line of the file that the row ends on, counted from 1."""
    cells: list[str]


def read_text(path: Path) -> str:
    """The UTF-8 text of `path` (a byte-order mark is dropped). Raises DataError when it has none."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        message = f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8."
        raise DataError(message) from error
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror or error})."
        raise DataError(message) from error
    refuse_lfs_pointers([path], DataError)
    if not text.strip():
        message = f"{path}: the file is empty."
        raise DataError(message)
    return text


def read_table(path: Path) -> tuple[list[str], list[TableRow]]:
    """Header and rows of the csv file `path`; blank lines are no rows.

    Raises DataError when it is no UTF-8 csv, or has no rows.
    """
    header, rows = open_table(path)
    return header, list(rows)


def open_table(path: Path) -> tuple[list[str], Iterator[TableRow]]:
    """Header and rows of the csv file `path`, a row at a time; as `read_table`, but errors in rows come with them."""
    rows = _rows(path)
    return [cell.strip() for cell in next(rows).cells], rows


def _rows(path: Path) -> Iterator[TableRow]:
    """The header as it is, and the rows."""
    reader, count = csv.reader(io.StringIO(read_text(path), newline=""), strict=True), 0
    try:
        for cells in reader:
            if cells or not count:
                yield TableRow(number=reader.line_num, cells=cells)
                count += 1
    except csv.Error as error:
        message = f"{path}, line {reader.line_num}: not a csv file ({error})."
        raise DataError(message) from error
    if count < 2:
        message = f"{path}: a header but no rows."
        raise DataError(message)


def read_mos(column: str, cell: str, mos_range: MosRange) -> float:
    """The MOS in `cell`. Raises DataError, in words for a list of problems, unless it lies in `mos_range`."""
    low, high = mos_range
    try:
        value = float(cell)
    except ValueError:
        message = f"{column} is {cell!r}, not a number"
        raise DataError(message) from None
    if not (math.isfinite(value) and low <= value <= high):
        remedy = " (give the range of these MOS by --mos-range)" if math.isfinite(value) else ""
        message = f"{column} is {cell}, outside {low:g} to {high:g}{remedy}"
        raise DataError(message)
    return value
