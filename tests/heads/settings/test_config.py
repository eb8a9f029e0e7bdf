"""Configs: strict, frozen, and read from YAML under options."""

from pathlib import Path

import pytest

from agiqa.errors import ConfigError
from agiqa.heads.settings.config import HeadConfig, TrainConfig, load_settings


def test_no_setting_has_two_homes():
    assert not set(HeadConfig.model_fields) & set(TrainConfig.model_fields)


def test_option_beats_file_beats_default(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("head:\n  width: 64\n  encoder: gru\ntrain:\n  lr: 0.01\n")
    head, train = load_settings(file, {"width": 32, "encoder": None, "epochs": 3})
    assert (head.width, head.encoder, head.pooling) == (32, "gru", "mean")
    assert (train.lr, train.epochs, train.loss) == (0.01, 3, "mse")


def test_empty_sections_and_no_file_are_the_defaults(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("head:\n")
    assert load_settings(file) == load_settings() == (HeadConfig(), TrainConfig())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("head:\n  widht: 3\n", "Did you mean 'width'"),
        ("haed:\n  width: 3\n", "Did you mean 'head'"),
        ("head: 3\n", "section 'head': expected keys and values"),
        ("- 1\n", "expected keys and values, found list"),
        ("head: {\n", "cannot be read as YAML"),
        ("train:\n  lr: -1\n", "lr: Input should be greater than 0"),
        ("train:\n  split: random\n", "split: Input should be 'published', 'grouped', 'folds' or 'generator'"),
    ],
)
def test_faults_of_a_file_are_named(tmp_path: Path, text: str, said: str):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_settings(file)


def test_an_unknown_option_or_keyword_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'epochs'"):
        load_settings(None, {"epoch": 3})
    with pytest.raises(ConfigError, match="Did you mean 'encoder'"):
        HeadConfig(encodr="gru")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_settings(Path("absent.yaml"))


def test_configs_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        HeadConfig().width = 3
