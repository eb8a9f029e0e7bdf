"""A small canvas in unit coordinates (x to the right, y down, both 0..1), drawn at twice the final size."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from agiqa.bench.demo.prompts import Colour

SIDE = 192
"""Side of a finished picture in pixels."""
_FINE = 2 * SIDE


def mix(first: Colour, second: Colour, share: float) -> Colour:
    """The colour `share` (0..1) of the way from `first` to `second`."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return red, green, blue


def clouds(rng: np.random.Generator, side: int, *, coarsest: int = 4, octaves: int = 5) -> NDArray[np.float32]:
    """Cloud-like noise (side, side) in [0, 1]: octaves of random grids, each finer and half as strong."""
    total = np.zeros((side, side), np.float32)
    for octave in range(octaves):
        cells = min(side, coarsest * 2**octave)
        grid = Image.fromarray(rng.random((cells, cells), np.float32))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) * 0.5**octave
    low, high = float(total.min()), float(total.max())
    return ((total - low) / (high - low)).astype(np.float32)


class Canvas:
    """Shapes and light on an RGB picture; later shapes cover earlier ones."""

    def __init__(self) -> None:
        """A black canvas."""
        self._image = Image.new("RGB", (_FINE, _FINE))
        self._draw = ImageDraw.Draw(self._image)

    def picture(self) -> NDArray[np.uint8]:
        """The finished picture (SIDE, SIDE, 3), smoothed by averaging 2 x 2 pixels."""
        return np.asarray(self._image.reduce(2))

    def gradient(self, top: Colour, bottom: Colour, start: float = 0.0, end: float = 1.0) -> None:
        """A vertical gradient over the whole width, from y = start to y = end."""
        first, last = round(start * _FINE), round(end * _FINE)
        for row in range(first, last):
            share = (row - first) / (last - first)
            self._draw.line([(0, row), (_FINE, row)], fill=mix(top, bottom, share))

    def polygon(self, points: Sequence[tuple[float, float]], colour: Colour) -> None:
        """A filled polygon."""
        self._draw.polygon([(x * _FINE, y * _FINE) for x, y in points], fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A filled rectangle."""
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour)

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float) -> None:
        """A line through the points, `width` in units of the canvas."""
        self._draw.line([(x * _FINE, y * _FINE) for x, y in points], fill=colour, width=max(1, round(width * _FINE)))

    def arc(self, x: float, y: float, across: float, down: float, colour: Colour, width: float) -> None:
        """The lower half of an ellipse's outline around (x, y)."""
        bounds = [(x - across) * _FINE, (y - down) * _FINE, (x + across) * _FINE, (y + down) * _FINE]
        self._draw.arc(bounds, 10, 170, fill=colour, width=max(1, round(width * _FINE)))

    def ellipse(self, x: float, y: float, across: float, down: float, colour: Colour) -> None:
        """A filled ellipse around (x, y) with half axes `across` and `down`."""
        bounds = [(x - across) * _FINE, (y - down) * _FINE, (x + across) * _FINE, (y + down) * _FINE]
        self._draw.ellipse(bounds, fill=colour)

    def ball(self, x: float, y: float, across: float, down: float, colour: Colour) -> None:
        """An ellipse that looks round, lit from the upper left."""
        dark, bright = mix(colour, (0, 0, 0), 0.5), mix(colour, (255, 255, 255), 0.55)
        for step in range(16):
            share = step / 15
            inner = 1 - 0.9 * share
            tone = mix(dark, colour, share * 1.6) if share < 0.62 else mix(colour, bright, (share - 0.62) * 2.6)
            self.ellipse(x - 0.32 * share * across, y - 0.32 * share * down, across * inner, down * inner, tone)

    def glow(self, x: float, y: float, radius: float, colour: Colour, strength: float) -> None:
        """Light around (x, y) that fades like a bell curve; `strength` 0..1 at its centre."""
        grid = (np.arange(_FINE, dtype=np.float32) + 0.5) / _FINE
        distance = (grid[None, :] - x) ** 2 + (grid[:, None] - y) ** 2
        self.blend(strength * np.exp(-distance / (2 * radius**2)), colour)

    def blend(self, share: NDArray[np.floating], colour: Colour) -> None:
        """Mix `colour` in, by its share of every pixel: (2 SIDE, 2 SIDE) in [0, 1]."""
        mask = Image.fromarray((np.clip(share, 0, 1) * 255).astype(np.uint8))
        self._image.paste(colour, (0, 0), mask)

    def haze(self, rng: np.random.Generator, colour: Colour, strength: float, end: float = 1.0) -> None:
        """Clouds of `colour` from the top down to y = end, thinning out downwards."""
        height = np.clip(1 - np.arange(_FINE, dtype=np.float32) / (_FINE * end), 0, 1)[:, None]
        wisps = np.clip(clouds(rng, _FINE, coarsest=3) * 2.4 - 1.0, 0, 1)
        self.blend(strength * wisps * np.sqrt(height), colour)

    def grain(self, rng: np.random.Generator, strength: float, start: float = 0.0, end: float = 1.0) -> None:
        """The texture of a surface between y = start and y = end: darker and lighter spots of all sizes."""
        rows = (np.arange(_FINE) >= start * _FINE) & (np.arange(_FINE) < end * _FINE)
        spots = (clouds(rng, _FINE, coarsest=20, octaves=4) - 0.5) * rows[:, None]
        self.blend(strength * np.clip(2 * spots, 0, 1), (255, 250, 235))
        self.blend(strength * np.clip(-2 * spots, 0, 1), (10, 8, 20))
