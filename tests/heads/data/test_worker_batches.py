"""Batches by worker processes: the same ones, in the same order, for any number of workers and however they start."""

import multiprocessing
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from agiqa.errors import ConfigError, DataError, HeadError
from agiqa.heads.data.batches import BatchLoader, FeatureBatches, LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.store import open_store, union
from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store
from tests.store.sharing_servers import web_server

SETTINGS = {"batch_size": 4, "label": "quality", "seed": 2, "epoch": 5}


def content_of(prefix, seed):
    made = make_content(np.random.default_rng(seed).integers(4, 50, 30).tolist(), seed=seed)
    names = [prefix + name for name in made.items.names]
    mos = np.random.default_rng(seed).uniform(0, 5, 30)
    lm_head = make_content([1]).lm_head
    return replace(made, lm_head=lm_head, items=replace(made.items, names=names, labels={"quality": mos}))


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    return [write_store(folder / f"{name}.agiqa", content_of(name, seed)) for seed, name in enumerate("ab")]


def expected_batches(source, items):
    features = FeatureSet.from_store(source, items)
    labelled = LabelledItems.at(features, np.arange(len(items)), "quality")
    return list(BatchLoader(features, labelled, batch_size=4, order=(2, 5)))


def assert_same(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        for name in vars(theirs):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


@pytest.mark.filterwarnings("ignore:.*may lead to deadlocks in the child:DeprecationWarning")
@pytest.mark.parametrize(("workers", "start"), [(0, None), (2, "fork"), (2, "spawn")])
def test_workers_give_the_batches_of_a_loader(stores, workers, start):
    source = open_store(stores[0].path)  # nothing of it read yet
    items = np.random.default_rng(0).permutation(30)[:26]
    batches = FeatureBatches(source, items, **SETTINGS)
    context = multiprocessing.get_context(start) if start else None
    loader = DataLoader(batches, batch_size=None, num_workers=workers, multiprocessing_context=context)
    assert len(loader) == 7
    assert_same(loader, expected_batches(stores[0], items))


def test_an_epoch_goes_on_after_the_batches_that_were_skipped(stores):
    wanted = expected_batches(stores[0], np.arange(30))
    assert_same(FeatureBatches(stores[0], np.arange(30), **SETTINGS, skip=3), wanted[3:])
    with pytest.raises(ConfigError, match="Of 8 batches 9 cannot be skipped"):
        FeatureBatches(stores[0], np.arange(30), **SETTINGS, skip=9)


@pytest.mark.parametrize("kind", ["store", "union", "memory"])
def test_what_travels_to_a_spawned_worker_opens_the_source_again(stores, make_store, kind):
    source = {"store": stores[0], "union": union(stores), "memory": make_store(30)}[kind]
    items = np.arange(len(source.items.names))
    batches = FeatureBatches(source, items, **SETTINGS)
    data = pickle.dumps(batches)
    assert_same(pickle.loads(data), expected_batches(source, items))
    if kind != "memory":
        assert len(data) < 20_000  # no rows, no arrays of the store


def test_a_store_at_a_url_or_a_relative_path_is_found_again(stores, tmp_path, monkeypatch):
    monkeypatch.setenv("AGIQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(stores[0].path.parent)
    with web_server(stores[0].path) as server:
        for place in (server.url, Path(stores[0].path.name)):
            data = pickle.dumps(FeatureBatches(open_store(place), np.arange(30), **SETTINGS))
            monkeypatch.chdir(tmp_path)
            assert_same(pickle.loads(data), expected_batches(stores[0], np.arange(30)))
            monkeypatch.chdir(stores[0].path.parent)


def test_a_store_that_was_replaced_meanwhile_is_refused(stores, tmp_path):
    path = tmp_path / "moving.agiqa"
    write_store(path, content_of("a", 0))
    data = pickle.dumps(FeatureBatches(open_store(path), np.arange(5), **SETTINGS))
    path.rename(tmp_path / "away.agiqa")
    stores[1].path.rename(path)
    try:
        with pytest.raises(HeadError, match="it was replaced"):
            pickle.loads(data)
    finally:
        path.rename(stores[1].path)


def test_faults_name_the_item(make_store):
    source = make_store(12)
    source.features[7][0, 0] = np.nan
    with pytest.raises(DataError, match=r"'0007\.png' holds NaN"):
        list(FeatureBatches(source, np.arange(12), **SETTINGS))
    source.items.labels["quality"][3] = np.nan
    with pytest.raises(DataError, match=r"'0003\.png' has no quality MOS"):
        FeatureBatches(source, np.arange(12), **SETTINGS)
