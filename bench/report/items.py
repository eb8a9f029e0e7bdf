"""A head's predictions item by item: the scatter plot of the paper's Fig. 5, best and worst items as in Table VIII."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageOps, UnidentifiedImageError

from agiqa.bench.recording.predictions import Predictions as RunPredictions
from agiqa.bench.recording.predictions import read_predictions
from agiqa.bench.recording.records import Row
from agiqa.bench.recording.result_folders import RUNS
from agiqa.bench.report.naming import METRIC_NAMES, plural, protocol_name
from agiqa.bench.report.pictures import (
    DASHED,
    INK,
    MUTED,
    PALETTE,
    SMALL,
    Curve,
    Floats,
    Picture,
    draw,
    draw_fit,
    limits_of,
    safe,
    tidy,
)
from agiqa.bench.report.reading import METRICS, Results
from agiqa.bench.report.tables import Column, Table, make_table
from agiqa.errors import AgiqaError, DataError
from agiqa.heads.evaluation.runs import PREDICTIONS
from agiqa.store import open_store

Key = tuple[str, str, int | None]
"""Name and prompt of an item, and its number in the store if it is known."""
SHOWN = 6
"""Items of each kind."""
_FEWEST = 3
_VECTORS = 400
"""More points than this are pixels in an SVG, which keeps the page small."""
_SIDE = 240
_QUALITY = 80
_PIXELS = 200_000_000
"""Larger images are not opened."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """True and predicted MOS of the test items of a row."""

    row: Row
    keys: list[Key]
    true: Floats
    """(items,)"""
    predicted: Floats
    """(items,): means over the runs that predicted the item."""
    runs: int
    missing: tuple[str, ...]
    """Runs whose predictions could not be read, and why."""

    @property
    def error(self) -> Floats:
        """Predicted minus true (items,)."""
        return self.predicted - self.true


def predictions_of(results: Results, row: Row) -> Predictions | None:
    """The predictions of a head's row, of all folds together; None where no run has any.

    Two items of a store may share name and prompt. Their numbers keep them apart if all runs recorded these.
    """
    tables: list[RunPredictions] = []
    missing: list[str] = []
    for line in results.runs_of(row):
        if row.label not in line.labels:
            continue
        try:
            tables.append(read_predictions(results.run_folder(line) / PREDICTIONS, line.labels, row.label))
        except DataError as error:
            cause = error.__cause__
            reason = "missing" if isinstance(cause, FileNotFoundError) else f"not readable ({cause!r})"
            where = f"{RUNS}/{line.name}" if line.path is None else line.name
            missing.append(f"{where}/{PREDICTIONS} is {reason}")
    numbered = all(table.items is not None for table in tables)
    found: dict[Key, tuple[float, list[float]]] = {}
    for table in tables:
        numbers: Sequence[int | None] = (table.items if numbered else None) or [None] * len(table.names)
        keys = zip(table.names, table.prompts, numbers, strict=True)
        for key, true, predicted in zip(keys, table.mos.tolist(), table.predicted.tolist(), strict=True):
            found.setdefault(key, (true, []))[1].append(predicted)
    if not found:
        return None
    true, predicted = np.array([(true, np.mean(values)) for true, values in found.values()]).T
    return Predictions(row=row, keys=[*found], true=true, predicted=predicted, runs=len(tables), missing=tuple(missing))


def scatter_chart(results: Results, found: Predictions, title: str, *, quartic: bool = False) -> Picture | None:
    """Predicted against true MOS with a fitted `Curve`, residuals below; None for fewer than three items."""
    if len(found.true) < _FEWEST:
        return None
    row, true = found.row, found.true
    scores = [f"{METRIC_NAMES[name]} {value:.3f}" for name in METRICS if (value := row.value(name)) is not None]
    limits = limits_of(true, found.predicted, margin=0.04)
    size, pixels = float(np.clip(2400 / len(true), 3, 22)), len(true) > _VECTORS
    curve = Curve.fit(true, found.predicted, quartic=quartic)

    def paint(figure: Figure) -> None:
        upper, lower = figure.subplots(2, 1, height_ratios=[3, 1.15], sharex=True)
        upper.plot(limits, limits, color=MUTED, label="identity", **DASHED)
        lower.axhline(0.0, color=MUTED, **DASHED)
        upper.set(xlim=limits, ylim=limits)
        for axes, values in ((upper, found.predicted), (lower, found.error)):
            axes.scatter(true, values, s=size, c=PALETTE[0], alpha=0.45, linewidths=0, zorder=2, rasterized=pixels)
            axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        tidy(upper, y="predicted MOS")
        tidy(lower, x="true MOS", y="predicted \N{MINUS SIGN} true")
        if curve is not None:
            draw_fit(upper, curve.across, curve.heights, PALETTE[1], curve.name)
            draw_fit(lower, curve.across, curve.heights - curve.across, PALETTE[1], None)
        corner: Any = {"transform": upper.transAxes, "va": "top", "linespacing": 1.5, "zorder": 5}
        text = safe("\n".join([f"n = {len(true):,}", *scores]))
        upper.text(0.03, 0.97, text, fontsize=SMALL, color=INK, **corner)
        figure.legend(loc="outside upper right", ncols=2, fontsize=SMALL)

    missing = f" Predictions of {plural(len(found.missing), 'run')} are missing." if found.missing else ""
    return draw(
        results.anchor("scatter", row.label, row.protocol, row.store_name),
        results.heading(f"predicted against true MOS, {row.label}, {protocol_name(row.protocol)}"),
        alt=_describe_scatter(found, title, scores, curve),
        caption=f"{title}: {plural(len(true), 'test item')}; each prediction is the mean over "
        f"{plural(found.runs, 'run')}. SRCC and PLCC are those of the table (means over seeds). Below: the error of "
        f"the head; a falling line is regression to the mean.{missing}",
        height=5.4,
        paint=paint,
    )


def _describe_scatter(found: Predictions, title: str, scores: Sequence[str], curve: Curve | None) -> str:
    low, high = found.true <= np.quantile(found.true, 0.2), found.true >= np.quantile(found.true, 0.8)
    ends = " and ".join(
        f"{found.error[part].mean():+.2f} for the {name} fifth" for part, name in ((low, "worst"), (high, "best"))
    )
    return (
        f"Scatter of predicted against true MOS of {plural(len(found.true), 'item')} by {title} "
        f"({', '.join(scores) or 'no correlation'}), with the identity{f' and a {curve.name}' if curve else ''}; below "
        f"it the residuals, on average {ends} of the images."
    )


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item with its description and scores."""

    name: str
    prompt: str
    description: str | None
    true: float
    predicted: float
    image: str | None
    """A thumbnail as a data URI."""

    @property
    def error(self) -> float:
        """Predicted minus true."""
        return self.predicted - self.true


