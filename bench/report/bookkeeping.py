"""Where numbers come from: stores, versions and devices, runs that failed, and the bias of the paper's own choice."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from agiqa.bench.recording.result_folders import RESULTS, ROWS, RUNS
from agiqa.bench.report.naming import METRIC_NAMES, on_store, plural, protocol_name, row_titles, slug
from agiqa.bench.report.reading import METRICS, Results, Row, RunLine
from agiqa.bench.report.tables import Cell, Column, Table, key_values
from agiqa.heads.evaluation.runs import complete_settings
from agiqa.heads.settings.config import default_settings
from agiqa.heads.training.experiment import OF_THE_MACHINE

_ID_LETTERS = 16
_LINES = 4
"""Most lines of an error that are shown."""
_ELSEWHERE = ("label", "split", "fold", "held_out", "seed", *OF_THE_MACHINE)
"""Settings that rows, headings and `Seeds` tell, or that say where a run was trained."""
_ROUNDED = 0.0005
"""Seconds by which the mean of a row may be rounded."""


def stores_table(results: Results) -> Table:
    """What the numbers were computed from."""
    columns = [
        Column(key="store", title="Store", kind="text"),
        Column(key="data", title="Data", kind="text"),
        Column(key="items", title="Items", kind="count"),
        Column(key="model", title="Features of", kind="text"),
        Column(key="encoding", title="Encoding", kind="text"),
        Column(key="width", title="Width", kind="count"),
        Column(key="id", title="Id", kind="text"),
    ]
    body = [
        [
            Cell(value=name or "(the only one)"),
            Cell(value=store.data_name),
            Cell(value=store.items),
            Cell(value=store.model_name),
            Cell(value=store.encoding),
            Cell(value=store.width),
            Cell(value=store.id[:_ID_LETTERS]),
        ]
        for name, store in results.about.stores.items()
    ]
    return Table(name=slug(results.prefix, "stores"), title=results.titled("stores"), columns=columns, rows=body)


def runs_table(results: Results) -> Table:
    """What the runs were made with, and how many."""
    done, failed = results.done, [line for line in results.lines if line.error is not None]
    seconds = sum(line.seconds or 0.0 for line in done)
    facts = {
        "Folder": results.name,
        "Runs": f"{len(done):,} done, {len(failed):,} failed",
        "Seeds": _counted(line.seed for line in done),
        "agiqa": _counted(line.agiqa for line in done),
        "Commit": _counted(line.commit for line in done),
        "torch": _counted(line.torch for line in done),
        "Device": _counted(line.device for line in done),
        "Kernels": _counted(line.kernels for line in done),
        "Settings of all": _alike(done),
        "Settings that differ": _different(done),
        "Training and testing": f"{seconds / 3600:.1f} h of work"
        if seconds > 5400
        else f"{seconds / 60:.1f} min of work",
    }
    return key_values(slug(results.prefix, "runs"), results.titled("runs"), facts)


def failures_table(results: Results) -> Table | None:
    """Runs with an error in the place of a result, those of a row that begin and end alike as one; None without any."""
    alike: dict[tuple[str, ...], list[tuple[str, list[str]]]] = {}
    for line in results.lines:
        if line.error is not None:
            told = line.error.splitlines() or [""]
            alike.setdefault((line.of_row, line.store_name, told[0], told[-1]), []).append((line.name, told))
    if not alike:
        return None
    columns = [Column(key="run", title="Run", kind="text"), Column(key="error", title="Error", kind="text")]
    body = []
    for (first, told), *others in alike.values():
        short = told if len(told) <= _LINES else [*told[: _LINES - 2], "...", told[-1]]
        run = f"{first} and {plural(len(others), 'run')} like it" if others else first
        body.append([Cell(value=run), Cell(value="\n".join(short))])
    title = results.titled(plural(sum(map(len, alike.values())), "failed run"))
    note = f"The same `agiqa {results.about.command}` tries them again."
    return Table(name=slug(results.prefix, "failed"), title=title, columns=columns, rows=body, notes=[note])


def outdated(results: Results) -> str | None:
    """What to do where runs were added or made again since rows.jsonl was computed; None where it is of these runs.

    Rows tell how many runs they are of and how long these took, which no two trainings share. Where lines lack that,
    or some could not be read, nothing is told.
    """
    heads = [row for row in (*results.rows, *results.left_out) if row.kind == "head"]
    comparable = all(line.protocol and line.seconds is not None and all(line.labels) for line in results.done)
    if not results.lines or results.problems or not comparable or not all(row.runs for row in heads):
        return None
    of_rows = _tally((row.label, row.protocol, row.runs - row.failed, row.seconds) for row in heads)
    of_lines = _tally((label, one.protocol, 1, one.seconds) for one in results.done for label in one.labels)
    for label, protocol in of_rows | of_lines:
        (known, took), (done, takes) = (tally.get((label, protocol), (0, 0.0)) for tally in (of_rows, of_lines))
        if done == known and abs(takes - took) <= _ROUNDED * (known + 1):
            continue
        told = "runs were made again" if done == known else f"{plural(done, 'run')} done, and the rows are of {known}"
        return (
            f"what {RESULTS} tells since {ROWS} was computed ({label}, {protocol_name(protocol)}: {told}): run the "
            f"same `agiqa {results.about.command}` again, which computes the rows anew, and then report."
        )
    return None


def _tally(counted: Iterable[tuple[str, str, int, float | None]]) -> dict[tuple[str, str], tuple[int, float]]:
    """Runs and seconds by label and protocol, of (label, protocol, runs, mean seconds)."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for label, protocol, runs, seconds in counted:
        before, took = found.get((label, protocol), (0, 0.0))
        found[label, protocol] = before + runs, took + runs * (seconds or 0.0)
    return found


