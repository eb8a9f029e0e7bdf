"""The painters of the demo: one function per kind of scene, each from geometry and a seeded generator only."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from agiqa.bench.demo.canvas import Canvas, mix
from agiqa.bench.demo.prompts import COLOURS, Colour, Scene

_BLACK: Colour = (0, 0, 0)
_WHITE: Colour = (255, 255, 255)


def paint(scene: Scene, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The picture of a scene before style and degradations: (SIDE, SIDE, 3), RGB."""
    canvas = Canvas()
    PAINTERS[scene.kind](canvas, scene, rng)
    return canvas.picture()


def _places(count: int, rng: np.random.Generator) -> list[float]:
    """`count` horizontal places from left to right, spread over the picture with a little disorder."""
    return [(index + 0.5 + rng.uniform(-0.16, 0.16)) / count for index in range(count)]


def _sky(canvas: Canvas, scene: Scene, rng: np.random.Generator, horizon: float) -> None:
    setting = scene.setting
    canvas.gradient(setting.top, setting.bottom, 0, horizon)
    x, y = rng.uniform(0.15, 0.85), horizon * rng.uniform(0.3, 0.8)
    canvas.glow(x, y, 0.16, setting.light, 0.8)
    canvas.ellipse(x, y, 0.05, 0.05, setting.light)
    canvas.haze(rng, mix(setting.light, _WHITE, 0.4), 0.7, horizon)


