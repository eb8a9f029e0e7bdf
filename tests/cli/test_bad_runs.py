"""Heads that cannot be trained or applied: one clear message, exit 1, and no run that could pass for a good one."""

import csv
import json
import shutil

import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import extract, refuse, truncate
from tests.extract import tiny_models
from tests.extract.small_sets import read_table, write_table


def test_heads_that_cannot_read_a_store(agiqa, example, tmp_path):
    other = tmp_path / "other.agiqa"
    assert agiqa("store", "sketch", example.store, other, "--rank", 8).code == 0
    run, out = tmp_path / "run", tmp_path / "scores.csv"
    assert agiqa("train", example.sketch, run, *SMALL_HEAD, "--projection", "sketch").code == 0
    refuse(agiqa("evaluate", run, other), run, "basis", "agiqa store sketch")
    refuse(agiqa("predict", run, other, out), run, "basis")
    refuse(agiqa("predict", run, example.store, out), run, "'sketch'", "'hidden'")
    refuse(agiqa("predict", example.run, example.sketch, out), example.run, "'hidden'", "'sketch'")
    assert not out.exists()
    same = tmp_path / "same.agiqa"
    assert agiqa("store", "sketch", example.store, same, "--basis", example.sketch).code == 0
    assert agiqa("predict", run, same, out).code == 0


def test_a_head_of_another_model(agiqa, example, tmp_path):
    model = tiny_models.write_text_checkpoint(tmp_path / "model", seed=1)
    store = tmp_path / "s.agiqa"
    assert extract(agiqa, example.data, store, model).code == 0
    refuse(agiqa("evaluate", example.run, store), example.run, "language-model head", "same model")


def test_a_run_folder_that_exists(agiqa, example):
    before = {file.name: file.read_bytes() for file in example.run.iterdir()}
    refuse(agiqa("train", example.store, example.run, *SMALL_HEAD), example.run, "Choose another run folder")
    assert {file.name: file.read_bytes() for file in example.run.iterdir()} == before


def test_a_damaged_run_folder(agiqa, example, tmp_path):
    for name in ("config.json", "metrics.json", "head.safetensors"):
        run = tmp_path / name
        shutil.copytree(example.run, run)
        truncate(run / name)
        refuse(agiqa("evaluate", run, example.store), run, name)


def test_training_on_what_is_not_there(agiqa, example, tmp_path):
    run = tmp_path / "run"
    refuse(agiqa("train", example.store, run, "--label", "authenticity"), "'authenticity'", "Known: quality")
    unfinished = tmp_path / "unfinished.agiqa"
    assert agiqa(*example.extract(unfinished, "--part", "1/2")).code == 0
    refuse(agiqa("train", unfinished, run), unfinished, "incomplete", "Run the same `agiqa extract` again")
    refuse(agiqa("evaluate", example.run, unfinished), unfinished, "incomplete")
    refuse(agiqa("store", "sketch", unfinished, tmp_path / "sketch", "--rank", 4), unfinished, "incomplete")
    refuse(agiqa("train", example.store, run, "--width", 0), "width", "greater than or equal to 1")
    refuse(agiqa("train", example.sketch, run, "--projection", "vocabulary"), "the projection 'sketch' for a sketch")
    assert not run.exists()
    assert not (tmp_path / "sketch").exists()


@pytest.mark.parametrize("encoding", ["sketch", "logits"])
def test_a_head_reads_the_encoding_of_its_store_where_no_projection_is_named(agiqa, example, tmp_path, encoding):
    store, run = example.sketch, tmp_path / "run"
    if encoding == "logits":
        store = tmp_path / "logits.agiqa"
        assert agiqa("store", "convert", example.store, store, "--encoding", "logits").code == 0
    assert agiqa("train", store, run, *SMALL_HEAD, "--epochs", 1).code == 0
    assert json.loads((run / "config.json").read_text())["head"]["projection"] == encoding
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    grid.write_text("base: {width: 4, epochs: 1, device: cpu}\ngrid: {encoder: [none, gru]}\n")
    assert agiqa("ablate", store, out, "--grid", grid, "--train-workers", 1).code == 0
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {line["config"]["projection"] for line in lines} == {encoding}


@pytest.fixture
def relabelled(agiqa, example, tmp_path):
    """A function that gives a copy of the hidden store other rows: `change` gets and returns (name, MOS, split)."""

    def relabel(change):
        store = shutil.copytree(example.store, tmp_path / "relabelled.agiqa")
        rows = [change(number, row["name"], row["mos_quality"], row["split"]) for number, row in enumerate(talked)]
        table = write_table(tmp_path / "table", rows, ["name", "mos_quality", "split"]) / "data.csv"
        outcome = agiqa("store", "labels", store, table)
        assert outcome.code == 0, outcome.err
        return store

    talked = read_table(example.data)
    return relabel


def test_labels_that_are_all_the_same(agiqa, relabelled, tmp_path):
    store = relabelled(lambda number, name, mos, split: [name, 3.0, split])
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD)
    refuse(outcome, "training items have the label 3.0: there is nothing to learn")
    assert not (tmp_path / "run").exists()


def test_a_single_training_item(agiqa, relabelled, tmp_path):
    store = relabelled(lambda number, name, mos, split: [name, mos, "test" if number else "train"])
    refuse(agiqa("train", store, tmp_path / "run", *SMALL_HEAD), "two different prompts or more, and 1 items have 1")
    outcome = agiqa("train", store, tmp_path / "run", *SMALL_HEAD, "--validation", 0)
    refuse(outcome, f"{store}: the training part is a single item")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["relabelled.agiqa", "table"]


def test_a_head_without_validation_items(agiqa, example, tmp_path):
    trained = agiqa("train", example.store, tmp_path / "run", *SMALL_HEAD, "--validation", 0, "--json")
    assert trained.json["validation"] is None
    assert trained.json["chosen_by"] == "last epoch, as there are no validation items"
    refuse(agiqa("evaluate", tmp_path / "run", example.store, "--on", "validation"), "no item", "'validation'")


def test_a_split_that_leaks_prompts_is_warned_of_with_its_size(agiqa, example, tmp_path):
    outcome = agiqa("train", example.store, tmp_path / "run", *SMALL_HEAD)
    assert outcome.code == 0
    assert "warning: 10 of 10 test items have a prompt that also occurs in training" in outcome.err


def test_fp16_on_a_cpu(agiqa, example, tmp_path):
    outcome = agiqa("train", example.store, tmp_path / "run", *SMALL_HEAD, "--precision", "fp16")
    refuse(outcome, "'fp16' needs a CUDA device", "'bf16' or 'fp32'")


def test_predictions_cannot_replace_a_folder_or_go_nowhere(agiqa, example, tmp_path):
    refuse(agiqa("predict", example.run, example.store, tmp_path / "no" / "scores.csv"), tmp_path / "no")
    good = tmp_path / "scores.csv"
    assert agiqa("predict", example.run, example.store, good).code == 0
    with good.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 40
    assert [path.name for path in tmp_path.iterdir()] == ["scores.csv"]
