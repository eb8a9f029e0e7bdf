"""The items that a head scores best and worst, as in the paper's Table VIII: image, prompt, description, both MOS."""

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from agiqa.bench.report.naming import plural, protocol_name, slug
from agiqa.bench.report.predictions import Predictions
from agiqa.bench.report.reading import Results
from agiqa.bench.report.tables import Cell, Column, Table
from agiqa.errors import AgiqaError
from agiqa.store import open_store

_Known = tuple[str, str, int | None]
"""Name and prompt of an item, and its number in the store where it is known."""

SHOWN = 6
"""Items of each kind."""
_SIDE = 240
_QUALITY = 80
_PIXELS = 200_000_000
"""An image with more is not opened."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """One item and what was said of it."""

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

    name: str
    title: str
    worst: tuple[Example, ...]
    """The largest errors first."""
    best: tuple[Example, ...]
    """The smallest errors first."""
    notes: tuple[str, ...]
    problem: str | None = None
    """What is not shown that was asked for."""

    def table(self) -> Table:
        """The same as a table."""
        columns = [
            Column(key="kind", title="", kind="text"),
            Column(key="name", title="Image", kind="text"),
            Column(key="prompt", title="Prompt", kind="text"),
            Column(key="description", title="Description", kind="text"),
            Column(key="true", title="True MOS"),
            Column(key="predicted", title="Predicted MOS"),
            Column(key="error", title="Error", kind="difference"),
        ]
        body = [
            [
                Cell(value=value)
                for value in (kind, one.name, one.prompt, one.description, one.true, one.predicted, one.error)
            ]
            for kind, items in (("worst", self.worst), ("best", self.best))
            for one in items
        ]
        return Table(name=self.name, title=self.title, columns=columns, rows=body, notes=self.notes)


def examples_of(results: Results, found: Predictions, head: str, *, images: Path | None) -> Examples:
    """The best and worst items of a head, called `head`, each once; ties in the order of the file."""
    row = found.row
    order = np.argsort(np.abs(found.error), kind="stable")
    count = min(SHOWN, len(order) // 2)
    descriptions, why = _descriptions(results, row.store_name)
    thumbnails = (
        {k: _thumbnail(images, found.names[k]) for k in (*order[:count], *order[::-1][:count])} if images else {}
    )

    def example(k: int) -> Example:
        key = found.names[k], found.prompts[k], found.items[k]
        true, predicted = float(found.true[k]), float(found.predicted[k])
        return Example(
            name=key[0],
            prompt=key[1],
            description=descriptions.get(key),
            true=true,
            predicted=predicted,
            image=thumbnails.get(k),
        )

    absent = sum(image is None for image in thumbnails.values())
    notes = [f"Items of the test part by the error of {head}, a mean over {plural(found.runs, 'run')}."]
    notes += ["Images are not shown: give their folder with --images FOLDER."] if images is None else []
    problem = f"{absent:,} of {plural(len(thumbnails), 'image')} could not be read in {images}." if absent else None
    notes += [problem] if problem else []
    notes += [why] if why else []
    return Examples(
        name=slug(results.prefix, "items", row.label, row.protocol),
        title=results.titled(f"best and worst items, {row.label}, {protocol_name(row.protocol)}"),
        worst=tuple(example(k) for k in order[::-1][:count]),
        best=tuple(example(k) for k in order[:count]),
        notes=tuple(notes),
        problem=problem,
    )


def _descriptions(results: Results, store: str) -> tuple[Mapping[_Known, str | None], str | None]:
    """The descriptions of the store's items by name and prompt, with and without their number, or none and why."""
    path = results.store(store).path
    if path is None or not Path(path).is_dir():
        where = f"is not at {path}" if path else "has no path in about.json"
        return {}, f"Descriptions are not shown: the store {where}."
    try:
        items = open_store(Path(path)).items
    except (AgiqaError, OSError) as error:
        return {}, f"Descriptions are not shown: {error}"
    described: dict[_Known, str | None] = {}
    for number, (name, prompt, text) in enumerate(zip(items.names, items.prompts, items.descriptions, strict=True)):
        described[name, prompt, number] = described[name, prompt, None] = text
    return described, None if any(described.values()) else "The store holds no descriptions."


def _thumbnail(folder: Path, name: str) -> str | None:
    """The image `name` below `folder`, made small, as a data URI; None where it is not there or no image."""
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
