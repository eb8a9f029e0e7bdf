"""Predicted against true MOS with the quartic fit of the paper's Fig. 5, and the residuals below."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from agiqa.bench.report.figures import COLOURS, INK, MUTED, PAPER, SMALL, Picture, draw, safe, tidy
from agiqa.bench.report.naming import plural, protocol_name, slug
from agiqa.bench.report.pictures import FIT_DEGREE, fit_polynomial
from agiqa.bench.report.predictions import Floats, Predictions
from agiqa.bench.report.reading import Results

_FEWEST = 3
_VECTORS = 400
"""Points above this are pixels in an SVG, so that a page of many items stays small."""


def scatter_chart(results: Results, found: Predictions, title: str) -> Picture | None:
    """Fig. 5 for one row, with residuals; None for fewer than three items."""
    if len(found.true) < _FEWEST:
        return None
    row = found.row
    scores = [
        f"{name} {value:.3f}"
        for name, value in (("SRCC", row.value("srcc")), ("PLCC", row.value("plcc")))
        if value is not None
    ]
    curve = fit_polynomial(found.true, found.predicted)

    def paint(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1.15], sharex=True)
        _clouds(upper, lower, found)
        if curve is not None:
            across = np.linspace(found.true.min(), found.true.max(), 200)
            _fitted(upper, across, curve(across), f"fit, degree {curve.degree()}")
            _fitted(lower, across, curve(across) - across, None)
        text = safe("\n".join([f"n = {len(found.true):,}", *scores]))
        place: Any = {"transform": upper.transAxes, "va": "top", "linespacing": 1.5, "zorder": 5}
        upper.text(0.03, 0.97, text, fontsize=SMALL, color=INK, **place)
        figure.legend(loc="outside upper right", ncols=2, fontsize=SMALL)

    caption = (
        f"{title}: {plural(len(found.true), 'test item')}; predicted is the mean over "
        f"{plural(found.runs, 'run')}. SRCC and PLCC are "
        "those of the table (means over seeds). Below: what the head is off by; a falling line is regression to "
        "the mean."
    )
    missing = f" Predictions of {plural(len(found.missing), 'run')} are missing." if found.missing else ""
    return draw(
        slug(results.prefix, "scatter", row.label, row.protocol, row.store_name),
        results.titled(f"predicted against true MOS, {row.label}, {protocol_name(row.protocol)}"),
        alt=_told(found, title, scores),
        caption=caption + missing,
        height=5.4,
        paint=paint,
    )


def _clouds(upper: Axes, lower: Axes, found: Predictions) -> None:
    """The points and the line of no error in both panels, their limits and labels."""
    values = np.concatenate([found.true, found.predicted])
    margin = 0.04 * float(np.ptp(values)) or 0.5
    limits = float(values.min()) - margin, float(values.max()) + margin
    dashes: Any = {"color": MUTED, "linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
    upper.plot(limits, limits, label="identity", **dashes)
    lower.axhline(0.0, **dashes)
    _points(upper, found.true, found.predicted)
    _points(lower, found.true, found.error)
    upper.set(xlim=limits, ylim=limits, ylabel="predicted MOS")
    lower.set(xlabel="true MOS", ylabel="predicted \N{MINUS SIGN} true")
    for axes in (upper, lower):
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        tidy(axes)


def _fitted(axes: Axes, across: Floats, height: Floats, label: str | None) -> None:
    """A curve with a rim that sets it off from the points."""
    axes.plot(across, height, color=PAPER, linewidth=3.4, alpha=0.8, zorder=3)
    axes.plot(across, height, color=COLOURS[1], linewidth=1.8, zorder=4, label=label)


def _points(axes: Axes, across: Floats, up: Floats) -> None:
    size = float(np.clip(2400 / len(across), 3, 22))
    axes.scatter(
        across, up, s=size, c=COLOURS[0], alpha=0.45, linewidths=0, zorder=2, rasterized=len(across) > _VECTORS
    )


def _told(found: Predictions, title: str, scores: list[str]) -> str:
    low, high = found.true <= np.quantile(found.true, 0.2), found.true >= np.quantile(found.true, 0.8)
    ends = " and ".join(
        f"{found.error[part].mean():+.2f} for the {name} fifth" for part, name in ((low, "worst"), (high, "best"))
    )
    told = ", ".join(scores) or "no correlation"
    return (
        f"Scatter of predicted against true MOS of {plural(len(found.true), 'item')} by {title} ({told}), with "
        "the identity and a "
        f"polynomial of degree {FIT_DEGREE}; below it the residuals, on average {ends} of the images."
    )