@dataclass(frozen=True, kw_only=True)
class Examples:
    """The items of one head."""

    worst: tuple[Example, ...]
    """The largest errors first."""
    best: tuple[Example, ...]
    """The smallest errors first."""
    table: Table
    """The same items as a table."""
    problem: str | None = None
    """The requested images that could not be read."""


def examples_of(results: Results, found: Predictions, head: str, *, images: Path | None) -> Examples:
    """The best and worst items of a head with the title `head`, each once; equal errors in the order of the file."""
    row = found.row
    order = [int(k) for k in np.argsort(np.abs(found.error), kind="stable")]
    count = min(SHOWN, len(order) // 2)
    descriptions, why = _descriptions(results, row.store_name)

    def example(k: int) -> Example:
        name, prompt, _ = key = found.keys[k]
        return Example(
            name=name,
            prompt=prompt,
            description=descriptions.get(key),
            true=float(found.true[k]),
            predicted=float(found.predicted[k]),
            image=None if images is None else _thumbnail(images, name),
        )

    worst, best = ([example(k) for k in part[:count]] for part in (order[::-1], order))
    absent = sum(one.image is None for one in (*worst, *best))
    notes = [f"Test items by the error of {head}, averaged over {plural(found.runs, 'run')}."]
    problem = None
    if images is None:
        notes.append("Images are not shown: give their folder with --images FOLDER.")
    elif absent:
        problem = f"{absent:,} of {plural(2 * count, 'image')} could not be read in {images}."
        notes.append(problem)
    notes += [why] if why else []
    title = f"best and worst items, {row.label}, {protocol_name(row.protocol)}"
    items = [("worst", one) for one in worst] + [("best", one) for one in best]
    table = make_table(results, ["items", row.label, row.protocol], title, _example_columns(), items, notes)
    return Examples(worst=tuple(worst), best=tuple(best), table=table, problem=problem)


def _example_columns() -> list[Column[tuple[str, Example]]]:
    return [
        Column("kind", "", lambda item: item[0], "text"),
        Column("name", "Image", lambda item: item[1].name, "text"),
        Column("prompt", "Prompt", lambda item: item[1].prompt, "text"),
        Column("description", "Description", lambda item: item[1].description, "text"),
        Column("true", "True MOS", lambda item: item[1].true),
        Column("predicted", "Predicted MOS", lambda item: item[1].predicted),
        Column("error", "Error", lambda item: item[1].error, "difference"),
    ]


def _descriptions(results: Results, store: str) -> tuple[Mapping[Key, str | None], str | None]:
    """The descriptions of the store's items, under keys with and without their number; or none, and the reason."""
    path = results.store(store).path
    if path is None or not Path(path).is_dir():
        where = f"is not at {path}" if path else "has no path in about.json"
        return {}, f"Descriptions are not shown: the store {where}."
    try:
        items = open_store(Path(path)).items
    except (AgiqaError, OSError) as error:
        return {}, f"Descriptions are not shown: {error}"
    described: dict[Key, str | None] = {}
    for number, (name, prompt, text) in enumerate(zip(items.names, items.prompts, items.descriptions, strict=True)):
        described[name, prompt, number] = described[name, prompt, None] = text
    return described, None if any(described.values()) else "The store holds no descriptions."


def _thumbnail(folder: Path, name: str) -> str | None:
    """The image `name` below `folder`, reduced, as a data URI; None if it is missing or no image."""
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        return None
    try:
        with Image.open(path) as image:
            if image.width * image.height > _PIXELS:
                return None
            small = ImageOps.exif_transpose(image)
            small.thumbnail((_SIDE, _SIDE))
            content = io.BytesIO()
            small.convert("RGB").save(content, format="JPEG", quality=_QUALITY, optimize=True)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
