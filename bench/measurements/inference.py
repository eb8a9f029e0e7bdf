"""Simulations of interval coverage and of the false positive rate of p-values; LOG.md has the figures.

`coverage`   intervals of one head on the items of 10 to 300 prompts, against the metric on very many items
`errors`     p-values of one method against itself, trained with other seeds: 5 % may be below .05
`measured`   the same with the predictions of real heads: seeds of each head of an ablation against its other seeds

A made-up prediction is the MOS plus errors that a method shares over seeds, plus each seed's own errors, slope and
level; prompts explain a share of the MOS and of all errors. agiqa gives no p-value for one seed, so the lines of one
seed use its interval, which covers prompts alone.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import combinations, product
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from agiqa.bench.ablation.protocols import PUBLISHED
from agiqa.bench.measurements.measuring import Line, append_line, out_option
from agiqa.bench.recording.predictions import Predictions, read_predictions
from agiqa.bench.recording.result_folders import RESULTS, RUNS
from agiqa.bench.recording.tables import as_table, read_results
from agiqa.heads.evaluation.metrics import PROMPTS, SeedScores, score, seeds_score
from agiqa.heads.evaluation.runs import PREDICTIONS
from agiqa.heads.evaluation.significance import METRICS
from agiqa.progress import track

Array = NDArray[np.float64]

_LEVEL = 0.05
_ALL_ITEMS = 40_000
_ALL_SEEDS = 400


@dataclass(frozen=True, kw_only=True)
class World:
    """The distribution of made-up predictions. Sizes of errors are in standard deviations of the MOS."""

    shared: float = 0.5
    """Size of the errors that all seeds of a method share."""
    own: float = 0.15
    """Size of each seed's own errors."""
    slope: float = 0.02
    """Standard deviation between seeds of the slope of their predictions."""
    level: float = 0.02
    """Standard deviation between seeds of the level of their predictions."""
    quality: float = 0.1
    """Relative standard deviation between seeds of the size of their own errors."""
    of_prompts: float = 0.4
    """Share of prompts in the variance of MOS and errors; the rest belongs to single images."""

    def mos(self, random: np.random.Generator, prompts: NDArray[np.int64]) -> Array:
        """The MOS of items (items,) with these `prompts`."""
        return 3.0 + self._drawn(random, prompts)

    def method(self, random: np.random.Generator, mos: Array, prompts: NDArray[np.int64]) -> Array:
        """The part of the predictions (items,) that all seeds of a method share."""
        return mos + self.shared * self._drawn(random, prompts)

    def traits(self, random: np.random.Generator) -> tuple[float, float, float]:
        """The random traits of a trained head: the size of its own errors, its slope and its level."""
        size, slope, level = random.normal(size=3)
        return self.own * (1.0 + self.quality * size), 1.0 + self.slope * slope, self.level * level

    def head(
        self,
        random: np.random.Generator,
        method: Array,
        prompts: NDArray[np.int64],
        traits: tuple[float, float, float],
    ) -> Array:
        """The predictions (items,) of a head with these traits."""
        size, slope, level = traits
        return 3.0 + slope * (method - 3.0) + level + size * self._drawn(random, prompts)

    def seeds(self, random: np.random.Generator, method: Array, prompts: NDArray[np.int64], count: int) -> Array:
        """The predictions (seeds, items) of a method trained with `count` seeds."""
        return np.stack([self.head(random, method, prompts, self.traits(random)) for _ in range(count)])

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
    """Whether the interval of each metric holds the true value; None without an interval.

    The true value is the mean over all possible seeds. The interval of one seed is about its own head.
    """
    random = np.random.default_rng([seed, prompts, images])
    groups = np.repeat(np.arange(prompts), images)
    mos = world.mos(random, groups)
    method = world.method(random, mos, groups)
    traits = [world.traits(random) for _ in range(seeds)]
    predicted = np.stack([world.head(random, method, groups, one) for one in traits])
    scores = seeds_score(predicted, mos, [str(group) for group in groups])
    truth = metrics_of_head(world, traits[0]) if seeds == 1 else true_metrics(world)
    return [None if ends is None else ends[0] <= truth[name] <= ends[1] for name, ends in scores["ci"].items()]


