"""The demo runs all steps and says what its numbers do not show."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from scipy.stats import spearmanr

from agiqa.bench.demo.run import run_demo
from agiqa.errors import SettingsConflict
from agiqa.store import open_store, verify

READY = os.environ.get("AGIQA_DEMO")
"""The folder of a demo of the same code that `.ci/run` has made just now; without it, the tests make one."""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folder of a demo that was made in one go."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    if READY is None:
        run_demo(folder, images=400, seed=0)
    else:
        shutil.copytree(READY, folder)
    return folder


@pytest.fixture(scope="module")
def first(out):
    """What the demo left behind when it was made."""
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def demo(first, out):
    """The demo run again: it keeps what is there."""
    return run_demo(out, images=400, seed=0)


def test_heads_learn_quality_of_images_and_prompts_never_seen(demo):
    baseline, *heads = demo.rows
    for row in heads:
        assert row.scores["srcc"] >= 0.80
        assert row.scores["srcc"] > baseline.scores["srcc"] + 0.1
        low, high = row.scores["ci"]["srcc"]
        assert low < row.scores["srcc"] < high


def test_no_test_prompt_is_in_training(demo):
    items = open_store(demo.out / "demo.agiqa").items
    prompts = {split: {items.prompts[item] for item in items.in_split(split)} for split in ("train", "test")}
    assert prompts["train"]
    assert prompts["test"]
    assert not prompts["train"] & prompts["test"]


def test_table_agrees_with_the_predictions_on_disk(demo):
    with (demo.out / "runs" / "gru" / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    srcc = spearmanr([float(row["mos"]) for row in rows], [float(row["predicted"]) for row in rows]).statistic
    assert demo.rows[1].scores["srcc"] == pytest.approx(srcc, abs=1e-6)


def test_store_is_sound_and_what_is_left_behind_says_what_it_is(first, demo):
    assert verify(open_store(demo.out / "demo.agiqa"), "numeric").sound
    assert "RANDOM" in first["what_is_shown"]
    assert demo.picture.stat().st_size > 20_000


def test_a_second_run_keeps_what_is_there_and_refuses_other_settings(first, demo):
    assert [row.scores for row in demo.rows] == [row["scores"] for row in first["rows"]]
    assert demo.seconds < first["seconds"] / 2
    with pytest.raises(SettingsConflict, match="seed"):
        run_demo(demo.out, images=400, seed=1)
