"""Heads that were saved by earlier code load, and predict what they predicted."""

import json

import pytest

from agiqa.heads import load_run, predict
from tests.heads import golden_heads


def test_there_is_a_golden_head_of_every_kind():
    assert {folder.name for folder in golden_heads.FOLDER.iterdir()} >= golden_heads.HEADS.keys()


@pytest.mark.parametrize("name", golden_heads.HEADS)
@pytest.mark.parametrize("batch_size", [1, 32])  # without padding, and with much of it
def test_a_saved_head_predicts_what_it_predicted(name, batch_size):
    folder = golden_heads.FOLDER / name
    expected = json.loads((folder / "predictions.json").read_text())
    found = predict(load_run(folder), golden_heads.rated_items(), device="cpu", batch_size=batch_size)
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(expected) - min(expected) > 0.01
