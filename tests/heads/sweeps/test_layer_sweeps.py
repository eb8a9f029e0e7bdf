"""Sweeps over layers: each layer is decoded once, and every head has the numbers that it has alone."""

import pytest

from agiqa.heads import HeadConfig, HeadJob, TrainConfig, train_head, train_heads
from tests.heads.layered_stores import made_states, mos_of, pooled_states, write_store

POOLED = ("mean@question", "mean@answer", "last")
STATES = made_states()
HEAD = HeadConfig(projection="hidden", encoder="none", pooling="mean@answer", width=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "pooled.agiqa"
    return write_store(path, pooled_states(STATES, POOLED), mos_of(STATES["16"]), pooled=POOLED)


def jobs_in(folder, layers=("8", "16", "8+last"), poolings=("mean@answer",)):
    return [
        HeadJob(
            run=folder / f"{layer}-{pooling}-{seed}",
            head=HEAD.model_copy(update={"pooling": pooling}),
            train=TrainConfig(epochs=1, batch_size=16, device="cpu", threads=1, layer=layer, seed=seed),
        )
        for layer in layers
        for pooling in poolings
        for seed in (0, 1)
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_head_has_the_numbers_that_it_has_alone(store, tmp_path, workers):
    jobs = jobs_in(tmp_path / "sweep")
    outcomes = {ended.job.run.name: ended.load() for ended in train_heads(store, jobs, workers=workers)}
    assert len(outcomes) == len(jobs)
    for job in jobs[1::2]:
        alone = train_head(store, tmp_path / "alone" / job.run.name, head=job.head, train=job.train)
        assert alone.predictions == outcomes[job.run.name].predictions


def test_each_layer_and_row_is_decoded_once(store, tmp_path, capsys):
    jobs = jobs_in(tmp_path, layers=("8", "16"), poolings=("mean@answer", "last"))
    assert all(ended.status == "trained" for ended in train_heads(store, jobs, workers=1))
    assert capsys.readouterr().err.count("features:") == 4
    assert all(ended.status == "there" for ended in train_heads(store, jobs, workers=1))


def test_a_layer_that_is_missing_fails_its_heads_alone(store, tmp_path):
    jobs = jobs_in(tmp_path, layers=("8", "12"))
    ended = {one.job.train.layer: one for one in train_heads(store, jobs, workers=1)}
    assert ended["8"].status == "trained"
    assert ended["12"].status == "failed"
    assert "no layer '12'" in (ended["12"].error or "")


def test_a_folder_of_another_layer_is_not_taken_for_this_one(store, tmp_path):
    first, *_ = jobs_in(tmp_path, layers=("8",))
    list(train_heads(store, [first], workers=1))
    other = HeadJob(run=first.run, head=first.head, train=first.train.model_copy(update={"layer": "16"}))
    (ended,) = train_heads(store, [other], workers=1)
    assert ended.status == "failed"
    assert "layer: there '8', asked for '16'" in (ended.error or "")
