"""What an image of the demo shows: scenes, their prompts, content errors against a prompt, and the drawing itself."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from agiqa.errors import ConfigError

Colour = tuple[int, int, int]
Pixels = NDArray[np.uint8]
"""An RGB image (SIDE, SIDE, 3)."""

SIDE = 192
"""Side of an image in pixels."""
_FINE = 2 * SIDE
"""Side of the drawing, which is halved at the end to smooth its edges."""

COLOURS: Mapping[str, Colour] = {
    "red": (206, 52, 46),
    "orange": (236, 136, 40),
    "yellow": (242, 206, 62),
    "green": (58, 148, 84),
    "blue": (48, 104, 190),
    "purple": (132, 72, 160),
    "white": (240, 238, 230),
}
SKIES: Mapping[str, tuple[Colour, Colour]] = {
    "at sunset": ((72, 62, 128), (250, 164, 96)),
    "at dawn": ((120, 160, 206), (250, 212, 200)),
    "at noon": ((56, 126, 208), (196, 226, 244)),
    "under a stormy sky": ((52, 60, 74), (150, 160, 168)),
}
"""The colours at the top of the sky and at the horizon."""
STYLES: Mapping[str, str] = {"photo": "photograph", "flat": "flat vector art", "watercolour": "watercolour style"}
"""The words of each style in a prompt."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of scene: `thing` is counted and stands at `place`; `ground` and `height` (0..1) say what it stands on.

    `shapes` draw a thing of size 1 around (0, 0): a colour (None: that of the scene) and the corners of a polygon, or
    the upper left and lower right corner of an ellipse.
    """

    thing: str
    place: str
    ground: Colour
    height: tuple[float, float]
    shapes: tuple[tuple[Colour | None, tuple[tuple[float, float], ...]], ...]


_PALE, _BROWN, _DARK = (232, 224, 208), (96, 62, 40), (48, 44, 52)
KINDS: Mapping[str, Kind] = {
    "sea": Kind(
        thing="sailboat",
        place="on a calm sea",
        ground=(34, 92, 134),
        height=(0.66, 0.85),
        shapes=(
            (_BROWN, ((-0.45, 0.02), (0.45, 0.02), (0.3, 0.22), (-0.3, 0.22))),
            (None, ((-0.04, -1.0), (-0.04, -0.04), (-0.45, -0.04))),
            (None, ((0.04, -0.9), (0.04, -0.04), (0.38, -0.04))),
        ),
    ),
    "hills": Kind(
        thing="balloon",
        place="over green hills",
        ground=(58, 116, 62),
        height=(0.3, 0.5),
        shapes=(
            (None, ((-0.33, 0.0), (0.33, 0.0), (0.0, 0.62))),
            (None, ((-0.4, -0.55), (0.4, 0.25))),
            (_PALE, ((-0.09, -0.54), (0.09, 0.24))),
            (_BROWN, ((-0.1, 0.5), (0.1, 0.5), (0.1, 0.66), (-0.1, 0.66))),
        ),
    ),
    "field": Kind(
        thing="house",
        place="in a yellow field",
        ground=(190, 160, 78),
        height=(0.72, 0.85),
        shapes=(
            (None, ((-0.36, -0.4), (0.36, -0.4), (0.36, 0.2), (-0.36, 0.2))),
            (_DARK, ((-0.46, -0.38), (0.0, -0.85), (0.46, -0.38))),
            (_PALE, ((-0.24, -0.2), (-0.06, -0.2), (-0.06, 0.0), (-0.24, 0.0))),
            (_BROWN, ((0.08, -0.15), (0.24, -0.15), (0.24, 0.2), (0.08, 0.2))),
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one image: `count` things of `colour` in a kind of scene, its sky and its style."""

    kind: str
    count: int
    colour: str
    sky: str
    style: str

    def prompt(self) -> str:
        """The prompt that a text-to-image model would get for the scene."""
        kind = KINDS[self.kind]
        article = "an" if self.colour == "orange" else "a"
        number = ("no", article, "two", "three", "four", "five")[self.count]
        things = kind.thing if self.count == 1 else f"{kind.thing}s"
        return f"{number} {self.colour} {things} {kind.place} {self.sky}, {STYLES[self.style]}"


_SHELVES = [
    [Scene(kind=kind, style=style, count=count, colour=colour, sky=sky) for count, colour, sky in choices]
    for kind, style in product(KINDS, STYLES)
    for choices in [product(range(1, 5), COLOURS, SKIES)]
]
SCENES = tuple(chain.from_iterable(_SHELVES))
"""Every scene; no two have the same prompt."""


