"""The baseline of word probabilities: on real stores that record the tokens, and absent on others."""

import csv
from dataclasses import replace

import numpy as np
import pytest
from scipy.special import softmax

from agiqa.bench.baselines.baselines import run_baselines
from agiqa.bench.baselines.predictors import WORD_PROBABILITIES
from agiqa.heads import TrainConfig, make_partition
from agiqa.heads.closed.token_bags import read_bags
from agiqa.store import basis_from, sketch_store
from tests.store.conftest import make_content, make_store

TOKENS = {"bad": 5, "poor": 9, "fair": 2, "good": 31, "excellent": 17}


@pytest.fixture
def content():
    made = make_content([4] * 40, width=6, logical_dtype="float32")
    roles = [np.array([0, 2, 2, 0], np.uint8)] * 40
    labels = {"quality": np.linspace(0, 10, 40)}
    items = replace(made.items, labels=labels, mos_ranges={"quality": (0.0, 10.0)})
    return replace(made, roles=roles, items=items)


def lines_of(store, out):
    lines = run_baselines(store, [TrainConfig()], protocol="published", out=out)
    return {line["settings"]["baseline"]: line for line in lines}


def test_it_is_the_softmax_at_the_last_token_and_says_what_a_sketch_lacks(tmp_path, content):
    store = make_store(tmp_path / "a.agiqa", content, rating_tokens=TOKENS)
    sketched = sketch_store(store, tmp_path / "s.agiqa", basis=basis_from(store, 6)).store
    test = make_partition(store, TrainConfig()).test
    logits = np.stack([content.hidden[k][-1] for k in test]).astype(np.float64) @ content.lm_head[[*TOKENS.values()]].T
    expected = softmax(logits, axis=1) @ [1, 3, 5, 7, 9]
    for name, source in (("hidden", store), ("sketch", sketched)):
        line = lines_of(source, tmp_path / name)[WORD_PROBABILITIES]
        with (tmp_path / name / line["predictions"]).open(newline="") as file:
            told = [float(row["predicted"]) for row in csv.DictReader(file)]
        assert told == pytest.approx(expected, abs=1e-9 if name == "hidden" else 2e-3)  # sketches are float16
        assert line["test"]["rmse"] is not None
        assert any("sketch of rank 6" in note for note in line["notes"]) == (name == "sketch")


def test_a_store_without_the_tokens_has_no_such_line(tmp_path, content):
    store = make_store(tmp_path / "a.agiqa", content)
    assert WORD_PROBABILITIES not in lines_of(store, tmp_path / "out")


def test_the_token_ids_of_a_real_store_are_read_in_any_order(tmp_path, content):
    store = make_store(tmp_path / "a.agiqa", content)
    items = np.array([7, 3, 30])
    assert [ids.tolist() for ids, _ in store.tokens(items)] == [content.token_ids[k].tolist() for k in items]
    assert [roles.tolist() for _, roles in store.tokens(items)] == [content.roles[k].tolist() for k in items]
    bags = read_bags(store, items, "mean@question", ngrams=1)
    assert [(bag - 1).tolist() for bag in bags] == [content.token_ids[k][1:3].tolist() for k in items]
