"""Networks that learn the residual of a closed form."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.linear_model import Ridge
from sklearn.model_selection import GroupKFold
from sklearn.preprocessing import StandardScaler

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, load_run, make_partition, train_head
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.data.prompt_groups import prompt_groups
from agiqa.heads.training.closed_base import fit_base
from tests.heads.label_stores import BOTH, with_correspondence

GRU = HeadConfig(projection="sketch", encoder="gru", width=16, init="ridge", strength=10.0)
QUICK = TrainConfig(split="grouped", epochs=3, lr=1e-2, device="cpu", validation=0.3)


def scores(run, part):
    return [row["predicted"] for row in run.predictions if row["split"] == part]


def test_offsets_of_training_items_are_out_of_fold_and_those_of_others_are_not(make_store):
    store = make_store(60, prompts=20)
    features = FeatureSet.from_store(store, range(60))
    train, validation = (
        LabelledItems.at(features, np.array(places), "quality") for places in (range(40), range(45, 55))
    )
    base = fit_base(features, GRU, QUICK, train=train, validation=validation, device=torch.device("cpu"))
    rows = np.stack([one.astype(np.float64).mean(0) for one in store.features])
    mos = store.items.labels["quality"]

    def ridge(known, unknown):
        scaler = StandardScaler().fit(rows[known])
        model = Ridge(alpha=10.0).fit(scaler.transform(rows[known]), mos[known])
        return model.predict(scaler.transform(rows[unknown]))

    groups = prompt_groups(store.items.prompts[:40])
    for kept, held in GroupKFold(5).split(np.zeros(40), groups=groups):
        assert base.offsets[held, 0].numpy() == pytest.approx(ridge(kept, held))
    assert base.offsets[45:55, 0].numpy() == pytest.approx(ridge(np.arange(40), np.arange(45, 55)))
    assert base.offsets[[*range(40, 45), *range(55, 60)]].isnan().all()


def test_a_network_that_learns_nothing_leaves_the_closed_form(make_store, tmp_path):
    store = make_store(150, prompts=60)
    still = QUICK.model_copy(update={"lr": 1e-12})
    run = train_head(store, tmp_path / "init", head=GRU, train=still)
    alone = HeadConfig(encoder="ridge", strength=10.0, pooling="mean")
    ridge = train_head(store, tmp_path / "ridge", head=alone, train=QUICK)
    assert scores(run, "validation") == pytest.approx(scores(ridge, "validation"), abs=1e-5)
    assert run.metrics["chosen_epoch"] == 0
    assert any("closed form of `init` alone" in line for line in run.metrics["warnings"])
    refit = train_head(store, tmp_path / "refit", head=GRU, train=still.model_copy(update={"refit": True}))
    assert scores(refit, "test") == pytest.approx(scores(ridge, "test"), abs=1e-5)


def test_too_few_validation_items_keep_the_closed_form(make_store, tmp_path):
    store = make_store(100, prompts=40)
    few = QUICK.model_copy(update={"validation": 0.1, "lr": 1e-1})
    run = train_head(store, tmp_path / "init", head=GRU, train=few)
    alone = HeadConfig(encoder="ridge", strength=10.0, pooling="mean")
    ridge = train_head(store, tmp_path / "ridge", head=alone, train=few)
    assert run.metrics["chosen_epoch"] == 0
    assert run.metrics["chosen_by"].startswith("closed form of `init` alone, as ")
    assert any("so the closed form of `init` alone was kept" in line for line in run.metrics["warnings"])
    assert scores(run, "validation") == pytest.approx(scores(ridge, "validation"), abs=1e-5)
    none = train_head(store, tmp_path / "none", head=GRU, train=few.model_copy(update={"validation": 0.0}))
    assert none.metrics["chosen_epoch"] == few.epochs


def test_a_residual_is_learned_and_the_sum_is_read_back(make_store, tmp_path):
    store = make_store(300)
    config = QUICK.model_copy(update={"epochs": 8, "validation": 0.2})
    run = train_head(store, tmp_path / "init", head=GRU, train=config)
    ridge = train_head(store, tmp_path / "ridge", head=HeadConfig(encoder="ridge", strength=10.0), train=config)
    assert run.metrics["test"]["srcc"] > ridge.metrics["test"]["srcc"] + 0.03
    assert run.metrics["chosen_epoch"] > 0
    again = load_run(run.path)
    test = make_partition(store, config).test
    assert again.predict(store, test) == pytest.approx(scores(run, "test"), abs=1e-6)
    head = again.load_head(store, device=torch.device("cpu"))
    assert {name.split(".")[0] for name in load_file(run.path / "head.safetensors")} == {"closed", "network"}
    assert head.closed.predict(store, test) + again_network(head, store, test) == pytest.approx(
        again.predict(store, test)[:, None]
    )


def again_network(head, store, items):
    """The network, item by item."""
    rows = [torch.from_numpy(store.features[k])[None] for k in items]
    with torch.no_grad():
        return np.stack([head.network(one, torch.ones(one.shape[:2], dtype=torch.bool))[0].numpy() for one in rows])


def test_calibration_and_several_labels_hold_for_the_sum(make_store, tmp_path):
    store = with_correspondence(make_store(150, prompts=60))
    config = QUICK.model_copy(update={"label": BOTH, "lr": 1e-3})
    plain = train_head(store, tmp_path / "plain", head=GRU, train=config)
    run = train_head(store, tmp_path / "line", head=GRU, train=config.model_copy(update={"calibrate": True}))
    lines = [run.metrics["calibration"][label] for label in run.train.labels]
    expected = plain.predict(store) * [one["slope"] for one in lines] + [one["intercept"] for one in lines]
    assert run.predict(store) == pytest.approx(expected, rel=1e-4)


def test_a_killed_training_with_init_ends_with_the_same_numbers(make_store, tmp_path):
    class Killed(Exception):
        pass

    class Killer:
        def begin(self, *args, **kwargs): ...
        def step(self): ...
        def validated(self): ...
        def end(self): ...

        def epoch(self, epoch):
            if epoch.epoch == 3:
                raise Killed

    store, config = make_store(150, prompts=60), QUICK.model_copy(update={"epochs": 4, "save_seconds": 0.0})
    whole = train_head(store, tmp_path / "whole", head=GRU, train=config)
    with pytest.raises(Killed):
        train_head(store, tmp_path / "run", head=GRU, train=config, progress=Killer())
    run = train_head(store, tmp_path / "run", head=GRU, train=config)
    assert scores(run, "test") == scores(whole, "test")
    assert [row["epoch"] for row in run.curves] == [1, 2, 3, 4]


def test_what_init_cannot_be_is_said(make_store, tmp_path):
    store = make_store(60)

    def train(**changes):
        head = GRU.model_copy(update=changes)
        return train_head(store, tmp_path / "run", head=head, train=QUICK)

    with pytest.raises(UnknownName, match="Did you mean 'ridge'"):
        train(init="rigde")
    with pytest.raises(UnknownName, match="Did you mean 'answer'"):
        train(init_pooling="mean@answr")
    with pytest.raises(ConfigError, match="is a closed form itself"):
        train(encoder="krr")
    run = train()
    with pytest.raises(HeadError, match="fitted anew"):
        train_head(store, tmp_path / "warm", train=QUICK, start=run)
    config = json.loads((run.path / "config.json").read_text())
    config["closed"] = {"kind": "linear"}
    (run.path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HeadError, match="does not hold the closed form"):
        load_run(run.path).predict(replace(store, id="other"))
