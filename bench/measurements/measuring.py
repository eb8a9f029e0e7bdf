"""What all measurements share: their command line, result lines in a file, and the tables made of them."""

import json
import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from agiqa.bench.recording.tables import as_table, read_results
from agiqa.bench.recording.this_run import about_this_run
from agiqa.errors import AgiqaError
from agiqa.progress import say

Command = TypeVar("Command", bound=Callable[..., Any])
Line = dict[str, Any]
"""A result line: `stage`, `name`, `config` and `measured`, and the facts of `about_this_run`."""


def out_option(command: Command) -> Command:
    """Add `--out`; the command receives a path or None."""
    return click.option("--out", type=click.Path(path_type=Path), help="Append the result lines to this file.")(command)


def result_options(command: Command) -> Command:
    """Add `--out` and `--table`; the command receives a path or None for each."""
    existing = click.Path(path_type=Path, exists=True)
    return out_option(click.option("--table", type=existing, help="Only print the tables of these lines.")(command))


def append_line(line: Mapping[str, Any], out: Path | None) -> None:
    """Append `line` to the file `out`, where one is given."""
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def recorded(lines: Iterable[Line], out: Path | None, summary: Callable[[Line], str]) -> Iterator[Line]:
    """`lines` with the facts of `about_this_run`; each is appended to `out` and its `summary` printed as it comes."""
    about = about_this_run()
    for measured in lines:
        line = {**measured, **about}
        say(summary(line))
        append_line(line, out)
        yield line


def print_tables(
    lines: Generator[Line],
    tables: Callable[[Sequence[Line]], str],
    summary: Callable[[Line], str],
    *,
    out: Path | None,
    table: Path | None,
) -> None:
    """Print the `tables` of the lines in the file `table`; without a file, measure `lines` now (see `recorded`).

    With `table`, nothing is measured. An AgiqaError becomes an error of the command line.
    """
    with closing(lines):
        try:
            print(tables(list(recorded(lines, out, summary)) if table is None else read_results(table)))
        except AgiqaError as error:
            raise click.ClickException(str(error)) from error


def device_name(device: torch.device) -> str:
    """The name of a device in result lines."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def digits(value: float) -> str:
    """`value` with three digits after the point, or as a whole number from 10."""
    return f"{value:.3f}" if value < 10 else f"{value:,.0f}"


def spelled(key: str) -> str:
    """The title of a measured number: `write_mb_s` is `write MB/s`."""
    return key.replace("_", " ").replace("gb", "GB").replace("mb", "MB").replace("MB s", "MB/s")


def measured_table(columns: Mapping[str, Callable[[Line], str]], keys: Sequence[str], lines: Iterable[Line]) -> str:
    """A markdown table with a row per line: `columns` by title, then the measured numbers `keys`."""
    rows = [
        [*(cell(line) for cell in columns.values()), *(digits(line["measured"][key]) for key in keys)] for line in lines
    ]
    return as_table([*columns, *map(spelled, keys)], rows)


def goal_cells(value: float, *, at_most: float = math.inf, at_least: float = 0.0) -> list[str]:
    """The cells `wanted`, `measured` and `met` of a goal, which is one bound or the other."""
    wanted = f"at most {at_most:g}" if at_least == 0 else f"at least {at_least:g}"
    return [wanted, digits(value), "yes" if at_least <= value <= at_most else "no"]


def goal_table(rows: Iterable[list[str]], *columns: str) -> str:
    """A markdown table of goals; the cells of `rows` are the goal, `columns`, and `goal_cells`."""
    return as_table(["goal", *columns, "wanted", "measured", "met"], list(rows))


def joined(*parts: str) -> str:
    """The tables that have rows, one below the other."""
    return "\n\n".join(part for part in parts if part)
