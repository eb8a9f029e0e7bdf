"""`agiqa train`: protocols, few items, a head to start from, and the published way to choose an epoch."""

import csv
import json
import shutil
from functools import partial

import pytest

from tests.cli.conftest import ITEMS, SMALL_HEAD
from tests.cli.refusals import refuse
from tests.cli.test_cli_resuming import Saves, numbers
from tests.command_line import in_time
from tests.extract.small_sets import read_table, write_table

GENERATORS = ("DALLE2", "Midjourney", "SD1.5")


@pytest.fixture(scope="module")
def generated(agiqa, example, tmp_path_factory):
    """A copy of the example's store whose items have generators."""
    folder = tmp_path_factory.mktemp("generated")
    store = shutil.copytree(example.store, folder / "hidden.agiqa")
    rows = [[row["name"], GENERATORS[k % 3]] for k, row in enumerate(read_table(example.data))]
    table = write_table(folder / "table", rows, ["name", "generator"]) / "data.csv"
    assert agiqa("store", "labels", store, table).code == 0
    return store


def held_out_names(run):
    with (run / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return [row["name"] for row in csv.DictReader(file) if row["split"] == "test"]


def test_the_folds_test_every_item_once(agiqa, example, tmp_path):
    found = []
    for fold in range(2):
        run = tmp_path / str(fold)
        outcome = agiqa(
            *(
                "train",
                example.store,
                run,
                *SMALL_HEAD,
                "--split",
                "folds",
                "--folds",
                2,
                "--fold",
                fold,
                "--json",
                "--validation",
                0,
            )
        )
        assert outcome.json["split"]["leak"]["share"] == 0
        assert outcome.json["warnings"] == []
        found += held_out_names(run)
    assert sorted(found) == [row["name"] for row in read_table(example.data)]


def test_a_generator_is_held_out_and_few_others_are_used(agiqa, example, generated, tmp_path):
    arguments = ("train", generated, tmp_path / "run", *SMALL_HEAD, "--split", "generator")
    few = ("--held-out", "Midjourney", "--training-items", 9, "--validation", 0)
    split = agiqa(*arguments, *few, "--json").json["split"]
    assert held_out_names(tmp_path / "run") == [row["name"] for row in read_table(example.data)][1::3]
    assert (split["name"], split["train"], split["test"], split["left_out"]) == ("generator", 9, 13, ITEMS - 22)


def test_other_few_items_are_drawn_beside_the_same_test_part(agiqa, example, tmp_path):
    few = (*SMALL_HEAD, "--split", "grouped", "--training-items", 9, "--validation", 0, "--epochs", 1)
    drawn = []
    for seed in (1, 2):
        run = tmp_path / str(seed)
        assert agiqa("train", example.store, run, *few, "--training-seed", seed).code == 0
        drawn.append(json.loads((run / "parts.json").read_text()))
    assert drawn[0]["test"] == drawn[1]["test"]
    assert len(drawn[0]["train"]) == len(drawn[1]["train"]) == 9
    assert drawn[0]["train"] != drawn[1]["train"]


@pytest.mark.parametrize(
    ("options", "mentions"),
    [
        (("--split", "generator", "--held-out", "Midjorney"), ("Did you mean 'Midjourney'?", "DALLE2")),
        (("--split", "generator"), ("`held_out`", "DALLE2, Midjourney, SD1.5")),
        (("--held-out", "DALLE2"), ("`held_out` is 'DALLE2'", "split 'generator'")),
        (("--split", "folds", "--fold", 5), ("`fold` is 5", "of 5 `folds`")),
        (("--fold", 1), ("`fold` is 1", "split 'folds'")),
        (("--split", "folds", "--folds", 21), ("21 folds need as many different prompts", "have 20")),
        (("--training-items", 1000), ("`training_items` is 1000", "Lower it")),
        (("--training-items", 1), ("two different prompts or more", "Set `validation` to 0")),
    ],
    ids=lambda value: " ".join(map(str, value)) if str(value[0]).startswith("--") else "",
)
def test_protocols_that_cannot_be_had_are_refused(agiqa, generated, tmp_path, options, mentions):
    refuse(agiqa("train", generated, tmp_path / "run", *SMALL_HEAD, *options), *mentions)
    assert not (tmp_path / "run").exists()


def test_a_store_without_generators_is_told_how_to_get_them(agiqa, example, tmp_path):
    outcome = agiqa("train", example.store, tmp_path / "run", "--split", "generator", "--held-out", "DALLE2")
    refuse(outcome, "'000.png' has no generator", "agiqa store labels")


def test_a_head_starts_from_that_of_a_run_with_its_settings(agiqa, example, tmp_path):
    started = tmp_path / "started"
    training = ("--epochs", 1, "--lr", 1e-30, "--weight-decay", 0, "--device", "cpu")
    outcome = agiqa("train", example.store, started, "--start", example.run, *training, "--json")
    assert "10 of 10 test items have a prompt that occurs in the training of run, the head that" in outcome.err
    config, before = (json.loads((run / "config.json").read_text()) for run in (started, example.run))
    assert config["head"] == before["head"]
    assert (config["start"]["run"], config["start"]["store"]) == ("run", before["features"]["store"])
    assert (started / "head.safetensors").read_bytes() == (example.run / "head.safetensors").read_bytes()
    outcome = agiqa("train", example.store, tmp_path / "other", "--start", example.run, "--width", 16)
    refuse(outcome, example.run, tmp_path / "other", "width: 8 there, 16 here")
    refuse(agiqa("train", example.sketch, tmp_path / "other", "--start", example.run), "'hidden'", "'sketch'")
    outcome = agiqa("train", example.store, tmp_path / "other", "--start", example.data)
    refuse(outcome, example.data, "is no run folder of a trained head")


def test_the_best_epoch_on_test_is_told_beside_the_honest_number_and_its_training_can_be_killed(
    agiqa, example, tmp_path
):
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    options = (*SMALL_HEAD, "--epochs", 8, "--paper-compatible", "--start", example.run, "--save-seconds", 0)
    whole = agiqa("train", example.store, undisturbed, *options, "--json")
    told = whole.json["paper_compatible"]
    assert told["bias"]["srcc"] == told["srcc"] - whole.json["test"]["srcc"] >= 0
    assert (
        f"warning: paper-compatible: the best epoch on the test part itself ({told['epoch']}) has test SRCC"
        in whole.err
    )
    kill = partial(agiqa.killed, "train", example.store, run, *options)
    assert in_time(lambda: kill(when=Saves(run, 3)), run).code == -9
    last = agiqa("train", example.store, run, *options)
    assert "going on after epoch" in last.err
    assert numbers(run) == numbers(undisturbed)
