"""Presets: they override defaults and yield to options, give every encoder the same head, and all build real heads."""

from pathlib import Path

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, UnknownName
from agiqa.heads import ENCODERS, TrainConfig, load_settings, train_head
from agiqa.heads.model.head import build_head
from agiqa.heads.model.projection import FeatureSpec
from agiqa.heads.settings.presets import PRESETS

PUBLISHED_ENCODERS = sorted({"xlstm", "lstm", "gru", "mamba2", "transformer", "none"} & set(ENCODERS))
CPU = {"device": "cpu"}


def test_option_beats_file_beats_preset_beats_default(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("head:\n  encoder: gru\n  layers: 3\ntrain:\n  lr: 0.01\n")
    head, train = load_settings(file, {"lr": 0.02, "seed": None, **CPU}, preset="published")
    assert (head.encoder, head.layers, head.bidirectional, head.pooling) == ("gru", 3, True, "first-last-mean")
    assert (train.lr, train.weight_decay, train.seed) == (0.02, 1e-5, 42)
    assert train.split == TrainConfig().split


def test_a_file_can_undo_what_a_preset_says(tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("train:\n  projection_lr: null\n  gradient_clip: 0.5\n")
    _, train = load_settings(file, CPU, preset="published")
    assert (train.projection_lr, train.gradient_clip) == (None, 0.5)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UnknownName, match=r"No preset is called 'publishd'\. Did you mean 'published'"):
        load_settings(preset="publishd")


@pytest.mark.parametrize("encoder", PUBLISHED_ENCODERS)
def test_the_paper_preset_varies_the_encoder_alone(encoder):
    head, train = load_settings(None, {"encoder": encoder, **CPU}, preset="paper")
    first_head, first_train = load_settings(None, CPU, preset="paper")
    assert train == first_train
    own = {"encoder", "blocks", "layers", "num_heads", "state_size"}
    assert head.model_dump(exclude=own) == first_head.model_dump(exclude=own)
    assert (head.pooling, head.width, head.regressor_hidden, train.loss) == ("mean", 512, 128, "mse")


@pytest.mark.parametrize("encoder", PUBLISHED_ENCODERS)
def test_the_published_preset_trains_as_the_released_code(encoder):
    head, train = load_settings(None, {"encoder": encoder, **CPU}, preset="published")
    assert (train.lr, train.projection_lr, train.weight_decay) == (1e-5, 1e-5, 1e-5)
    assert (train.batch_size, train.seed, train.loss, train.schedule) == (1, 42, "mse", "constant")
    assert (train.warmup, train.gradient_clip, train.precision) == (0.0, None, "fp32")
    assert head.standardise is False
    assert head.width == (1024 if encoder == "none" else 512)


def test_the_learning_rate_of_the_published_preset_is_that_of_all_parameters():
    _, train = load_settings(None, {"lr": 2e-5, **CPU}, preset="published")
    assert (train.lr, train.projection_lr) == (2e-5, 2e-5)
    _, train = load_settings(None, {"lr": 2e-5, "projection_lr": 1e-6, **CPU}, preset="published")
    assert train.projection_lr == 1e-6


@pytest.mark.parametrize("preset", PRESETS.names())
@pytest.mark.parametrize("encoder", PUBLISHED_ENCODERS)
def test_every_preset_trains_around_every_encoder(make_store, tmp_path: Path, preset, encoder):
    overrides = {"encoder": encoder, "width": 16, "epochs": 1, "split": "grouped", "num_heads": 2, **CPU}
    head, train = load_settings(None, overrides, preset=preset)
    run = train_head(make_store(20, encoding="hidden"), tmp_path / "run", head=head, train=train, preset=preset)
    assert run.config["preset"] == preset
    assert np.isfinite(run.metrics["test"]["rmse"])


def test_the_published_head_without_encoder_is_linear_in_the_mean_of_the_logits(make_store):
    store = make_store(3, encoding="hidden")
    head_config, _ = load_settings(None, {"encoder": "none", **CPU}, preset="published")
    head = build_head(head_config, FeatureSpec.of(store)).double().eval()
    tokens = torch.from_numpy(store.features[0]).double()
    logits = tokens @ torch.from_numpy(store.weights).double().T
    projected = torch.nn.functional.linear(logits.mean(0), head.projection.weight, head.projection.bias)
    layers = list(head.regressor.layers)
    assert [type(layer) for layer in layers] == [torch.nn.Linear]
    expected = layers[0](projected)
    got = head(tokens[None], torch.ones(1, len(tokens), dtype=torch.bool))
    assert got.item() == pytest.approx(expected.item(), rel=1e-9)


def test_fp16_asks_for_cuda_before_anything_is_read(make_store, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"'fp16' needs a CUDA device.*'bf16' or 'fp32'"):
        train_head(
            make_store(20, encoding="hidden"), tmp_path / "run", train=TrainConfig(precision="fp16", device="cpu")
        )
    assert list(tmp_path.iterdir()) == []
