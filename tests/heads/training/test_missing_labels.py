"""Items that lack one of several labels, and items of unequal weight."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from agiqa.bench.recording.predictions import read_predictions
from agiqa.errors import ConfigError, DataError
from agiqa.heads import HeadConfig, TrainConfig, make_partition, train_head
from agiqa.heads.data.weights import item_weights
from agiqa.heads.model.losses import get_loss
from tests.heads.conftest import MemoryItems
from tests.heads.label_stores import BOTH, GRU, LABELS, with_correspondence

CONFIG = TrainConfig(label=BOTH, split="grouped", epochs=2, lr=1e-2, device="cpu", validation=0.3, calibrate=True)
RIDGE = HeadConfig(encoder="ridge", strength=3.0, pooling="mean")


@dataclass(frozen=True, kw_only=True)
class RatedItems(MemoryItems):
    deviations: dict[str, Any] = field(default_factory=dict)


@pytest.fixture
def gappy(make_store):
    """200 items, of which every third lacks one of two labels."""
    store = with_correspondence(make_store(200, prompts=80))
    store.items.labels["quality"][::6] = np.nan
    store.items.labels["correspondence"][3::6] = np.nan
    return store


def rated(store, **deviations):
    return replace(store, items=RatedItems(**vars(store.items), deviations=deviations))


@pytest.mark.parametrize("loss", ["mse", "mse+0.5*plcc"])
@pytest.mark.parametrize("encoder", ["gru", "ridge", "init"])
def test_each_label_is_learned_from_the_items_that_have_it(gappy, tmp_path, encoder, loss):
    head = {"gru": GRU, "ridge": RIDGE, "init": GRU.model_copy(update={"init": "ridge"})}[encoder]
    run = train_head(gappy, tmp_path / "run", head=head, train=CONFIG.model_copy(update={"loss": loss}))
    test = make_partition(gappy, CONFIG).test
    for label in LABELS:
        has = ~np.isnan(gappy.items.labels[label][test])
        assert run.metrics["test"][label]["n"] == has.sum() < len(test)
        read = read_predictions(run.path / "predictions.csv", LABELS, label)
        assert read.mos == pytest.approx(gappy.items.labels[label][test][has])
    assert np.isfinite(run.predict(gappy)).all()
    row = next(row for row in run.predictions if np.isnan(gappy.items.labels["quality"][row["item"]]))
    assert row["mos_quality"] is None
    assert np.isfinite(row["predicted_quality"])


def test_the_loss_with_gaps_is_that_of_the_labels_that_are_there():
    random = torch.Generator().manual_seed(0)
    predicted = torch.randn((6, 2), generator=random, dtype=torch.float64, requires_grad=True)
    labels = torch.randn((6, 2), generator=random, dtype=torch.float64)
    labels[[1, 4], 0] = torch.nan
    found = get_loss("mse+0.5*ranknet").over_labels(predicted, labels, gaps=True)
    kept, loss = [0, 2, 3, 5], get_loss("mse+0.5*ranknet")
    expected = (loss(predicted[kept, 0], labels[kept, 0]) + loss(predicted[:, 1], labels[:, 1])) / 2
    assert found.item() == pytest.approx(expected.item())
    found.backward()
    assert predicted.grad[[1, 4], 0].tolist() == [0, 0]
    labels[:, 0] = torch.nan
    only = get_loss("mse").over_labels(predicted, labels, gaps=True)
    assert only.item() == pytest.approx((predicted[:, 1] - labels[:, 1]).square().mean().item() / 2)


@pytest.mark.parametrize(("loss", "each"), [("mse", np.square), ("mae", np.abs)])
def test_weights_multiply_the_loss_of_each_item(loss, each):
    random = np.random.default_rng(0)
    predicted, labels, weights = (torch.from_numpy(random.uniform(size=(5, 1))) for _ in range(3))
    found = get_loss(f"0.5*{loss}").over_labels(predicted, labels, weights=weights)
    assert found.item() == pytest.approx(0.5 * float((weights.numpy() * each((predicted - labels).numpy())).mean()))


def test_weights_follow_the_deviations_of_the_ratings(make_store):
    spread = np.array([0.5, 1.0, 2.0, 0.0, 4.0])
    store = rated(make_store(5), quality=spread)
    config = TrainConfig(weights="deviation")
    mos = store.items.labels["quality"][:, None]
    expected = 1 / (spread**2 + np.median(spread) ** 2)
    assert item_weights(store, np.arange(5), mos, config)[:, 0] == pytest.approx(expected / expected.mean())
    assert (item_weights(store, np.arange(5), mos, TrainConfig()) == 1).all()
    agreed = rated(make_store(5), quality=np.zeros(5))
    assert (item_weights(agreed, np.arange(5), mos, config) == 1).all()


def test_weighted_heads_are_others_and_the_closed_form_is_that_of_scikit_learn(make_store, tmp_path):
    plain = make_store(120, prompts=50)
    spread = np.random.default_rng(1).uniform(0.1, 3, size=120)
    store, config = rated(plain, quality=spread), TrainConfig(split="grouped", epochs=2, device="cpu", validation=0.0)
    by = config.model_copy(update={"weights": "deviation"})
    train = make_partition(store, config).train
    rows = np.stack([one.astype(np.float64).mean(0) for one in store.features])
    scaler, mos = StandardScaler().fit(rows[train]), store.items.labels["quality"][train]
    weights = item_weights(store, train, mos[:, None], by)[:, 0]
    expected = Ridge(alpha=3.0).fit(scaler.transform(rows[train]), mos, sample_weight=weights)
    ridge = train_head(store, tmp_path / "ridge", head=RIDGE, train=by)
    assert ridge.predict(store) == pytest.approx(expected.predict(scaler.transform(rows)))
    runs = [train_head(store, tmp_path / one.weights, head=GRU, train=one) for one in (config, by)]
    assert runs[0].predict(store) != pytest.approx(runs[1].predict(store), abs=1e-4)


def test_what_weights_lack_is_said(make_store, tmp_path):
    by = TrainConfig(split="grouped", epochs=1, device="cpu", weights="deviation")
    with pytest.raises(DataError, match="has no column std_quality"):
        train_head(make_store(60), tmp_path / "run", head=GRU, train=by)
    holes = rated(make_store(60), quality=np.where(np.arange(60) % 2, 1.0, np.nan))
    with pytest.raises(DataError, match=r"has a quality MOS and no std_quality"):
        train_head(holes, tmp_path / "run", head=GRU, train=by)
    with pytest.raises(ConfigError, match="'plcc' has no loss of a single item"):
        train_head(holes, tmp_path / "run", head=GRU, train=by.model_copy(update={"loss": "plcc"}))
    store = with_correspondence(make_store(60))
    store.items.labels["correspondence"][:] = np.nan
    with pytest.raises(DataError, match=r"none of .* train items has a correspondence MOS"):
        train_head(store, tmp_path / "run", head=GRU, train=CONFIG)
    partial = with_correspondence(make_store(60))
    partial.items.labels["correspondence"][make_partition(partial, CONFIG).test] = np.nan
    with pytest.raises(DataError, match=r"none of .* test items has a correspondence MOS"):
        train_head(partial, tmp_path / "run", head=GRU, train=CONFIG)
