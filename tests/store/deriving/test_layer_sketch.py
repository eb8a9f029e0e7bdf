"""Sketches, eight bits and logits of stores with layers, pooled rows, or without W_lm."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError, DataError, HeadError, ViewRefused
from agiqa.store import Scale, basis_from, convert_store, layer_bases_from, sketch_store, verify
from agiqa.store.deriving.calibrating import bases_of
from tests.store.layered import lm_head, make_layered, make_store

LENGTHS = (3, 9, 0, 5, 1, 30)
TRAINING = (1, 2, 3, 5)


@pytest.fixture(scope="module")
def content():
    return make_layered(LENGTHS, widths={"0": 5})


@pytest.fixture(scope="module")
def stored(content, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("source") / "s.agiqa", content)


def training_states(content, layer):
    return np.concatenate([content.states[layer][item] for item in TRAINING]).astype(np.float64)


def leading(states, rank):
    """The leading right singular vectors (rank, width), each with its largest entry positive, and squared singular
    values per row."""
    _, values, vectors = np.linalg.svd(states, full_matrices=False)
    return signed(vectors[:rank]), values**2 / len(states)


def signed(vectors):
    largest = np.abs(vectors).argmax(axis=1)
    return vectors * np.sign(vectors[np.arange(len(vectors)), largest])[:, None]


def test_every_layer_is_sketched_in_the_leading_directions_of_its_training_states(stored, content, tmp_path):
    result = sketch_store(stored, tmp_path / "k.agiqa", basis=basis_from(stored, 3))
    sketch = result.store
    assert sketch.layers == ("0", "3", "last")
    for layer in ("0", "3"):
        states, basis = training_states(content, layer), sketch.layer(layer).basis()
        vectors, energy = leading(states, 3)
        np.testing.assert_allclose(signed(basis.map), vectors, atol=1e-5)
        np.testing.assert_allclose(basis.energy, energy, rtol=1e-5)
        np.testing.assert_array_equal(basis.q, basis.map.T)
        np.testing.assert_allclose(basis.mean, basis.map @ states.mean(axis=0), atol=1e-5)
        assert (basis.is_of_states, basis.calibration) == (True, f"{stored.id}:4 items")
        found = sketch.layer(layer).read([1, 5]).float32()
        everything = np.concatenate([content.states[layer][item] for item in (1, 5)])
        np.testing.assert_allclose(found, everything @ basis.map.T, atol=0.02)
        kept = result.layers[layer]
        assert kept.energy_kept == pytest.approx(energy[:3].sum() / energy.sum())
        assert 0.0 < kept.state_error < 0.7
    assert sketch.layer("0+3").basis().id not in {basis.id for basis in sketch.layer_bases().values()}
    assert verify(sketch, "numeric").sound


def test_test_items_have_no_say_in_the_bases_of_layers(stored, content, tmp_path):
    changed = make_layered(LENGTHS, widths={"0": 5})
    for layer in changed.states:
        for item in set(range(len(LENGTHS))) - set(TRAINING):
            changed.states[layer][item][...] *= 100
    other = make_store(tmp_path / "o.agiqa", changed)
    here, there = layer_bases_from(stored, 2), layer_bases_from(other, 2)
    for layer in ("0", "3"):
        np.testing.assert_array_equal(here[layer].map, there[layer].map)


def test_a_layer_that_is_narrower_than_the_rank_keeps_all_its_channels(stored, content, tmp_path):
    sketch = sketch_store(stored, tmp_path / "k.agiqa", basis=basis_from(stored, 7)).store
    assert [sketch.layer(layer).width for layer in sketch.layers] == [5, 7, 7]
    rebuilt = sketch.layer("0").read([1]).float32() @ sketch.layer_basis("0").q.T
    np.testing.assert_allclose(rebuilt, content.states["0"][1], atol=0.02)


def test_a_second_store_is_sketched_in_the_bases_of_the_first(stored, tmp_path):
    first = sketch_store(stored, tmp_path / "a.agiqa", basis=basis_from(stored, 3)).store
    other = make_store(tmp_path / "o.agiqa", make_layered((4, 5, 6), widths={"0": 5}, seed=8))
    second = sketch_store(other, tmp_path / "b.agiqa", basis=first.basis(), layer_bases=first.layer_bases()).store
    assert {layer: basis.id for layer, basis in second.layer_bases().items()} == first.provenance["layer_bases"]


def test_a_sketch_that_lacks_a_layer_gives_no_basis_for_it(stored, tmp_path):
    plain = make_store(tmp_path / "o.agiqa", make_layered((4, 5, 6), layers=("last",), seed=8))
    first = sketch_store(plain, tmp_path / "a.agiqa", basis=basis_from(plain, 3)).store
    with pytest.raises(HeadError, match="has the layer 0, and the sketch whose basis was given does not"):
        sketch_store(stored, tmp_path / "b.agiqa", basis=first.basis(), layer_bases=first.layer_bases())
    wide = make_store(tmp_path / "w.agiqa", make_layered((4, 5, 6), widths={"3": 6}))
    with pytest.raises(HeadError, match=r"reads 5 channels, the layer 0 of .* has 8"):
        sketch_store(wide, tmp_path / "c.agiqa", basis=basis_from(wide, 2), layer_bases=layer_bases_from(stored, 2))


def test_large_states_are_sketched_in_float32(tmp_path):
    """Middle layers have tokens of thousands times the usual length; a coordinate of float16 would overflow."""
    content = make_layered(LENGTHS)
    content.states["3"][1][0] *= 3000
    store = make_store(tmp_path / "s.agiqa", content)
    sketch = sketch_store(store, tmp_path / "k.agiqa", basis=basis_from(store, 8)).store
    assert (sketch.logical_dtype, sketch.layer("3").logical_dtype) == ("float16", "float32")
    assert sketch.provenance["layer_dtypes"] == {"3": "float32"}
    rebuilt = sketch.layer("3").read([1]).float32() @ sketch.layer_basis("3").q.T
    np.testing.assert_allclose(rebuilt, content.states["3"][1], rtol=1e-3, atol=0.05)
    assert sketch.layer("3+last").logical_dtype == "float32"
    assert verify(sketch, "numeric").sound


def test_eight_bits_have_a_scale_per_layer(stored, content, tmp_path):
    eighth = convert_store(stored, tmp_path / "i.agiqa", "int8")
    assert {"layer_widths": {"0": 5}}.items() <= eighth.provenance.items()
    for layer in eighth.layers:
        states, source = training_states(content, layer), eighth.layer(layer)
        scale = eighth.layer_scale(layer)
        np.testing.assert_allclose(scale.mean, states.mean(axis=0), atol=1e-5)
        np.testing.assert_allclose(scale.rms, states.std(axis=0), rtol=1e-4)
        assert (source.encoding, source.logical_dtype) == ("int8", "float16")
        for item in (1, 5):
            found, right = source.read([item]).float32(), content.states[layer][item]
            assert np.abs(found - right).max() <= np.abs(right - scale.mean).max() / 127 * 4
            assert np.linalg.norm(found - right) < 0.02 * np.linalg.norm(right)
    joined = eighth.layer("0+last").read([1]).float32()
    expected = [eighth.layer(layer).read([1]).float32() for layer in ("0", "last")]
    np.testing.assert_array_equal(joined, np.concatenate(expected, axis=1))
    assert verify(eighth, "numeric").sound


@pytest.mark.parametrize("value", [70000.0, -66000.0])
def test_a_value_that_eight_bits_cannot_hold_is_named_when_it_is_written(tmp_path, value):
    content = make_layered(LENGTHS)
    content.states["3"][5][7, 2] = value
    store = make_store(tmp_path / "s.agiqa", content)
    with pytest.raises(DataError, match=r"item 'image_5\.png' .* at token 7 of layer 3\. .* exceeds 65504"):
        convert_store(store, tmp_path / "i.agiqa", "int8")


@pytest.mark.parametrize("value", [np.nan, np.inf, 65505.0])
def test_a_token_that_eight_bits_cannot_hold_has_no_scale_and_others_keep_theirs(value):
    states = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    scale = Scale(mean=states.mean(axis=0), rms=states.std(axis=0), calibration="none")
    rows, sizes = scale.encode(states)
    states[1, 2] = value
    other_rows, other_sizes = scale.encode(states)
    assert np.isnan(other_sizes).tolist() == [False, True, False]
    np.testing.assert_array_equal(other_rows[[0, 2]], rows[[0, 2]])
    np.testing.assert_array_equal(other_sizes[[0, 2]], sizes[[0, 2]])


def test_logits_are_those_of_the_last_layer_beside_the_states_of_others(stored, content, tmp_path):
    logits = convert_store(stored, tmp_path / "l.agiqa", "logits")
    np.testing.assert_allclose(logits.read([1]).float32(), content.states["last"][1] @ lm_head().T, atol=1e-4)
    layer = logits.layer("3")
    assert (layer.encoding, layer.width) == ("hidden", 8)
    np.testing.assert_array_equal(layer.read([1]).rows, content.states["3"][1])
    with pytest.raises(ViewRefused, match="logits of the layer 'last' and hidden states of the others"):
        logits.layer("3+last")
    assert logits.layer("0+3").encoding == "hidden"
    assert verify(logits, "numeric").sound


@pytest.mark.parametrize("settings", [{"layers": ("0", "3")}, {"tap": "timm"}, {"tap": "timm", "pooled": ("mean",)}])
def test_stores_without_w_lm_are_sketched_by_their_states(tmp_path, settings):
    content = make_layered(LENGTHS, **settings)
    store = make_store(tmp_path / "s.agiqa", content)
    result = sketch_store(store, tmp_path / "k.agiqa", basis=basis_from(store, 3))
    basis, last = result.store.basis(), content.layers[-1]
    vectors, energy = leading(training_states(content, last), 3)
    np.testing.assert_allclose(signed(basis.map), vectors, atol=1e-5)
    assert result.energy_kept == pytest.approx(energy[:3].sum() / energy.sum())
    assert (result.store.lm_head_sha256, result.store.pooled) == ("", store.pooled)
    everything = np.concatenate([content.states[last][item] for item in range(len(LENGTHS))])
    error = np.linalg.norm(everything - everything @ basis.map.T @ basis.map) / np.linalg.norm(everything)
    assert result.logit_error == pytest.approx(error, rel=0.05)
    assert verify(result.store, "numeric").sound
    eighth = convert_store(store, tmp_path / "i.agiqa", "int8")
    np.testing.assert_allclose(eighth.read([1]).float32(), content.states[last][1], atol=0.2)
    assert verify(eighth, "numeric").sound
    with pytest.raises(ViewRefused, match="has no W_lm"):
        convert_store(store, tmp_path / "l.agiqa", "logits")
    with pytest.raises(ViewRefused, match="has no W_lm"):
        basis_from(store, 3, method="lm_head")


def test_a_rank_above_the_width_is_refused(tmp_path):
    store = make_store(tmp_path / "s.agiqa", make_layered(LENGTHS, tap="timm"))
    with pytest.raises(ConfigError, match=r"rank 9 is outside 1\.\.8"):
        basis_from(store, 9)


def test_a_basis_is_that_of_the_same_layer_and_tap(tmp_path):
    def sketched(name, **settings):
        made = make_store(tmp_path / f"{name}.agiqa", make_layered(LENGTHS, **settings))
        return made, sketch_store(made, tmp_path / f"{name}-sketch.agiqa", basis=basis_from(made, 3)).store

    plain, sketch = sketched("a")
    middle, other = sketched("b", layers=("0", "3"))
    found = bases_of(sketch, middle.layers, tap=None)  # of `features` in the one store, of another layer in the other
    assert {name: basis.id for name, basis in found.items()} == {
        name: sketch.layer_basis(name).id for name in ("0", "3")
    }
    with pytest.raises(HeadError, match="has no basis for the layer last; it has the layers 0, 3"):
        bases_of(other, plain.layers, tap=None)
    with pytest.raises(HeadError, match=r"those of the tap timm, and .* those of the language model"):
        bases_of(other, ["3"], tap="timm")
    with pytest.raises(
        HeadError, match=r"belongs to no language-model head, .* to the language-model head [0-9a-f]{12}:"
    ):
        sketch_store(plain, tmp_path / "c.agiqa", basis=other.basis())


def test_layers_change_nothing_for_the_last_one(stored, content, tmp_path):
    plain = make_store(tmp_path / "p.agiqa", replace(content, states={"last": content.states["last"]}))
    assert plain.attributes["version"] == 1
    here, there = basis_from(stored, 3), basis_from(plain, 3)
    np.testing.assert_array_equal(here.map, there.map)
    sketch = sketch_store(plain, tmp_path / "k.agiqa", basis=there).store
    assert (sketch.attributes["version"], sketch.layer_bases()) == (1, {})
    assert "layer_bases" not in sketch.provenance
