"""Spaces of a search: what a file may say, what a trial gets, and what is refused."""

from pathlib import Path

import optuna
import pytest
import yaml

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig
from agiqa.heads.model.encoders.base import encoder_settings
from agiqa.heads.model.losses import get_loss
from agiqa.heads.searching.folder import configs_of
from agiqa.heads.searching.space import SHIPPED, loss_weights, read_space, spell_loss


def space_of(tmp_path: Path, store, text: str, head=None, train=None):
    file = tmp_path / "own.yaml"
    file.write_text(text)
    return read_space(file, store, head or HeadConfig(projection="sketch"), train or TrainConfig())


def suggestions(space, count: int, head=None):
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask(), head or HeadConfig(projection="sketch")) for _ in range(count)]


@pytest.mark.parametrize(
    ("encoding", "projections"), [("hidden", {"vocabulary", "hidden"}), ("sketch", {"sketch"}), ("logits", {"logits"})]
)
def test_the_shipped_space_gives_heads_that_read_the_store(make_store, encoding, projections):
    store = make_store(4, encoding=encoding)
    head, train = HeadConfig(projection=min(projections)), TrainConfig()
    found = suggestions(read_space(SHIPPED, store, head, train), 60)
    assert {one["projection"] for one in found} == projections
    assert {one["encoder"] for one in found} == {"none", "gru", "lstm", "transformer", "mamba2", "xlstm"}
    for one in found:
        read = encoder_settings(one["encoder"])
        assert {"layers", "blocks", "dropout"} & one.keys() == {"layers", "blocks", "dropout"} & read
        assert 1e-4 <= one["lr"] <= 5e-3
        get_loss(one["loss"])
        configs_of(one, head, train)


def test_the_first_trial_has_the_defaults_as_far_as_the_space_holds_them(make_store, tmp_path: Path):
    store, head = make_store(4), HeadConfig(projection="sketch", encoder="gru", width=512)
    text = "encoder: [none, gru]\nwidth: [32, 64]\nlr: {from: 1.0e-4, to: 1.0e-2, log: true}\nlayers: {from: 2, to: 4}"
    train = TrainConfig(lr=5e-3, loss="mse+0.5*plcc")
    space = space_of(tmp_path, store, text + "\nloss: {mse: [1, 2], plcc: {from: 0, to: 1}, mae: [0, 1]}", head, train)
    assert space.at_first(head, train) == {
        "encoder": "gru",
        "width": 32,
        "lr": 5e-3,
        "layers": 3,
        "loss": "mse+0.5*plcc",
    }


def test_weights_of_losses_are_spelled_as_the_setting_is():
    assert spell_loss({"mse": 1.0, "plcc": 0.25, "mae": 0.0}) == "mse+0.25*plcc"
    assert spell_loss({"plcc": 0.0, "mse": 0.0}) == "plcc"
    assert loss_weights("0.3*mae + ranknet") == {"mae": 0.3, "ranknet": 1.0}


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("", ConfigError, "found None"),
        ("[a, b]", ConfigError, "Expected settings with their values"),
        ("widht: [1, 2]", UnknownName, "Did you mean 'width'"),
        ("seed: [1, 2]", ConfigError, "`seed` cannot be searched"),
        ("split_seed: [1, 2]", ConfigError, "`split_seed` cannot be searched"),
        ("encoder: [gru, grru]", UnknownName, "Did you mean 'gru'"),
        ("pooling: [mean, mean@answr]", UnknownName, "answr"),
        ("loss: {msee: 1}", UnknownName, "Did you mean 'mse'"),
        ("loss: {mse: -1, mae: [1, 2]}", ConfigError, "The weight of the loss 'mse' cannot be -1"),
        ("loss: {mse: true, mae: [1, 2]}", ConfigError, "The weight of the loss 'mse' cannot be True"),
        ("width: [16, 16]", ConfigError, "needs different values"),
        ("width: []", ConfigError, "needs different values"),
        ("width: [[16], 8]", ConfigError, "needs numbers, names"),
        ("width: {from: 1.5, to: 3}", ConfigError, "needs whole numbers"),
        ("lr: {from: 1, to: 1}", ConfigError, "goes from 1 to 1"),
        ("lr: {from: 0, to: 1, log: true}", ConfigError, "logarithmic"),
        ("lr: {from: 0.1, to: 1, step: 2}", ConfigError, "must be above 0 and fit"),
        ("lr: {from: 0.1, too: 1}", UnknownName, "Did you mean 'to'"),
        ("lr: {from: -1, to: 1}", ConfigError, "greater than 0"),
        ("dropout: {from: 0, to: 1}", ConfigError, "less than 1"),
        ("projection: [hidden]", HeadError, "reads 'hidden' features"),
        ("width: 16", ConfigError, "Nothing varies"),
    ],
)
def test_what_a_space_may_not_say_is_refused_by_name(make_store, tmp_path: Path, text, error, message):
    with pytest.raises(error, match=message) as caught:
        space_of(tmp_path, make_store(4), text)
    assert str(tmp_path / "own.yaml") in caught.value.__notes__[-1]


def test_numbers_that_yaml_takes_for_text_are_numbers(make_store, tmp_path: Path):
    space = space_of(tmp_path, make_store(4), "lr: {from: 1e-4, to: 5e-3, log: true}\nweight_decay: [1e-3, 0.1]")
    assert space.record() == {"lr": {"from": 1e-4, "to": 5e-3, "log": True}, "weight_decay": [1e-3, 0.1]}


def test_a_space_is_recorded_as_it_was_written(make_store, tmp_path: Path):
    text = "width: [8, 16]\nlayers: {from: 1, to: 3}\nlr: {from: 0.001, to: 0.1, log: true}\nema: [null, 0.9]\n"
    assert space_of(tmp_path, make_store(4), text).record() == yaml.safe_load(text)
