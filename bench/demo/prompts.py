"""What a picture of the demo shows: scenes, their words as a prompt, and content errors against that prompt."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from agiqa.errors import ConfigError

Colour = tuple[int, int, int]

COLOURS: Mapping[str, Colour] = {
    "red": (206, 52, 46),
    "orange": (236, 136, 40),
    "yellow": (242, 206, 62),
    "green": (58, 148, 84),
    "blue": (48, 104, 190),
    "purple": (132, 72, 160),
    "white": (240, 238, 230),
}
STYLES: Mapping[str, str] = {
    "photo": "photograph",
    "oil": "oil painting",
    "flat": "flat vector art",
    "pencil": "coloured pencil drawing",
    "watercolour": "watercolour style",
    "pixel": "pixel art",
}
NUMBERS = ("no", "a", "two", "three", "four", "five")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A place or time of day: its words, and the colours at the top, at the bottom and of the light."""

    words: str
    top: Colour
    bottom: Colour
    light: Colour


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of scene: the counted thing in singular and plural, where it is, and the settings that exist."""

    one: str
    many: str
    place: str
    settings: tuple[Setting, ...]


_DAYLIGHT = (
    Setting(words="at sunset", top=(72, 62, 128), bottom=(250, 164, 96), light=(255, 222, 150)),
    Setting(words="at dawn", top=(120, 160, 206), bottom=(250, 212, 200), light=(255, 240, 214)),
    Setting(words="at noon", top=(56, 126, 208), bottom=(196, 226, 244), light=(255, 252, 226)),
    Setting(words="under a stormy sky", top=(52, 60, 74), bottom=(150, 160, 168), light=(216, 220, 220)),
)
_NIGHT = (
    Setting(words="under a full moon", top=(10, 16, 46), bottom=(60, 66, 120), light=(244, 242, 220)),
    Setting(words="at dusk", top=(44, 30, 84), bottom=(206, 98, 112), light=(255, 190, 140)),
    Setting(words="in green neon light", top=(6, 24, 32), bottom=(28, 108, 100), light=(150, 255, 210)),
)
_ROOM = (
    Setting(words="on a wooden table", top=(70, 58, 52), bottom=(150, 98, 56), light=(255, 236, 200)),
    Setting(words="on a blue tablecloth", top=(206, 198, 180), bottom=(86, 118, 168), light=(255, 250, 236)),
    Setting(words="on a marble shelf", top=(96, 110, 98), bottom=(214, 212, 206), light=(255, 255, 250)),
)
_WALL = (
    Setting(words="before a grey wall", top=(96, 100, 108), bottom=(160, 162, 164), light=(250, 244, 236)),
    Setting(words="before an ochre wall", top=(150, 104, 40), bottom=(216, 172, 96), light=(255, 240, 200)),
    Setting(words="before a teal wall", top=(20, 78, 84), bottom=(84, 152, 150), light=(236, 250, 244)),
)
_GROUND = (
    Setting(words="on a dark ground", top=(26, 28, 40), bottom=(54, 58, 78), light=(214, 204, 180)),
    Setting(words="on a cream ground", top=(242, 230, 206), bottom=(228, 208, 176), light=(60, 64, 78)),
    Setting(words="on a pink ground", top=(238, 178, 180), bottom=(224, 142, 158), light=(64, 52, 92)),
)
_SPACE = (
    Setting(words="beside a blue nebula", top=(8, 10, 30), bottom=(26, 50, 116), light=(150, 200, 255)),
    Setting(words="beside a red nebula", top=(18, 6, 20), bottom=(110, 26, 52), light=(255, 170, 150)),
    Setting(words="in deep darkness", top=(4, 4, 10), bottom=(18, 20, 34), light=(240, 240, 255)),
)
KINDS: Mapping[str, Kind] = {
    "sea": Kind(one="sailboat", many="sailboats", place="on a calm sea", settings=_DAYLIGHT),
    "hills": Kind(one="balloon", many="balloons", place="over rolling hills", settings=_DAYLIGHT),
    "city": Kind(one="car", many="cars", place="in a city street", settings=_NIGHT),
    "still life": Kind(one="apple", many="apples", place="and a glass bottle", settings=_ROOM),
    "portrait": Kind(one="hat", many="hats", place="worn by smiling people", settings=_WALL),
    "geometry": Kind(one="circle", many="circles", place="among triangles and bars", settings=_GROUND),
    "forest": Kind(one="mushroom", many="mushrooms", place="in a deep forest", settings=_DAYLIGHT),
    "space": Kind(one="planet", many="planets", place="among the stars", settings=_SPACE),
}


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The content of one picture: `count` things of `colour` in a kind of scene, its setting and its style."""

    kind: str
    count: int
    colour: str
    setting: Setting
    style: str

    def prompt(self) -> str:
        """The scene in words, as a text-to-image model would be asked for it."""
        kind = KINDS[self.kind]
        article = "an" if self.colour == "orange" else "a"
        number = article if self.count == 1 else NUMBERS[self.count]
        noun = kind.one if self.count == 1 else kind.many
        return f"{number} {self.colour} {noun} {kind.place} {self.setting.words}, {STYLES[self.style]}"


def all_scenes(kind: str) -> list[Scene]:
    """Every scene of one kind; no two have the same prompt."""
    choices = product(range(1, 5), COLOURS, KINDS[kind].settings, STYLES)
    return [
        Scene(kind=kind, count=count, colour=colour, setting=setting, style=style)
        for count, colour, setting, style in choices
    ]


def choose_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes with prompts of their own, kinds and styles in turn. Raises ConfigError over `capacity()`."""
    if count > capacity():
        message = f"{count} different prompts were asked for; the words allow {capacity()}."
        raise ConfigError(message)
    rng = np.random.default_rng([seed, 0])
    shelves: dict[tuple[str, str], list[Scene]] = {}
    for kind in KINDS:
        scenes = all_scenes(kind)
        for index in rng.permutation(len(scenes)):
            shelves.setdefault((kind, scenes[index].style), []).append(scenes[index])
    kinds, styles = list(KINDS), list(STYLES)
    chosen: list[Scene] = []
    turn = 0
    while len(chosen) < count:
        # A kind moves on by one style in every round, so that all pairs of kind and style get their turn.
        rounds, place = divmod(turn, len(kinds))
        shelf = shelves[kinds[place], styles[(place + rounds) % len(styles)]]
        if shelf:
            chosen.append(shelf.pop())
        turn += 1
    return chosen


def capacity() -> int:
    """How many different prompts exist."""
    return sum(len(all_scenes(kind)) for kind in KINDS)


def with_errors(scene: Scene, severity: float, rng: np.random.Generator) -> Scene:
    """The scene that a careless generator paints instead of `scene`.

    `severity` in [0, 1]: from .2 the count is wrong by one, from .45 the colour too, from .7 the setting too,
    and from .9 the counted things are missing.
    """
    wrong = scene
    if severity >= 0.2:
        step = 1 if scene.count == 1 or rng.random() < 0.5 else -1
        wrong = replace(wrong, count=scene.count + step)
    if severity >= 0.45:
        colours = [colour for colour in COLOURS if colour != scene.colour]
        wrong = replace(wrong, colour=colours[rng.integers(len(colours))])
    if severity >= 0.7:
        settings = [setting for setting in KINDS[scene.kind].settings if setting != scene.setting]
        wrong = replace(wrong, setting=settings[rng.integers(len(settings))])
    if severity >= 0.9:
        wrong = replace(wrong, count=0)
    return wrong
