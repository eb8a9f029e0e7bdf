"""Recipes and settings of networks: every shipped recipe is complete, changes are named, and wrong ones are refused."""

import pytest

from agiqa.bench.networks.config import TABLE_II, NetworkConfig, network_config, read_changes
from agiqa.commands.baseline import NETWORKS
from agiqa.errors import ConfigError, UnknownName
from agiqa.heads.model.losses import get_loss


def test_the_command_names_the_networks_of_table_ii():
    assert NETWORKS == TABLE_II


@pytest.mark.parametrize("name", [*TABLE_II, "vil_tiny", "vil_small", "vil_base", "convnext_tiny"])
def test_every_recipe_is_complete_and_says_where_it_comes_from(name):
    config = network_config(name, {})
    assert config.network == name
    assert len(config.source) > 30
    assert "changed here" not in config.source
    get_loss(config.loss)


def test_recipes_are_those_of_the_released_training_scripts():
    hyper, bilinear, stairs = (network_config(name, {}) for name in ("hyperiqa", "dbcnn", "stairiqa"))
    assert (hyper.epochs, hyper.batch_size, hyper.lr, hyper.new_lr_factor, hyper.loss) == (16, 96, 2e-5, 10, "mae")
    assert (hyper.train_crops, hyper.test_crops, hyper.image_size) == (25, 25, 224)
    assert (bilinear.alone_epochs, bilinear.alone_lr, bilinear.epochs, bilinear.lr) == (50, 1e-3, 50, 1e-5)
    assert (bilinear.batch_size, bilinear.image_size, bilinear.weight_decay) == (8, 448, 5e-4)
    assert (stairs.resize, stairs.image_size, stairs.test_crops, stairs.flip) == (384, 320, 5, False)
    assert (stairs.epochs, stairs.batch_size, stairs.lr, stairs.decay, stairs.decay_epochs) == (100, 30, 5e-5, 0.9, 10)


def test_changes_are_named_in_the_source_and_a_smaller_crop_comes_from_a_smaller_image():
    config = network_config("stairiqa", {"image_size": 32, "epochs": 2, "lr": None})
    assert config.source.endswith("; changed here: image_size, epochs, resize")
    assert (config.resize, config.lr) == (38, 5e-5)
    assert network_config("stairiqa", {"image_size": 32, "resize": 32}).resize == 32


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"image_size": 64, "resize": 32}, "Crops of 64 pixels .* do not fit into images of 32"),
        ({"test_crops": 7}, "test_crops is 7, and must be 5 or a square number"),
        ({"batch_size": 1}, "batch_size"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"epoch": 3}, "Did you mean 'epochs'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        network_config("resnet50", changes)


def test_a_file_of_settings_is_flat_and_known(tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text("epochs: 3\nflip: false\n")
    assert read_changes(file) == {"epochs": 3, "flip": False}
    assert read_changes(None) == {}
    file.write_text("weigth_decay: 0.1\n")
    with pytest.raises(UnknownName, match="Did you mean 'weight_decay'"):
        read_changes(file)
    file.write_text("[1, 2]\n")
    with pytest.raises(ConfigError, match="expected `setting: value` lines"):
        read_changes(file)


def test_all_epochs_are_those_with_and_without_pretrained_layers():
    assert NetworkConfig(network="n", source="s", alone_epochs=2, epochs=3).all_epochs == 5
