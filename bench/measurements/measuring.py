"""The command line of a benchmark: lines are measured and kept in a file, or read from one, and tables made of them."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from agiqa.bench.recording.tables import read_results
from agiqa.bench.recording.this_run import recorded

Command = TypeVar("Command", bound=Callable[..., Any])
Line = dict[str, Any]
"""A result line: `stage`, `name`, `config` and `measured`, and what `about_this_run` says."""


def result_options(command: Command) -> Command:
    """Add `--out` and `--table`; the command receives a path or None for each."""
    out = click.option("--out", type=click.Path(path_type=Path), help="Append the result lines to this file.")
    existing = click.Path(path_type=Path, exists=True)
    table = click.option("--table", type=existing, help="Only print the tables of these lines.")
    return out(table(command))


def print_tables(
    lines: Generator[Line],
    tables: Callable[[Sequence[Line]], str],
    told: Callable[[Mapping[str, Any]], str],
    *,
    out: Path | None,
    table: Path | None,
) -> None:
    """Print the `tables` of the lines in the file `table`, or without one of `lines`, measured now (see `recorded`).

    With `table` nothing is measured: `lines` is not begun.
    """
    with closing(lines):
        print(tables(recorded(lines, out, told) if table is None else read_results(table)))


def device_name(device: torch.device) -> str:
    """What result lines call a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
