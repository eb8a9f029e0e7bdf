"""The simulation of intervals and p-values: its worlds by their own definition, and its tables in the log."""

import json
from pathlib import Path

import numpy as np
import pytest

from agiqa.bench.measurements.inference import (
    World,
    covered,
    inference_tables,
    rejected,
    seeds_of_rows,
    splits_of,
    true_metrics,
)
from agiqa.bench.recording.predictions import write_predictions
from agiqa.bench.recording.tables import read_results

BENCH = Path(__file__).resolve().parents[3] / "bench"


def test_a_world_has_the_deviations_that_it_says():
    world, random = World(shared=0.5, own=0.3, slope=0.1, level=0.2, quality=0.0), np.random.default_rng(0)
    prompts = np.repeat(np.arange(20_000), 2)
    mos = world.mos(random, prompts)
    assert np.corrcoef(mos[::2], mos[1::2])[0, 1] == pytest.approx(world.of_prompts, abs=0.03)
    method = world.method(random, mos, prompts)
    assert (method - mos).std() == pytest.approx(0.5, rel=0.03)
    seeds = world.seeds(random, method, prompts, 200)
    assert seeds.mean(axis=1).std() == pytest.approx(0.2, rel=0.2)
    slopes = [np.polyfit(method, row, 1)[0] for row in seeds]
    assert (np.mean(slopes), np.std(slopes)) == (pytest.approx(1.0, abs=0.03), pytest.approx(0.1, rel=0.25))


NORMAL = World(shared=0.6, own=0.0, slope=0.0, level=0.0, quality=0.0)
"""One world for two tests: its true metrics take seconds, and are kept."""


def test_the_true_correlation_is_that_of_the_normal_distribution():
    truth = true_metrics(NORMAL)
    assert truth["plcc"] == pytest.approx(1 / np.sqrt(1 + 0.36), abs=0.005)
    assert truth["srcc"] == pytest.approx(6 / np.pi * np.arcsin(truth["plcc"] / 2), abs=0.005)
    assert truth["krcc"] == pytest.approx(2 / np.pi * np.arcsin(truth["plcc"]), abs=0.005)
    assert truth["rmse"] == pytest.approx(0.6, abs=0.005)


def test_trials_are_drawn_by_their_seed():
    assert covered(NORMAL, 30, 2, 2, seed=1) == covered(NORMAL, 30, 2, 2, seed=1)
    world = World()
    assert len(covered(world, 30, 2, 1, seed=1)) == len(rejected(world, 30, 2, 1, 1)) == 4
    assert covered(world, 12, 2, 1, seed=0)[3] is None
    far = World(shared=0.1, own=0.1), 60, 3, 3, 0
    assert not all(rejected(*far)), "one method is not another in every metric"


def test_seeds_of_a_head_are_set_against_its_others(tmp_path):
    mos = np.random.default_rng(0).normal(size=(24, 1))
    names = [f"{k}.png" for k in range(24)]
    with (tmp_path / "results.jsonl").open("w") as file:
        for seed in range(4):
            predicted = mos + np.random.default_rng(seed).normal(size=(24, 1))
            name = f"run-{seed}"
            write_predictions(tmp_path / "runs" / name / "predictions.csv", ["quality"], names, names, mos, predicted)
            about = {"name": name, "row": "gru", "protocol": "published", "config": {"label": "quality"}}
            file.write(json.dumps(about) + "\n" + json.dumps({**about, "name": "x", "protocol": "grouped"}) + "\n")
        file.write(json.dumps({**about, "name": "y", "error": "lost"}) + "\n")
    (scores,) = seeds_of_rows(tmp_path)
    assert scores.values.shape == (4, 4)
    ones = list(splits_of(scores, 1, 1))
    assert len(ones) == 6
    assert {len(side.values) for pair in ones for side in pair} == {1}
    twos = [(tuple(a.values[:, 0]), tuple(b.values[:, 0])) for a, b in splits_of(scores, 2, None)]
    assert len(twos) == 3
    assert all(sorted((*a, *b)) == sorted(scores.values[:, 0]) for a, b in twos)


@pytest.mark.parametrize("path", sorted((BENCH / "results" / "inference").glob("*.jsonl")), ids=lambda path: path.stem)
def test_the_tables_of_the_log_are_those_of_the_lines(path):
    log = (BENCH / "LOG.md").read_text(encoding="utf-8")
    rows = [row for row in inference_tables(read_results(path)).splitlines() if row.startswith("| ")]
    assert len(rows) > 10
    assert [row for row in rows if row not in log] == []
