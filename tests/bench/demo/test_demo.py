"""The demo runs all steps and says what its numbers do not show."""

import csv
import json

import pytest
from scipy.stats import spearmanr

from agiqa.bench.demo.run import run_demo
from agiqa.errors import SettingsConflict
from agiqa.store import open_store, verify


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("demo") / "out", images=400, seed=0)


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


def test_store_is_sound_and_what_is_left_behind_says_what_it_is(demo):
    assert verify(open_store(demo.out / "demo.agiqa"), "numeric").sound
    results = json.loads((demo.out / "results.json").read_text())
    assert "RANDOM" in results["what_is_shown"]
    assert demo.picture.stat().st_size > 20_000


def test_a_second_run_keeps_what_is_there_and_refuses_other_settings(demo):
    again = run_demo(demo.out, images=400, seed=0)
    assert [row.scores for row in again.rows] == [row.scores for row in demo.rows]
    assert again.seconds < demo.seconds / 2
    with pytest.raises(SettingsConflict, match="seed"):
        run_demo(demo.out, images=400, seed=1)
