"""One head for several labels, and one label as if there were no others."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.heads import HeadConfig, LineProgress, TrainConfig, train_head
from agiqa.heads.data.batches import BatchLoader, LabelledItems, collate
from agiqa.heads.data.features import FeatureSet, read_labels
from agiqa.heads.model.head import build_head
from agiqa.heads.model.losses import get_loss
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.config import load_settings
from agiqa.heads.training.fitting import fit_head
from agiqa.heads.training.learner import Learner
from tests.heads.fits import fit_everything
from tests.heads.label_stores import BOTH, GRU, LABELS, QUICK, with_correspondence

NONE = HeadConfig(projection="sketch", encoder="none", width=8)


@pytest.mark.parametrize("given", [BOTH, " quality + correspondence ", "quality+ correspondence"])
def test_labels_keep_their_order_and_are_spelled_one_way(given):
    config = TrainConfig(label=given)
    assert (config.label, config.labels) == (BOTH, LABELS)
    assert TrainConfig(label="correspondence+quality").labels == LABELS[::-1]
    assert TrainConfig().labels == ("quality",)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("quality+", "an empty part"),
        ("+quality", "an empty part"),
        ("quality++correspondence", "an empty part"),
        ("", "an empty part"),
        (" ", "an empty part"),
        ("quality+quality", "a name twice"),
        ("quality+correspondence+ quality", "a name twice"),
    ],
)
def test_labels_that_name_nothing_or_one_twice_are_refused(make_store, tmp_path: Path, label, said):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"train": {"label": label}}))
    calls = [
        lambda: TrainConfig(label=label),
        lambda: load_settings(file),
        lambda: read_labels(with_correspondence(make_store(4)), np.arange(4), label=label),
    ]
    for call in calls:
        with pytest.raises(ConfigError) as caught:
            call()
        assert f"The label {label!r} has {said}" in str(caught.value)


def test_what_lacks_all_of_the_labels_is_told_by_item_and_label(make_store, tmp_path: Path):
    store = with_correspondence(make_store(40))
    assert read_labels(store, np.array([3, 1]), label=BOTH).tolist() == [
        [store.items.labels[name][item] for name in LABELS] for item in (3, 1)
    ]
    store.items.labels["correspondence"][[4, 7]] = np.nan
    store.items.labels["quality"][7] = np.nan
    with pytest.raises(DataError) as caught:
        read_labels(store, np.arange(40), label=BOTH)
    assert str(caught.value).splitlines()[1:] == [
        "  '0007.png' has no quality MOS",
        "  '0007.png' has no correspondence MOS",
    ]
    assert "quality on 39 of 40 items, correspondence on 38 of 40 items" in caught.value.__notes__[0]
    assert np.isnan(read_labels(store, np.array([4]), label=BOTH)).tolist() == [[False, True]]
    with pytest.raises(DataError, match=r"'0004\.png' has no correspondence MOS"):
        read_labels(store, np.array([3, 4]), label="correspondence")
    with pytest.raises(DataError, match=r"'0007\.png' has no correspondence MOS"):
        train_head(store, tmp_path / "run", head=NONE, train=QUICK)
    wrong = QUICK.model_copy(update={"label": "quality+corespondence"})
    with pytest.raises(UnknownName, match=r"'corespondence'\. Did you mean 'correspondence'"):
        train_head(store, tmp_path / "run", head=NONE, train=wrong)
    assert list(tmp_path.iterdir()) == []


def test_a_label_that_is_the_same_everywhere_is_refused_by_its_name(make_store, tmp_path: Path):
    store = with_correspondence(make_store(40))
    store.items.labels["correspondence"][:] = 3.0
    with pytest.raises(DataError, match=r"all \d+ training items have the correspondence label 3.0: there is nothing"):
        train_head(store, tmp_path / "run", head=NONE, train=QUICK)


def test_items_with_other_labels_than_the_settings_are_refused(make_store):
    store = with_correspondence(make_store(10))
    features = FeatureSet.from_store(store, range(10))
    with pytest.raises(DataError, match=r"'quality\+correspondence' needs 2 per item, and has 1"):
        fit_head(
            features,
            FeatureSpec.of(store),
            NONE,
            QUICK,
            train=LabelledItems.at(features, np.arange(10), "quality"),
            validation=LabelledItems.at(features, np.arange(0), "quality"),
            epochs=1,
            stage="train",
            progress=LineProgress(lambda _: None),
        )


def test_a_head_of_one_label_keeps_its_names_and_shapes(make_store):
    head = build_head(GRU, FeatureSpec.of(make_store(3)))
    assert {name: tuple(value.shape) for name, value in head.regressor.state_dict().items()} == {
        "label_mean": (),
        "label_std": (),
        "layers.0.weight": (128, 16),
        "layers.0.bias": (128,),
        "layers.2.weight": (1, 128),
        "layers.2.bias": (1,),
    }


def test_one_label_trains_to_the_bit_as_a_plain_loop_over_vectors(make_store):
    store = with_correspondence(make_store(41))
    config = QUICK.model_copy(update={"label": "quality", "warmup": 0.2})
    features, fit = fit_everything(store, config, GRU)
    everything = np.arange(41)
    torch.manual_seed(config.seed)
    head = build_head(GRU, FeatureSpec.of(store))
    head.projection.standardise(features.statistics(everything))
    truth = torch.from_numpy(store.items.labels["quality"])
    mean, std = truth.mean().float(), truth.std(correction=0).float()
    learner = Learner(
        head,
        features,
        LabelledItems.at(features, everything, "quality"),
        config,
        validation=LabelledItems.at(features, everything[:0], "quality"),
        stage="",
        progress=LineProgress(print),
    )
    steps = learner.configure_optimizers()
    optimizer, schedule = steps["optimizer"], steps["lr_scheduler"]["scheduler"]
    for epoch in range(config.epochs):
        for batch in BatchLoader(features, everything, batch_size=16, order=(config.seed, epoch)):
            pooled = head.pooling(head.encoder(head.projection(batch.features), batch.mask), batch.mask)
            predicted = head.regressor.layers(pooled).squeeze(-1) * std + mean
            wanted = truth[batch.positions].float()
            loss = ((predicted - mean) / std - (wanted - mean) / std).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(head.parameters(), config.gradient_clip)
            optimizer.step()
            schedule.step()
    trained = fit.head.state_dict()
    assert (trained["regressor.label_mean"], trained["regressor.label_std"]) == (mean, std)
    for name, value in head.named_parameters():
        assert torch.equal(trained[name], value), name


@pytest.mark.parametrize("name", ["fidelity", "huber", "mae", "margin", "mse", "plcc", "ranknet", "mse+0.5*plcc"])
def test_loss_and_gradients_are_the_mean_of_those_of_explicit_columns(make_store, name):
    store = with_correspondence(make_store(12))
    features = FeatureSet.from_store(store, range(12))
    labels = LabelledItems.at(features, np.arange(12), BOTH).labels
    torch.manual_seed(0)
    head = build_head(GRU, FeatureSpec.of(store), labels=2).double()
    head.regressor.standardise(labels)
    truth = np.stack([store.items.labels[label] for label in LABELS])
    batch, loss = collate(features, np.arange(12)), get_loss(name)
    inputs = (batch.features.double(), batch.mask, batch.roles)
    parameters = list(head.parameters())
    scaled = head.regressor.scaled
    found = loss.over_labels(scaled(head(*inputs)), scaled(labels))
    predicted = head(*inputs)
    parts = [
        loss((predicted[:, k] - truth[k].mean()) / truth[k].std(), torch.from_numpy(each - each.mean()) / each.std())
        for k, each in enumerate(truth)
    ]
    expected = (parts[0] + parts[1]) / 2
    assert parts[0].item() != pytest.approx(parts[1].item(), rel=1e-3)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    gradients = (torch.autograd.grad(one, parameters) for one in (found, expected))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_training_takes_the_mean_over_the_labels(make_store):
    store = with_correspondence(make_store(30))
    config = QUICK.model_copy(update={"epochs": 1, "batch_size": 30, "loss": "mae"})
    features, fit = fit_everything(store, config, NONE)
    torch.manual_seed(config.seed)
    head = build_head(NONE, FeatureSpec.of(store), labels=2)
    labels = LabelledItems.at(features, np.arange(30), BOTH).labels
    head.standardise(features.statistics(np.arange(30)), labels)
    batch = collate(features, np.arange(30))
    errors = (head(*batch.inputs).detach().numpy() - labels.numpy()) / labels.numpy().std(axis=0)
    assert fit.curves[0].train_loss == pytest.approx(np.abs(errors).mean(axis=0).mean(), rel=1e-5)
