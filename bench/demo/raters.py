"""Who makes and who judges the demo's pictures: fictional generators with typical faults, and noisy raters."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ASPECTS = ("quality", "correspondence", "authenticity")
PANEL = 60
"""Raters in the panel."""
RATINGS = 20
"""Raters who judge one picture, drawn from the panel."""
FLAWS = ("blur", "noise", "compression")
"""The faults of which every picture has one that dominates."""


@dataclass(frozen=True, kw_only=True)
class Generator:
    """A fictional text-to-image model.

    `flaws` holds the probabilities that blur, noise or compression dominates; `level` the mean severity of that fault;
    `extras` maps further faults to the probability that a picture shows them;
    `suffix` is the type of file that the model writes.
    """

    level: float
    flaws: tuple[float, float, float]
    extras: Mapping[str, float]
    suffix: str = ".png"


GENERATORS: Mapping[str, Generator] = {
    "aurora-xl": Generator(level=0.25, flaws=(0.4, 0.3, 0.3), extras={"colour": 0.2, "warp": 0.1, "content": 0.3}),
    "brushwork-2": Generator(level=0.4, flaws=(0.7, 0.1, 0.2), extras={"colour": 0.4, "warp": 0.2, "content": 0.4}),
    "glimpse-turbo": Generator(
        level=0.5, flaws=(0.2, 0.1, 0.7), extras={"colour": 0.25, "warp": 0.25, "content": 0.5}, suffix=".jpg"
    ),
    "noisegate": Generator(
        level=0.55, flaws=(0.1, 0.8, 0.1), extras={"colour": 0.25, "artefact": 0.25, "content": 0.5}
    ),
    "oldgan": Generator(
        level=0.7, flaws=(0.5, 0.3, 0.2), extras={"colour": 0.3, "warp": 0.7, "artefact": 0.5, "content": 0.8}
    ),
}

_WEIGHTS: Mapping[str, Mapping[str, float]] = {
    "quality": {"blur": 0.9, "noise": 0.9, "compression": 0.9, "colour": 0.12, "warp": 0.1, "artefact": 0.15},
    "correspondence": {"content": 0.9, "warp": 0.15, "blur": 0.2, "noise": 0.1},
    "authenticity": {"warp": 0.75, "artefact": 0.7, "colour": 0.3, "compression": 0.2, "blur": 0.2, "noise": 0.2},
}
_STYLE_TOLL: Mapping[str, float] = {
    "photo": 0.0,
    "oil": 0.1,
    "watercolour": 0.12,
    "pencil": 0.15,
    "flat": 0.3,
    "pixel": 0.35,
}


def draw_severities(generator: Generator, rng: np.random.Generator) -> dict[str, float]:
    """The faults of one picture by `generator` and their severities in (0, 1]."""
    main = FLAWS[rng.choice(len(FLAWS), p=generator.flaws)]
    severities = {main: float(rng.beta(3 * generator.level, 3 * (1 - generator.level)))}
    for fault, chance in generator.extras.items():
        shown, severity = rng.random() < chance, rng.beta(1.6, 1.4)
        if shown:
            severities[fault] = float(severity)
    return severities


def merit(aspect: str, severities: Mapping[str, float], style: str) -> float:
    """What a picture deserves for one of `ASPECTS`, from 0.3 to 4.7: every fault takes its share of what is left.

    Authenticity also pays for styles that no real scene or artwork on paper has.
    """
    left = 1 - (_STYLE_TOLL[style] if aspect == "authenticity" else 0.0)
    for fault, weight in _WEIGHTS[aspect].items():
        left *= 1 - weight * severities.get(fault, 0.0)
    return 0.3 + 4.4 * left


class Panel:
    """`PANEL` raters, each with a lasting bias and a scatter of their own."""

    def __init__(self, rng: np.random.Generator) -> None:
        """Draw the raters: biases of standard deviation 0.3, scatters from 0.35 to 0.75, on the scale 0..5."""
        self._bias: NDArray[np.float64] = rng.normal(0, 0.3, PANEL)
        self._scatter: NDArray[np.float64] = rng.uniform(0.35, 0.75, PANEL)

    def mean_opinion(self, merit: float, rng: np.random.Generator) -> float:
        """The mean of `RATINGS` opinions in [0, 5] about a picture of this merit."""
        chosen = rng.choice(PANEL, RATINGS, replace=False)
        opinions = merit + self._bias[chosen] + self._scatter[chosen] * rng.normal(size=RATINGS)
        return float(np.clip(opinions, 0, 5).mean())
