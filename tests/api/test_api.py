"""The Python API on real data: the same numbers as the commands, outcomes as values, tables and one-line descriptions."""

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import agiqa
from agiqa.errors import ConfigError, DataError, HeadError, SchemaError, UnknownName
from tests.cli.test_cli_own_parts import stored
from tests.extract.small_sets import write_set
from tests.extract.tiny_models import roomy, write_vision_checkpoint

SMALL = {"width": 8, "encoder": "gru", "epochs": 2, "batch_size": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def run(store, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return agiqa.train(str(store), str(path), projection="hidden", split="grouped", **SMALL)


class Way:
    """A data set with pictures, described and extracted by a tiny model in one process."""

    def __init__(self, folder):
        self.model = str(roomy(write_vision_checkpoint(folder / "model")))
        self.data = write_set(folder / "set", 12, images=True)
        self.images = sorted((self.data / "images").iterdir())
        given = {"model": self.model, "device": "cpu"}
        self.described = agiqa.describe(self.data, str(folder / "out.jsonl"), max_new_tokens=6, **given)
        talks = [str(self.described.out)]
        self.extracted = agiqa.extract(str(self.data), folder / "features", conversations=talks, **given)
        self.run = agiqa.train(self.extracted.store, folder / "run", **SMALL)
        self.options = {"run": self.run, "max_new_tokens": 6, "batch_size": 2, **given}


@pytest.fixture(scope="module")
def way(tmp_path_factory):
    return Way(tmp_path_factory.mktemp("way"))


def test_train_writes_what_the_command_writes(agiqa, run, store, tmp_path):
    options = [part for name, value in SMALL.items() for part in (f"--{name.replace('_', '-')}", value)]
    made = tmp_path / "run"
    assert agiqa("train", store, made, "--projection", "hidden", "--split", "grouped", *options).code == 0
    for name in ("predictions.csv", "parts.json"):
        assert (made / name).read_bytes() == (run.path / name).read_bytes()
    configs = [json.loads((path / "config.json").read_text()) for path in (made, run.path)]
    assert configs[0] == configs[1]


def test_settings_of_file_preset_and_start_reach_the_head(run, store, tmp_path):
    file = tmp_path / "head.yaml"
    file.write_text("head: {pooling: max, width: 16}\ntrain: {epochs: 1}\n")
    given = {**SMALL, "split": "grouped", "projection": "hidden"}
    del given["epochs"]
    trained = agiqa.train(store, tmp_path / "run", config=str(file), **given)
    assert (trained.head.pooling, trained.head.width, trained.train.epochs) == ("max", 8, 1)
    again = agiqa.train(store, tmp_path / "again", start=run.path, split="grouped", epochs=1, device="cpu")
    assert again.head == run.head
    assert again.config["start"]["run"] == "run"
    with pytest.raises(HeadError, match="exists and is not empty"):
        agiqa.train(store, run.path, **given)
    with pytest.raises(ConfigError, match="Did you mean 'encoder'"):
        agiqa.train(store, tmp_path / "new", encoderr="gru")
    with pytest.raises(TypeError, match="`also` joins stores"):
        agiqa.train(agiqa.store.union([agiqa.open_store(store)]), tmp_path / "new", also=[store])


def test_a_run_gives_its_tables_and_scores(run, store):
    rows, curves = run.predictions, run.curves
    with (run.path / "predictions.csv").open(newline="") as file:
        assert [row["name"] for row in rows] == [row["name"] for row in csv.DictReader(file)]
    assert {type(row["item"]) for row in rows} == {int}
    assert {type(row["predicted"]) for row in rows} == {float}
    assert [row["epoch"] for row in curves] == [1, 2]
    assert {row["stage"] for row in curves} == {"train"}
    items = [row["item"] for row in rows if row["split"] == "test"]
    scores = run.predict(str(store), items, device="cpu")
    assert scores == pytest.approx([row["predicted"] for row in rows if row["split"] == "test"], abs=1e-5)
    assert run.predict(agiqa.open_store(store), device="cpu").shape == (60,)
    assert run.evaluate(store, device="cpu")["srcc"] == run.metrics["test"]["srcc"]
    assert len(pd.DataFrame(curves)) == 2


def test_damaged_tables_of_a_run_are_named(run, tmp_path):
    from dataclasses import replace

    (tmp_path / "curves.csv").write_text("stage,epoch\ntrain,one\n")
    broken = replace(run, path=tmp_path)
    with pytest.raises(HeadError, match=r"curves\.csv cannot be read as a table of a training \(invalid literal"):
        broken.curves  # noqa: B018
    with pytest.raises(HeadError, match=r"predictions\.csv cannot be read"):
        broken.predictions  # noqa: B018


def test_a_store_gives_features_by_name_and_items_as_a_data_frame(store):
    opened = agiqa.open_store(str(store))
    name = opened.items.names[3]
    features = opened.features(name)
    assert features.dtype == np.float32
    assert np.array_equal(features, opened.read([3]).float32())
    assert features.shape == (opened.n_tokens[3], opened.width)
    with pytest.raises(UnknownName, match=f"No item is called '{name}x'. Did you mean '{name}'"):
        opened.features(f"{name}x")
    frame = opened.to_pandas()
    assert list(frame["name"]) == opened.items.names
    assert list(frame["tokens"]) == opened.n_tokens.tolist()
    assert np.array_equal(frame["mos_quality"], opened.items.labels["quality"])
    assert frame["mos_quality"].dtype == np.float64


def test_without_pandas_one_line_says_what_to_install(store, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ConfigError, match=r"pip install 'agiqa\[pandas\]'"):
        agiqa.open_store(store).to_pandas()


def test_things_say_what_they_are(store, run, way):
    opened = agiqa.open_store(store)
    assert repr(opened).startswith(f"<Store {store}: items 60, tokens {opened.n_tokens.sum()}, features hidden, ")
    assert repr(opened.items) == "<Items: items 60, MOS quality>"
    assert f"<b>Store {store}</b>" in opened._repr_html_()
    assert repr(run).startswith(f"<Run {run.path}: encoder gru, pooling mean, projection hidden, label quality, ")
    assert f"SRCC {run.metrics['test']['srcc']:.4f}" in repr(run)
    assert "<th style='text-align:left'>encoder</th>" in run._repr_html_()
    assert repr(agiqa.ENCODERS).startswith("<encoder registry: gru, lstm, ")
    data = agiqa.extract.load_data_set(way.data, variant="no_id", images=False)
    assert repr(data) == "<DataSet set: items 12, MOS quality, splits train 9, test 3, left out 0>"
    assert "ExtractionResult(store=<Store " in repr(way.extracted)
    assert len(repr(way.described)) < 500


def test_describe_fills_a_store_in_the_same_pass(way, tmp_path):
    given = {"model": way.model, "device": "cpu", "max_new_tokens": 6}
    result = agiqa.describe(way.data, tmp_path / "out.jsonl", store=tmp_path / "store", pool_tokens="mean", **given)
    assert [line["description"] for line in result.lines] == [line["description"] for line in way.described.lines]
    assert result.extraction.store.pooled == ("mean",)
    assert result.extraction.fill.reused == 12
    assert result.as_dict()["extraction"]["pooled"] == ["mean"]
    assert len(repr(result)) < 500


def test_scores_are_those_of_the_store(way):
    outcomes = list(agiqa.score(way.images, [f"a picture {k // 2}" for k in range(12)], **way.options))
    assert [type(one) for one in outcomes] == [agiqa.ImageScore] * 12
    assert [one.image for one in outcomes] == [str(path) for path in way.images]
    expected = way.run.predict(way.extracted.store, device="cpu")
    assert [one.mos for one in outcomes] == pytest.approx(expected.tolist(), abs=1e-4)
    lines = {line["name"]: line for line in map(json.loads, way.described.out.read_text().splitlines())}
    assert outcomes[0].description == lines[way.images[0].name]["response_0"]


def test_one_image_is_a_path_and_so_is_the_model(way):
    kept = {**way.options, "model": Path(way.model)}
    (first,) = agiqa.score(str(way.images[0]), "a picture 0", **kept)
    (again,) = agiqa.score(way.images[0], iter(["a picture 0"]), **kept)
    assert (first.image, first.mos) == (str(way.images[0]), again.mos)


def test_scores_come_batch_by_batch_and_failures_are_values(way, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    images = [way.images[0], str(broken), way.images[1], way.images[0], tmp_path / "absent.png"]
    scorer = agiqa.open_scorer(way.run, way.model, max_new_tokens=6, batch_size=2, device="cpu")
    items = agiqa.items_to_score(images, ["one", "two", " ", "another", "five"])
    outcomes = scorer.scores(items)
    first = next(outcomes)
    assert (first.image, first.prompt) == (str(way.images[0]), "one")
    done = [first, *outcomes]
    assert [isinstance(one, agiqa.NotScored) for one in done] == [False, True, True, False, True]
    assert str(broken) in done[1].reason
    assert done[2].reason == f"{way.images[1]}: has no prompt"
    assert "absent.png" in done[4].reason
    assert (done[3].image, done[3].prompt) == (first.image, "another")
    assert done[3].as_dict()["prompt"] == "another"


def test_the_table_of_the_data_set_has_the_prompts(way):
    by_table = agiqa.items_to_score(way.images, table=way.data / "data.csv")
    assert [item.prompt for item in by_table] == [f"a picture {k // 2}" for k in range(12)]
    with pytest.raises(ConfigError, match="2 prompts for 12 images"):
        agiqa.items_to_score(way.images, ["a", "b"])
    with pytest.raises(ConfigError, match="prompt"):
        agiqa.items_to_score(way.images)


def test_bad_arguments_are_refused_before_the_model_runs(way, tmp_path):
    with pytest.raises(ConfigError, match=r"out\.csv: descriptions are JSON lines"):
        agiqa.describe(way.data, tmp_path / "out.csv", model=way.model)
    with pytest.raises(TypeError, match="unexpected keyword argument 'cake'"):
        agiqa.describe(way.data, tmp_path / "out.jsonl", model=way.model, cake=1)
    with pytest.raises(ConfigError, match="encoding, variant: settings of a store"):
        agiqa.describe(way.data, tmp_path / "out.jsonl", model=way.model, variant="full", encoding="int8")
    with pytest.raises(ConfigError, match="A server hands out no hidden states"):
        agiqa.describe(way.data, tmp_path / "out.jsonl", model="m", server="http://localhost:9", store=tmp_path / "s")
    with pytest.raises(DataError, match="absent"):
        agiqa.extract(tmp_path / "absent", tmp_path / "store", model=way.model, device="cpu")
    with pytest.raises(TypeError, match="model"):
        agiqa.extract(way.data, tmp_path / "store")
    with pytest.raises(HeadError, match="is no run folder"):
        agiqa.load_run(str(tmp_path))
    with pytest.raises(ConfigError, match="own_settings: Input should be"):
        agiqa.train(way.extracted.store, tmp_path / "run", own_settings=3)
    with pytest.raises(SchemaError, match="absent is not a feature store"):
        agiqa.train(way.extracted.store, tmp_path / "run", also=str(tmp_path / "absent"))
