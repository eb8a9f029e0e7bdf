"""`--layers` and `--pool-tokens` from extracting to scoring, and what they refuse."""

import csv
import json

import numpy as np
import pytest

from agiqa.store import open_store
from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import refuse
from tests.extract.small_sets import write_set
from tests.extract.tiny_models import roomy, write_deep_checkpoint

POOLED = "mean@question,last"


class Way:
    """A data set, its model, and a store of layers and one of pooled rows."""

    def __init__(self, folder, agiqa):
        self.model = roomy(write_deep_checkpoint(folder / "model"))
        self.data = write_set(folder / "set", 16, images=True)
        self.given = ("--model", self.model, "--variant", "no_id", "--device", "cpu")
        self.layers, self.pooled = folder / "layers.agiqa", folder / "pooled.agiqa"
        self.extracted = [
            agiqa("extract", self.data, path, *self.given, *options, "--json").json
            for path, options in (
                (self.layers, ("--layers", "every 2")),
                (self.pooled, ("--layers", "-1,-2,0", "--pool-tokens", POOLED)),
            )
        ]
        self.images = sorted((self.data / "images").iterdir())[:4]


@pytest.fixture(scope="module")
def way(agiqa, tmp_path_factory):
    return Way(tmp_path_factory.mktemp("way"), agiqa)


def test_stores_say_what_they_hold(agiqa, way):
    assert [one["state"] for one in way.extracted] == ["complete", "complete"]
    assert agiqa("store", "info", way.layers, "--json").json["layers"] == ["2", "4", "last"]
    told = agiqa("store", "info", way.pooled, "--json").json
    assert (told["layers"], told["pooled"]) == (["0", "4", "last"], POOLED.split(","))
    for path in (way.layers, way.pooled):
        assert agiqa("store", "verify", path, "--level", "numeric").code == 0


@pytest.mark.parametrize(
    ("store", "options"),
    [
        ("layers", ("--layer", "2", "--projection", "hidden")),
        ("layers", ("--layer", "2+last", "--projection", "hidden")),
        ("layers", ("--layer", "last")),
        ("pooled", ("--layer", "0", "--projection", "hidden", "--encoder", "none", "--pooling", "mean@question")),
        ("pooled", ("--layer", "4+last", "--projection", "hidden", "--encoder", "none", "--pooling", "last")),
    ],
    ids=["a layer", "two layers", "the last layer", "a pooled row", "a pooled row of two layers"],
)
def test_score_extracts_what_the_head_reads(agiqa, way, store, options, tmp_path):
    """The same MOS as `predict` gives on the store."""
    run, path = tmp_path / "run", getattr(way, store)
    outcome = agiqa("train", path, run, *SMALL_HEAD, *options)
    assert outcome.code == 0, outcome.err
    assert agiqa("predict", run, path, tmp_path / "scores.csv").code == 0
    with (tmp_path / "scores.csv").open(newline="") as file:
        predicted = {row["name"]: float(row["predicted"]) for row in csv.DictReader(file)}
    prompts = ("--prompts", way.data / "data.csv")
    told = agiqa("score", *way.images, "--run", run, "--model", way.model, "--device", "cpu", *prompts, "--json").json
    for one in told["images"]:
        assert one["mos"] == pytest.approx(predicted[one["image"].rpartition("/")[2]], abs=2e-4)


def test_a_killed_run_goes_on_with_its_layers(agiqa, way, tmp_path):
    path = tmp_path / "killed.agiqa"
    command = ("extract", way.data, path, *way.given, "--layers", "0,4,last", "--pool-tokens", POOLED)
    outcome = agiqa.killed(*command, "--batch-size", 1, when=lambda: any((path / "commits").glob("[0-9]*.json")))
    assert outcome.code in (-9, 0)
    assert agiqa(*command, "--json").json["id"] == way.extracted[1]["id"]
    found, whole = open_store(path), open_store(way.pooled)
    for layer in whole.layers:
        one, other = (store.layer(layer).read(range(16)).float32() for store in (found, whole))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_what_a_store_would_take_counts_layers_and_rows(agiqa, way, tmp_path):
    new = tmp_path / "new.agiqa"
    options = ("--layers", "2,last", "--pool-tokens", POOLED, "--plan-only")
    planned = agiqa("extract", way.data, new, *way.given, *options, "--json").json["cost"]
    assert (planned["layers"], planned["pooled"]) == (["2", "last"], POOLED.split(","))
    assert planned["hidden"]["rows"] == 32
    assert planned["hidden"]["bytes_per_token"] == 2 * 32 * 4 + 5
    assert not new.exists()
    check = ("data", "check", way.data, "--variant", "no_id")
    published = agiqa(*check, "--layers", "8,16", "--json").json["cost"]
    assert "logits" not in published
    both, last = (agiqa(*check, "--layers", layers, "--json").json["cost"] for layers in ("16,last", "last"))
    assert both["hidden"]["bytes_per_token"] == 2 * 8192 + 5
    assert published["hidden"]["gpu_hours"] < last["hidden"]["gpu_hours"]
    text = agiqa(*check, "--layers", "all", "--pool-tokens", "mean@image").out
    assert "A store of each encoding of layers 0, 1, 2," in text
    assert "mean@image of every item" in text
    assert "bytes per row" in text


def test_the_help_and_a_file_of_options_know_them(agiqa, way, tmp_path):
    assert "--pool-tokens" in agiqa("extract", "--help").out
    (tmp_path / "o.yaml").write_text("layers: 2,last\npool-tokens: mean\n")
    found = agiqa(
        "extract", way.data, tmp_path / "s.agiqa", *way.given, "--options", tmp_path / "o.yaml", "--plan-only", "--json"
    )
    assert json.loads(found.out)["cost"]["layers"] == ["2", "last"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--layers", "9"), "--layers names '9', which is no layer of the model. It has 5"),
        (("--layers", "2-4"), "takes no ranges"),
        (("--pool-tokens", "mean@pixels"), "No role of tokens is called 'pixels'"),
        (("--pool-tokens", "mean@answer"), "003.png: it has no tokens for --pool-tokens mean@answer"),
        (("--pool-tokens", "last", "--keep-logits"), "--pool-tokens stores none"),
        (("--layers", "2", "--encoding", "logits"), "add `last` to --layers"),
    ],
)
def test_refusals_come_before_the_model_runs(agiqa, way, options, message, tmp_path):
    new = tmp_path / "new.agiqa"
    refuse(agiqa("extract", way.data, new, *way.given, *options), message)
    assert not new.exists()


def test_other_layers_need_another_store(agiqa, way):
    refuse(
        agiqa("extract", way.data, way.layers, *way.given), "was made with --layers 2,4,last, and you asked for last"
    )
    refuse(agiqa("train", way.layers, way.layers / "run", "--layer", "3"), "has no layer '3'", "agiqa extract --layers")