def left_out_table(results: Results) -> Table | None:
    """Rows without a number, and why; None without any."""
    if not results.left_out:
        return None
    columns = [
        Column(key="row", title="Row", kind="text"),
        Column(key="protocol", title="Protocol", kind="text"),
        Column(key="label", title="Label", kind="text"),
        Column(key="why", title="Why", kind="text"),
    ]
    body = [
        [
            Cell(
                value=on_store(row.row, row.store_name),
                tag="baseline" if row.kind == "baseline" else None,
            ),
            Cell(value=protocol_name(row.protocol)),
            Cell(value=row.label),
            Cell(value=row.left_out or f"{plural(row.failed, 'run')} failed, none has a result"),
        ]
        for row in results.left_out
    ]
    title = results.titled("rows without a number")
    return Table(name=slug(results.prefix, "left-out"), title=title, columns=columns, rows=body)


def bias_table(results: Results) -> Table | None:
    """The epoch chosen by the test score beside the honest one, means over runs; None where no run recorded it."""
    rows = [(row, found) for row in results.rows for found in [_biases(results, row)] if found]
    if not rows:
        return None
    titles = row_titles(row for row, _ in rows)
    columns = [
        Column(key="row", title="Row", kind="text"),
        Column(key="protocol", title="Protocol", kind="text"),
        Column(key="label", title="Label", kind="text"),
    ]
    for metric in METRICS:
        name = METRIC_NAMES[metric]
        columns += [
            Column(key=f"{metric}_honest", title=f"{name} honest"),
            Column(key=f"{metric}_best_epoch", title=f"{name} best epoch on test"),
            Column(key=f"{metric}_bias", title="bias", kind="difference"),
        ]
    columns += [Column(key="runs", title="Runs", kind="count")]
    body: list[list[Cell]] = []
    for row, found in rows:
        name = on_store(titles[row.row], row.store_name)
        cells = [Cell(value=name), Cell(value=protocol_name(row.protocol)), Cell(value=row.label)]
        for metric in METRICS:
            best, bias = (fmean(one[kind][metric] for one in found) for kind in ("best", "bias"))
            cells += [Cell(value=best - bias), Cell(value=best), Cell(value=bias)]
        body.append([*cells, Cell(value=len(found))])
    note = (
        "Best epoch on test: the epoch is picked by the test score, as in the published code. Honest: picked by "
        "validation items. "
        "Bias is what that choice adds (and, with `refit`, what the second training changes). Means over runs, fold by "
        "fold, which is not what the other tables average."
    )
    title = results.titled("best epoch on test beside the honest number")
    return Table(name=slug(results.prefix, "bias"), title=title, columns=columns, rows=body, notes=[note])


def _biases(results: Results, row: Row) -> list[dict[str, dict[str, float]]]:
    """`best` and `bias` of each metric, for every run of the row that recorded both."""
    found: list[dict[str, dict[str, float]]] = []
    for line in results.runs_of(row):
        told: Any = line.paper_compatible
        if told is None:
            told = (_read_json(results.folder / RUNS / line.name / "metrics.json") or {}).get("paper_compatible")
        told = told.get(row.label) if isinstance(told, dict) and len(line.labels) > 1 else told
        if not isinstance(told, dict) or not isinstance(told.get("bias"), dict):
            continue
        values = {"best": _numbers(told), "bias": _numbers(told["bias"])}
        if all(len(numbers) == len(METRICS) for numbers in values.values()):
            found.append(values)
    return found


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, or None where there is none that can be read."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _numbers(told: Mapping[str, object]) -> dict[str, float]:
    """The metrics that are numbers."""
    return {metric: float(value) for metric in METRICS if isinstance(value := told.get(metric), int | float)}


def _settings(lines: Sequence[RunLine]) -> dict[str, list[object]]:
    """The distinct values of every setting, in the order of the runs; what older lines lack as those were trained."""
    usual = default_settings()
    found: dict[str, list[object]] = {}
    for config in (line.config for line in lines if line.config):
        for name, value in {**usual, **complete_settings(config)}.items():
            if name not in _ELSEWHERE and value not in found.setdefault(name, []):
                found[name].append(value)
    return found


def _alike(lines: Sequence[RunLine]) -> str | None:
    """What all runs were trained with, where it is not what `agiqa train` does by default; None without any."""
    settings, usual = _settings(lines), default_settings()
    shared = {name: values[0] for name, values in settings.items() if len(values) == 1}
    told = [f"{name} {_said(value)}" for name, value in shared.items() if value != usual.get(name)]
    return ", ".join([*told, "others by default"]) if settings else None


def _different(lines: Sequence[RunLine]) -> str | None:
    """What runs of these results differ in."""
    differ = {name: values for name, values in _settings(lines).items() if len(values) > 1}
    return "; ".join(f"{name} {', '.join(map(_said, values))}" for name, values in differ.items()) or None


def _said(value: object) -> str:
    """A setting as YAML has it."""
    return value if isinstance(value, str) else json.dumps(value)


def _counted(values: Iterable[object]) -> str:
    """The distinct values, with how many runs had each where they differ."""
    counted = Counter("not recorded" if value is None else str(value) for value in values)
    if len(counted) == 1:
        return next(iter(counted))
    if all(count == next(iter(counted.values())) for count in counted.values()):
        return ", ".join(sorted(counted, key=lambda text: (len(text), text)))
    return ", ".join(f"{value} ({plural(count, 'run')})" for value, count in counted.most_common())
