"""What is known of a data set before a model runs: counts, splits, leaks, duplicates, MOS, image sizes."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from agiqa.extract.data.items import DataSet, Item
from agiqa.extract.filling.footprints import RATE_SOURCE, Footprint, ModelShape, RowsOfItems
from agiqa.extract.filling.token_estimates import TokenCounts
from agiqa.heads.data.prompt_groups import KnownPrompts, normalise_prompt
from agiqa.store.format.labels import SPLITS, MosRange

ASPECTS = ("quality", "correspondence", "authenticity")
BINS = 10
"""Of the histogram of MOS."""
_EXAMPLES = 5
_SIZES = 8


def summary_of(data_set: DataSet) -> dict[str, Any]:
    """The summary of a data set whose images were checked, JSON-able."""
    items = data_set.items
    aspects = [aspect for aspect in ASPECTS if any(aspect in item.labels for item in items)]
    return {
        "name": data_set.name,
        "table": None if data_set.table is None else str(data_set.table),
        "items": len(items),
        "prompts": len({normalise_prompt(item.prompt) for item in items}),
        "splits": _counts([item.split or "none" for item in items], order=(*SPLITS, "none")),
        "generators": _counts([item.generator or "none" for item in items]),
        "described": sum(item.description is not None for item in items),
        "mos_range": None if data_set.mos_range is None else list(data_set.mos_range),
        "mos": {aspect: _mos(items, aspect, data_set.mos_range) for aspect in aspects},
        "unlabelled": sum(not item.labels for item in items),
        "leaks": _leaks(items),
        "duplicates": _duplicates(items),
        "images": _images(items),
        "problems": list(data_set.skipped),
        "notes": list(data_set.notes),
        "warnings": list(data_set.warnings),
    }


def tokens_summary(counts: TokenCounts) -> dict[str, Any]:
    """Tokens and slices per item, JSON-able."""
    about = {
        "exact": counts.is_exact,
        "total": int(counts.tokens.sum()),
        "per_item": _spread(counts.tokens),
        "image_per_item": _spread(counts.image_tokens),
        "slices_per_item": None if counts.slices is None else _spread(counts.slices),
    }
    return {**about, "truncated": counts.truncated, "skipped": list(counts.skipped)}


def costs_summary(shape: ModelShape, found: Sequence[Footprint], content: RowsOfItems) -> dict[str, Any]:
    """Disk and GPU hours by encoding, for stores of `content`, JSON-able."""
    encodings = {one.encoding: one.as_dict() for one in found}
    rate = RATE_SOURCE if shape.is_measured else None
    about = {"model": shape.name, "width": shape.width, "vocabulary": shape.vocabulary, "rate": rate}
    return {**about, **content.as_dict(), **encodings}


def _counts(values: Sequence[str], order: Sequence[str] = ()) -> dict[str, int]:
    found = Counter(values)
    first = [value for value in order if value in found]
    return {value: found[value] for value in (*first, *sorted(found.keys() - set(first)))}


def _mos(items: Sequence[Item], aspect: str, scale: MosRange | None) -> dict[str, Any]:
    """Count, moments and histogram over the scale of one aspect's MOS, and how many items have none."""
    values = np.array([item.labels[aspect] for item in items if aspect in item.labels])
    low, high = scale or (float(values.min()), float(values.max()) + 1e-9)
    counts, edges = np.histogram(values, bins=BINS, range=(low, high))
    missing = _counts([item.split or "none" for item in items if aspect not in item.labels])
    return {
        "count": len(values),
        "missing": len(items) - len(values),
        "missing_by_split": missing,
        "mean": float(values.mean()),
        "std": float(values.std()),
        "lowest": float(values.min()),
        "highest": float(values.max()),
        "edges": [float(edge) for edge in edges],
        "histogram": [int(count) for count in counts],
    }


def _leaks(items: Sequence[Item]) -> dict[str, Any]:
    """By pair of parts, how many items of the first have a prompt or an image that the second has, too."""
    parts = {part: [item for item in items if item.split == part] for part in SPLITS}
    found: dict[str, Any] = {}
    for part, other in (("test", "train"), ("test", "val"), ("val", "train")):
        here, there = parts[part], parts[other]
        if not here or not there:
            continue
        prompts = KnownPrompts(item.prompt for item in there).count(item.prompt for item in here)
        images = {item.image_sha256 for item in there} - {None}
        found[f"{part} in {other}"] = {
            "of": len(here),
            "prompts": prompts.same,
            "verbatim": prompts.verbatim,
            "images": sum(item.image_sha256 in images for item in here),
        }
    return found


def _duplicates(items: Sequence[Item]) -> dict[str, Any]:
    """How many image files have the same content as an earlier one, with the first names of the first groups."""
    names: dict[str, list[str]] = defaultdict(list)
    for item in items:
        if item.image_sha256 is not None:
            names[item.image_sha256].append(item.name)
    groups = [group for group in names.values() if len(group) > 1]
    examples = [group[:_EXAMPLES] for group in groups[:_EXAMPLES]]
    return {"images": sum(len(group) - 1 for group in groups), "examples": examples}


def _images(items: Sequence[Item]) -> dict[str, Any]:
    """The sizes of the images, in pixels."""
    sizes = [item.image_size for item in items if item.image_size is not None]
    if not sizes:
        return {"count": 0, "sizes": {}}
    common = Counter(sizes).most_common(_SIZES)
    shown = {f"{width}x{height}": count for (width, height), count in common}
    pixels = np.array([width * height for width, height in sizes])
    smallest, largest = (sizes[int(place)] for place in (pixels.argmin(), pixels.argmax()))
    return {
        "count": len(sizes),
        "sizes": shown,
        "other_sizes": len(sizes) - sum(shown.values()),
        "smallest": list(smallest),
        "largest": list(largest),
    }


def _spread(values: Any) -> dict[str, float]:
    if not len(values):
        return {"mean": 0.0, "median": 0.0, "most": 0}
    return {"mean": float(values.mean()), "median": float(np.median(values)), "most": int(values.max())}
