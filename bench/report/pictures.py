"""Pictures for reports, drawn by matplotlib into files, without its global state and without a display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from numpy.polynomial import Polynomial
from numpy.typing import NDArray
from scipy import stats

from agiqa.errors import DataError

Floats = NDArray[np.float64]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""A marker per group beside its colour, so that pictures also work in grey."""
FIT_DEGREE = 4
"""Degree of the fitted polynomial, as in Fig. 5 of the paper."""
_COLUMNS = 3
_ENTRY_WIDTH = 1.2
"""Inches that an entry of the legend takes."""
_INK = "#333333"
_UNGROUPED = "items"
_FEWEST = 3


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One scatter: true and predicted MOS of the same items, and optionally the group of each item."""

    title: str
    true: Floats
    """(items,)"""
    predicted: Floats
    """(items,)"""
    groups: Sequence[str] | None = None
    """(items,): the generator of each item, say."""


def scatter(path: Path, panels: Sequence[Panel], *, title: str, dpi: int = 200) -> None:
    """Write scatter plots of predicted against true MOS; the suffix of `path` chooses the format (.png, .svg, .pdf).

    The panels stand side by side, three in a row, on the same equal axes. Each shows the identity line, a
    polynomial fit of degree 4 over the range of its points (Fig. 5 of the paper), n, SRCC and PLCC. Groups are
    told apart by colour and marker, the same in all panels.
    Raises DataError for no panels, lengths that differ, values that are not finite, or under three items.
    """
    if not panels:
        message = "There is nothing to draw: no predictions were given."
        raise DataError(message)
    for panel in panels:
        _check(panel)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    groups = sorted({group for panel in panels for group in panel.groups or ()})
    height = 3.75 * rows + 0.6 + (0.5 if groups else 0.0)
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.08)
    figure = Figure(figsize=(3.5 * columns + 0.3, height), dpi=dpi, layout=layout)
    FigureCanvasAgg(figure)
    limits = _limits(panels)
    styles = dict(zip(groups, cycle(zip(PALETTE, MARKERS, strict=True)), strict=False))
    drawn: list[Axes] = []
    for index, panel in enumerate(panels):
        axes = figure.add_subplot(rows, columns, index + 1)
        _draw(axes, panel, limits, styles)
        axes.set_ylabel("predicted MOS" if index % columns == 0 else "", fontsize=9, color=_INK)
        drawn.append(axes)
    figure.suptitle(title, fontsize=11, fontweight="bold", color=_INK, wrap=True)
    _add_legend(figure, drawn)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _check(panel: Panel) -> None:
    """Raise DataError unless the panel can be drawn."""
    where = f"The panel {panel.title!r}"
    groups = len(panel.true) if panel.groups is None else len(panel.groups)
    if panel.true.ndim != 1 or panel.true.shape != panel.predicted.shape or groups != len(panel.true):
        message = (
            f"{where} needs one value of each kind per item: true {panel.true.shape}, "
            f"predicted {panel.predicted.shape}, groups ({groups},)."
        )
        raise DataError(message)
    if len(panel.true) < _FEWEST:
        message = f"{where} has {len(panel.true)} items; a scatter plot needs at least {_FEWEST}."
        raise DataError(message)
    broken = int((~np.isfinite(panel.true) | ~np.isfinite(panel.predicted)).sum())
    if broken:
        message = f"{where} has {broken} of {len(panel.true)} items whose MOS is not finite; leave them out."
        raise DataError(message)


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """The same range for all axes, a little wider than the points."""
    values = np.concatenate([numbers for panel in panels for numbers in (panel.true, panel.predicted)])
    low, high = float(values.min()), float(values.max())
    margin = 0.06 * (high - low) or 0.5
    return low - margin, high + margin


def _draw(axes: Axes, panel: Panel, limits: tuple[float, float], styles: Mapping[str, tuple[str, str]]) -> None:
    axes.plot(limits, limits, color="#999999", linewidth=0.9, linestyle=(0, (4, 3)), zorder=1, label="identity")
    if panel.groups is None:
        _points(axes, panel.true, panel.predicted, PALETTE[0], MARKERS[0], _UNGROUPED)
    else:
        names = np.asarray(panel.groups)
        for name, (colour, marker) in styles.items():
            chosen = names == name
            _points(axes, panel.true[chosen], panel.predicted[chosen], colour, marker, name)
    _fit(axes, panel)
    axes.set(xlim=limits, ylim=limits, aspect="equal")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.set_xlabel("true MOS", fontsize=9, color=_INK)
    axes.set_title(panel.title, fontsize=10, color=_INK)
    axes.text(
        0.04,
        0.96,
        _summary(panel),
        transform=axes.transAxes,
        va="top",
        fontsize=8,
        color=_INK,
        linespacing=1.4,
        bbox={"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        zorder=5,
    )
    axes.tick_params(labelsize=8, colors=_INK, length=3)
    axes.grid(color="#E6E6E6", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _points(axes: Axes, across: Floats, up: Floats, colour: str, marker: str, label: str) -> None:
    size = float(np.clip(2400 / max(1, len(across)), 5, 22))
    axes.scatter(
        across,
        up,
        s=size,
        c=colour,
        marker=marker,
        alpha=0.7,
        linewidths=0.3,
        edgecolors="white",
        label=label,
        zorder=2,
    )


def fit_polynomial(true: Floats, predicted: Floats) -> Polynomial | None:
    """The least-squares polynomial of degree 4 over items (items,).

    It is of lower degree where there are too few distinct true values for it, and None where they are all equal.
    """
    degree = min(FIT_DEGREE, len(np.unique(true)) - 1)
    return Polynomial.fit(true, predicted, degree) if degree else None


def _fit(axes: Axes, panel: Panel) -> None:
    curve = fit_polynomial(panel.true, panel.predicted)
    if curve is None:
        return
    across = np.linspace(panel.true.min(), panel.true.max(), 200)
    axes.plot(across, curve(across), color="white", linewidth=2.6, alpha=0.7, zorder=3)
    axes.plot(across, curve(across), color="#000000", linewidth=1.5, zorder=4, label=f"fit, degree {curve.degree()}")


def _summary(panel: Panel) -> str:
    """n and both correlations; they do not exist where all true or all predicted values are equal."""
    lines = [f"n = {len(panel.true)}"]
    if np.ptp(panel.true) == 0 or np.ptp(panel.predicted) == 0:
        return "\n".join([*lines, "no correlation: constant"])
    srcc = float(stats.spearmanr(panel.true, panel.predicted).statistic)
    plcc = float(stats.pearsonr(panel.true, panel.predicted).statistic)
    return "\n".join([*lines, f"SRCC {srcc:.3f}", f"PLCC {plcc:.3f}"])


def _add_legend(figure: Figure, drawn: Sequence[Axes]) -> None:
    """One legend under all panels: the lines first, then the groups where there are any."""
    entries: dict[str, Artist] = {}
    for axes in drawn:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    entries.pop(_UNGROUPED, None)
    labels = sorted(entries, key=lambda label: (not isinstance(entries[label], Line2D), label))
    columns = min(len(labels), max(2, round(figure.get_figwidth() / _ENTRY_WIDTH)))
    figure.legend(
        [entries[label] for label in labels],
        labels,
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        frameon=False,
        labelcolor=_INK,
    )
