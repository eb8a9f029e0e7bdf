"""TF-IDF of layers, shorter conversations and unions by their token ids, and of stores without ids by their words."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge

from agiqa.errors import DataError
from agiqa.heads import HeadConfig, TrainConfig, make_partition, train_head
from agiqa.store import Prefixes, union
from tests.heads.layered_stores import made_ids, made_roles, made_states, mos_of, pooled_states, write_store

LAYERS = ("8", "last")
STATES, IDS = made_states(layers=LAYERS), made_ids()
COUNT = len(IDS)
MOS = mos_of(STATES["last"])
TRAIN = TrainConfig(device="cpu")
TFIDF = HeadConfig(encoder="tfidf", strength=0.5)
POOLED = ("mean@question", "mean@answer")


def shortened(rows):
    return [one[:-1] for one in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bags")


@pytest.fixture(scope="module")
def full(folder):
    rows = np.array([[len(ids) - 1] for ids in IDS], np.int32)
    prefixes = Prefixes(names=("id",), rows=rows, authors=np.zeros((COUNT, 1), np.uint8))
    return write_store(folder / "full.agiqa", STATES, MOS, variant="full", prefixes=prefixes, ids=IDS)


@pytest.fixture(scope="module")
def shorter(folder):
    states = {layer: shortened(rows) for layer, rows in STATES.items()}
    roles = shortened(made_roles())
    return write_store(folder / "id.agiqa", states, MOS, variant="id", roles=roles, ids=shortened(IDS))


@pytest.fixture(scope="module")
def rows(folder):
    """A store of pooled rows."""
    return write_store(folder / "pooled.agiqa", pooled_states(STATES, POOLED), MOS, pooled=POOLED)


@pytest.mark.parametrize("layer", ["8", "8+last"])
def test_layers_and_shorter_conversations_have_the_token_ids_of_their_store(full, shorter, layer, tmp_path):
    views = {"layer": full.layer(layer), "of a view": full.variant("id").layer(layer)}
    of_union = union([full]).variant("id").layer(layer)
    for source in (views["of a view"], of_union, full.variant("id")):
        for (ids, roles), (own, of_own) in zip(source.tokens([5, 0]), shorter.tokens([5, 0]), strict=True):
            np.testing.assert_array_equal(ids, own)
            np.testing.assert_array_equal(roles, of_own)
    expected = train_head(shorter, tmp_path / "own", head=TFIDF, train=TRAIN)
    config = TRAIN.model_copy(update={"variant": "id", "layer": layer})
    run = train_head(full, tmp_path / "view", head=TFIDF, train=config)
    np.testing.assert_array_equal(run.predict(full), expected.predict(shorter))
    whole = train_head(full, tmp_path / "whole", head=TFIDF, train=TRAIN.model_copy(update={"layer": layer}))
    assert whole.predict(full) != pytest.approx(run.predict(full), abs=1e-6)


def test_without_token_ids_the_words_of_prompts_and_descriptions_are_counted(rows, full, tmp_path):
    run = train_head(rows, tmp_path / "words", head=TFIDF, train=TRAIN.model_copy(update={"layer": "8"}))
    partition = make_partition(rows, TRAIN)
    known, test = np.concatenate([partition.train, partition.validation]), partition.test
    texts = [f"{prompt}\n{text}" for prompt, text in zip(rows.items.prompts, rows.items.descriptions, strict=True)]
    vectorizer = TfidfVectorizer(ngram_range=(1, 2))
    fitted = Ridge(alpha=0.5).fit(vectorizer.fit_transform([texts[k] for k in known]).toarray(), MOS[known])
    expected = fitted.predict(vectorizer.transform([texts[k] for k in test]).toarray())
    assert run.predict(rows, test) == pytest.approx(expected, abs=2e-3)  # scikit-learn iterates on sparse rows
    assert run.predict(full) == pytest.approx(run.predict(rows))  # a store with token ids has the texts too
    assert any("tfidf counts the words of prompts and descriptions" in note for note in run.metrics["notes"])


def test_a_stack_on_pooled_rows_counts_words(rows, tmp_path):
    stack = train_head(rows, tmp_path / "stack", head=HeadConfig(encoder="stack"), train=TRAIN)
    assert stack.config["closed"]["names"] == ["ridge", "krr", "tfidf"]
    assert any("tfidf counts the words" in note for note in stack.metrics["notes"])
    plain = train_head(rows, tmp_path / "plain", head=HeadConfig(encoder="stack", members="ridge+krr"), train=TRAIN)
    assert not any("tfidf" in note for note in plain.metrics["notes"])


def test_words_that_cannot_be_counted_are_refused(rows, make_store, tmp_path):
    with pytest.raises(DataError, match=r"no roles to choose by 'mean@answer'.*Leave the pooling out"):
        train_head(rows, tmp_path / "bad", head=TFIDF.model_copy(update={"pooling": "mean@answer"}), train=TRAIN)
    run = train_head(rows, tmp_path / "run", head=TFIDF, train=TRAIN)
    head = run.load_head(rows, device=torch.device("cpu"))
    silent = make_store(6)
    silent = replace(silent, items=replace(silent.items, prompts=[""] * 6))
    with pytest.raises(DataError, match="has neither prompts nor descriptions"):
        head.predict(silent, np.arange(6))
