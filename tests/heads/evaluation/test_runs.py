"""Run folders: what a saved head predicts, and which stores it refuses."""

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from agiqa.errors import ConfigError, DataError, HeadError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, predict, train_head, training_progress
from agiqa.heads.data.splits import make_partition
from agiqa.heads.sweeps.head_jobs import with_notes
from tests.heads.conftest import MemoryStore

QUICK = TrainConfig(split="grouped", epochs=1, lr=1e-2)


@pytest.fixture(params=[("sketch", "sketch"), ("vocabulary", "hidden")], ids=str)
def trained(request, make_store, tmp_path: Path):
    projection, encoding = request.param
    store = make_store(60, encoding=encoding)
    head = HeadConfig(projection=projection, encoder="gru", width=8)
    return store, train_head(store, tmp_path / "run", head=head, train=QUICK)


def test_a_loaded_run_repeats_its_own_metrics(trained):
    store, run = trained
    again = load_run(run.path)
    assert again.head == run.head
    assert again.train == run.train
    for part in ("test", "validation"):
        result = evaluate(again, store, part)
        assert result["n"] == run.metrics[part]["n"]
        assert result["srcc"] == pytest.approx(run.metrics[part]["srcc"], abs=1e-6)
    assert evaluate(again, store, "train")["n"] == run.metrics["split"]["train"]
    assert evaluate(again, store, "all")["n"] == 60


def test_predictions_within_inference_mode_are_the_same_and_leave_a_head_that_can_be_trained(
    make_store, tmp_path: Path
):
    store = make_store(40, encoding="hidden", prompts=20)
    train = TrainConfig(split="grouped", epochs=1, device="cpu", threads=1)
    run = train_head(store, tmp_path / "run", head=HeadConfig(encoder="none", width=4), train=train)
    expected = predict(run, store, device="cpu")
    with torch.inference_mode():
        assert predict(run, store, device="cpu").tolist() == expected.tolist()
        head = run.load_head(store, device=torch.device("cpu"))
    assert not any(weight.is_inference() for weight in head.parameters())


def test_predictions_keep_the_asked_order_in_any_batch(trained):
    store, run = trained
    items = np.random.default_rng(0).permutation(60)
    everything = predict(run, store)
    assert predict(run, store, items, batch_size=7) == pytest.approx(everything[items], abs=1e-5)
    assert predict(run, store, []).shape == (0,)


@pytest.mark.parametrize(
    "items", [[60], [-1], np.array([1.5]), np.array(["image_0.png"]), np.array([True, False]), np.array([[0]])]
)
def test_items_that_are_no_positions_are_refused(trained, items):
    store, run = trained
    with pytest.raises(DataError, match="whole numbers from 0 to 59"):
        predict(run, store, items)


def test_another_data_set_with_the_same_features_is_read(trained, make_store):
    store, run = trained
    other = make_store(25, published=True, seed=9, encoding=store.encoding, weights=store.weights, id="other")
    assert evaluate(run, other)["n"] == 5
    assert evaluate(run, other, "all")["n"] == 25
    with pytest.raises(DataError, match=r"split 'val'.*test \(5\), train \(20\)"):
        evaluate(run, other, "validation")
    with pytest.raises(UnknownName, match="Did you mean 'test'"):
        evaluate(run, other, "tset")


def test_the_parts_of_a_run_do_not_move_when_the_split_column_does(make_store, tmp_path: Path):
    store = make_store(60, published=True)
    head = HeadConfig(projection="sketch", encoder="none", width=8)
    run = train_head(store, tmp_path / "run", head=head, train=QUICK.model_copy(update={"split": "published"}))
    items = replace(store.items, splits=store.items.splits[::-1])
    assert evaluate(run, replace(store, items=items), "test")["srcc"] == run.metrics["test"]["srcc"]
    assert evaluate(run, store, "val")["srcc"] == run.metrics["validation"]["srcc"]
    trained = {name for name, _ in run.parts().pairs["train"] | run.parts().pairs["validation"]}
    assert trained == {
        name for name, split in zip(store.items.names, store.items.splits, strict=True) if split != "test"
    }


@pytest.mark.parametrize(
    ("content", "said"),
    [('{"train": [], "test": []}', "'validation' is missing"), ('{"train": [7], "validation": [], "test": []}', "int")],
)
def test_damaged_parts_are_told_with_their_file(trained, content, said):
    store, run = trained
    (run.path / "parts.json").write_text(content)
    with pytest.raises(HeadError, match=rf"run/parts\.json is not what a training writes .*{said}"):
        evaluate(load_run(run.path), store)


