"""Whether intervals cover and p-values err as often as they say, by simulation; LOG.md has the figures.

`coverage`   intervals of one head on the items of 10 to 300 prompts, against the metric of very many items
`errors`     p-values of one method against itself, trained with other seeds, where 5 % may be below .05
`measured`   the same with the predictions of real heads: a csv of `agiqa predict` or predictions.csv for each of many
             seeds, from which sides of one, three and five seeds are drawn without replacement

A made-up prediction is the MOS plus errors that a method has with every seed, and errors, a slope and a level that a
seed has for itself; prompts have a share in MOS and in all errors. With one seed the product gives no p-value, so the
lines of one seed tell what its interval, which is about prompts alone, would have made of it.
"""

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from agiqa.bench.predictions import read_predictions
from agiqa.heads.comparing import paired, seeds_score
from agiqa.heads.metrics import score
from agiqa.heads.uncertainty import METRICS
from agiqa.progress import track

Array = NDArray[np.float64]

_LEVEL = 0.05
_ALL_ITEMS = 100_000


@dataclass(frozen=True, kw_only=True)
class World:
    """Where made-up predictions come from. Sizes of errors are in standard deviations of the MOS."""

    shared: float = 0.5
    """Of the errors that all seeds of a method make."""
    own: float = 0.15
    """Of those that a seed makes for itself."""
    slope: float = 0.02
    """Deviation between seeds of the slope of their predictions."""
    level: float = 0.02
    """The same of their level."""
    quality: float = 0.1
    """How much the size of a seed's own errors differs between seeds, as a share of it."""
    of_prompts: float = 0.4
    """Share of prompts in the variance of MOS and errors; the rest is of single images."""

    def mos(self, random: np.random.Generator, prompts: NDArray[np.int64]) -> Array:
        """The MOS of items (items,) with these `prompts`."""
        return 3.0 + self._drawn(random, prompts)

    def method(self, random: np.random.Generator, mos: Array, prompts: NDArray[np.int64]) -> Array:
        """What all seeds of a method predict (items,)."""
        return mos + self.shared * self._drawn(random, prompts)

    def seeds(self, random: np.random.Generator, method: Array, prompts: NDArray[np.int64], count: int) -> Array:
        """The predictions (seeds, items) of a method trained with `count` seeds."""
        rows: list[Array] = []
        for _ in range(count):
            size = self.own * (1.0 + self.quality * random.normal())
            slope = 1.0 + self.slope * random.normal()
            level = self.level * random.normal()
            rows.append(3.0 + slope * (method - 3.0) + level + size * self._drawn(random, prompts))
        return np.stack(rows)

    def _drawn(self, random: np.random.Generator, prompts: NDArray[np.int64]) -> Array:
        by_prompt, by_item = random.normal(size=prompts.max() + 1), random.normal(size=len(prompts))
        return np.asarray(np.sqrt(self.of_prompts) * by_prompt[prompts] + np.sqrt(1.0 - self.of_prompts) * by_item)


WORLDS = {
    "seeds differ little": World(),
    "seeds differ in level and slope": World(slope=0.1, level=0.1),
    "seeds differ a lot": World(own=0.3, slope=0.1, level=0.1, quality=0.3),
    "seeds do not differ": World(own=0.1, slope=0.0, level=0.0, quality=0.0),
}


def covered(world: World, prompts: int, images: int, seeds: int, seed: int) -> list[bool | None]:
    """Whether the interval of each metric holds the true value; None where there is no interval."""
    random = np.random.default_rng([seed, prompts, images])
    groups = np.repeat(np.arange(prompts), images)
    mos = world.mos(random, groups)
    predicted = world.seeds(random, world.method(random, mos, groups), groups, seeds)
    told = seeds_score(predicted, mos, [str(group) for group in groups])
    truth = true_metrics(world)
    return [None if ends is None else ends[0] <= truth[name] <= ends[1] for name, ends in told["ci"].items()]


def true_metrics(world: World) -> dict[str, float]:
    """The mean over seeds of the metrics of very many items, no two with one prompt."""
    if world not in _TRUTHS:
        random, single = np.random.default_rng(0), np.arange(_ALL_ITEMS)
        mos = world.mos(random, single)
        rows = world.seeds(random, world.method(random, mos, single), single, 20)
        scores = [score(row, mos) for row in rows]
        _TRUTHS[world] = {name: float(np.mean([one[name] for one in scores])) for name in METRICS}
    return _TRUTHS[world]


_TRUTHS: dict[World, dict[str, float]] = {}


def rejected(world: World, prompts: int, images: int, seeds: int, seed: int, *, methods: int = 1) -> list[bool]:
    """Whether the test tells two sides apart, by metric: of one method, or of two that are equally good."""
    random = np.random.default_rng([seed, prompts, images])
    groups = np.repeat(np.arange(prompts), images)
    mos = world.mos(random, groups)
    made = [world.method(random, mos, groups) for _ in range(methods)]
    sides = [world.seeds(random, made[k % methods], groups, seeds) for k in range(2)]
    return verdict(sides[0], sides[1], mos, [str(group) for group in groups])