def choose_scenes(count: int, seed: int) -> list[Scene]:
    """`count` different scenes, all kinds and styles in turn. Raises ConfigError for more than there are."""
    if count > len(SCENES):
        message = f"The demo has {len(SCENES)} different prompts, you asked for {count}."
        raise ConfigError(message)
    rng = np.random.default_rng([seed, 0])
    shuffled = [[shelf[place] for place in rng.permutation(len(shelf))] for shelf in _SHELVES]
    return list(chain.from_iterable(zip(*shuffled, strict=True)))[:count]


def with_errors(scene: Scene, severity: float, rng: np.random.Generator) -> Scene:
    """The scene that a careless generator draws instead of `scene`.

    `severity` in [0, 1]: from .2 the count is wrong by one, from .45 the colour too, from .7 the sky too, and from .9
    the counted things are missing.
    """
    wrong = scene
    if severity >= 0.2:
        wrong = replace(wrong, count=scene.count + (1 if scene.count == 1 or rng.random() < 0.5 else -1))
    if severity >= 0.45:
        wrong = replace(wrong, colour=_other(COLOURS, scene.colour, rng))
    if severity >= 0.7:
        wrong = replace(wrong, sky=_other(SKIES, scene.sky, rng))
    return replace(wrong, count=0) if severity >= 0.9 else wrong


def _other(names: Iterable[str], name: str, rng: np.random.Generator) -> str:
    return str(rng.choice([one for one in names if one != name]))


def draw(scene: Scene, rng: np.random.Generator) -> Pixels:
    """The flawless image of a scene."""
    kind, (top, bottom) = KINDS[scene.kind], SKIES[scene.sky]
    horizon = round(_FINE * rng.uniform(0.5, 0.62))
    sky = np.linspace(top, bottom, horizon)
    ground = np.linspace(np.mean([kind.ground, bottom], 0), np.multiply(kind.ground, 0.7), _FINE - horizon)
    rows = np.concatenate([sky, ground])[:, None]
    clouds = np.clip(2.4 * _noise(rng, coarsest=3) - 1, 0, 1)[..., None] * np.linspace(0.8, 0, _FINE)[:, None, None]
    image = Image.fromarray(_pixels(rows + clouds * (np.clip(np.add(bottom, 60), 0, 255) - rows)))
    pen = ImageDraw.Draw(image)
    for index in range(scene.count):
        x = (index + 0.5 + rng.uniform(-0.16, 0.16)) / max(scene.count, 2) + 0.25 * (scene.count == 1)
        y, size = rng.uniform(*kind.height), rng.uniform(0.85, 1.1) * min(0.42, 0.85 / scene.count)
        for colour, corners in kind.shapes:
            places = [((x + size * dx) * _FINE, (y + size * dy) * _FINE) for dx, dy in corners]
            shape = pen.ellipse if len(places) == 2 else pen.polygon
            shape(places, fill=COLOURS[scene.colour] if colour is None else colour)
    return _STYLISTS[scene.style](np.asarray(image.reduce(2)), rng)


def _noise(rng: np.random.Generator, *, coarsest: int, side: int = _FINE) -> NDArray[np.float32]:
    """Cloud-like noise (side, side) in [0, 1]: five random grids, each twice as fine and half as strong."""
    total = np.zeros((side, side), np.float32)
    for octave in range(5):
        grid = Image.fromarray(rng.random((coarsest << octave, coarsest << octave), np.float32))
        total += np.asarray(grid.resize((side, side), Image.Resampling.BICUBIC)) * 0.5**octave
    scaled: NDArray[np.float32] = (total - total.min()) / np.ptp(total)
    return scaled


def _pixels(values: NDArray[np.floating]) -> Pixels:
    """Values on the scale 0..255, rounded and clipped."""
    rounded: Pixels = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return rounded


def _photo(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Fine surface texture and strong contrast."""
    lit = image / 255 * (0.85 + 0.3 * _noise(rng, coarsest=32, side=SIDE)[..., None])
    return _pixels(255 * (0.35 * lit + 0.65 * lit * lit * (3 - 2 * lit)))


def _flat(image: Pixels, _rng: np.random.Generator) -> Pixels:
    """Even areas of fourteen colours with crisp edges."""
    few = Image.fromarray(image).quantize(14, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    return np.asarray(few.convert("RGB"))


def _watercolour(image: Pixels, rng: np.random.Generator) -> Pixels:
    """Pale, uneven washes over the relief of the paper."""
    wash = ndimage.median_filter(image, size=(5, 5, 1)).astype(np.float32)
    pale = 255 - (255 - wash) * (0.55 + 0.45 * _noise(rng, coarsest=5, side=SIDE)[..., None])
    return _pixels(pale + 5 * rng.normal(size=(SIDE, SIDE, 1)))


_STYLISTS: Mapping[str, Callable[[Pixels, np.random.Generator], Pixels]] = {
    "photo": _photo,
    "flat": _flat,
    "watercolour": _watercolour,
}