@cache
def true_metrics(world: World) -> dict[str, float]:
    """The mean of `metrics_of_head` over enough seeds to make its error small against that of three or five seeds."""
    random = np.random.default_rng(0)
    scores = [metrics_of_head(world, world.traits(random)) for _ in range(_ALL_SEEDS)]
    return {name: float(np.mean([one[name] for one in scores])) for name in METRICS}


def metrics_of_head(world: World, traits: tuple[float, float, float]) -> dict[str, float]:
    """The metrics of a head with these traits on many items, each with a prompt of its own."""
    random, single = np.random.default_rng(1), np.arange(_ALL_ITEMS)
    mos = world.mos(random, single)
    return score(world.head(random, world.method(random, mos, single), single, traits), mos)


def rejected(world: World, prompts: int, images: int, seeds: int, seed: int, methods: int = 1) -> list[bool]:
    """Whether the test finds a difference, by metric, between two sides of one method or of two equally good ones."""
    random = np.random.default_rng([seed, prompts, images])
    groups = np.repeat(np.arange(prompts), images)
    mos = world.mos(random, groups)
    made = [world.method(random, mos, groups) for _ in range(methods)]
    sides = [world.seeds(random, made[k % methods], groups, seeds) for k in range(2)]
    a, b = (SeedScores.of(side, mos, [str(group) for group in groups]) for side in sides)
    return scores_differ(a, b)


def scores_differ(a: SeedScores, b: SeedScores) -> list[bool]:
    """Whether each metric's p is below .05; for one seed, whether its interval excludes 0."""
    compared = a.against(b)
    if compared["covers"] == PROMPTS:
        return [ends is not None and not ends[0] <= 0.0 <= ends[1] for ends in compared["ci"].values()]
    return [p is not None and p < _LEVEL for p in compared["p"].values()]


def shares(found: Sequence[Sequence[bool | None]]) -> dict[str, float | None]:
    """The share of True by metric, None left out."""
    columns = zip(*found, strict=True)
    known = {name: [one for one in column if one is not None] for name, column in zip(METRICS, columns, strict=True)}
    return {name: round(float(np.mean(values)), 4) if values else None for name, values in known.items()}


def _parallel(work: Callable[..., Any], tasks: Sequence[tuple[Any, ...]], what: str) -> list[Any]:
    """The results of `work` on each tuple of arguments, computed by a process per core."""
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool, track(what, len(tasks), "trials") as advance:
        found: list[Any] = []
        for one in pool.map(work, *zip(*tasks, strict=True), chunksize=8):
            found.append(one)
            advance(1)
        return found


def _print(line: Line, out: Path | None) -> None:
    click.echo(json.dumps(line))
    append_line(line, out)


_TRIALS = click.option("--trials", default=1000, show_default=True, type=click.IntRange(min=1))


@click.group()
def main() -> None:
    """Simulate the coverage of intervals and the false positive rate of p-values."""


@main.command()
@_TRIALS
@out_option
def coverage(trials: int, out: Path | None) -> None:
    """The share of intervals that hold the true value."""
    for name, world in WORLDS.items():
        for prompts, images, seeds in (
            (10, 8, 1),
            (20, 8, 1),
            (20, 8, 5),
            (60, 5, 1),
            (60, 5, 2),
            (60, 5, 5),
            (300, 2, 1),
            (300, 2, 2),
            (300, 2, 3),
            (300, 2, 5),
        ):
            tasks = [(world, prompts, images, seeds, trial) for trial in range(trials)]
            held = shares(_parallel(covered, tasks, f"{name}, {prompts} prompts"))
            about = {"bench": "coverage", "world": name, **asdict(world), "prompts": prompts, "images": images}
            _print({**about, "seeds": seeds, "trials": trials, "covered": held}, out)