def verdict(a: Array, b: Array, mos: Array, prompts: Sequence[str]) -> list[bool]:
    """Whether each metric's p is below .05, of one seed whether its interval leaves out 0."""
    told = paired(a, b, mos, prompts)
    if told["covers"] == "prompts":
        return [ends is not None and not ends[0] <= 0.0 <= ends[1] for ends in told["ci"].values()]
    return [p is not None and p < _LEVEL for p in told["p"].values()]


def draws_of(predicted: Array, seeds: int, trials: int) -> Iterator[tuple[Array, Array]]:
    """Two sides of `seeds` rows each from `predicted` (many seeds, items), no row in both."""
    random = np.random.default_rng(0)
    for _ in range(trials):
        chosen = random.permutation(len(predicted))[: 2 * seeds]
        yield predicted[chosen[:seeds]], predicted[chosen[seeds:]]


def shares(found: Sequence[Sequence[bool | None]]) -> dict[str, float | None]:
    """The share of True by metric, of those that are not None."""
    columns = zip(*found, strict=True)
    told = {name: [one for one in column if one is not None] for name, column in zip(METRICS, columns, strict=True)}
    return {name: round(float(np.mean(values)), 4) if values else None for name, values in told.items()}


def _cover(task: tuple[World, int, int, int, int]) -> list[bool | None]:
    return covered(*task)


def _reject(task: tuple[World, int, int, int, int, int]) -> list[bool]:
    return rejected(*task[:5], methods=task[5])


def _judge(task: tuple[Array, Array, Array, list[str]]) -> list[bool]:
    return verdict(*task)


def _parallel(work: Any, tasks: Sequence[Any], what: str) -> list[Any]:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool, track(what, len(tasks), "trials") as advance:
        found: list[Any] = []
        for one in pool.map(work, tasks, chunksize=8):
            found.append(one)
            advance(1)
        return found


def _say(line: dict[str, Any], out: Path | None) -> None:
    text = json.dumps(line)
    click.echo(text)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.write(text + "\n")


_TRIALS = click.option("--trials", default=1000, show_default=True, type=click.IntRange(min=1))
_OUT = click.option("--out", type=click.Path(path_type=Path), help="Append the result lines to this file.")


@click.group()
def main() -> None:
    """Simulate what intervals cover, and how often p-values err."""


@main.command()
@_TRIALS
@_OUT
def coverage(trials: int, out: Path | None) -> None:
    """The share of intervals that hold the true value."""
    for name, world in WORLDS.items():
        for prompts, images, seeds in (
            (10, 8, 1),
            (20, 8, 1),
            (20, 8, 5),
            (60, 5, 1),
            (60, 5, 5),
            (300, 2, 1),
            (300, 2, 3),
        ):
            tasks = [(world, prompts, images, seeds, trial) for trial in range(trials)]
            held = shares(_parallel(_cover, tasks, f"{name}, {prompts} prompts"))
            about = {"bench": "coverage", "world": name, **asdict(world), "prompts": prompts, "images": images}
            _say({**about, "seeds": seeds, "trials": trials, "covered": held}, out)


@main.command()
@_TRIALS
@_OUT
def errors(trials: int, out: Path | None) -> None:
    """The share of p-values below .05 where there is no difference."""
    for name, world in WORLDS.items():
        for prompts, images in ((20, 8), (200, 3)):
            for seeds in (1, 3, 5):
                for methods in (1, 2):
                    tasks = [(world, prompts, images, seeds, trial, methods) for trial in range(trials)]
                    told = shares(_parallel(_reject, tasks, f"{name}, {seeds} seeds"))
                    about = {"bench": "errors", "world": name, **asdict(world), "prompts": prompts, "images": images}
                    _say({**about, "seeds": seeds, "methods": methods, "trials": trials, "below": told}, out)


@main.command()
@click.argument("tables", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--label", default="quality", show_default=True)
@click.option("--name", required=True, help="What the result line calls these heads.")
@_TRIALS
@_OUT
def measured(tables: tuple[Path, ...], label: str, name: str, trials: int, out: Path | None) -> None:
    """The share of p-values below .05 between sides drawn from the test predictions of many seeds of one head."""
    read = [read_predictions(path, [label], label=label) for path in tables]
    predicted, mos, prompts = np.stack([one.predicted for one in read]), read[0].mos, list(read[0].prompts)
    spreads = np.array([list(score(row, mos).values()) for row in predicted]).std(axis=0, ddof=1)
    sd = dict(zip(METRICS, spreads.round(5).tolist(), strict=True))
    for seeds in (1, 3, 5):
        tasks = [(a, b, mos, prompts) for a, b in draws_of(predicted, seeds, trials)]
        told = shares(_parallel(_judge, tasks, f"{name}, {seeds} seeds"))
        line = {"bench": "measured", "head": name, "of_seeds": len(tables), "items": len(mos), "sd": sd}
        _say({**line, "seeds": seeds, "trials": trials, "below": told}, out)


if __name__ == "__main__":
    main()