def _sea(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting, horizon = scene.setting, rng.uniform(0.45, 0.58)
    _sky(canvas, scene, rng, horizon)
    canvas.gradient(mix(setting.bottom, (30, 90, 130), 0.45), mix(setting.top, (6, 30, 60), 0.6), horizon, 1)
    for _ in range(150):
        y = horizon + (1 - horizon) * rng.random()
        depth = (y - horizon) / (1 - horizon)
        x, width = rng.random(), 0.02 + 0.09 * depth
        tone = mix(setting.light, setting.top, rng.uniform(0.1, 0.9))
        canvas.line([(x, y), (x + width, y)], tone, 0.003 + 0.005 * depth)
    for x in _places(scene.count, rng):
        size = rng.uniform(0.7, 1.05) * (0.3 if scene.count < 3 else 0.22)
        _boat(canvas, x, horizon + rng.uniform(0.08, 0.3), size, COLOURS[scene.colour])


def _boat(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    shadow = mix(colour, (10, 20, 40), 0.65)
    canvas.ellipse(x, y + 0.1 * size, 0.5 * size, 0.07 * size, shadow)
    canvas.polygon([(x - 0.02 * size, y - size), (x - 0.02 * size, y), (x - 0.42 * size, y)], colour)
    canvas.polygon(
        [(x + 0.03 * size, y - 0.9 * size), (x + 0.03 * size, y), (x + 0.34 * size, y)], mix(colour, _WHITE, 0.45)
    )
    canvas.line([(x, y - 1.05 * size), (x, y + 0.05 * size)], (60, 40, 30), 0.008)
    hull = [(x - 0.45 * size, y + 0.02), (x + 0.45 * size, y + 0.02)]
    canvas.polygon([*hull, (x + 0.3 * size, y + 0.16 * size), (x - 0.3 * size, y + 0.16 * size)], (84, 52, 36))


def _ridge(canvas: Canvas, height: float, colour: Colour, rng: np.random.Generator, rough: float) -> None:
    """A range of hills whose tops lie around y = height."""
    phases, xs = rng.uniform(0, 6.28, 3), np.linspace(0, 1, 60)
    waves = zip((3.0, 7.0, 17.0), (1.0, 0.5, 0.22), phases, strict=True)
    tops = height + rough * sum(weight * np.sin(rate * xs + phase) for rate, weight, phase in waves)
    canvas.polygon([(0, 1), *zip(xs.tolist(), np.asarray(tops).tolist(), strict=True), (1, 1)], colour)


def _hills(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    _sky(canvas, scene, rng, 0.7)
    for layer in range(4):
        share = layer / 3
        colour = mix(mix(scene.setting.bottom, (70, 110, 90), 0.5), (34, 76, 40), share)
        _ridge(canvas, 0.58 + 0.11 * layer, colour, rng, 0.05 - 0.008 * layer)
    for _ in range(26):
        x, y = rng.random(), rng.uniform(0.82, 0.98)
        canvas.line([(x, y), (x, y + 0.03)], (50, 36, 26), 0.007)
        canvas.ball(x, y - 0.015, 0.022, 0.028, mix((40, 100, 46), (120, 130, 40), rng.random()))
    canvas.grain(rng, 0.3, 0.6)
    for x in _places(scene.count, rng):
        _balloon(canvas, x, rng.uniform(0.2, 0.42), rng.uniform(0.085, 0.12), COLOURS[scene.colour])


def _balloon(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    for side in (-0.5, 0.5):
        canvas.line([(x + side * size, y + 0.7 * size), (x + 0.3 * side * size, y + 1.75 * size)], (70, 50, 40), 0.005)
    canvas.polygon([(x - 0.8 * size, y + 0.5 * size), (x + 0.8 * size, y + 0.5 * size), (x, y + 1.6 * size)], colour)
    canvas.ball(x, y, size, size, colour)
    canvas.ellipse(x, y, 0.22 * size, 0.98 * size, mix(colour, _WHITE, 0.6))
    canvas.box(x - 0.22 * size, y + 1.7 * size, x + 0.22 * size, y + 2.1 * size, (110, 74, 44))


def _city(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting, street = scene.setting, 0.74
    _sky(canvas, scene, rng, street)
    for layer in range(2):
        left = -rng.uniform(0, 0.1)
        while left < 1:
            width, top = rng.uniform(0.1, 0.2), rng.uniform(0.16, 0.42) + 0.14 * layer
            _tower(
                canvas, (left, top, left + width, street), mix(setting.bottom, (14, 14, 26), 0.5 + 0.35 * layer), rng
            )
            left += width * 1.02
    canvas.gradient((58, 58, 66), (24, 24, 30), street, 1)
    canvas.grain(rng, 0.3, street)
    for dash in range(6):
        canvas.box(dash * 0.18, 0.9, dash * 0.18 + 0.1, 0.912, (214, 206, 170))
    for x in _places(scene.count, rng):
        _car(canvas, x, rng.uniform(0.82, 0.86), min(0.3, 0.8 / scene.count), COLOURS[scene.colour])


def _tower(canvas: Canvas, bounds: tuple[float, float, float, float], wall: Colour, rng: np.random.Generator) -> None:
    left, top, right, bottom = bounds
    canvas.box(left, top, right, bottom, wall)
    canvas.box(right - 0.012, top, right, bottom, mix(wall, _BLACK, 0.45))
    for y in np.arange(top + 0.025, bottom - 0.03, 0.042):
        for x in np.arange(left + 0.016, right - 0.03, 0.032):
            lit = rng.random()
            if lit < 0.55:
                canvas.box(x, y, x + 0.017, y + 0.024, mix((255, 214, 120), (180, 220, 255), float(lit < 0.1)))


def _car(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    canvas.ellipse(x, y + 0.2 * size, 0.52 * size, 0.07 * size, (8, 8, 12))
    roof = [(x - 0.26 * size, y), (x - 0.16 * size, y - 0.2 * size), (x + 0.14 * size, y - 0.2 * size)]
    canvas.polygon([*roof, (x + 0.28 * size, y)], mix(colour, _BLACK, 0.25))
    canvas.box(x - 0.13 * size, y - 0.16 * size, x + 0.12 * size, y - 0.02 * size, (170, 206, 224))
    canvas.box(x - 0.48 * size, y, x + 0.48 * size, y + 0.16 * size, colour)
    canvas.box(x - 0.48 * size, y, x + 0.48 * size, y + 0.03 * size, mix(colour, _WHITE, 0.5))
    for wheel in (-0.28, 0.28):
        canvas.ellipse(x + wheel * size, y + 0.17 * size, 0.1 * size, 0.1 * size, (16, 16, 18))
        canvas.ellipse(x + wheel * size, y + 0.17 * size, 0.045 * size, 0.045 * size, (190, 190, 196))
    canvas.glow(x + 0.48 * size, y + 0.06 * size, 0.02, (255, 244, 190), 0.9)


def _still_life(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting, edge = scene.setting, rng.uniform(0.52, 0.6)
    canvas.gradient(mix(setting.top, _WHITE, 0.12), setting.top, 0, edge)
    canvas.glow(0.15, 0.1, 0.35, setting.light, 0.5)
    canvas.gradient(mix(setting.bottom, _WHITE, 0.15), mix(setting.bottom, _BLACK, 0.35), edge, 1)
    for _ in range(34):
        y = rng.uniform(edge + 0.01, 1)
        canvas.line(
            [(0, y), (1, y + rng.uniform(-0.02, 0.02))], mix(setting.bottom, _BLACK, rng.uniform(0, 0.45)), 0.003
        )
    canvas.grain(rng, 0.25)
    bottle = rng.uniform(0.15, 0.85)
    glass = mix((40, 110, 90), setting.light, 0.15)
    canvas.box(bottle - 0.03, 0.14, bottle + 0.03, 0.4, glass)
    canvas.ball(bottle, 0.52, 0.09, 0.18, glass)
    canvas.box(bottle - 0.036, 0.11, bottle + 0.036, 0.15, (120, 84, 50))
    canvas.line([(bottle - 0.045, 0.42), (bottle - 0.05, 0.58)], (226, 250, 240), 0.012)
    for x in _places(scene.count, rng):
        _apple(canvas, x, rng.uniform(0.68, 0.82), rng.uniform(0.095, 0.12), COLOURS[scene.colour])


def _apple(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    canvas.ellipse(x + 0.35 * size, y + 0.85 * size, 1.15 * size, 0.25 * size, (30, 22, 20))
    canvas.ball(x, y, size, 0.95 * size, colour)
    canvas.ellipse(x, y - 0.8 * size, 0.3 * size, 0.1 * size, mix(colour, _BLACK, 0.5))
    canvas.line([(x, y - 0.8 * size), (x + 0.15 * size, y - 1.3 * size)], (70, 44, 24), 0.012)
    canvas.ellipse(x + 0.4 * size, y - 1.15 * size, 0.28 * size, 0.12 * size, (84, 150, 60))


def _portrait(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting = scene.setting
    canvas.gradient(setting.top, setting.bottom)
    canvas.glow(0.2, 0.15, 0.4, setting.light, 0.4)
    canvas.grain(rng, 0.35)
    people = max(1, scene.count)
    for index, x in enumerate(_places(people, rng)):
        size = min(0.3, 0.5 / people) * rng.uniform(0.9, 1.05)
        hat = COLOURS[scene.colour] if index < scene.count else None
        _person(canvas, x, 0.55 + rng.uniform(-0.03, 0.06), size, hat, rng)


def _person(canvas: Canvas, x: float, y: float, size: float, hat: Colour | None, rng: np.random.Generator) -> None:
    skin = mix((246, 208, 178), (120, 78, 54), rng.random())
    hair = mix((38, 26, 22), (190, 136, 70), rng.random())
    coat = mix((50, 60, 90), (150, 60, 60), rng.random())
    canvas.ball(x, y + 1.75 * size, 1.15 * size, 0.95 * size, coat)
    canvas.box(x - 0.22 * size, y + 0.5 * size, x + 0.22 * size, y + 1.1 * size, mix(skin, _BLACK, 0.25))
    canvas.ellipse(x, y - 0.1 * size, 0.74 * size, 0.92 * size, hair)
    canvas.ball(x, y, 0.6 * size, 0.8 * size, skin)
    for side in (-1, 1):
        eye = x + 0.24 * side * size
        canvas.ellipse(eye, y - 0.08 * size, 0.12 * size, 0.075 * size, (250, 250, 246))
        canvas.ellipse(eye, y - 0.08 * size, 0.055 * size, 0.065 * size, (36, 50, 70))
        canvas.line([(eye - 0.13 * size, y - 0.26 * size), (eye + 0.13 * size, y - 0.28 * size)], hair, 0.04 * size)
    canvas.line([(x, y), (x + 0.07 * size, y + 0.2 * size), (x, y + 0.22 * size)], mix(skin, _BLACK, 0.4), 0.03 * size)
    canvas.arc(x, y + 0.32 * size, 0.25 * size, 0.14 * size, (170, 50, 56), 0.06 * size)
    if hat is not None:
        canvas.ball(x, y - 0.75 * size, 0.6 * size, 0.5 * size, hat)
        canvas.ellipse(x, y - 0.52 * size, 0.98 * size, 0.16 * size, mix(hat, _BLACK, 0.3))
        canvas.box(x - 0.58 * size, y - 0.72 * size, x + 0.58 * size, y - 0.6 * size, mix(hat, _WHITE, 0.55))


def _geometry(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting = scene.setting
    canvas.gradient(setting.top, setting.bottom)
    for _ in range(9):
        x, y, size, turn = rng.random(), rng.random(), rng.uniform(0.06, 0.2), rng.uniform(0, 6.28)
        corners = [(x + size * np.cos(turn + a), y + size * np.sin(turn + a)) for a in (0, 2.1, 4.2)]
        canvas.polygon(corners, mix(setting.light, setting.bottom, rng.uniform(0.1, 0.75)))
    for _ in range(7):
        x, y, turn = rng.random(), rng.random(), rng.uniform(0, 3.14)
        reach = (0.3 * np.cos(turn), 0.3 * np.sin(turn))
        canvas.line([(x, y), (x + reach[0], y + reach[1])], mix(setting.light, setting.top, rng.random()), 0.016)
    for x in _places(scene.count, rng):
        y, size = rng.uniform(0.25, 0.75), min(0.19, 0.42 / scene.count)
        canvas.ellipse(x, y, size * 1.12, size * 1.12, setting.top)
        canvas.ball(x, y, size, size, COLOURS[scene.colour])


def _forest(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting = scene.setting
    canvas.gradient(mix(setting.bottom, (90, 130, 90), 0.5), mix(setting.bottom, (30, 60, 40), 0.6))
    canvas.glow(rng.uniform(0.2, 0.8), 0.2, 0.22, setting.light, 0.8)
    for layer in range(3):
        bark = mix(mix(setting.bottom, (60, 80, 66), 0.6), (34, 26, 22), layer / 2)
        for x in rng.random(9 - 2 * layer):
            width, foot = 0.012 + 0.018 * layer, 0.66 + 0.08 * layer
            canvas.polygon([(x - 0.6 * width, 0), (x + 0.6 * width, 0), (x + width, foot), (x - width, foot)], bark)
            canvas.line([(x - 0.3 * width, 0), (x - 0.5 * width, foot)], mix(bark, setting.light, 0.35), 0.006)
        _ridge(canvas, 0.68 + 0.09 * layer, mix((72, 98, 54), (24, 46, 26), layer / 2), rng, 0.02)
    for _ in range(220):
        x, y = rng.random(), rng.uniform(0, 0.25) ** 1.3
        canvas.ellipse(x, y, 0.022, 0.013, mix((30, 70, 36), (140, 170, 70), rng.random()))
    for _ in range(130):
        x, y = rng.random(), rng.uniform(0.72, 1)
        canvas.line(
            [(x, y), (x + rng.uniform(-0.02, 0.02), y - 0.04)], mix((40, 80, 40), (130, 150, 60), rng.random()), 0.004
        )
    for x in _places(scene.count, rng):
        _mushroom(canvas, x, rng.uniform(0.74, 0.88), rng.uniform(0.085, 0.11), COLOURS[scene.colour])


def _mushroom(canvas: Canvas, x: float, y: float, size: float, colour: Colour) -> None:
    canvas.ball(x, y + 0.3 * size, 0.3 * size, 0.95 * size, (236, 224, 200))
    canvas.ball(x, y - 0.35 * size, size, 0.62 * size, colour)
    canvas.ellipse(x, y + 0.02 * size, 0.86 * size, 0.16 * size, mix(colour, _BLACK, 0.55))
    spots = ((-0.5, -0.4, 0.13), (0.05, -0.62, 0.15), (0.5, -0.32, 0.12), (-0.1, -0.25, 0.1))
    for across, up, radius in spots:
        canvas.ellipse(x + across * size, y + up * size, radius * size, 0.75 * radius * size, (255, 250, 236))


def _space(canvas: Canvas, scene: Scene, rng: np.random.Generator) -> None:
    setting = scene.setting
    canvas.gradient(setting.top, setting.top)
    canvas.haze(rng, setting.bottom, 1.0, 1.4)
    canvas.haze(rng, setting.light, 0.3, 1.2)
    for _ in range(170):
        size = 0.0015 + 0.003 * rng.random() ** 3
        canvas.ellipse(rng.random(), rng.random(), size, size, mix(setting.light, _WHITE, rng.random()))
    for index, x in enumerate(_places(scene.count, rng)):
        y, size = rng.uniform(0.25, 0.75), min(0.2, 0.42 / scene.count)
        _planet(canvas, x, y, size, COLOURS[scene.colour], ringed=index == 0)


def _planet(canvas: Canvas, x: float, y: float, size: float, colour: Colour, *, ringed: bool) -> None:
    canvas.glow(x, y, 0.9 * size, mix(colour, _WHITE, 0.4), 0.5)
    canvas.ball(x, y, size, size, colour)
    for band in (-0.45, -0.1, 0.3):
        half = size * float(np.sqrt(1 - band**2)) * 0.96
        canvas.line([(x - half, y + band * size), (x + half, y + band * size)], mix(colour, _BLACK, 0.3), 0.09 * size)
    if ringed:
        canvas.arc(x, y, 1.7 * size, 0.42 * size, mix(colour, _WHITE, 0.65), 0.12 * size)


PAINTERS: Mapping[str, Callable[[Canvas, Scene, np.random.Generator], None]] = {
    "sea": _sea,
    "hills": _hills,
    "city": _city,
    "still life": _still_life,
    "portrait": _portrait,
    "geometry": _geometry,
    "forest": _forest,
    "space": _space,
}
"""A painter per kind of `agiqa.bench.demo.prompts.KINDS`."""