def test_items_of_the_training_are_told_when_a_copy_is_evaluated(make_store, tmp_path: Path):
    store = make_store(60, published=True, prompts=20)
    head = HeadConfig(projection="sketch", encoder="none", width=8)
    run = train_head(store, tmp_path / "run", head=head, train=QUICK)
    held_out = make_partition(store, QUICK).test
    clean = [f"{'test' if k in held_out else 'train'}" for k in range(60)]
    copy = replace(store, id="copy", items=replace(store.items, splits=clean))
    assert evaluate(run, copy)["warnings"] == []
    leaking = replace(copy, items=replace(store.items, splits=["test"] * 60))
    warnings = evaluate(run, leaking)["warnings"]
    trained = 60 - len(held_out)
    assert warnings == [
        f"{trained} of 60 items were in the training of this head.",
        f"{trained} of 60 items have a prompt that occurs in its training.",
    ]


def test_features_of_another_meaning_are_refused_with_both_sides(trained):
    store, run = trained
    other = {"encoding": "hidden" if store.encoding == "sketch" else "sketch", "weights": store.weights + 1}
    with pytest.raises(HeadError, match=f"reads {store.encoding!r} features, and the store holds"):
        predict(run, replace(store, encoding=other["encoding"]))
    with pytest.raises(
        HeadError, match=f"{store.lm_head_sha256}.*\n?.*{replace(store, weights=other['weights']).lm_head_sha256}"
    ):
        predict(run, replace(store, weights=other["weights"]))
    if store.encoding == "sketch":
        with pytest.raises(HeadError, match=r"basis-a.*basis-b.*agiqa store sketch STORE OUT --basis"):
            predict(run, replace(store, basis_id="basis-b"))


def test_folders_that_are_no_runs_are_refused(trained, tmp_path: Path):
    _, run = trained
    with pytest.raises(HeadError, match="no run folder"):
        load_run(tmp_path / "absent")
    config = json.loads((run.path / "config.json").read_text())
    (run.path / "config.json").write_text(json.dumps({**config, "version": 3}))
    with pytest.raises(HeadError, match=r"agiqa.head v3; this agiqa reads agiqa.head v1"):
        load_run(run.path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: {**config, "features": None}, "is not what a training writes .*train the head anew"),
        (lambda config: {k: v for k, v in config.items() if k != "features"}, r"'features' is missing\)\. Bring"),
        (lambda config: {k: v for k, v in config.items() if k != "train"}, r"'train' is missing"),
        (lambda config: {**config, "head": ["gru"]}, "is not what a training writes"),
        (lambda config: {**config, "features": {}}, "is missing"),
        (list, "holds no JSON object"),
        (lambda config: {**config, "head": {**config["head"], "encoder": "my-gru"}}, "'my-gru'.*--import MODULE"),
        (lambda config: {**config, "head": {**config["head"], "depth": 3}}, "'depth'.*trained by agiqa"),
    ],
)
def test_a_config_that_no_training_wrote_is_refused_with_its_file(make_store, tmp_path: Path, change, said):
    head = HeadConfig(projection="sketch", encoder="none", width=4)
    run = train_head(make_store(40), tmp_path / "run", head=head, train=QUICK)
    (run.path / "config.json").write_text(json.dumps(change(dict(run.config))))
    with pytest.raises(HeadError, match=f"run.*config.json.*{said}"):
        load_run(run.path)


class PlacedStore(MemoryStore):
    """A store that is somewhere."""

    location = "s3://bucket/placed.agiqa"


def test_messages_name_a_store_by_its_place_and_not_by_its_id(make_store, tmp_path: Path):
    made = make_store(40, id="0" * 64)
    made.items.labels["flat"] = np.ones(40)
    placed = PlacedStore(**vars(made))
    head = HeadConfig(projection="sketch", encoder="none", width=4)

    def told(source, **settings):
        with pytest.raises((DataError, UnknownName, HeadError, ConfigError)) as refused:
            train_head(source, tmp_path / "run", head=head, train=TrainConfig(epochs=1, **settings))
        return with_notes(refused.value)

    for settings in [
        {"split": "published"},
        {"split": "folds", "folds": 50},
        {"split": "generator", "held_out": "DALLE2"},
        {"split": "grouped", "label": "correspondence"},
        {"split": "grouped", "label": "flat"},
        {"split": "grouped", "training_items": 1, "validation": 0.0},
    ]:
        assert placed.location in told(placed, **settings)
        assert placed.id not in told(placed, **settings)
        assert made.id in told(made, **settings)
    run = train_head(placed, tmp_path / "run", head=head, train=QUICK)
    with pytest.raises(HeadError, match=r"cannot read the store s3://bucket/placed\.agiqa: "):
        predict(run, replace(placed, encoding="hidden"))


def test_damaged_weights_are_refused(trained):
    store, run = trained
    (run.path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(HeadError, match="does not hold the weights"):
        predict(run, store)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(make_store, tmp_path: Path, terminal):
    out = StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    head = HeadConfig(projection="sketch", encoder="none", width=4)
    train_head(make_store(40), tmp_path / "run", head=head, train=QUICK, progress=training_progress(console))
    assert "epoch 1/" in out.getvalue()
    assert ": loss" in out.getvalue()
    assert ("\x1b[" in out.getvalue()) is terminal
