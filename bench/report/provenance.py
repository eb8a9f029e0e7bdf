"""Where the numbers come from: stores, software, devices and settings, and the runs and rows without a number."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from agiqa.bench.recording.records import AboutStore, Row, RunLine
from agiqa.bench.recording.result_folders import RESULTS, ROWS
from agiqa.bench.report.naming import listed, on_store, plural, protocol_name
from agiqa.bench.report.reading import Results
from agiqa.bench.report.tables import Cell, Column, Table, fact_table, make_table
from agiqa.heads.evaluation.runs import complete_settings
from agiqa.heads.settings.config import default_settings
from agiqa.heads.training.experiment import OF_THE_MACHINE

_ID_LETTERS = 16
_LINES = 4
"""The most lines of an error that are shown."""
_ELSEWHERE = ("label", "split", "fold", "held_out", "seed", *OF_THE_MACHINE)
"""Settings that are shown in rows, headings and `Seeds`, or that say where a run was trained."""
NETWORK = "network"
"""The setting that only the runs of image networks have."""
_ROUNDED = 0.0005
"""The largest rounding error of a row's mean seconds."""


def stores_table(results: Results) -> Table:
    """The stores of the features."""
    columns: list[Column[tuple[str, AboutStore]]] = [
        Column("store", "Store", lambda one: one[0] or "(the only one)", "text"),
        Column("data", "Data", lambda one: one[1].data, "text"),
        Column("items", "Items", lambda one: one[1].items, "count"),
        Column("model", "Model of the features", lambda one: one[1].model, "text"),
        Column("encoding", "Encoding", lambda one: one[1].encoding, "text"),
        Column("width", "Width", lambda one: one[1].width, "count"),
        Column("id", "Id", lambda one: one[1].id[:_ID_LETTERS], "text"),
    ]
    return make_table(results, ["stores"], "stores", columns, results.about.stores.items())


def runs_table(results: Results) -> Table:
    """The number of runs, their software, devices and settings."""
    done = results.done
    seconds = sum(line.seconds or 0.0 for line in done)
    time = f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min"
    settings = _settings(done)
    facts = {
        "Folder": results.name,
        "Runs": f"{len(done):,} done, {len(results.lines) - len(done):,} failed",
        "Seeds": _counted(line.seed for line in done),
        "agiqa": _counted(line.agiqa for line in done),
        "Commit": _counted(line.commit for line in done),
        "torch": _counted(line.torch for line in done),
        "Device": _counted(line.device for line in done),
        "Kernels": _counted(line.kernels for line in done),
        "Settings of all": _shared(settings),
        "Settings that differ": "; ".join(
            f"{name} {', '.join(map(_as_yaml, values))}" for name, values in settings.items() if len(values) > 1
        ),
        "Trained": _days(done),
        "Training and testing": f"{time} of work",
    }
    return fact_table(results, "runs", "runs", facts)


def origin_note(results: Results, rows: Iterable[Row]) -> str:
    """Data set, model, settings and date of the heads or networks among some rows of a table, for its note."""
    trained = [row for row in rows if row.is_trained]
    stores = [results.store(name) for name in dict.fromkeys(row.store_name for row in trained)]
    names = {run.name for row in trained for run in results.runs_of(row)}
    lines = [line for line in results.lines if line.name in names]
    data = [*dict.fromkeys(store.hint for store in stores if store.hint)]
    models = [*dict.fromkeys(store.model for store in stores if store.model)]
    encodings = _encodings(stores)
    parts = {
        "Data": listed(data),
        "Model of the features": listed(models) + (f" ({encodings})" if models and encodings else ""),
        f"Settings of all {results.trained_noun}s": _shared(_settings(lines)),
        "Trained": _days(lines),
    }
    return " ".join(f"{name}: {value}." for name, value in parts.items() if value)


def _encodings(stores: Sequence[AboutStore]) -> str:
    """`sketch, width 64 and 128`; empty where no encoding is known."""
    widths: dict[str, set[int]] = {}
    for store in stores:
        if store.encoding:
            widths.setdefault(store.encoding, set()).update([] if store.width is None else [store.width])
    return "; ".join(
        f"{encoding}, width {listed([str(width) for width in sorted(found)])}" if found else encoding
        for encoding, found in widths.items()
    )


def _days(lines: Sequence[RunLine]) -> str | None:
    """The days on which runs ended, `2026-11-02` or `2026-11-02 to 2026-11-05`; None where no line has a date."""
    days = sorted({line.trained_at[:10] for line in lines if line.trained_at})
    return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else None


def _settings(lines: Sequence[RunLine]) -> dict[str, list[object]]:
    """The distinct values of every setting, in the order of the runs.

    A setting that an older line lacks has the value that it was trained with.
    """
    usual = default_settings()
    found: dict[str, list[object]] = {}
    for config in (line.config for line in lines if line.config):
        for name, value in (config if NETWORK in config else {**usual, **complete_settings(config)}).items():
            if name not in _ELSEWHERE and value not in found.setdefault(name, []):
                found[name].append(value)
    return found


