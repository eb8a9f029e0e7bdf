"""The demo's data set: images drawn from seeds, damaged by known amounts, and judged by simulated raters.

Neither the name of an image nor its prompt says how badly it was damaged, so a head can learn quality from the pixels
only.
"""

import csv
import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from agiqa.bench.demo.scenes import SCENES, Pixels, choose_scenes, draw, with_errors
from agiqa.errors import ConfigError

Values = NDArray[np.float32]
"""An image (side, side, 3) in grey levels 0..255, not rounded."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A fictional text-to-image model.

    `level` is the mean severity of the flaw that every image has; `extras` maps further faults to the probability that
    an image shows them; `suffix` is the file type that the model writes.
    """

    level: float
    extras: Mapping[str, float]
    suffix: str


GENERATORS: Mapping[str, Generator] = {
    "aurora-xl": Generator(level=0.3, extras={"warp": 0.1, "content": 0.3}, suffix=".png"),
    "oldgan": Generator(level=0.65, extras={"warp": 0.5, "content": 0.7}, suffix=".jpg"),
}
FLAWS = ("blur", "noise", "compression")
"""Every image has exactly one of these faults."""
_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "quality": {"blur": 0.9, "noise": 0.9, "compression": 0.9, "warp": 0.1},
    "correspondence": {"content": 0.9, "warp": 0.15, "blur": 0.2, "noise": 0.1},
    "authenticity": {"warp": 0.9, "compression": 0.3, "blur": 0.3, "noise": 0.3},
}
ASPECTS = tuple(_WEIGHTS)
RATINGS = 20
"""Raters of one image, drawn from a panel of 60."""
_PANEL = 60
COLUMNS = ("name", "prompt", "generator", "split", *(f"mos_{aspect}" for aspect in ASPECTS))
"""The columns of `data.csv`."""
_FEWEST = 10
_PROMPTS_PER_TEST_PROMPT = 5


def draw_data_set(out: Path, *, count: int = 400, seed: int = 0) -> None:
    """Write `out/data.csv` (columns `COLUMNS`) and `out/images/`: `count` images of 192 x 192 pixels.

    Each generator draws every prompt once (with an odd count, one of them draws the last prompt alone). Every fifth
    prompt is held out with all its images, so no test prompt occurs in the training split. The same seed gives the same
    bytes. Raises ConfigError for a count under 10, or over what the prompts allow.
    """
    most = len(SCENES) * len(GENERATORS)
    if not _FEWEST <= count <= most:
        message = f"count is {count}; the demo can draw from {_FEWEST} to {most} images."
        raise ConfigError(message)
    scenes = choose_scenes(-(-count // len(GENERATORS)), seed)
    panel, held_out = Panel(np.random.default_rng([seed, 2])), seed % _PROMPTS_PER_TEST_PROMPT
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, ...]] = []
    for index in range(count):
        number, rng = index // len(GENERATORS), np.random.default_rng([seed, 3, index])
        generator, maker = list(GENERATORS.items())[index % len(GENERATORS)]
        severities = draw_severities(maker, rng)
        shown = with_errors(scenes[number], severities.get("content", 0.0), rng)
        name = f"{generator}_{number:04d}{maker.suffix}"
        # PNG has no quality and ignores it.
        Image.fromarray(degrade(draw(shown, rng), severities, rng)).save(out / "images" / name, quality=95)
        split = "test" if number % _PROMPTS_PER_TEST_PROMPT == held_out else "train"
        opinions = [panel.mean_opinion(merit(aspect, severities), rng) for aspect in ASPECTS]
        rows.append((name, scenes[number].prompt(), generator, split, *(f"{opinion:.4f}" for opinion in opinions)))
    # The table is written last: it tells `run_demo` that all images exist.
    with (out / "data.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


def draw_severities(generator: Generator, rng: np.random.Generator) -> dict[str, float]:
    """The faults of one image by `generator` and their severities in (0, 1]."""
    severities = {str(rng.choice(FLAWS)): float(rng.beta(3 * generator.level, 3 * (1 - generator.level)))}
    shown = {fault: rng.random() < chance for fault, chance in generator.extras.items()}
    return severities | {fault: float(rng.beta(1.6, 1.4)) for fault, is_shown in shown.items() if is_shown}


def merit(aspect: str, severities: Mapping[str, float]) -> float:
    """The true quality for one of `ASPECTS`, 0.3 to 4.7: each fault removes a share of what the others leave."""
    left = np.prod([1 - weight * severities.get(fault, 0.0) for fault, weight in _WEIGHTS[aspect].items()])
    return float(0.3 + 4.4 * left)


class Panel:
    """Sixty raters, each with a constant bias and an individual scatter."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draw the raters: biases of standard deviation 0.3, scatters from 0.35 to 0.75, on the scale 0..5."""
        self._bias, self._scatter = rng.normal(0, 0.3, _PANEL), rng.uniform(0.35, 0.75, _PANEL)

    def mean_opinion(self, merit: float, rng: np.random.Generator) -> float:
        """The mean of `RATINGS` opinions in [0, 5] about an image of this merit."""
        chosen = rng.choice(_PANEL, RATINGS, replace=False)
        opinions = merit + self._bias[chosen] + self._scatter[chosen] * rng.normal(size=RATINGS)
        return float(np.clip(opinions, 0, 5).mean())


def degrade(image: Pixels, severities: Mapping[str, float], rng: np.random.Generator) -> Pixels:
    """`image` with the faults of `severities`, applied in the order of `DEGRADATIONS`."""
    for name, degradation in DEGRADATIONS.items():
        if severities.get(name, 0.0) > 0:
            values = degradation(image.astype(np.float32), severities[name], rng)
            image = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return image


def _warp(image: Values, severity: float, rng: np.random.Generator) -> Values:
    """Smooth random displacement, at severity 1 with a standard deviation of 7 pixels."""
    side = len(image)
    moves = ndimage.gaussian_filter(rng.normal(size=(2, side, side)), (0, side / 16, side / 16))
    places = np.mgrid[:side, :side] + moves * (7 * severity / moves.std())
    channels = [
        ndimage.map_coordinates(channel, places, order=1, mode="reflect") for channel in image.transpose(2, 0, 1)
    ]
    return np.stack(channels, axis=-1)


def _blur(image: Values, severity: float, _rng: np.random.Generator) -> Values:
    """Gaussian blur, at severity 1 with a standard deviation of 4 pixels."""
    blurred: Values = ndimage.gaussian_filter(image, (4 * severity, 4 * severity, 0))
    return blurred


def _noise(image: Values, severity: float, rng: np.random.Generator) -> Values:
    """Gaussian noise, at severity 1 with a standard deviation of 52 grey levels, mostly in brightness."""
    bright, tinted = rng.normal(size=(*image.shape[:2], 1)), rng.normal(size=image.shape)
    return (image + 52 * severity * (0.8 * bright + 0.6 * tinted)).astype(np.float32)


def _compression(image: Values, severity: float, _rng: np.random.Generator) -> Values:
    """A real JPEG round trip, of quality 40 at the lowest severity and 2 at the highest."""
    buffer = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(buffer, "JPEG", quality=round(2 + 38 * (1 - severity) ** 2))
    with Image.open(buffer) as decoded:
        return np.asarray(decoded.convert("RGB"), np.float32)


DEGRADATIONS: Mapping[str, Callable[[Values, float, np.random.Generator], Values]] = {
    "warp": _warp,
    "blur": _blur,
    "noise": _noise,
    "compression": _compression,
}
"""Each takes an image (side, side, 3), a severity in (0, 1] and a generator; in the order of application."""
