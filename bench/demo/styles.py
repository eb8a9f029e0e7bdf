"""The styles that the demo paints in: each turns a clean picture into one of that style."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from agiqa.bench.demo.canvas import SIDE, clouds

Pixels = NDArray[np.uint8]
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


def in_style(picture: Pixels, style: str, rng: np.random.Generator) -> Pixels:
    """`picture` (SIDE, SIDE, 3) in the style called `style`, a key of `STYLISTS`."""
    return STYLISTS[style](picture, rng)


def _pixels(values: NDArray[np.floating]) -> Pixels:
    """Values on the scale 0..255, rounded and clipped."""
    rounded: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _photo(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Fine surface texture, darker corners and stronger contrast, as a lens sees the scene."""
    values = picture.astype(np.float32) / 255
    texture = clouds(rng, SIDE, coarsest=32, octaves=3)[..., None] - 0.5
    across = np.linspace(-1, 1, SIDE, dtype=np.float32) ** 2
    corners = 1 - 0.18 * (across[None, :] + across[:, None])[..., None]
    lit = values * (1 + 0.22 * texture) * corners
    return _pixels(255 * (0.35 * lit + 0.65 * lit * lit * (3 - 2 * lit)))


def _oil(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Brush strokes that follow the edges, large ones first, each of one colour of the picture."""
    grey = ndimage.gaussian_filter(picture @ _GREY, 2)
    angles = np.arctan2(ndimage.sobel(grey, axis=0), ndimage.sobel(grey, axis=1)) + np.pi / 2
    painting = Image.fromarray(picture)
    draw = ImageDraw.Draw(painting)
    for count, length, width in ((900, 9, 7), (2000, 6, 3)):
        spots = rng.integers(0, SIDE, (count, 2))
        shades = rng.normal(1, 0.07, count)
        for (row, column), shade in zip(spots.tolist(), shades.tolist(), strict=True):
            red, green, blue = np.clip(picture[row, column] * shade, 0, 255).astype(int).tolist()
            angle = float(angles[row, column])
            reach, rise = length * np.cos(angle), length * np.sin(angle)
            ends = (column - reach, row - rise, column + reach, row + rise)
            draw.line(ends, fill=(red, green, blue), width=width)
    return np.asarray(painting)


def _flat(picture: Pixels, _rng: np.random.Generator) -> Pixels:
    """Even areas of fourteen colours with crisp edges."""
    smooth = ndimage.median_filter(picture, size=(3, 3, 1))
    image = Image.fromarray(smooth).quantize(14, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return np.asarray(image.convert("RGB"))


def _pencil(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Outlines and hatching on white paper, with a pale tint of the colours."""
    values = picture.astype(np.float32) / 255
    grey = values @ _GREY
    outline = np.clip(7 * np.hypot(ndimage.sobel(grey, axis=0), ndimage.sobel(grey, axis=1)) / 8, 0, 1)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    slant = np.sin((rows + columns) * 1.35 + 2.2 * clouds(rng, SIDE, coarsest=6, octaves=2))
    hatching = np.clip(1 - grey, 0, 1) * (0.22 + 0.26 * slant)
    tint = 1 - 0.8 * (1 - values)
    paper = tint * (1 - 0.75 * np.clip(outline + hatching, 0, 1))[..., None]
    return _pixels(255 * paper + rng.normal(0, 2.5, (SIDE, SIDE, 1)))


def _watercolour(picture: Pixels, rng: np.random.Generator) -> Pixels:
    """Pale washes that pool at their edges, over the relief of the paper."""
    wash = ndimage.median_filter(picture, size=(5, 5, 1)).astype(np.float32)
    edges = np.abs(wash - ndimage.gaussian_filter(wash, (2.5, 2.5, 0))).mean(axis=2, keepdims=True)
    pools = clouds(rng, SIDE, coarsest=5, octaves=4)[..., None]
    relief = ndimage.gaussian_filter(rng.normal(0, 1, (SIDE, SIDE, 1)), (0.7, 0.7, 0))
    pale = 255 - (255 - wash) * (0.55 + 0.45 * pools)
    return _pixels(pale - 1.1 * edges + 9 * relief)


def _pixel(picture: Pixels, _rng: np.random.Generator) -> Pixels:
    """Squares of 6 x 6 pixels in twenty colours."""
    small = Image.fromarray(picture).reduce(6)
    few = small.quantize(20, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).convert("RGB")
    return np.asarray(few.resize((SIDE, SIDE), Image.Resampling.NEAREST))


STYLISTS: Mapping[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "photo": _photo,
    "oil": _oil,
    "flat": _flat,
    "pencil": _pencil,
    "watercolour": _watercolour,
    "pixel": _pixel,
}
"""A stylist per style of `agiqa.bench.demo.prompts.STYLES`."""
