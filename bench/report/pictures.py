"""Figures drawn by matplotlib without its global state: charts of a report, and scatter plots of predictions."""

import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from pathlib import Path
from typing import Any, Literal, TypeVar

import matplotlib as mpl
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
from agiqa.heads.evaluation.mos_mappings import fit_logistic

Floats = NDArray[np.float64]
Shown = TypeVar("Shown")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
"""Colours that colour-blind readers can tell apart (Okabe and Ito, 2008)."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Each colour has a marker of its own, so that pictures also work in grey."""
INK, MUTED, GRID, PAPER = "#24292f", "#6b7280", "#e3e6ea", "#ffffff"
SMALL, NORMAL = 8.0, 9.0
"""Font sizes in points."""
DASHED: Any = {"linewidth": 0.9, "linestyle": (0, (4, 3)), "zorder": 1}
"""The line of perfect predictions."""
_DEGREE = 4
"""Degree of the polynomial in Fig. 5 of the paper."""
_WIDTH = 4.6
"""Inches: narrow enough to be read on a phone without being made much smaller."""
_COLUMN_WIDTH = 3.25
"""Inches of one of two columns of a paper."""
_LOWER = 0.85
"""Height of a picture in a paper, relative to its height on the page."""
_DPI = 200
_COLUMNS = 3
_ENTRY_WIDTH = 1.2
"""Inches per entry of a scatter plot's legend."""
_UNGROUPED = "items"
_FEWEST = 3
_PLACES = 200
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--card",
    **{colour.lower(): f"--s{k}" for k, colour in enumerate(PALETTE)},
}
"""The variable of the page's style sheet for each colour."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,  # TrueType, which publishers accept
    "font.family": ["DejaVu Sans"],
    "font.size": NORMAL,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.autolayout": False,  # these two: a user's settings must not bring an engine back
    "figure.constrained_layout.use": False,
    "figure.facecolor": PAPER,
    "legend.labelcolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure of a report."""

    name: str
    """The name of its files and its anchor."""
    title: str
    alt: str
    """A description for readers who cannot see it."""
    caption: str
    height: float
    """Inches; it is 4.6 inches wide."""
    paint: Callable[[Figure], None] = field(repr=False, compare=False)
    """Draws it on an empty figure."""
    is_wide: bool = False
    """Whether it takes a whole line of the page."""

    @cached_property
    def _drawn(self) -> tuple[str, bytes]:
        """The SVG file and the PNG file, drawn when the first of them is needed: both are cut from one figure."""
        with mpl.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            figure = _figure(_WIDTH, self.height, _DPI, h_pad=0.06, w_pad=0.06)
            self.paint(figure)
            _arrange(figure)
            png, svg = io.BytesIO(), io.StringIO()
            figure.savefig(png, format="png")
            figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Title": safe(self.title)})
        return svg.getvalue(), png.getvalue()

    @property
    def svg(self) -> str:
        """The SVG file."""
        return self._drawn[0]

    @property
    def png(self) -> bytes:
        """The PNG file."""
        return self._drawn[1]

    @property
    def inline(self) -> str:
        """The SVG element alone, with the page's colours, and with ids that are unique on the page."""
        start = self.svg.index("<svg")
        text = re.sub(r"<metadata>.*?</metadata>", "", self.svg[start:], flags=re.DOTALL)
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found.group()), text)
        text = re.sub(r"font: ([0-9.]+)px[^;\"]*", r"font-size: \1px", text)
        return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)

    def pdf(self) -> bytes:
        """The figure as a PDF that is as wide as a column of a paper, its text at the size of a caption."""
        content = io.BytesIO()
        with mpl.rc_context(_STYLE):
            figure = _figure(_COLUMN_WIDTH, _LOWER * self.height, _DPI, h_pad=0.04, w_pad=0.04)
            self.paint(figure)
            _arrange(figure)
            figure.savefig(content, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
        return content.getvalue()

    def write(self, folder: Path, *, pdf: bool = False) -> list[Path]:
        """Write NAME.png and NAME.svg, and with `pdf` NAME.pdf, into `folder`."""
        contents = {"png": self.png, "svg": self.svg.encode()} | ({"pdf": self.pdf()} if pdf else {})
        for end, content in contents.items():
            (folder / f"{self.name}.{end}").write_bytes(content)
        return [folder / f"{self.name}.{end}" for end in contents]


def draw(
    name: str,
    title: str,
    *,
    alt: str,
    caption: str,
    height: float,
    paint: Callable[[Figure], None],
    is_wide: bool = False,
) -> Picture:
    """The picture that `paint` makes of an empty figure of 4.6 x `height` inches, when it is needed."""
    return Picture(
        name=name, title=title, alt=f"{title}. {alt}", caption=caption, height=height, paint=paint, is_wide=is_wide
    )


def _figure(width: float, height: float, dpi: int, *, h_pad: float, w_pad: float) -> Figure:
    """An empty figure of `width` x `height` inches that keeps its parts apart."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout=ConstrainedLayoutEngine(h_pad=h_pad, w_pad=w_pad))
    FigureCanvasAgg(figure)
    return figure


def _arrange(figure: Figure) -> None:
    """Lay the figure out, once for all its files: an engine that stays would draw it once more before each of them."""
    figure.draw_without_rendering()
    figure.set_layout_engine(None)


def styled(shown: Mapping[str, Shown]) -> Iterable[tuple[str, Shown, dict[str, Any]]]:
    """Each name and value with a colour and a marker, as keyword arguments of `Axes.plot`."""
    for k, (name, value) in enumerate(shown.items()):
        yield name, value, {"color": PALETTE[k % len(PALETTE)], "marker": MARKERS[k % len(MARKERS)]}


def draw_line(
    axes: Axes, points: Iterable[tuple[float, float | None, tuple[float, float] | None]], label: str, **style: Any
) -> None:
    """A line of marked points, each (place, value, interval), with a thin bar over each interval.

    Points without a value are left out; `style` is as of `Axes.plot`.
    """
    known = [(at, value, interval) for at, value, interval in points if value is not None]
    axes.plot([at for at, _, _ in known], [value for _, value, _ in known], label=safe(shortened(label)), **style)
    for at, _, interval in known:
        if interval is not None:
            axes.plot([at, at], interval, color=style["color"], linewidth=1.0, alpha=0.6)


def tidy(axes: Axes, *, x: str | None = None, y: str | None = None, grid: Literal["x", "both"] = "both") -> None:
    """A light grid, no box, and labels of the axes."""
    axes.grid(visible=True, axis=grid, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2.5, labelsize=SMALL)
    axes.set(**{name: text for name, text in (("xlabel", x), ("ylabel", y)) if text is not None})


def safe(text: str) -> str:
    """The text as matplotlib shows it unchanged, dollar signs included."""
    return text.replace("$", r"\$")


def shortened(text: str, length: int = 30) -> str:
    """The text, without its middle if it is too long for an axis."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour)
    return colour if name is None else f"var({name})"


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One scatter plot: true and predicted MOS of the same items, and optionally the group of each item."""

    title: str
    true: Floats
    """(items,)"""
    predicted: Floats
    """(items,)"""
    groups: Sequence[str] | None = None
    """(items,): for example the generator of each item."""


def scatter(path: Path, panels: Sequence[Panel], *, title: str, dpi: int = 200) -> None:
    """Write scatter plots of predicted against true MOS; the suffix of `path` chooses the format (.png, .svg, .pdf).

    The panels stand side by side, three in a row, on the same equal axes. Each shows the identity line, a rising
    logistic curve through its points, n, SRCC and PLCC. Each group has the same colour and marker in all panels.
    Raises DataError for no panels, lengths that differ, values that are not finite, or fewer than three items.
    """
    if not panels:
        message = "There is nothing to draw: no predictions were given."
        raise DataError(message)
    for panel in panels:
        _check(panel)
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    groups = sorted({group for panel in panels for group in panel.groups or ()})
    limits = limits_of(*(values for panel in panels for values in (panel.true, panel.predicted)), margin=0.06)
    with mpl.rc_context({**_STYLE, "svg.fonttype": "path"}):
        height = 3.75 * rows + 0.6 + (0.5 if groups else 0.0)
        figure = _figure(3.5 * columns + 0.3, height, dpi, h_pad=0.1, w_pad=0.08)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, index + 1)
            _draw_panel(axes, panel, groups)
            axes.set(xlim=limits, ylim=limits, aspect="equal", ylabel="" if index % columns else "predicted MOS")
        figure.suptitle(title, fontsize=11, fontweight="bold", wrap=True)
        _add_legend(figure)
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


def _draw_panel(axes: Axes, panel: Panel, groups: Sequence[str]) -> None:
    axes.axline((0.0, 0.0), slope=1.0, color=MUTED, label="identity", **DASHED)
    names = np.full(len(panel.true), _UNGROUPED) if panel.groups is None else np.asarray(panel.groups)
    size = float(np.clip(2400 / len(names), 5, 22))
    shown = [_UNGROUPED] if panel.groups is None else groups
    for name, colour, marker in zip(shown, cycle(PALETTE), cycle(MARKERS), strict=False):
        here = names == name
        look: Any = {"alpha": 0.7, "linewidths": 0.3, "edgecolors": "white", "zorder": 2}
        axes.scatter(panel.true[here], panel.predicted[here], s=size, c=colour, marker=marker, label=name, **look)
    curve = Curve.fit(panel.true, panel.predicted)
    if curve is not None:
        draw_fit(axes, curve.across, curve.heights, PALETTE[-1], curve.name)
    tidy(axes, x="true MOS")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6))
    axes.set_title(panel.title, fontsize=10)
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": "none", "alpha": 0.8}
    corner: Any = {"transform": axes.transAxes, "va": "top", "linespacing": 1.4, "bbox": box, "zorder": 5}
    axes.text(0.04, 0.96, _summary(panel), fontsize=SMALL, **corner)


def limits_of(*values: Floats, margin: float) -> tuple[float, float]:
    """Limits of an axis that shows all values, with a margin in parts of their range."""
    together = np.concatenate(values)
    around = margin * float(np.ptp(together)) or 0.5
    return float(together.min()) - around, float(together.max()) + around


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A curve that was fitted to the points of a scatter plot."""

    name: str
    across: Floats
    """(places,): from the lowest to the highest true MOS."""
    heights: Floats
    """(places,): predicted MOS."""

    @classmethod
    def fit(cls, true: Floats, predicted: Floats, *, quartic: bool = False) -> "Curve | None":
        """The least-squares curve of `predicted` over `true` (items,).

        It is the 4-parameter logistic of VQEG, which always rises, or with `quartic` a polynomial of degree 4, as in
        Fig. 5 of the paper; its degree is lower where there are too few distinct true values. None where the points
        determine no such curve.
        """
        across = np.linspace(true.min(), true.max(), _PLACES)
        if quartic:
            degree = min(_DEGREE, len(np.unique(true)) - 1)
            heights = Polynomial.fit(true, predicted, degree)(across) if degree else None
            return None if heights is None else cls(name=f"fit, degree {degree}", across=across, heights=heights)
        try:
            heights = fit_logistic(true, predicted)(across)
        except DataError:
            return None
        return cls(name="logistic fit", across=across, heights=heights)


def draw_fit(axes: Axes, across: Floats, height: Floats, colour: str, label: str | None) -> None:
    """A curve with a light rim that separates it from the points."""
    axes.plot(across, height, color=PAPER, linewidth=3.4, alpha=0.8, zorder=3)
    axes.plot(across, height, color=colour, linewidth=1.8, zorder=4, label=label)


def _summary(panel: Panel) -> str:
    """n and both correlations, which are undefined where all true or all predicted values are equal."""
    lines = [f"n = {len(panel.true)}"]
    if np.ptp(panel.true) == 0 or np.ptp(panel.predicted) == 0:
        return "\n".join([*lines, "no correlation: constant"])
    srcc = float(stats.spearmanr(panel.true, panel.predicted).statistic)
    plcc = float(stats.pearsonr(panel.true, panel.predicted).statistic)
    return "\n".join([*lines, f"SRCC {srcc:.3f}", f"PLCC {plcc:.3f}"])


def _add_legend(figure: Figure) -> None:
    """One legend under all panels: lines before groups."""
    entries: dict[str, Artist] = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    entries.pop(_UNGROUPED, None)
    labels = sorted(entries, key=lambda label: (not isinstance(entries[label], Line2D), label))
    columns = min(len(labels), max(2, round(figure.get_figwidth() / _ENTRY_WIDTH)))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=SMALL)
