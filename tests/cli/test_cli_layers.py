"""Layers and pooled rows on the command line, from extraction to the report."""

import csv
import json
from dataclasses import replace

import pytest
import yaml

from tests.cli.conftest import ITEMS, SMALL_HEAD
from tests.cli.refusals import refuse
from tests.extract.small_sets import write_set, write_talks

LINEAR = ("--width", 8, "--epochs", 2, "--batch-size", 8, "--device", "cpu")


@pytest.fixture(scope="module")
def layered(agiqa, example, tmp_path_factory):
    """States of tokens, of every layer that the tiny model has."""
    store = tmp_path_factory.mktemp("layers") / "tokens.agiqa"
    assert agiqa(*example.extract(store, "--layers", "0,1,last")).code == 0
    return store


@pytest.fixture(scope="module")
def pooled(agiqa, example, tmp_path_factory):
    store = tmp_path_factory.mktemp("layers") / "pooled.agiqa"
    options = ("--layers", "0,1,last", "--pool-tokens", "mean@question,mean@answer,last")
    assert agiqa(*example.extract(store, *options)).code == 0
    return store


def test_a_layer_is_trained_and_read_again_without_being_named(agiqa, layered, tmp_path):
    run = tmp_path / "run"
    trained = agiqa("train", layered, run, *SMALL_HEAD, "--layer", 1, "--json").json
    assert trained["layer"] == "1"
    evaluated = agiqa("evaluate", run, layered, "--json").json
    assert evaluated["srcc"] == trained["test"]["srcc"]
    assert agiqa("predict", run, layered, tmp_path / "scores.csv").code == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        told = {row["name"]: float(row["predicted"]) for row in csv.DictReader(file)}
    with (run / "predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            assert told[row["name"]] == pytest.approx(float(row["predicted"]), rel=1e-5)
    further = agiqa("train", layered, tmp_path / "further", *SMALL_HEAD, "--start", run, "--json").json
    assert further["layer"] == "1"


def test_the_last_layer_of_many_is_that_of_a_store_of_its_own(agiqa, layered, example, tmp_path):
    found = [
        agiqa("train", store, tmp_path / str(k), *SMALL_HEAD, "--json").json["test"]
        for k, store in enumerate((layered, example.store))
    ]
    assert found[0] == found[1]


def test_a_learned_mix_prints_its_weights(agiqa, layered, tmp_path):
    mixed = ("--layer", "0+1+last", "--layer-mix", "softmax")
    outcome = agiqa("train", layered, tmp_path / "run", *SMALL_HEAD, *mixed)
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("weights of the layers: ")]
    shares = [part.split() for part in line.removeprefix("weights of the layers: ").split(", ")]
    assert [name for name, _ in shares] == ["0", "1", "last"]
    assert sum(float(share) for _, share in shares) == pytest.approx(1, abs=2e-3)
    recorded = json.loads((tmp_path / "run" / "metrics.json").read_text())["layer_weights"]
    assert {name: f"{share:.3f}" for name, share in recorded.items()} == dict(shares)


def test_pooled_rows_are_read_by_name(agiqa, pooled, layered, tmp_path):
    run = tmp_path / "run"
    assert agiqa("train", pooled, run, *LINEAR, "--layer", 1).code == 0
    head = json.loads((run / "config.json").read_text())["head"]
    assert (head["encoder"], head["pooling"], head["projection"]) == ("none", "mean@answer", "hidden")
    on_rows, on_tokens = (agiqa("evaluate", run, store, "--json").json["plcc"] for store in (pooled, layered))
    assert on_rows == pytest.approx(on_tokens, abs=1e-3)
    outcome = agiqa("train", pooled, tmp_path / "gru", *SMALL_HEAD, "--pooling", "last")
    assert "note: the encoder 'gru' reads the 3 pooled rows of each item" in outcome.err


def test_what_cannot_be_read_is_refused_by_name(agiqa, layered, pooled, tmp_path):
    run = tmp_path / "run"
    refuse(agiqa("train", layered, run, *LINEAR, "--layer", 7), "no layer '7'", "0, 1, last", "agiqa extract --layers")
    vocabulary = ("--layer", 1, "--projection", "vocabulary")
    refuse(
        agiqa("train", layered, run, *LINEAR, *vocabulary), "'vocabulary'", "layer 1", "Take the projection 'hidden'"
    )
    refuse(
        agiqa("train", pooled, run, *LINEAR, "--pooling", "mean@image"), "mean@answer, mean@question", "--pool-tokens"
    )
    refuse(agiqa("train", layered, run, *LINEAR, "--layer", "1+1"), "names a layer", "twice")
    assert not run.exists()


def test_a_store_without_layers_is_refused_one(agiqa, example, tmp_path):
    refuse(agiqa("train", example.store, tmp_path / "run", *LINEAR, "--layer", 1), "no layer '1'", "Stored: last")


def test_a_grid_of_all_layers_makes_a_picture(agiqa, pooled, tmp_path):
    grid, out = tmp_path / "grid.yaml", tmp_path / "out"
    base = {"projection": "hidden", "width": 4, "epochs": 1, "device": "cpu"}
    grid.write_text(yaml.safe_dump({"base": base, "grid": {"layer": "all"}, "seeds": [0], "protocols": ["published"]}))
    table = agiqa("ablate", pooled, out, "--grid", grid, "--json").json["table"]
    assert [row["row"] for row in table if row["kind"] == "head"] == ["layer=0", "layer=1", "layer=last"]
    assert agiqa("report", out, "--pdf").code == 0
    pictures = {path.name for path in (out / "report" / "pictures").iterdir()}
    assert {f"layers-quality-published.{end}" for end in ("png", "svg", "pdf")} <= pictures
    assert "SRCC against layer" in (out / "report" / "index.html").read_text()


def test_a_transfer_reads_the_layer_of_both_stores(agiqa, example, pooled, tmp_path):
    other = tmp_path / "other.agiqa"
    options = ("--layers", "0,1", "--pool-tokens", "mean@answer,last")
    refuse(agiqa("transfer", pooled, pooled, tmp_path / "out", "--names", "a,b", "--layer", 1), "the same 40 images")
    data = write_set(tmp_path / "set", ITEMS, seed=1)
    assert agiqa(*replace(example, data=data, talks=write_talks(data)).extract(other, *options)).code == 0
    given = ("--names", "a,b", "--layer", 1, "--seeds", 1, "--shots", "", "--one-way")
    config = tmp_path / "few.yaml"
    config.write_text(yaml.safe_dump({"head": {"width": 4}, "train": {"epochs": 1, "device": "cpu"}}))
    done = agiqa("transfer", pooled, other, tmp_path / "transfer", *given, "--config", config, "--json")
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (tmp_path / "transfer" / "results.jsonl").read_text().splitlines()]
    assert {line["config"]["layer"] for line in lines} == {"1"}