def _shared(settings: Mapping[str, Sequence[object]]) -> str | None:
    """The settings of all runs that differ from the defaults of `agiqa train`; None without any settings."""
    usual = {} if NETWORK in settings else default_settings()
    shared = {name: values[0] for name, values in settings.items() if len(values) == 1}
    parts = [f"{name} {_as_yaml(value)}" for name, value in shared.items() if value != usual.get(name)]
    return ", ".join([*parts, *(["others by default"] if usual else [])]) if settings else None


def _as_yaml(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _counted(values: Iterable[object]) -> str:
    """The distinct values; if they are not equally frequent, with the number of runs of each."""
    counted = Counter("not recorded" if value is None else str(value) for value in values)
    if len(set(counted.values())) == 1:
        return ", ".join(sorted(counted, key=lambda text: (len(text), text)))
    return ", ".join(f"{value} ({plural(count, 'run')})" for value, count in counted.most_common())


def failures_table(results: Results) -> Table | None:
    """The failed runs with their errors; None without any.

    Runs of one row whose errors have the same first and last line share a row.
    """
    alike: dict[tuple[str, ...], list[RunLine]] = {}
    for line in results.lines:
        if line.error is not None:
            text = line.error.splitlines() or [""]
            alike.setdefault((line.row_name, line.store_name, text[0], text[-1]), []).append(line)
    if not alike:
        return None
    columns: list[Column[list[RunLine]]] = [
        Column("run", "Run", _names, "text"),
        Column("error", "Error", lambda lines: _short_error(lines[0].error or ""), "text"),
    ]
    title = plural(sum(map(len, alike.values())), "failed run")
    note = f"The same `agiqa {results.about.command}` tries them again."
    return make_table(results, ["failed"], title, columns, alike.values(), [note])


def _names(lines: Sequence[RunLine]) -> str:
    first, others = lines[0].name, len(lines) - 1
    return f"{first} and {plural(others, 'run')} like it" if others else first


def _short_error(error: str) -> str:
    lines = error.splitlines()
    return "\n".join(lines if len(lines) <= _LINES else [*lines[: _LINES - 2], "...", lines[-1]])


def left_out_table(results: Results) -> Table | None:
    """Rows without a number, and why; None without any."""
    if not results.left_out:
        return None

    def name(row: Row) -> Cell:
        return Cell(on_store(row.row, row.store_name), tag="baseline" if row.kind == "baseline" else None)

    columns: list[Column[Row]] = [
        Column("row", "Row", name, "text"),
        Column("protocol", "Protocol", lambda row: protocol_name(row.protocol), "text"),
        Column("label", "Label", lambda row: row.label, "text"),
        Column(
            "why", "Why", lambda row: row.left_out or f"{plural(row.failed, 'run')} failed, none has a result", "text"
        ),
    ]
    return make_table(results, ["left-out"], "rows without a number", columns, results.left_out)


def outdated(results: Results) -> str | None:
    """What to do if runs were added or repeated after rows.jsonl was computed; None if the rows are up to date.

    Each row records the number of its runs and their mean seconds, which no two trainings share. None also where
    lines lack either, or some could not be read.
    """
    heads = [row for row in (*results.rows, *results.left_out) if row.is_trained]
    comparable = all(line.protocol and line.seconds is not None and all(line.labels) for line in results.done)
    if not results.lines or results.problems or not comparable or not all(row.runs for row in heads):
        return None
    of_rows = _tally((row.label, row.protocol, row.runs - row.failed, row.seconds) for row in heads)
    of_lines = _tally((label, one.protocol, 1, one.seconds) for one in results.done for label in one.labels)
    for label, protocol in of_rows | of_lines:
        (known, before), (done, after) = (tally.get((label, protocol), (0, 0.0)) for tally in (of_rows, of_lines))
        if done == known and abs(after - before) <= _ROUNDED * (known + 1):
            continue
        change = "runs were repeated" if done == known else f"{plural(done, 'run')} done, but the rows cover {known}"
        return (
            f"results in {RESULTS} that were added after {ROWS} was computed ({label}, {protocol_name(protocol)}: "
            f"{change}): run the same `agiqa {results.about.command}` again, which computes the rows anew, and then "
            "make the report."
        )
    return None


def _tally(counted: Iterable[tuple[str, str, int, float | None]]) -> dict[tuple[str, str], tuple[int, float]]:
    """Runs and seconds by label and protocol, of (label, protocol, runs, mean seconds)."""
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for label, protocol, runs, seconds in counted:
        count, total = found.get((label, protocol), (0, 0.0))
        found[label, protocol] = count + runs, total + runs * (seconds or 0.0)
    return found
