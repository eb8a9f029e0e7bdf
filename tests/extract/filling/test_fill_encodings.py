"""Encodings filled by the model itself, against transformers run item by item."""

import re
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError, SettingsConflict
from agiqa.extract import ExtractionSettings, LengthRule, run_extraction
from agiqa.store import open_store, verify, view
from tests.extract.jobs import extract, inputs
from tests.extract.oracle import all_hidden, expected
from tests.extract.small_sets import write_set, write_talks


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "texts", 24)
    write_talks(folder)
    return folder


def test_raw_logits_are_the_models_own(texts, tiny_text_checkpoint, tmp_path):
    store = extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", encoding="logits", batch_size=5).store
    data_set, _ = inputs(texts, tiny_text_checkpoint)
    for position, item in enumerate(data_set.items):
        own = expected(tiny_text_checkpoint, item)
        np.testing.assert_allclose(view(store, "logits").item(position), own.logits, rtol=1e-3, atol=1e-3)
    assert verify(store, "numeric").sound


def test_logits_kept_beside_hidden_states_are_the_models_own(texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    store = extract(texts, tiny_text_checkpoint, path, keep_logits=True, part=(1, 2)).store
    assert not store.is_sealed
    store = extract(texts, tiny_text_checkpoint, path, keep_logits=True).store
    data_set, _ = inputs(texts, tiny_text_checkpoint)
    for position, item in enumerate(data_set.items):
        own = expected(tiny_text_checkpoint, item)
        np.testing.assert_allclose(view(store, "logits").item(position), own.logits, rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(view(store, "hidden").item(position), own.hidden, rtol=1e-4, atol=1e-4)
    assert verify(store, "numeric").sound
    plain = extract(texts, tiny_text_checkpoint, tmp_path / "plain.agiqa").store
    assert plain.id != store.id


def test_eight_bits_are_scaled_by_training_items_and_resume_with_their_scale(texts, tiny_text_checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, encoding="int8", part=(1, 2))
    begun = open_store(path, allow_partial=True).scale
    store = extract(texts, tiny_text_checkpoint, path, encoding="int8", batch_size=3).store
    data_set, _ = inputs(texts, tiny_text_checkpoint)
    training = all_hidden(tiny_text_checkpoint, [item for item in data_set.items if item.split == "train"])
    scale = store.scale
    assert scale.id == begun.id
    np.testing.assert_allclose(scale.mean, training.mean(0), atol=1e-4)
    np.testing.assert_allclose(scale.rms, training.std(0), rtol=1e-3)
    own = all_hidden(tiny_text_checkpoint, data_set.items)
    found = store.read(range(24)).float32()
    assert np.linalg.norm(found - own) / np.linalg.norm(own) < 0.01
    assert verify(store, "numeric").sound


CALIBRATED = pytest.mark.parametrize("settings", [{"encoding": "int8"}, {"encoding": "sketch", "rank": 4}])


@CALIBRATED
def test_a_store_of_other_settings_is_refused_before_the_model_calibrates(
    settings, texts, tiny_text_checkpoint, tmp_path, capsys
):
    path = tmp_path / "s.agiqa"
    extract(texts, tiny_text_checkpoint, path, **settings)
    assert "calibrate:" in capsys.readouterr().err
    others = [
        ({"variant": "no_id"}, "conversation.variant: stored 'id', asked 'no_id'"),
        ({"length": LengthRule(max_tokens=40, truncate=True)}, "tokens.max_tokens: stored None, asked 40"),
    ]
    if "rank" in settings:
        others.append(({"rank": 5}, "sketch.rank: stored 4, asked 5"))
    for changes, said in others:
        with pytest.raises(SettingsConflict, match=re.escape(said)):
            extract(texts, tiny_text_checkpoint, path, **{**settings, **changes})
        assert "calibrate:" not in capsys.readouterr().err


@CALIBRATED
def test_a_store_whose_run_was_killed_before_its_constants_were_written_is_calibrated_again(
    settings, texts, tiny_text_checkpoint, tmp_path, capsys
):
    path = tmp_path / "s.agiqa"
    begun = extract(texts, tiny_text_checkpoint, path, part=(1, 2), **settings).store
    begun.layout.model_commit.unlink()
    capsys.readouterr()
    store = extract(texts, tiny_text_checkpoint, path, **settings).store
    assert "calibrate:" in capsys.readouterr().err
    assert store.id == begun.id
    assert verify(store, "numeric").sound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "int8", "rank": 4}, "belong to --encoding sketch, not to int8"),
        ({"encoding": "logits", "keep_logits": True}, "beside hidden states, not beside logits"),
        ({"encoding": "int8", "plan_only": True}, "int8 needs a calibration"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, message, texts, tiny_text_checkpoint, tmp_path):
    with pytest.raises(ConfigError, match=message):
        extract(texts, tiny_text_checkpoint, tmp_path / "s.agiqa", **options)
    assert not (tmp_path / "s.agiqa").exists()


def test_eight_bits_need_training_items(texts, tiny_text_checkpoint, tmp_path):
    data_set, backbone = inputs(texts, tiny_text_checkpoint)
    tested = replace(data_set, items=[replace(item, split="test") for item in data_set.items])
    settings = ExtractionSettings(encoding="int8", length=LengthRule())
    with pytest.raises(ConfigError, match="never calibrated on test items"):
        run_extraction(tested, backbone, tmp_path / "s.agiqa", settings)
