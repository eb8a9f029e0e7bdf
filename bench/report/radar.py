"""The radar of the paper's Fig. 1: SRCC and PLCC of every aspect, heads here beside the paper's numbers."""

from typing import cast

import numpy as np
from matplotlib.figure import Figure
from matplotlib.projections.polar import PolarAxes

from agiqa.bench.report.figures import GRID, MUTED, SMALL, Picture, draw, safe, shortened, styles
from agiqa.bench.report.naming import METRIC_NAMES, plural, protocol_name, row_titles, slug
from agiqa.bench.report.paper import comparable, paper, paper_scores
from agiqa.bench.report.reading import METRICS, Results, Row

_FEWEST_AXES = 3
_HEADS = 4
Spokes = list[tuple[str, str]]
"""Label and metric of each axis."""


def radar_chart(results: Results, protocol: str, store: str) -> Picture | None:
    """The radar of one protocol and store; None for fewer than three axes: two aspects have four."""
    rows = [row for row in results.rows if row.protocol == protocol and row.store_name == store and row.kind == "head"]
    spokes: Spokes = [(label, metric) for metric in METRICS for label in dict.fromkeys(row.label for row in rows)]
    heads = _complete(rows, spokes)
    if len(spokes) < _FEWEST_AXES or not heads:
        return None
    about = results.store(store)
    facts = {label: paper_scores(paper().data_set(about.hint), paper().label(label)) for label, _ in spokes}
    papers = [
        None if fact is None else float(getattr(fact, metric)) for label, metric in spokes for fact in [facts[label]]
    ]
    titles = row_titles(rows)

    def paint(figure: Figure) -> None:
        axes = cast("PolarAxes", figure.add_subplot(projection="polar"))
        angles = np.linspace(0.0, 2.0 * np.pi, len(spokes), endpoint=False)
        for (name, values), (colour, marker) in zip(heads.items(), styles(heads).values(), strict=True):
            _line(axes, angles, values, colour, marker, titles[name], "solid")
        if None not in papers:
            _line(axes, angles, [value for value in papers if value is not None], MUTED, "", "the paper", (0, (3, 2)))
        _dress(axes, angles, spokes, [*heads.values(), [value for value in papers if value is not None]])
        figure.legend(loc="outside lower center", ncols=2, fontsize=SMALL)

    beside = f" {comparable([about])}" if None not in papers else ""
    name, values = next(iter(heads.items()))
    told = ", ".join(
        f"{label} {METRIC_NAMES[metric]} {value:.3f}" for (label, metric), value in zip(spokes, values, strict=True)
    )
    return draw(
        slug(results.prefix, "radar", protocol, store),
        results.titled(f"aspects, {protocol_name(protocol)}"),
        alt=f"Radar over {len(spokes)} axes of {plural(len(heads), 'head')}. {titles[name]}: {told}.",
        caption=f"Test SRCC and PLCC of the {plural(len(heads), 'head')} with the best mean validation SRCC.{beside}",
        height=4.3,
        paint=paint,
    )


def _complete(rows: list[Row], spokes: Spokes) -> dict[str, list[float]]:
    """The values on every axis of the heads that have them all, best mean validation SRCC first."""
    by_name: dict[str, dict[str, Row]] = {}
    for row in rows:
        by_name.setdefault(row.row, {})[row.label] = row
    found: dict[str, list[float]] = {}
    for name in sorted(by_name, key=lambda name: -float(np.mean([row.chosen_by() for row in by_name[name].values()]))):
        values = [by_name[name][label].value(metric) if label in by_name[name] else None for label, metric in spokes]
        known = [value for value in values if value is not None]
        if len(known) == len(spokes) and len(found) < _HEADS:
            found[name] = known
    return found


def _line(
    axes: PolarAxes, angles: np.ndarray, values: list[float], colour: str, marker: str, name: str, dashes: object
) -> None:
    around = np.append(angles, angles[0])
    axes.plot(
        around,
        [*values, values[0]],
        color=colour,
        marker=marker,
        markersize=4,
        linewidth=1.5,
        linestyle=dashes,
        label=safe(shortened(name)),
    )


def _dress(axes: PolarAxes, angles: np.ndarray, spokes: Spokes, lines: list[list[float]]) -> None:
    low = min(value for line in lines for value in line)
    axes.set_ylim(max(0.0, np.floor(low * 10 - 1) / 10) if low > 0 else low - 0.1, 1.0)
    axes.set_theta_offset(np.pi / 2)
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, [safe(f"{label}\n{METRIC_NAMES[metric]}") for label, metric in spokes])
    axes.tick_params(axis="x", pad=12)
    axes.tick_params(axis="y", labelsize=SMALL - 0.5, labelcolor=MUTED)
    axes.set_rlabel_position(180.0 / len(spokes))
    axes.grid(visible=True, color=GRID, linewidth=0.8)
    axes.spines["polar"].set_color(GRID)
