"""The demo's data set: pictures painted from seeds, spoiled by known amounts, and judged by simulated raters.

Nothing is downloaded. A name holds the generator and a number, and a prompt holds the scene's words; neither
says how badly a picture was spoiled, so a head can learn quality from the pixels only.
"""

import csv
from pathlib import Path

import numpy as np
from PIL import Image

from agiqa.bench.demo.degradations import degrade
from agiqa.bench.demo.prompts import Scene, capacity, choose_scenes, with_errors
from agiqa.bench.demo.raters import ASPECTS, GENERATORS, Panel, draw_severities, merit
from agiqa.bench.demo.scenes import paint
from agiqa.bench.demo.styles import in_style
from agiqa.errors import ConfigError

COLUMNS = ("name", "prompt", "generator", "split", *(f"mos_{aspect}" for aspect in ASPECTS))
"""The columns of `data.csv`."""
_PROMPTS_PER_TEST_PROMPT = 5


def draw_data_set(out: Path, *, count: int = 400, seed: int = 0) -> None:
    """Write `out/data.csv` (columns `COLUMNS`) and `out/images/`: `count` pictures of 192 x 192 pixels.

    Every prompt is painted by each of the five fictional generators once (the last prompt by fewer where
    `count` is no multiple of five), and every fifth prompt is held out with all its pictures, so no
    prompt of the test split occurs in the training split. The same seed gives the same bytes.
    Raises ConfigError for a count under 10, which leaves no two prompts, or over what the words allow.
    """
    most = capacity() * len(GENERATORS)
    if not 2 * len(GENERATORS) <= count <= most:
        message = f"count is {count}; the demo can draw from {2 * len(GENERATORS)} to {most} pictures."
        raise ConfigError(message)
    scenes = choose_scenes(-(-count // len(GENERATORS)), seed)
    splits = _splits(scenes, np.random.default_rng([seed, 1]))
    panel = Panel(np.random.default_rng([seed, 2]))
    (out / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str]] = []
    for index in range(count):
        which, generator = divmod(index, len(GENERATORS))
        rng = np.random.default_rng([seed, 3, index])
        row = _draw(out / "images", scenes[which], list(GENERATORS)[generator], which, panel, rng)
        rows.append(row | {"split": splits[which]})
    with (out / "data.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _splits(scenes: list[Scene], rng: np.random.Generator) -> list[str]:
    """A split for every scene, every fifth one held out after sorting by kind, so that all kinds are tested."""
    order = sorted(range(len(scenes)), key=lambda index: (scenes[index].kind, rng.random()))
    first = int(rng.integers(min(len(scenes), _PROMPTS_PER_TEST_PROMPT)))
    held_out = set(order[first::_PROMPTS_PER_TEST_PROMPT])
    return ["test" if index in held_out else "train" for index in range(len(scenes))]


def _draw(
    folder: Path, scene: Scene, generator: str, number: int, panel: Panel, rng: np.random.Generator
) -> dict[str, str]:
    """Paint, spoil, save and rate one picture; its row of the table, all but the split."""
    maker = GENERATORS[generator]
    severities = draw_severities(maker, rng)
    shown = with_errors(scene, severities.get("content", 0.0), rng)
    picture = degrade(in_style(paint(shown, rng), scene.style, rng), severities, rng)
    name = f"{generator}_{number:04d}{maker.suffix}"
    # PNG has no quality and ignores it.
    Image.fromarray(picture).save(folder / name, quality=95)
    opinions = {
        f"mos_{aspect}": f"{panel.mean_opinion(merit(aspect, severities, scene.style), rng):.4f}" for aspect in ASPECTS
    }
    return {"name": name, "prompt": scene.prompt(), "generator": generator, **opinions}
