"""The tables of a transfer: across data sets in the layout of the paper's Table VI, and the few-shot curve."""

from collections.abc import Mapping, Sequence
from typing import Any

from agiqa.bench.ablation.row_text import score_text
from agiqa.bench.recording.tables import as_table

_METRICS = ("srcc", "plcc")
Row = Mapping[str, Any]


def transfer_text(rows: Sequence[Row]) -> str:
    """Both tables in markdown, each with a label column where there are several."""
    return "\n\n".join(
        [
            "**Across data sets**: the head of one applied to the other, and trained anew on it (w/ TP); means over "
            "seeds with intervals by prompt.",
            across(rows),
            "**Few-shot**: trained on so many items of the other data set, from random weights (fresh) or from the "
            "head of the first (warm); the last epoch is kept, and no line is fitted (`calibrate`).",
            few_shot(rows),
        ]
    )


def across(rows: Sequence[Row]) -> str:
    """A line per direction: SRCC and PLCC applied and with the predictor retrained; then each data set itself."""
    head = ["from -> to", *_label_head(rows), "SRCC", "PLCC", "w/ TP SRCC", "w/ TP PLCC"]
    body = [
        [_direction(row), *_label_cell(rows, row), *_cells(row), *_cells(_other(rows, row, "tp"))]
        for row in _of_way(rows, "apply")
    ]
    body += [[_direction(row), *_label_cell(rows, row), *_cells(row), "", ""] for row in _of_way(rows, "within")]
    return as_table(head, body)


def few_shot(rows: Sequence[Row]) -> str:
    """A line per direction and number of training items."""
    columns = [f"{way} {metric.upper()}" for way in ("fresh", "warm") for metric in _METRICS]
    head = ["from -> to", *_label_head(rows), "items", *columns]
    body = [
        [
            _direction(row),
            *_label_cell(rows, row),
            str(row["settings"]["training_items"]),
            *_cells(row),
            *_cells(_other(rows, row, "warm")),
        ]
        for row in _of_way(rows, "fresh")
    ]
    return as_table(head, body)


def _of_way(rows: Sequence[Row], way: str) -> list[Row]:
    return [row for row in rows if row["settings"]["way"] == way]


def _other(rows: Sequence[Row], row: Row, way: str) -> Row:
    """The row of another way, all else alike."""
    wanted = {**row["settings"], "way": way}
    return next(one for one in rows if one["settings"] == wanted and one["label"] == row["label"])


def _direction(row: Row) -> str:
    return f"{row['settings']['from']} -> {row['settings']['to']}"


def _label_head(rows: Sequence[Row]) -> list[str]:
    return ["label"] if len({row["label"] for row in rows}) > 1 else []


def _label_cell(rows: Sequence[Row], row: Row) -> list[str]:
    return [row["label"]] if _label_head(rows) else []


def _cells(row: Row) -> list[str]:
    """SRCC and PLCC with their intervals."""
    return [score_text(row["test"], metric, undefined="-") for metric in _METRICS]
