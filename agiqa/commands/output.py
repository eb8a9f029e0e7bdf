"""How commands print their results: JSON on the output stream for scripts, or text for people."""

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from agiqa.errors import HeadError

if TYPE_CHECKING:
    from agiqa.bench.recording.tables import Parts


def print_result(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print `text`, or `result` as one JSON object, to the output stream."""
    click.echo(json.dumps(result, ensure_ascii=False, allow_nan=False) if as_json else text)


def print_parts(result: Mapping[str, Any], parts: "Parts", *, as_json: bool) -> None:
    """As `print_result`, for text with tables: drawn to the width of a terminal, markdown anywhere else."""
    from agiqa.bench.recording.tables import as_markdown

    if as_json or not sys.stdout.isatty():
        print_result(result, as_markdown(parts), as_json=as_json)
        return
    from agiqa.commands.terminal_tables import print_drawn

    print_drawn(parts)


def table(rows: Mapping[str, Any]) -> str:
    """Lines `name  value` with the values aligned."""
    width = max(len(name) for name in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


def failures(failed: Mapping[str, str]) -> str:
    """A line per error: its first line, and the runs that it stopped. `failed` maps runs to errors."""
    names_of: dict[str, list[str]] = {}
    for name, error in failed.items():
        names_of.setdefault(error.splitlines()[0] if error else "no reason was recorded", []).append(name)
    return "\n".join(
        f"  {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {error}"
        for error, names in names_of.items()
    )


def fail_if_any(failed: Mapping[str, str], *, total: int, what: str) -> None:
    """Raise HeadError if any of the `total` runs or results failed, so that the command exits with 1."""
    if failed:
        message = f"{len(failed)} of {total} {what} failed; run the same command again to retry:\n{failures(failed)}"
        raise HeadError(message)


def calibration_lines(labels: Sequence[str], recorded: Any) -> list[str]:
    """A line per calibrated label; `recorded` is `calibration` of metrics.json."""
    from agiqa.heads.settings.labels import of_each_label

    return [
        f"calibrated: {label} = {one['slope']:.4g} x prediction {one['intercept']:+.4g}, fitted on {one['n']} "
        f"validation items{' before the refit' if one['applied_to_refit'] else ''}; errors on these items are "
        "therefore too small"
        for label, one in zip(labels, of_each_label(labels, recorded), strict=True)
        if one["slope"] is not None
    ]


def label_titles(labels: Sequence[str]) -> list[list[str]]:
    """The title lines above the scores of each label: none for a single label."""
    return [[] if len(labels) == 1 else [f"{label}:"] for label in labels]


def scores_line(name: str, scores: Mapping[str, Any]) -> str:
    """One line: SRCC, PLCC, KRCC and RMSE, with the intervals of the first two, and a caution if there is one."""
    parts = [f"{name:<10} n {scores['n']}"]
    for metric in ("srcc", "plcc", "krcc", "rmse"):
        value, interval = scores[metric], scores["ci"].get(metric)
        shown = "undefined" if value is None else f"{value:.4f}"
        around = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval and metric in ("srcc", "plcc") else ""
        parts.append(f"{metric.upper()} {shown}{around}")
    return "  ".join([*parts, *([f"({scores['caution']})"] if "caution" in scores else [])])


def spread_lines(scores: Mapping[str, Any]) -> list[str]:
    """A line on the predicted spreads, where there are any."""
    found = scores.get("spread")
    if found is None:
        return []
    parts = [f"{'spread':<10} mean {found['mean']:.3f}", f"NLL {found['nll']:.3f}"]
    if found["n_std"]:
        parts.append(f"NLL of ratings {found['rating_nll']:.3f}")
        srcc = found["srcc"]
        parts.append(f"SRCC with the known std {'undefined' if srcc is None else f'{srcc:.3f}'} (n {found['n_std']})")
    return ["  ".join(parts)]


def interval_lines(record: Mapping[str, Any]) -> list[str]:
    """The coverage of the intervals, of all items and of each generator, or why there are none."""
    if "absent" in record:
        return [f"{'intervals':<10} none: {record['absent']}"]
    level = 100 * record["level"]
    head = f"{'intervals':<10} {level:.4g} % from {record['validation_items']} validation items, mean width "
    lines = [f"{head}{record['mean_width']:.3f}; they hold {_coverage_text(record['coverage'])}"]
    return lines + [f"{'':<10} {name}: {_coverage_text(own)}" for name, own in record["generators"].items()]


def _coverage_text(own: Mapping[str, Any]) -> str:
    low, high = own["ci"]
    return f"{100 * own['share']:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of {own['n']}"
