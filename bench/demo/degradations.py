"""What can go wrong with a picture of the demo, each fault with a severity from 0 (nothing) to 1 (ruined)."""

import io
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

Pixels = NDArray[np.uint8]


def degrade(picture: Pixels, severities: Mapping[str, float], rng: np.random.Generator) -> Pixels:
    """`picture` (side, side, 3) with the faults in `severities`, applied in the order of `DEGRADATIONS`."""
    for name, degradation in DEGRADATIONS.items():
        severity = severities.get(name, 0.0)
        if severity > 0:
            picture = degradation(picture, severity, rng)
    return picture


def _pixels(values: NDArray[np.floating]) -> Pixels:
    rounded: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _warp(picture: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """Smooth random displacement, at severity 1 with a standard deviation of 7 pixels."""
    side = picture.shape[0]
    moves = ndimage.gaussian_filter(rng.normal(size=(2, side, side)), (0, side / 16, side / 16))
    moves *= 7 * severity / moves.std()
    places = np.mgrid[:side, :side] + moves
    channels = [
        ndimage.map_coordinates(picture[..., channel].astype(np.float32), places, order=1, mode="reflect")
        for channel in range(3)
    ]
    return _pixels(np.stack(channels, axis=-1))


def _artefact(picture: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """Patches copied to where they do not belong, and the checkerboard of a bad upsampling layer."""
    side = picture.shape[0]
    spoiled = picture.astype(np.float32)
    for _ in range(round(8 * severity)):
        size = int(rng.integers(side // 10, side // 5))
        (row, column), (to_row, to_column) = rng.integers(0, side - size, (2, 2)).tolist()
        spoiled[to_row : to_row + size, to_column : to_column + size] = picture[
            row : row + size, column : column + size
        ]
    rows, columns = np.mgrid[:side, :side]
    board = np.where((rows // 2 + columns // 2) % 2, 1.0, -1.0)[..., None]
    return _pixels(spoiled + 16 * severity * board)


def _blur(picture: Pixels, severity: float, _rng: np.random.Generator) -> Pixels:
    """Gaussian blur, at severity 1 with a standard deviation of 4 pixels."""
    sigma = 4 * severity
    return _pixels(ndimage.gaussian_filter(picture.astype(np.float32), (sigma, sigma, 0)))


def _colour(picture: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """A colour cast together with garish or washed-out colours."""
    values = picture.astype(np.float32)
    grey = values.mean(axis=2, keepdims=True)
    saturation = 1 + 1.6 * severity if rng.random() < 0.5 else 1 - 0.9 * severity
    cast = rng.normal(size=3)
    cast -= cast.mean()
    cast *= 55 * severity / np.abs(cast).max()
    return _pixels(grey + (values - grey) * saturation + cast)


def _noise(picture: Pixels, severity: float, rng: np.random.Generator) -> Pixels:
    """Gaussian noise, at severity 1 with a standard deviation of 52 grey levels, mostly in brightness."""
    side = picture.shape[0]
    bright, tinted = rng.normal(size=(side, side, 1)), rng.normal(size=(side, side, 3))
    return _pixels(picture + 52 * severity * (0.8 * bright + 0.6 * tinted))


def _compression(picture: Pixels, severity: float, _rng: np.random.Generator) -> Pixels:
    """A real JPEG round trip, of quality 40 at the lowest severity and 2 at the highest."""
    buffer = io.BytesIO()
    quality = round(2 + 38 * (1 - severity) ** 2)
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    buffer.seek(0)
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"))


DEGRADATIONS: Mapping[str, Callable[[Pixels, float, np.random.Generator], Pixels]] = {
    "warp": _warp,
    "artefact": _artefact,
    "blur": _blur,
    "colour": _colour,
    "noise": _noise,
    "compression": _compression,
}
"""Each takes a picture (side, side, 3), a severity in (0, 1] and a generator; in the order of application."""
