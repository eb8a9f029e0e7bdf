"""Figures of a report: drawn by matplotlib once, as PNG, as SVG, and as SVG that takes the colours of the page."""

import io
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from agiqa.bench.report.pictures import MARKERS, PALETTE

INK, MUTED, GRID, PAPER = "#24292f", "#6b7280", "#e3e6ea", "#ffffff"
COLOURS = PALETTE
SHAPES = MARKERS
WIDTH = 4.6
"""Inches: narrow enough to be read on a phone without being made much smaller."""
SMALL, NORMAL = 8.0, 9.0
_DPI = 200
_VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--card",
    **{colour.lower(): f"--s{k}" for k, colour in enumerate(PALETTE)},
}
_STYLE: Any = {
    "svg.fonttype": "none",
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
    "figure.facecolor": PAPER,
    "legend.labelcolor": INK,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure that was drawn."""

    name: str
    """Of its files and its anchor."""
    title: str
    alt: str
    """What it shows, for who cannot see it."""
    caption: str
    svg: str
    png: bytes
    is_wide: bool = False
    """Whether it stands alone in its line of the page."""

    @property
    def inline(self) -> str:
        """The SVG element alone, with the page's colours, and names that occur in no other picture."""
        start = self.svg.index("<svg")
        text = re.sub(r"<metadata>.*?</metadata>", "", self.svg[start:], flags=re.DOTALL)
        text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", text)
        text = re.sub(r"#[0-9a-f]{6}\b", lambda found: _variable(found.group()), text)
        text = re.sub(r"font: ([0-9.]+)px[^;\"]*", r"font-size: \1px", text)
        return re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)

    def write(self, folder: Path) -> list[Path]:
        """NAME.png and NAME.svg in `folder`."""
        paths = [folder / f"{self.name}.{end}" for end in ("png", "svg")]
        paths[0].write_bytes(self.png)
        paths[1].write_text(self.svg, encoding="utf-8")
        return paths


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
    """The picture that `paint` makes of an empty figure of 4.6 x `height` inches."""
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), dpi=_DPI, layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06))
        FigureCanvasAgg(figure)
        paint(figure)
        figure.draw_without_rendering()  # one layout serves both files
        figure.set_layout_engine("none")
        png, svg = io.BytesIO(), io.StringIO()
        figure.savefig(png, format="png")
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Title": safe(title)})
    return Picture(
        name=name,
        title=title,
        alt=f"{title}. {alt}",
        caption=caption,
        svg=svg.getvalue(),
        png=png.getvalue(),
        is_wide=is_wide,
    )


def whiskered_line(
    axes: Axes,
    points: Iterable[tuple[float, float | None, tuple[float, float] | None]],
    *,
    colour: str,
    marker: str,
    label: str,
    size: float,
    width: float,
) -> None:
    """A line of marked points, each (place, value, interval), with a thin bar over its interval.

    Points without a value are left out; `size` of the markers and `width` of the line are in points of a print.
    """
    known = [(at, value, interval) for at, value, interval in points if value is not None]
    places, values = [at for at, _, _ in known], [value for _, value, _ in known]
    axes.plot(places, values, color=colour, marker=marker, markersize=size, linewidth=width, label=label)
    for at, _, interval in known:
        if interval is not None:
            axes.plot([at, at], interval, color=colour, linewidth=1.0, alpha=0.6)


def tidy(axes: Axes, *, grid: str = "both") -> None:
    """Light grid, no box."""
    axes.grid(visible=True, axis="x" if grid == "x" else "y" if grid == "y" else "both", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=2.5, labelsize=SMALL)


def safe(text: str) -> str:
    """The text as matplotlib writes it letter by letter, dollar signs and all."""
    return text.replace("$", r"\$")


def shortened(text: str, length: int = 30) -> str:
    """The text, its middle left out where it is too long for an axis."""
    if len(text) <= length:
        return text
    half = (length - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def styles(names: Mapping[str, object] | list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each name."""
    return {name: (COLOURS[k % len(COLOURS)], SHAPES[k % len(SHAPES)]) for k, name in enumerate(names)}


def _variable(colour: str) -> str:
    name = _VARIABLES.get(colour)
    return colour if name is None else f"var({name})"
