"""Stores with layers and pooled rows, against transformers and NumPy run item by item."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agiqa.errors import ConfigError, DataError, HeadError, SettingsConflict, UnknownName
from agiqa.extract import LengthRule
from agiqa.extract.data.items import Message
from agiqa.extract.filling.live import LiveFeatures
from agiqa.extract.filling.plan import tokenise
from agiqa.extract.filling.pooling import parse_poolings
from agiqa.extract.filling.targets import Target
from agiqa.extract.models.loading import quiet_transformers
from agiqa.store import TOKEN_ROLES, open_store, verify
from tests.extract.jobs import extract, inputs
from tests.extract.small_sets import write_set, write_talks
from tests.extract.tiny_models import write_deep_checkpoint

ITEMS = 12
LAYERS = ("0", "2", "4", "last")
POOLED = ("mean@answer", "max@question", "mean", "first", "last")


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    return write_deep_checkpoint(tmp_path_factory.mktemp("deep"))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = write_set(tmp_path_factory.mktemp("sets") / "texts", ITEMS)
    write_talks(folder)
    return folder


@pytest.fixture(scope="module")
def own(deep, texts):
    """By transformers alone: for each item its roles and, by layer, its states (tokens, D)."""
    data_set, backbone = inputs(texts, deep)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(deep).eval()
    found = []
    for one in tokenise(data_set, backbone, LengthRule()).tokenised:
        ids = torch.from_numpy(one.token_ids.astype(np.int64))[None]
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states
        names = [*map(str, range(len(states) - 1)), "last"]
        found.append((one.roles, {name: rows[0].numpy() for name, rows in zip(names, states, strict=True)}))
    return found


@pytest.fixture(scope="module")
def layered(deep, texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("stores") / "layered.agiqa"
    return extract(texts, deep, path, layers="0,2,-2,last", batch_size=5).store


def pool(name, roles, states):
    """One row by NumPy in float64."""
    method, _, role = name.partition("@")
    chosen = states[roles == TOKEN_ROLES[role]] if role else states
    return {"mean": chosen.mean(axis=0), "max": chosen.max(axis=0), "first": chosen[0], "last": chosen[-1]}[method]


def pooled_rows(own, layer):
    return [np.stack([pool(name, roles, states[layer].astype(np.float64)) for name in POOLED]) for roles, states in own]


def near(found, expected, tolerance=1e-5):
    return np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_every_layer_has_the_states_that_transformers_reports(layered, own):
    assert layered.layers == LAYERS
    assert layered.attributes["version"] == 2
    for position, (_, states) in enumerate(own):
        for layer in LAYERS:
            assert near(layered.layer(layer).read([position]).float32(), states[layer])
    assert layered.layer("-2").id == layered.layer("4").id
    assert verify(layered, "numeric").sound


def test_the_last_layer_is_bit_for_bit_that_of_a_store_without_others(layered, deep, texts, tmp_path):
    alone = extract(texts, deep, tmp_path / "s.agiqa", batch_size=5).store
    assert alone.attributes["version"] == 1
    everything = range(ITEMS)
    assert layered.read(everything).rows.tobytes() == alone.read(everything).rows.tobytes()
    np.testing.assert_array_equal(layered.lm_head(), alone.lm_head())


def test_a_store_without_the_last_layer_has_no_lm_head(deep, texts, own, tmp_path):
    store = extract(texts, deep, tmp_path / "s.agiqa", layers=[2]).store
    assert (store.layers, store.lm_head_sha256) == (("2",), "")
    assert near(store.read([3]).float32(), own[3][1]["2"])
    checked = verify(store, "numeric")
    assert checked.sound
    assert checked.probe_error is not None


@pytest.mark.parametrize("layers", ["last", "0,4,last", "4"])
def test_pooled_rows_are_those_of_numpy(layers, deep, texts, own, tmp_path):
    store = extract(texts, deep, tmp_path / "s.agiqa", layers=layers, pool_tokens=",".join(POOLED), batch_size=5).store
    assert store.pooled == POOLED
    assert store.n_tokens.tolist() == [len(POOLED)] * ITEMS
    for layer in layers.split(","):
        for position, expected in enumerate(pooled_rows(own, layer)):
            block = store.layer(layer).read([position])
            assert near(block.float32(), expected)
            assert block.roles[:3].tolist() == [TOKEN_ROLES["answer"], TOKEN_ROLES["question"], 0]
    assert verify(store, "numeric").sound


@pytest.mark.parametrize("pooled", [(), POOLED])
def test_eight_bits_of_each_layer_are_near_its_states(pooled, deep, texts, own, tmp_path):
    store = extract(texts, deep, tmp_path / "s.agiqa", layers="0,2,last", encoding="int8", pool_tokens=pooled).store
    for layer in store.layers:
        expected = pooled_rows(own, layer) if pooled else [states[layer] for _, states in own]
        found = store.layer(layer).read(range(ITEMS)).float32()
        assert near(found, np.concatenate(expected), tolerance=0.02)
    assert verify(store, "numeric").sound


@pytest.mark.parametrize("layers", ["0,2,last", "2,4"])
def test_sketches_of_layers_are_their_leading_components(layers, deep, texts, own, tmp_path):
    rank = 8
    store = extract(texts, deep, tmp_path / "s.agiqa", layers=layers, encoding="sketch", rank=rank).store
    data_set, _ = inputs(texts, deep)
    for layer in (name for name in store.layers if name != "last"):
        states = np.concatenate([one[layer] for _, one in own]).astype(np.float64)
        training = np.concatenate(
            [one[layer] for item, (_, one) in zip(data_set.items, own, strict=True) if item.split == "train"]
        ).astype(np.float64)
        _, vectors = np.linalg.eigh(training.T @ training)
        leading = vectors[:, ::-1][:, :rank]
        basis = store.layer_basis(layer)
        assert basis.is_of_states
        coordinates = store.layer(layer).read(range(ITEMS)).float32()
        assert near(coordinates @ basis.map, states @ leading @ leading.T, tolerance=5e-3)
    assert verify(store, "numeric").sound
    again = extract(texts, deep, tmp_path / "again.agiqa", layers=layers, encoding="sketch", basis=store.path).store
    assert {name: again.layer_basis(name).id for name in again.layers} == {
        name: store.layer_basis(name).id for name in store.layers
    }
    with pytest.raises(HeadError, match="has no basis for the layer 3; it has the layers"):
        extract(texts, deep, tmp_path / "other.agiqa", layers="3", encoding="sketch", basis=store.path)


def test_logits_of_the_last_layer_beside_states_of_others(deep, texts, own, tmp_path):
    store = extract(texts, deep, tmp_path / "s.agiqa", layers="2,last", encoding="logits").store
    assert store.width != store.layer("2").width
    assert near(store.layer("2").read([1]).float32(), own[1][1]["2"])
    assert verify(store, "numeric").sound


@pytest.mark.parametrize("how", [{"devices": 2}, {"workers": 1}], ids=["devices", "workers"])
def test_other_processes_store_the_same(how, deep, texts, own, tmp_path):
    """Items with pooled rows have more tokens than rows, which the processes must know."""
    pool_tokens = ",".join(POOLED)
    store = extract(texts, deep, tmp_path / "s.agiqa", layers="0,last", pool_tokens=pool_tokens, **how).store
    for layer in store.layers:
        assert near(store.layer(layer).read(range(ITEMS)).float32(), np.concatenate(pooled_rows(own, layer)))


def test_parts_are_resumed_and_other_layers_are_not(deep, texts, layered, tmp_path):
    path = tmp_path / "s.agiqa"
    part = extract(texts, deep, path, layers=LAYERS, part=(1, 2), batch_size=5)
    assert not part.store.is_sealed
    with pytest.raises(SettingsConflict, match=r"was made with --layers 0,2,4,last, and you asked for last"):
        extract(texts, deep, path)
    with pytest.raises(SettingsConflict, match=r"--pool-tokens none \(one row per token\), and you asked for mean"):
        extract(texts, deep, path, layers=LAYERS, pool_tokens="mean")
    whole = extract(texts, deep, path, layers=",".join(LAYERS), batch_size=5).store
    assert whole.id == layered.id
    assert verify(whole, "numeric").sound


@pytest.mark.parametrize(
    "settings",
    [
        {"layers": "0,last"},
        {"layers": "2", "encoding": "int8"},
        {"layers": "0,last", "encoding": "sketch", "rank": 4},
        {"layers": "0,last", "pool_tokens": "mean@answer,last"},
    ],
    ids=["layers", "int8 of one layer", "sketch", "pooled"],
)
def test_more_items_are_added(settings, deep, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    old = extract(write_set(folder, 8), deep, path, **settings).store
    before = {layer: old.layer(layer).read(range(8)).rows.tobytes() for layer in old.layers}
    result = extract(write_set(folder, ITEMS), deep, path, **settings)
    assert result.fill is not None
    assert result.fill.items == ITEMS - 8
    store = open_store(path)
    assert {layer: store.layer(layer).read(range(8)).rows.tobytes() for layer in store.layers} == before
    assert verify(store, "numeric").sound


def test_an_item_without_tokens_of_the_role_is_named_before_the_model_runs(deep, tmp_path):
    folder = write_set(tmp_path / "set", 4)
    message = r"003\.png: it has no tokens for --pool-tokens mean@answer; its tokens are of the roles special, question"
    with pytest.raises(DataError, match=r"4 problems") as caught:
        extract(folder, deep, tmp_path / "s.agiqa", variant="no_id", pool_tokens="mean@answer")
    assert re.search(message, str(caught.value))
    assert not (tmp_path / "s.agiqa").exists()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"layers": "6"}, ConfigError, r"names '6', which is no layer of the model\. It has 5"),
        ({"pool_tokens": "meen"}, UnknownName, "Did you mean 'mean'"),
        ({"keep_logits": True, "pool_tokens": "mean"}, ConfigError, "--pool-tokens stores none"),
        ({"keep_logits": True, "layers": "2"}, ConfigError, "--keep-logits stores logits.*add `last` to --layers"),
        ({"encoding": "logits", "layers": "2"}, ConfigError, "--encoding logits stores logits"),
        ({"encoding": "sketch", "rank": 33, "layers": "2"}, ConfigError, r"rank 33 is outside 1\.\.32"),
    ],
)
def test_what_contradicts_itself_is_refused_before_anything_is_read(settings, error, message, deep, texts, tmp_path):
    with pytest.raises(error, match=message):
        extract(texts, deep, tmp_path / "s.agiqa", **settings)
    assert not (tmp_path / "s.agiqa").exists()


def test_features_without_a_store_are_those_of_the_store(deep, texts, layered, own):
    data_set, backbone = inputs(texts, deep)
    features = LiveFeatures(backbone, Target(encoding="hidden", layers=("2", "last")), name="here")
    features.replace(data_set.items[:3])
    joined, there = features.layer("2+last"), layered.layer("2+last")
    assert joined.widths == there.widths
    assert near(joined.read(range(3)).float32(), there.read(range(3)).float32())
    pooled = Target(encoding="hidden", layers=("4",), poolings=parse_poolings(POOLED))
    features = LiveFeatures(backbone, pooled, name="here")
    features.replace(data_set.items[:3])
    assert (features.pooled, features.n_tokens.tolist()) == (POOLED, [len(POOLED)] * 3)
    assert near(features.layer("-2").read([2]).float32(), pooled_rows(own, "4")[2])
    question = (Message(role="user", content="rate"),)
    with pytest.raises(DataError, match=r"item '000\.png': it has no tokens for --pool-tokens mean@answer"):
        features.replace([replace(data_set.items[0], conversation=question)])