@main.command()
@_TRIALS
@out_option
def errors(trials: int, out: Path | None) -> None:
    """The share of p-values below .05 where there is no difference."""
    for (name, world), (prompts, images), seeds, methods in product(
        WORLDS.items(), ((20, 8), (200, 3)), (1, 3, 5), (1, 2)
    ):
        tasks = [(world, prompts, images, seeds, trial, methods) for trial in range(trials)]
        below = shares(_parallel(rejected, tasks, f"{name}, {seeds} seeds"))
        about = {"bench": "errors", "world": name, **asdict(world), "prompts": prompts, "images": images}
        _print({**about, "seeds": seeds, "methods": methods, "trials": trials, "below": below}, out)


@main.command()
@click.argument("results", type=click.Path(exists=True, file_okay=False, path_type=Path))
@out_option
def measured(results: Path, out: Path | None) -> None:
    """The share of p-values below .05 between seeds of each head of an ablation (folder RESULTS), published split."""
    against = {"one against one": (1, 1), "two against the others": (2, None)}
    found: dict[str, list[list[bool]]] = {name: [] for name in against}
    spreads: list[Array] = []
    for scores in seeds_of_rows(results):
        spreads.append(scores.values.std(axis=0, ddof=1))
        for name, (first, second) in against.items():
            found[name] += [scores_differ(a, b) for a, b in splits_of(scores, first, second)]
    sd = dict(zip(METRICS, np.median(spreads, axis=0).round(5).tolist(), strict=True))
    for name, judged in found.items():
        line = {"bench": "measured", "results": results.name, "heads": len(spreads), "median_sd": sd, "seeds": name}
        _print({**line, "comparisons": len(judged), "below": shares(judged)}, out)


def seeds_of_rows(results: Path) -> list[SeedScores]:
    """The test predictions of each head with three seeds or more on the published split, a row per seed."""
    tables: dict[tuple[str, str], list[Predictions]] = {}
    for line in read_results(results / RESULTS):
        if line.get("protocol") == PUBLISHED and "error" not in line:
            path, label = results / RUNS / line["name"] / PREDICTIONS, line["config"]["label"]
            key = line["row"], line.get("store_name", "")
            tables.setdefault(key, []).append(read_predictions(path, [label], label=label))
    return [
        SeedScores.of(np.stack([one.predicted for one in seeds]), seeds[0].mos, seeds[0].prompts)
        for seeds in tables.values()
        if len(seeds) > 2
    ]


def splits_of(scores: SeedScores, first: int, second: int | None) -> Iterator[tuple[SeedScores, SeedScores]]:
    """Every way to draw `first` seeds and `second` others (None: all others) of one head."""
    seeds = range(len(scores.values))
    for some in combinations(seeds, first):
        others = [seed for seed in seeds if seed not in some]
        for rest in combinations(others, len(others) if second is None else second):
            if len(some) != len(rest) or some < rest:
                yield _only(scores, some), _only(scores, rest)


def _only(scores: SeedScores, seeds: Sequence[int]) -> SeedScores:
    chosen = list(seeds)
    return replace(scores, values=scores.values[chosen], left_out=scores.left_out[chosen])


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def tables(file: Path) -> None:
    """The result lines of FILE as tables in markdown."""
    click.echo(inference_tables(read_results(file)))


def inference_tables(lines: Sequence[dict[str, Any]]) -> str:
    """A table for each kind of result line, in percent, rows in the order of the lines."""
    kinds = {
        "measured": ("seeds", "heads", "comparisons"),
        "errors": ("world", "prompts", "images", "seeds", "methods"),
        "coverage": ("world", "prompts", "images", "seeds"),
    }
    found: list[str] = []
    for kind, columns in kinds.items():
        rows = [line for line in lines if line["bench"] == kind]
        body = [[*(str(line[name]) for name in columns), *_percent(line)] for line in rows]
        what = "covered" if kind == "coverage" else "below .05"
        found += [as_table([*columns, *(f"{name.upper()} {what}, %" for name in METRICS)], body)] if rows else []
    return "\n\n".join(found)


def _percent(line: dict[str, Any]) -> list[str]:
    shares_of = line["covered" if line["bench"] == "coverage" else "below"]
    return ["-" if shares_of[name] is None else f"{100 * shares_of[name]:.1f}" for name in METRICS]


if __name__ == "__main__":
    main()
