"""Adaptive slicing: an image becomes an overview and, if it is large, slices of about the model's own resolution.

Source of the rule: LLaVA-UHD (arXiv 2403.11703) as MiniCPM-V 2.5 applies it, with its rounding.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Size = tuple[int, int]
"""(width, height) in pixels, or (columns, rows)."""


@dataclass(frozen=True, kw_only=True)
class Slicing:
    """How one image is cut."""

    overview: Size
    """The whole image is scaled to this."""
    grid: Size | None = None
    """Columns and rows of slices; None for the overview alone."""
    scaled: Size | None = None
    """The image is scaled to this before it is cut into the grid."""


def slicing_of(size: Size, *, most: int, resolution: int, patch: int) -> Slicing:
    """The slicing of an image of `size` into at most `most` slices of about `resolution` squared pixels."""
    width, height = size
    wanted = min(math.ceil(width * height / resolution**2), most)
    if wanted <= 1:
        return Slicing(overview=_scaled(size, resolution, patch, enlarge=True))
    overview = _scaled(size, resolution, patch, enlarge=False)
    columns, rows = _grid(size, wanted, most)
    slice_width, slice_height = _scaled(
        (_multiple(width, columns) / columns, _multiple(height, rows) / rows), resolution, patch, enlarge=True
    )
    return Slicing(overview=overview, grid=(columns, rows), scaled=(slice_width * columns, slice_height * rows))


def cut(image: Image.Image, slicing: Slicing) -> Iterator[Image.Image]:
    """The overview, then the slices row by row."""
    yield image.resize(slicing.overview, resample=Image.Resampling.BICUBIC)
    if slicing.grid is None or slicing.scaled is None:
        return
    (columns, rows), (width, height) = slicing.grid, slicing.scaled
    scaled = image.resize(slicing.scaled, resample=Image.Resampling.BICUBIC)
    across, down = width // columns, height // rows
    for row in range(rows):
        for column in range(columns):
            left, top = column * across, row * down
            yield scaled.crop((left, top, left + across, top + down))


def patches_of(image: Image.Image, patch: int) -> tuple[NDArray[np.uint8], Size]:
    """The patches of an RGB image row by row, (rows * columns, 3 * patch * patch), and (rows, columns)."""
    pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    parts = pixels.reshape(rows, patch, columns, patch, 3).transpose(0, 2, 4, 1, 3)
    return np.ascontiguousarray(parts).reshape(rows * columns, -1), (rows, columns)


def _grid(size: Size, wanted: int, most: int) -> Size:
    """Columns and rows, of `wanted` slices or one more or less, whose ratio is nearest to that of the image."""
    counts = [count for count in (wanted - 1, wanted, wanted + 1) if 1 < count <= most]
    grids = [(columns, count // columns) for count in counts for columns in range(1, count + 1) if count % columns == 0]
    ratio = math.log(size[0] / size[1])
    return min(grids, key=lambda grid: abs(ratio - math.log(grid[0] / grid[1])))


def _scaled(size: tuple[float, float], resolution: int, patch: int, *, enlarge: bool) -> Size:
    """`size` in whole patches; scaled to about `resolution` squared pixels if it has more, or with `enlarge` always."""
    width, height = size
    if enlarge or width * height > resolution**2:
        ratio = width / height
        height = int(resolution / math.sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)


def _multiple(length: float, of: int) -> int:
    """The multiple of `of` nearest to `length`, at least one."""
    return max(round(length / of) * of, of)
