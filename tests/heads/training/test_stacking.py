"""Stacks of trained runs: what they predict, what they contain, and what cannot be stacked."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError, HeadError
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, stack_runs, train_head
from agiqa.heads.closed.stack import Mixture
from tests.heads.label_stores import BOTH, with_correspondence

CONFIG = TrainConfig(split="grouped", epochs=2, lr=1e-2, device="cpu", validation=0.3)
GRU = HeadConfig(projection="sketch", encoder="gru", width=8)


@pytest.fixture
def store(make_store):
    return with_correspondence(make_store(200, prompts=80))


@pytest.fixture
def runs(store, tmp_path):
    """Two seeds of a network, a closed form, and a network with one."""
    heads = {"a": GRU, "b": GRU, "ridge": HeadConfig(encoder="ridge"), "init": GRU.model_copy(update={"init": "ridge"})}
    return [
        train_head(store, tmp_path / name, head=head, train=CONFIG.model_copy(update={"seed": int(name == "b")}))
        for name, head in heads.items()
    ]


def column(run, part, name="predicted"):
    return np.array([row[name] for row in run.predictions if row["split"] == part])


def test_a_stack_mixes_validation_predictions_and_stands_alone(store, runs, tmp_path):
    stack = stack_runs(runs, tmp_path / "stack", store)
    validation = np.stack([column(run, "validation") for run in runs], axis=1)
    mixture = Mixture.fit(validation, column(runs[0], "validation", "mos"))
    test = mixture.of(np.stack([column(run, "test") for run in runs], axis=1))
    assert column(stack, "test") == pytest.approx(test)
    assert column(stack, "validation") != pytest.approx(mixture.of(validation), abs=1e-6)  # those of other prompts
    assert column(stack, "validation") == pytest.approx(mixture.of(validation), abs=0.5)
    for run in runs:
        shutil.rmtree(run.path)
    again = load_run(stack.path)
    items = [row["item"] for row in again.predictions if row["split"] == "test"]
    assert again.predict(store, items) == pytest.approx(test, abs=1e-5)
    assert evaluate(again, store)["srcc"] == pytest.approx(stack.metrics["test"]["srcc"])
    assert stack.config["closed"]["weights"]["quality"] == pytest.approx(mixture.weights)
    assert not list(tmp_path.glob(".stack*"))


def test_equal_weights_are_the_mean_and_so_are_those_of_few_validation_items(store, runs, tmp_path):
    stack = stack_runs(runs[:2], tmp_path / "mean", store, weights="equal")
    assert column(stack, "test") == pytest.approx((column(runs[0], "test") + column(runs[1], "test")) / 2)
    few = CONFIG.model_copy(update={"validation": 0.05})
    small = [
        train_head(store, tmp_path / f"few {seed}", head=GRU, train=few.model_copy(update={"seed": seed}))
        for seed in (0, 1)
    ]
    assert stack_runs(small, tmp_path / "few", store).config["closed"]["weights"]["quality"] == [0.5, 0.5]


def test_stacks_of_several_labels_and_of_stacks(store, tmp_path):
    config = CONFIG.model_copy(update={"label": BOTH})
    runs = [
        train_head(store, tmp_path / name, head=HeadConfig(encoder=name), train=config) for name in ("ridge", "krr")
    ]
    stack = stack_runs(runs, tmp_path / "stack", store)
    twice = stack_runs([stack, runs[0]], tmp_path / "twice", store, weights="equal")
    assert twice.predict(store) == pytest.approx((stack.predict(store) + runs[0].predict(store)) / 2)
    assert set(stack.metrics["test"]) == {"quality", "correspondence"}


def test_what_cannot_be_stacked_is_said(store, runs, tmp_path):
    with pytest.raises(ConfigError, match="two runs or more, each once"):
        stack_runs([runs[0], load_run(runs[0].path)], tmp_path / "bad", store)
    other = train_head(store, tmp_path / "other", head=GRU, train=CONFIG.model_copy(update={"split_seed": 1}))
    with pytest.raises(HeadError, match="other items or labels"):
        stack_runs([runs[0], other], tmp_path / "bad", store)
    about = train_head(store, tmp_path / "about", head=GRU, train=CONFIG.model_copy(update={"label": "correspondence"}))
    with pytest.raises(HeadError, match=r"predicts correspondence, and .* quality"):
        stack_runs([runs[0], about], tmp_path / "bad", store)
    with pytest.raises(HeadError, match="was not trained on"):
        stack_runs(runs, tmp_path / "bad", replace(store, id="elsewhere"))
    labels = {name: values + 1 for name, values in store.items.labels.items()}
    with pytest.raises(HeadError, match="other items or labels"):
        stack_runs(runs, tmp_path / "bad", replace(store, items=replace(store.items, labels=labels)))
    (runs[0].path / "predictions.csv").write_text("name,prompt,split,item,mos,predicted\n")
    with pytest.raises(HeadError, match=r"predictions\.csv does not hold the validation items"):
        stack_runs(runs, tmp_path / "bad", store)
    assert not (tmp_path / "bad").exists()


def test_a_stack_without_a_member_says_so(store, runs, tmp_path):
    stack = stack_runs(runs[:2], tmp_path / "stack", store)
    shutil.rmtree(stack.path / "members" / "1")
    with pytest.raises(HeadError, match="no run folder"):
        load_run(stack.path).predict(store)
    config = json.loads((stack.path / "config.json").read_text())
    del config["closed"]
    (stack.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match="does not describe a stack of runs"):
        load_run(stack.path).predict(store)
