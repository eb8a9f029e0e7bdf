"""Layers of a store, each read like a store of its own, joined, and of several stores read as one."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agiqa.errors import ConfigError, DamagedStore, HeadError, SchemaError, UnknownName, ViewRefused
from agiqa.heads.data.features import FeatureSource, Hashed, Joined, Located
from agiqa.store import open_store, store_summary, union, verify, view
from agiqa.store.format.layers import content_problem
from tests.store.conftest import make_content
from tests.store.conftest import make_store as make_plain
from tests.store.layered import Layered, lm_head, make_layered, make_store

LENGTHS = (3, 9, 0, 5, 1, 30)


@pytest.fixture(scope="module")
def content():
    return make_layered(LENGTHS, layers=("0", "3", "last"), widths={"0": 5}, layer_count=4)


@pytest.fixture(scope="module")
def stored(content, tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("layers") / "s.agiqa", content)


def rows_of(source):
    """Per item, (rows, width) float32."""
    read = source.read(range(len(source.n_tokens)))
    return [read.float32()[first:last] for first, last in pairwise(read.offsets.tolist())]


def assert_holds(source, states):
    for found, expected in zip(rows_of(source), states, strict=True):
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    layers=st.sets(st.sampled_from(["0", "1", "2", "17", "last"]), min_size=1),
    dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    width=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_every_layer_of_every_item_comes_back_in_its_own_bits(tmp_path_factory, lengths, layers, dtype, width, seed):
    names = sorted(layers, key=lambda name: 99 if name == "last" else int(name))
    widths = {name: width for name in names[:1] if name != "last"}  # that of `last` is the width of W_lm
    content = make_layered(lengths, layers=names, widths=widths, logical_dtype=dtype, seed=seed)
    store = make_store(tmp_path_factory.mktemp("round") / "s.agiqa", content)
    assert store.layers == tuple(names)
    order = np.random.default_rng(seed).permutation(len(lengths))
    for layer in names:
        read = store.layer(layer).read(order)
        for place, item in enumerate(order):
            rows = slice(read.offsets[place], read.offsets[place + 1])
            np.testing.assert_array_equal(read.float32()[rows], content.states[layer][item])
            np.testing.assert_array_equal(read.roles[rows], content.roles[item])
    joined = store.layer("+".join(names))
    assert_holds(joined, [np.concatenate(parts, axis=1) for parts in zip(*content.states.values(), strict=True)])
    assert verify(store, "numeric").sound


def test_a_layer_is_a_source_of_features_like_a_store(stored, content):
    for source in (stored, stored.layer("0"), stored.layer("0+last")):
        assert isinstance(source, FeatureSource)
        assert isinstance(source, Located)
        assert isinstance(source, Hashed)
        assert not isinstance(source, Joined)
        assert source.items.names == content.names
        assert source.lm_head_sha256 == hashlib.sha256(lm_head().tobytes()).hexdigest()
    layer = stored.layer("0")
    assert (layer.layer, layer.width, layer.encoding, layer.logical_dtype) == ("0", 5, "hidden", "float32")
    expected = hashlib.sha256(f'["{stored.id}","0"]'.encode()).hexdigest()
    assert layer.id == expected
    assert len({source.content for source in (stored, layer, stored.layer("3"), stored.layer("0+3"))}) == 4
    assert layer.location == f"{stored.path} (layer 0)"
    np.testing.assert_array_equal(layer.features("image_1.png"), content.states["0"][1])
    assert "layer 0" in repr(layer)
    with pytest.raises(ViewRefused, match="has no W_lm, which reads only the layer 'last'"):
        layer.lm_head()


@pytest.mark.parametrize(
    ("asked", "found"),
    [("last", "last"), ("-1", "last"), ("4", "last"), ("3", "3"), ("-2", "3"), ("-5", "0"), (" 03 ", "3")],
)
def test_layers_are_found_by_number_from_either_end(stored, asked, found):
    assert stored.layer(asked).layer_name == found
    assert (stored.layer(asked) is stored) == (found == "last")


def test_joined_layers_are_the_same_in_any_order(stored, content):
    joined, other = stored.layer("0+last"), stored.layer("-1+0")
    assert (joined.id, joined.layer_name) == (other.id, "0+last")
    assert (joined.layers, joined.widths, joined.width) == (("0", "last"), (5, 8), 13)
    expected = [
        np.concatenate(parts, axis=1) for parts in zip(content.states["0"], content.states["last"], strict=True)
    ]
    assert_holds(joined, expected)
    assert_holds(other, expected)


@pytest.mark.parametrize("asked", ["9", "-3", "first", "", "0+9", "²"])
def test_an_unknown_layer_is_answered_with_the_stored_ones(stored, asked):
    with pytest.raises(UnknownName, match=r"no layer .*4 blocks\. Stored: 0, 3, last\. `agiqa extract --layers"):
        stored.layer(asked)


def test_a_layer_that_is_named_twice_is_refused(stored):
    with pytest.raises(ConfigError, match="twice"):
        stored.layer("3+-2")


def test_a_store_without_layers_has_the_last_alone(tmp_path):
    store = make_plain(tmp_path / "s.agiqa", make_content([3, 4]))
    assert (store.layers, store.pooled, store.tap, store.layer_name) == (("last",), (), None, "last")
    assert (store.attributes["version"], store.manifest["version"]) == (1, 1)
    assert not {"layers", "pooled", "tap", "layer_count"} & {*store.attributes, *store.provenance}
    assert store.layer("last") is store
    with pytest.raises(UnknownName, match=r"no layer '8'\. Stored: last\. `agiqa extract --layers"):
        store.layer("8")
    with pytest.raises(UnknownName, match="need the number of blocks, which this store does not record"):
        store.layer("-2")


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"layers": ("0", "3")}, "its last layer is 3"), ({"tap": "vision:12"}, "its rows are those of vision:12")],
)
def test_without_w_lm_only_hidden_states_are_read(tmp_path, settings, why):
    content = make_layered(LENGTHS, **settings)
    store = make_store(tmp_path / "s.agiqa", content)
    assert store.lm_head_sha256 == ""
    np.testing.assert_array_equal(view(store, "hidden").item(1), content.states[content.layers[-1]][1])
    for ask in (store.lm_head, lambda: view(store, "logits")):
        with pytest.raises(ViewRefused, match=why):
            ask()
    assert verify(open_store(store.path), "numeric").sound


def test_a_layer_has_the_tokens_of_its_store(stored, content):
    for source in (stored.layer("0"), stored.layer("0+last"), union([stored]).layer("0"), union([stored]).layer("0+3")):
        for (ids, roles), expected in zip(source.tokens([5, 2, 1]), (5, 2, 1), strict=True):
            np.testing.assert_array_equal(ids, np.arange(LENGTHS[expected]))
            np.testing.assert_array_equal(roles, content.roles[expected])


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"pooled": ("mean@image", "last")}, r"pooled over tokens \(mean@image, last\)"),
        ({"tap": "timm"}, "those of timm"),
    ],
)
def test_rows_that_are_no_tokens_have_no_ids(tmp_path, settings, rows):
    store = make_store(tmp_path / "s.agiqa", make_layered(LENGTHS, **settings))
    for source in (store, store.layer("3"), union([store])):
        with pytest.raises(ViewRefused, match=rf"has no token ids: its rows are {rows}\. Give a store"):
            source.tokens([0])


def test_views_of_layers(stored, content):
    np.testing.assert_array_equal(view(stored, "hidden", layer="3").item(1), content.states["3"][1])
    np.testing.assert_allclose(view(stored, "logits").item(1), content.states["last"][1] @ lm_head().T, atol=1e-4)
    with pytest.raises(ViewRefused, match=r"Layer 3 of .* has no view 'logits'"):
        view(stored, "logits", layer="3")
    with pytest.raises(UnknownName, match="Stored: 0, 3, last"):
        view(stored, "hidden", layer="7")


def test_pooled_rows_are_one_per_pooling(tmp_path):
    content = make_layered(LENGTHS, pooled=("mean@image", "last"))
    store = make_store(tmp_path / "s.agiqa", content)
    assert store.pooled == store.layer("3").pooled == ("mean@image", "last")
    assert store.n_tokens.tolist() == [2] * len(LENGTHS)
    assert_holds(store.layer("3"), content.states["3"])
    assert "8 values per row" in repr(store)


def test_the_summary_and_the_data_card_name_what_rows_are(stored, tmp_path):
    summary = store_summary(stored)
    assert summary["layers"] == ["0", "3", "last"]
    assert not {"pooled", "tap"} & set(summary)
    assert summary["bytes_raw_features"] == sum(LENGTHS) * (5 + 8 + 8) * 4
    objects = [entry for entry in stored.manifest["objects"] if "/c/" in entry["path"]]
    rows = [entry["bytes"] for entry in objects if entry["path"].split("/")[1] in ("features", "layers")]
    assert summary["bytes_features"] == sum(rows)
    card = (stored.path / "README.md").read_text()
    assert "agiqa.features v2" in card
    assert "| layers | 0, 3, last |" in card
    assert "and their conversations, 48 tokens, made once by\na language model so" in card
    pooled = make_store(tmp_path / "p.agiqa", make_layered(LENGTHS, pooled=("mean",), tap="timm", layers=("2",)))
    assert store_summary(pooled)["pooled"] == ["mean"]
    assert store_summary(pooled)["tap"] == "timm"
    card = (pooled.path / "README.md").read_text()
    assert "--projection hidden" in card
    assert "of 6 AI-generated images, 6 rows, made once by\nan image encoder so" in card


def halves(tmp_path, content: Layered, other: Layered | None = None):
    """Two stores: the first three items of `content`, and all of `other`, whose items have other names and keys."""
    first = make_store(tmp_path / "a.agiqa", content.first(3))
    return first, make_store(tmp_path / "b.agiqa", Renamed(**vars(other or make_layered((2, 4, 1), seed=1))))


class Renamed(Layered):
    @property
    def names(self):
        return [f"other_{item}.png" for item in range(len(self.roles))]


def test_layers_of_several_stores_are_read_as_one(tmp_path):
    one, two = make_layered(LENGTHS), make_layered((2, 4, 1), layers=("3", "last"), seed=1)
    stores = halves(tmp_path, one, two)
    joined = union(stores)
    assert joined.layers == ("3", "last")
    for name in ("3", "3+last"):
        layer = joined.layer(name)
        assert isinstance(layer, FeatureSource)
        assert isinstance(layer, Joined)
        assert [part.layer_name for part, _ in layer.parts] == [name, name]
        assert layer.id == hashlib.sha256(f'["{joined.id}","{name}"]'.encode()).hexdigest()
    assert_holds(joined.layer("3"), [*one.states["3"][:3], *two.states["3"]])
    assert joined.layer("last") is joined
    assert_holds(joined, [*one.states["last"][:3], *two.states["last"]])
    with pytest.raises(UnknownName, match="Stored: 3, last"):
        joined.layer("0")


@pytest.mark.parametrize(
    ("one", "two", "error", "says"),
    [
        ({"pooled": ("mean",)}, {}, SchemaError, "the pooling mean, .* has none, its rows are tokens"),
        ({"tap": "timm"}, {"tap": "projector"}, SchemaError, "the tap timm, .* has projector"),
        ({"layers": ("0", "3")}, {"layers": ("0", "4")}, SchemaError, "the layer in `features` 3, .* has 4"),
        ({"tap": "timm"}, {"tap": "timm", "provenance": {"model": {"name": "b"}}}, HeadError, "differ in model.name"),
    ],
)
def test_stores_whose_rows_mean_something_else_are_not_read_as_one(tmp_path, one, two, error, says):
    stores = halves(tmp_path, make_layered(LENGTHS, **one), make_layered((2, 4, 1), seed=1, **two))
    with pytest.raises(error, match=says):
        union(stores)


def test_a_layer_of_another_width_is_not_read_as_one(tmp_path):
    stores = halves(tmp_path, make_layered(LENGTHS, widths={"3": 4}), make_layered((2, 4, 1), seed=1))
    joined = union(stores)
    with pytest.raises(SchemaError, match=r"the width of layer 3 4, .* has 8"):
        joined.layer("3")


ATTRIBUTES = {"version": 2, "layers": ["3", "last"], "layer_count": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"version": 1}, "what it holds is version 2"),
        ({"layers": None, "layer_count": None}, "what it holds is version 1"),
        ({"layers": ["last", "3"]}, "do not ascend"),
        ({"layers": ["3", "3"]}, "do not ascend"),
        ({"layers": ["03", "last"]}, "a layer is called '03'"),
        ({"layers": []}, "it has 0 layers"),
        ({"layers": "last"}, "no lists of texts"),
        ({"layers": [3]}, "no lists of texts"),
        ({"layer_widths": {"7": 4}}, "none of its other layers"),
        ({"layer_widths": {"3": 0}}, "layer_widths is"),
        ({"layer_dtypes": {"3": 1}}, "layer_dtypes is"),
        ({"layer_count": "4"}, "layer_count is '4'"),
        ({"pooled": ["median"]}, "'median' is no pooling"),
        ({"pooled": ["mean@picture"]}, "'mean@picture' is no pooling"),
        ({"pooled": ["mean", "mean"]}, "a pooling occurs twice"),
        ({"tap": "Vision 12"}, "its tap is 'Vision 12'"),
        ({"tap": 3}, "no lists of texts"),
    ],
)
def test_attributes_that_contradict_the_format_are_named(change, says):
    attributes = {name: value for name, value in {**ATTRIBUTES, **change}.items() if value is not None}
    assert content_problem(ATTRIBUTES, ATTRIBUTES) is None
    assert says in (content_problem(attributes, attributes) or "")
    if change.keys() != {"version"}:
        assert "is not that of its provenance" in (content_problem(attributes, ATTRIBUTES) or "")


def test_a_manifest_of_another_version_than_its_store_is_damage(content, tmp_path):
    store = make_store(tmp_path / "s.agiqa", content)
    manifest = json.loads(store.layout.manifest.read_text())
    store.layout.manifest.write_text(json.dumps({**manifest, "version": 1}))
    with pytest.raises(DamagedStore, match="it says version 1, the metadata 2"):
        open_store(store.path)
