"""Heads that start from another run's: they predict what it predicts, learn from there, and refuse what does not fit."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from agiqa.errors import HeadError
from agiqa.heads import HeadConfig, HeadJob, TrainConfig, evaluate, predict, train_head, train_heads
from agiqa.heads.data.splits import make_partition
from agiqa.heads.settings.config import load_settings
from agiqa.heads.training.resuming import state_folder
from tests.heads.label_stores import with_correspondence
from tests.heads.training.test_resuming import BreakingProgress, Broken, numbers
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

GRU = HeadConfig(projection="sketch", encoder="gru", width=16)
FIRST = TrainConfig(split="grouped", epochs=3, lr=1e-2, batch_size=16, device="cpu", save_seconds=0)
WEIGHTS = np.ones((40, 4), np.float32)
"""The language-model head of every store here; a sketch is not read through it."""
STILL = FIRST.model_copy(update={"epochs": 1, "lr": 1e-30, "weight_decay": 0.0, "split_seed": 5})


def other_set(make_store, n=50, **changes):
    """A data set of its own, whose MOS is on another scale."""
    store = make_store(n, seed=9, id="other", **{"weights": WEIGHTS, **changes})
    store.items.names[:] = [f"other-{name}" for name in store.items.names]
    store.items.prompts[:] = [f"other {prompt}" for prompt in store.items.prompts]
    return replace(store, items=replace(store.items, labels={"quality": 20 * store.items.labels["quality"] - 3}))


def weights_sha(run):
    return hashlib.sha256((run.path / "head.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def first(make_store, tmp_path: Path):
    """A head of 16 channels on a store of 120 items."""
    return train_head(make_store(120, weights=WEIGHTS), tmp_path / "first", head=GRU, train=FIRST)


@pytest.mark.parametrize(
    ("head", "encoding"),
    [
        (GRU, "sketch"),
        (HeadConfig(projection="vocabulary", encoder="xlstm", width=8, blocks=2, num_heads=2), "hidden"),
        (HeadConfig(projection="hidden", encoder="none", width=8, pooling="attention", standardise=False), "hidden"),
    ],
    ids=["sketch", "vocabulary", "hidden"],
)
@pytest.mark.parametrize("refit", [False, True])
def test_before_the_first_step_it_predicts_what_the_run_predicts(make_store, tmp_path: Path, head, encoding, refit):
    store = make_store(60, encoding=encoding)
    run = train_head(store, tmp_path / "first", head=head, train=FIRST)
    target = other_set(make_store, encoding=encoding, weights=store.weights)
    config = STILL.model_copy(update={"refit": refit})
    started = train_head(target, tmp_path / "started", train=config, start=run)
    assert started.head == head
    before, after = (load_file(one.path / "head.safetensors") for one in (run, started))
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert np.array_equal(values, after[name]), name
    assert predict(started, target).tolist() == predict(run, target).tolist()
    test = make_partition(target, config).test
    alone = evaluate(
        run, replace(target, items=replace(target.items, splits=["test" if k in test else None for k in range(50)]))
    )
    assert started.metrics["test"]["srcc"] == alone["srcc"]
    assert started.metrics["test"]["rmse"] == pytest.approx(alone["rmse"])


def test_few_items_teach_more_to_a_head_that_knows_another_data_set(make_store, tmp_path: Path):
    run = train_head(
        make_store(400, weights=WEIGHTS), tmp_path / "first", head=GRU, train=FIRST.model_copy(update={"epochs": 12})
    )
    target = make_store(200, seed=9, id="other", weights=WEIGHTS)
    config = FIRST.model_copy(update={"training_items": 15, "validation": 0.0})
    started = train_head(target, tmp_path / "started", train=config, start=run)
    fresh = train_head(target, tmp_path / "fresh", head=GRU, train=config)
    assert started.metrics["test"]["srcc"] > 0.7 > fresh.metrics["test"]["srcc"]
    assert started.metrics["split"] == fresh.metrics["split"]


def test_the_run_says_where_it_started(first, make_store, tmp_path: Path):
    config = FIRST.model_copy(update={"validation": 0.0})
    started = train_head(other_set(make_store), tmp_path / "deep" / "started", train=config, start=first)
    weights = (first.path / "head.safetensors").read_bytes()
    said = {"run": "first", "store": "memory", "sha256": hashlib.sha256(weights).hexdigest()}
    assert started.config["start"] == said
    assert first.config["start"] is None
    assert started.metrics["warnings"] == []


def test_test_items_that_the_first_training_had_seen_are_told(first, make_store, tmp_path: Path):
    store, config = make_store(120, weights=WEIGHTS), FIRST.model_copy(update={"split_seed": 1, "validation": 0.0})
    test, before = make_partition(store, config).test, make_partition(store, FIRST)
    seen = len(np.intersect1d(test, np.concatenate([before.train, before.validation])))
    found = train_head(store, tmp_path / "started", train=config, start=first).metrics["warnings"]
    assert 0 < seen < len(test) == 24
    assert found == [
        f"{seen} of 24 test items were in the training of first, the head that this one starts from.",
        f"{seen} of 24 test items have a prompt that occurs in the training of first, the head that this one starts from.",
    ]


def test_another_label_is_learned_and_told_and_several_must_be_the_same(first, make_store, tmp_path: Path):
    store = with_correspondence(other_set(make_store))
    config = FIRST.model_copy(update={"label": "correspondence", "validation": 0.0})
    found = train_head(store, tmp_path / "one", train=config, start=first).metrics["warnings"]
    assert found == ["first, the head that this one starts from, learned quality, not correspondence."]
    for label in ("quality+correspondence", "correspondence+quality"):
        both = train_head(store, tmp_path / label, head=GRU, train=FIRST.model_copy(update={"label": label}))
        with pytest.raises(HeadError, match=rf"label: '{label.replace('+', '[+]')}' there, 'quality' here"):
            train_head(store, tmp_path / "new", train=FIRST, start=both)
    turned = FIRST.model_copy(update={"label": "quality+correspondence"})
    with pytest.raises(HeadError, match=r"label: 'correspondence\+quality' there, 'quality\+correspondence' here"):
        train_head(store, tmp_path / "new", train=turned, start=both)
    assert not (tmp_path / "new").exists()


def test_a_head_of_other_settings_or_features_is_refused_with_both_named(first, make_store, tmp_path: Path):
    run, target = tmp_path / "new", other_set(make_store)
    with pytest.raises(HeadError, match=r"new cannot start from the head .*first, which is another") as caught:
        train_head(target, run, head=GRU.model_copy(update={"width": 8, "layers": 2}), train=FIRST, start=first)
    assert "width: 16 there, 8 here\n  layers: 1 there, 2 here" in str(caught.value)
    with pytest.raises(
        HeadError, match="first cannot read the store other: it was trained on the sketch basis basis-a"
    ):
        train_head(replace(target, basis_id="basis-b"), run, train=FIRST, start=first)
    with pytest.raises(HeadError, match="reads 'sketch' features"):
        train_head(other_set(make_store, encoding="hidden"), run, train=FIRST, start=first)
    (first.path / "head.safetensors").write_bytes(b"no weights")
    with pytest.raises(HeadError, match=r"head\.safetensors does not hold the weights"):
        train_head(target, run, train=FIRST, start=first)
    (first.path / "head.safetensors").unlink()
    with pytest.raises(HeadError, match=r"head\.safetensors cannot be read"):
        train_head(target, run, train=FIRST, start=first)
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


def test_one_that_was_broken_off_goes_on_and_from_no_other_start(first, make_store, tmp_path: Path):
    target, run = other_set(make_store), tmp_path / "run"
    config = FIRST.model_copy(update={"refit": True, "ema": 0.9})
    expected = numbers(train_head(target, tmp_path / "whole", train=config, start=first).path)
    for place in ({"step": 2}, {"epoch": 2}, {"epoch": 4}):
        with pytest.raises(Broken):
            train_head(target, run, train=config, start=first, progress=BreakingProgress(**place))
        assert numbers(train_head(target, run, train=config, start=first).path) == expected
        run.rename(tmp_path / f"done {place}")
    with pytest.raises(Broken):
        train_head(target, run, train=config, start=first, progress=BreakingProgress(epoch=2))
    other = train_head(
        make_store(120, weights=WEIGHTS), tmp_path / "other", head=GRU, train=FIRST.model_copy(update={"seed": 1})
    )
    for start in (other, None):
        with pytest.raises(HeadError, match=f"start: kept '{weights_sha(first)}', asked for"):
            train_head(target, run, head=GRU, train=config, start=start)
    moved = first.path.rename(tmp_path / "moved")
    assert state_folder(run).exists()
    assert numbers(train_head(target, run, train=config, start=replace(first, path=moved)).path) == expected


def test_a_sweep_starts_heads_and_tells_those_that_are_there(tmp_path: Path):
    contents = [make_content([20 + (7 * k + seed) % 20 for k in range(40)], seed=seed) for seed in range(2)]
    stores = []
    for seed, content in enumerate(contents):
        items = replace(content.items, labels={"quality": np.random.default_rng(seed).uniform(0, 5, 40)})
        content = replace(content, items=items, lm_head=contents[0].lm_head)
        stores.append(write_store(tmp_path / f"{seed}.agiqa", content))
    head = HeadConfig(projection="hidden", encoder="gru", width=8)
    firsts = [
        train_head(stores[0], tmp_path / f"first {seed}", head=head, train=FIRST.model_copy(update={"seed": seed}))
        for seed in range(2)
    ]
    job = HeadJob(run=tmp_path / "started", head=head, train=FIRST, start=firsts[0].path)
    jobs = [
        job,
        HeadJob(run=tmp_path / "fresh", head=head, train=FIRST),
        HeadJob(run=tmp_path / "nowhere", head=head, train=FIRST, start=tmp_path / "absent"),
        HeadJob(
            run=tmp_path / "unlike",
            head=GRU.model_copy(update={"projection": "hidden"}),
            train=FIRST,
            start=firsts[0].path,
        ),
    ]
    found = {one.job.run.name: one for one in train_heads(stores[1], jobs, workers=1)}
    assert {name: one.status for name, one in found.items()} == {
        "started": "trained",
        "fresh": "trained",
        "nowhere": "failed",
        "unlike": "failed",
    }
    assert "absent is no run folder of a trained head" in found["nowhere"].error
    assert "width: 8 there, 16 here" in found["unlike"].error
    alone = train_head(stores[1], tmp_path / "alone", train=FIRST, start=firsts[0])
    assert numbers(job.run) == numbers(alone.path) != numbers(tmp_path / "fresh")
    again = [job, *(replace(job, start=start) for start in (firsts[1].path, None))]
    outcomes = [outcome for one in again for outcome in train_heads(stores[1], [one], workers=1)]
    assert [one.status for one in outcomes] == ["there", "failed", "failed"]
    assert f"start: there '{weights_sha(firsts[0])}', asked for '{weights_sha(firsts[1])}'" in outcomes[1].error
    assert "asked for None" in outcomes[2].error


def test_a_run_that_was_made_before_heads_could_start_is_there(make_store, tmp_path: Path):
    store = make_store(40)
    job = HeadJob(run=tmp_path / "run", head=GRU, train=FIRST)
    run = train_head(store, job.run, head=GRU, train=FIRST)
    config = dict(run.config)
    del config["start"]
    for setting in ("folds", "fold", "held_out", "training_items", "training_seed"):
        del config["train"][setting]
    (run.path / "config.json").write_text(json.dumps(config))
    assert [one.status for one in train_heads(store, [job], workers=1)] == ["there"]


def test_settings_not_given_are_those_of_the_head_to_start_from(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("head: {pooling: max}\ntrain: {epochs: 3}\n")
    head, train = load_settings(file, {"layers": 2}, preset="paper", start=GRU)
    assert head == GRU.model_copy(update={"pooling": "max", "layers": 2})
    assert (train.epochs, train.loss) == (3, "mse")
