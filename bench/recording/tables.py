"""Tables of text, and of result lines: `python -m agiqa.bench.recording.tables bench/results/FILE.jsonl`.

A result line is one run: stage, config, seed, and scores of validation, test or both. Rows are
configs, numbers are means over seeds with the standard deviation, and the best comes first.
"""

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def read_results(path: Path) -> list[dict[str, Any]]:
    """The result lines of a jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def tables(results: Sequence[dict[str, Any]]) -> str:
    """One markdown table per stage, with a row per configuration, named by its differences from the usual one."""
    stages: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for result in results:
        stages[result["stage"]].append(result)
    return "\n\n".join(f"**{stage}**\n\n{_table(lines)}" for stage, lines in stages.items())


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table that commands print: markdown in files and pipes, and drawn on a terminal."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The markdown table, or nothing without rows."""
        return as_table(self.head, [[_in_one_cell(cell) for cell in row] for row in self.rows])


Parts = Sequence[str | TextTable]
"""Paragraphs and tables of an output, in their order."""


def as_markdown(parts: Parts) -> str:
    """The parts that are not empty, with a line between them."""
    texts = [part if isinstance(part, str) else part.markdown() for part in parts]
    return "\n\n".join(text for text in texts if text)


def as_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A markdown table, or nothing without rows."""
    lines = (head, ["---"] * len(head), *rows) if rows else ()
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _in_one_cell(text: str) -> str:
    """The text of a cell on one line, with its bars escaped."""
    return " ".join(text.splitlines()).replace("|", "\\|")


def _table(lines: Sequence[dict[str, Any]]) -> str:
    keys = sorted({key for line in lines for key in line["config"]})
    usual = {key: statistics.mode(line["config"].get(key) for line in lines) for key in keys}
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        rows[_difference(line["config"], usual)].append(line)
    ordered = sorted(rows.items(), key=lambda row: -_rank(row[1]))
    parts = [part for part in ("validation", "test") if all(part in line for line in lines)]
    head = ["head", "seeds", *(f"{part} {metric}" for part in parts for metric in ("SRCC", "PLCC"))]
    body = [[name, str(len(runs)), *(cell for part in parts for cell in _cells(runs, part))] for name, runs in ordered]
    shared = ", ".join(f"{key} {value}" for key, value in usual.items() if value is not None)
    return ("" if len(usual) == 1 else f"Unless said otherwise: {shared}.\n\n") + as_table(head, body)


def _difference(config: Mapping[str, Any], usual: Mapping[str, Any]) -> str:
    if len(usual) == 1:
        return str(next(iter(config.values())))
    other = {key: config.get(key) for key in usual if config.get(key) != usual[key]}
    return ", ".join(f"no {key}" if value is None else f"{key} {value}" for key, value in other.items()) or "as said"


def _rank(runs: Sequence[dict[str, Any]]) -> float:
    """Validation decides the order where there is any; test scores only where nothing was chosen."""
    part = "validation" if "validation" in runs[0] else "test"
    return statistics.fmean(float(run[part]["srcc"]) + float(run[part]["plcc"]) for run in runs)


def _cells(runs: Sequence[dict[str, Any]], part: str) -> list[str]:
    return [_spread([run[part][metric] for run in runs]) for metric in ("srcc", "plcc")]


def _spread(values: Sequence[float]) -> str:
    around = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{around}"


if __name__ == "__main__":
    print(tables(read_results(Path(sys.argv[1]))))
