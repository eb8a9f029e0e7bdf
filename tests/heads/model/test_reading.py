"""What a head reads of a store by its settings, and the default settings of stores."""

from dataclasses import replace

import pytest

from agiqa.errors import ConfigError, HeadError, UnknownName
from agiqa.heads import HeadConfig
from agiqa.heads.data.layers import layer_of, pooled_rows
from agiqa.heads.model.projection import FeatureSpec, check_encoding
from agiqa.heads.model.reading import check_mix, features_for, mismatch, reading_notes, usual_pooling, usual_settings
from tests.heads.layered_stores import made_states, mos_of, pooled_states, write_store

POOLED = ("mean@question", "mean@answer", "last")
STATES = made_states(12)
MOS = mos_of(STATES["16"])


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("reading") / "tokens.agiqa", STATES, MOS)


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    path = tmp_path_factory.mktemp("reading") / "pooled.agiqa"
    return write_store(path, pooled_states(STATES, POOLED), MOS, pooled=POOLED)


@pytest.fixture(scope="module")
def tapped(tmp_path_factory):
    """Of a vision tower: without W_lm."""
    path = tmp_path_factory.mktemp("reading") / "tap.agiqa"
    return write_store(path, {"2": STATES["8"], "5": STATES["16"]}, MOS, tap="vision:5")


@pytest.mark.parametrize(("layer", "projection"), [(None, "vocabulary"), ("8", "hidden"), ("8+last", "hidden")])
def test_only_the_last_layer_is_read_through_w_lm(store, layer, projection):
    assert usual_settings(store)({"layer": layer}) == {"projection": projection}


def test_a_tap_is_read_as_hidden_states(tapped):
    assert usual_settings(tapped)({}) == {"projection": "hidden"}
    with pytest.raises(HeadError, match=r"'vocabulary'.*the tap vision:5.*Take the projection 'hidden'"):
        check_encoding(tapped, "vocabulary")


def test_the_vocabulary_projection_refuses_other_layers_by_name(store):
    with pytest.raises(HeadError, match=r"'vocabulary'.*layer 8.*Take the projection 'hidden'"):
        check_encoding(store.layer("8"), "vocabulary")
    check_encoding(store.layer("last"), "vocabulary")
    check_encoding(store.layer("8"), "hidden")


@pytest.mark.parametrize(
    ("stored", "usual"),
    [(POOLED, "mean@answer"), (("last", "mean"), "mean"), (("max@image", "last"), "max@image")],
)
def test_the_usual_pooling_is_the_answer_then_the_mean_then_the_first(stored, usual):
    assert usual_pooling(stored) == usual


def test_pooled_rows_are_read_without_an_encoder(pooled):
    assert usual_settings(pooled)({"layer": "8"}) == {
        "projection": "hidden",
        "encoder": "none",
        "pooling": "mean@answer",
    }
    assert usual_settings(pooled)({"encoder": "gru"})["pooling"] == "attention"


def test_a_pooling_picks_the_row_of_its_name(pooled):
    read = features_for(pooled, HeadConfig(encoder="none", pooling="mean@question"), "16")
    assert (layer_of(read), pooled_rows(read)) == ("16", ("mean@question",))
    assert features_for(read, HeadConfig(encoder="none", pooling="mean@question"), "16") is read


@pytest.mark.parametrize("encoder", ["none", "gru"])
def test_a_pooling_that_is_not_stored_is_refused_with_those_that_are(pooled, encoder):
    with pytest.raises(HeadError, match=r"'mean@image'.*Known: last, mean@answer, mean@question.*--pool-tokens"):
        features_for(pooled, HeadConfig(encoder=encoder, pooling="mean@image"), None)


def test_an_encoder_reads_all_pooled_rows_and_says_so(pooled):
    config = HeadConfig(encoder="gru", pooling="attention")
    read = features_for(pooled, config, "8")
    assert pooled_rows(read) == POOLED
    (note,) = reading_notes(read, config)
    assert "reads the 3 pooled rows of each item (mean@question, mean@answer, last) as a sequence" in note


def test_tokens_need_no_note(store, pooled):
    assert reading_notes(store, HeadConfig(encoder="gru")) == []
    one = HeadConfig(encoder="none", pooling="last")
    assert reading_notes(features_for(pooled, one, None), one) == []


def test_layers_are_compared(store):
    expected, found = FeatureSpec.of(store.layer("8")), FeatureSpec.of(store.layer("16"))
    told = mismatch(HeadConfig(projection="hidden"), expected, found)
    assert told is not None
    assert "trained on layer 8" in told
    assert "of layer 16" in told
    assert mismatch(HeadConfig(projection="hidden"), expected, expected) is None


@pytest.mark.parametrize(
    ("encoder", "pooling", "reads"),
    [("none", "mean@answer", True), ("none", "last", True), ("none", "max@answer", False), ("gru", "mean", False)],
)
def test_tokens_and_pooled_rows_are_alike_for_linear_heads(store, pooled, encoder, pooling, reads):
    tokens, rows = FeatureSpec.of(store), replace(FeatureSpec.of(pooled), pooled=(pooling,))
    for expected, found in ((tokens, rows), (rows, tokens)):
        told = mismatch(HeadConfig(encoder=encoder, pooling=pooling), expected, found)
        assert (told is None) is reads
    assert "the pooled rows" in (mismatch(HeadConfig(encoder="gru"), tokens, rows) or "")


def test_a_mix_needs_layers_of_one_width(tmp_path):
    states = {"1": made_states(12, width=6)["8"], "2": STATES["16"]}
    store = write_store(tmp_path / "stages.agiqa", states, MOS, tap="timm", widths={"1": 6})
    joined = store.layer("1+2")
    check_mix(joined, HeadConfig())
    check_mix(store, HeadConfig(layer_mix="softmax"))
    with pytest.raises(ConfigError, match=r"layers 1\+2 have the widths 6, 4\. Take 'concat'"):
        check_mix(joined, HeadConfig(layer_mix="softmax"))


def test_an_unknown_encoder_or_pooling_is_named(pooled):
    with pytest.raises(UnknownName, match="encoder"):
        features_for(pooled, HeadConfig(encoder="grru"), None)
    with pytest.raises(UnknownName, match="pooling"):
        features_for(pooled, HeadConfig(encoder="none", pooling="meen"), None)
