"""Several stores read as one: same rows, same order, and no mixture of spaces."""

import re
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
import torch

from agiqa.errors import ConfigError, DataError, HeadError, SchemaError
from agiqa.heads.data.features import FeatureSet, FeatureSource, location_of
from agiqa.heads.data.splits import split_items
from agiqa.store import basis_from, sketch_store
from agiqa.store.reading.union import union
from tests.store.conftest import Content, make_content, make_store


def named(content, prefix):
    """The same content under names, and so item keys, of its own."""
    return replace(content, items=replace(content.items, names=[prefix + name for name in content.items.names]))


def other_content(content, **settings):
    """A second data set for the same model, with an aspect of its own."""
    made = named(make_content([0, 5, 30, 2, 11, 7], seed=3, **settings), "b/")
    labels = {"authenticity": np.arange(6.0) / 2}
    return replace(made, lm_head=content.lm_head, items=replace(made.items, labels=labels))


@pytest.fixture(scope="module")
def content():
    return make_content(np.random.default_rng(7).integers(1, 60, 40).tolist())


@pytest.fixture(scope="module")
def second(content):
    return other_content(content)


@pytest.fixture(scope="module")
def stores(content, second, tmp_path_factory):
    """Two stores of one model; a union only reads."""
    folder = tmp_path_factory.mktemp("stores")
    return [
        make_store(folder / "a.agiqa", content),
        make_store(folder / "b.agiqa", second, data_set={"name": "b"}),
    ]


@pytest.fixture(scope="module")
def stored(stores):
    return stores[0]


@pytest.mark.parametrize("seed", range(4))
def test_rows_come_in_the_order_asked_for_from_whichever_store(stores, content, second, seed):
    both = union(stores)
    hidden, roles = [*content.hidden, *second.hidden], [*content.roles, *second.roles]
    asked = np.random.default_rng(seed).integers(0, 46, 60)  # some twice
    read = both.read(asked)
    np.testing.assert_array_equal(read.rows, np.concatenate([hidden[item] for item in asked]))
    np.testing.assert_array_equal(read.roles, np.concatenate([roles[item] for item in asked]))
    assert np.diff(read.offsets).tolist() == [len(hidden[item]) for item in asked]
    assert both.n_tokens.tolist() == [len(rows) for rows in hidden]


@pytest.mark.parametrize("asked", [[], [40], [44, 41], [3, 45, 3]])
def test_a_few_items_or_none_can_be_read(stores, content, second, asked):
    hidden = [*content.hidden, *second.hidden]
    read = union(stores).read(asked)
    expected = np.concatenate([hidden[0][:0], *(hidden[item] for item in asked)])
    assert read.rows.dtype == expected.dtype
    np.testing.assert_array_equal(read.rows, expected)
    assert read.offsets[-1] == len(expected)


@pytest.mark.parametrize("asked", [[46], [-1], [0, 99]])
def test_an_item_outside_is_refused(stores, asked):
    with pytest.raises(DataError, match="has 46 items"):
        union(stores).read(asked)


def test_items_are_listed_one_store_after_the_other(stores, content, second):
    items = union(stores).items
    assert items.names == content.items.names + second.items.names
    assert items.splits == content.items.splits + second.items.splits
    np.testing.assert_array_equal(items.labels["quality"], [*content.items.labels["quality"], *[np.nan] * 6])
    np.testing.assert_array_equal(items.labels["authenticity"], [*[np.nan] * 40, *second.items.labels["authenticity"]])


def test_it_is_a_source_to_train_from(stores, content, second):
    both = union(stores)
    assert isinstance(both, FeatureSource)
    np.testing.assert_array_equal(both.lm_head(), content.lm_head)
    features = FeatureSet.from_store(both, [45, 0, 41, 3])
    expected = [*content.hidden, *second.hidden]
    bits = features.rows.view(torch.uint16).numpy()
    np.testing.assert_array_equal(bits, np.concatenate([expected[item] for item in (45, 0, 41, 3)]))


def test_the_id_tells_the_stores_and_their_order(stores):
    ids = {union(stores).id, union(stores[::-1]).id, union(stores[:1]).id, union(stores[1:]).id}
    assert len(ids) == 4
    assert union(stores).id in ids


def test_stores_of_other_makings_are_joined_with_a_note(stored, second, tmp_path):
    other = make_store(tmp_path / "b.agiqa", second, conversation={"variant": "no_id"})
    both = union([stored, other])
    assert both.provenance["union"] == [stored.id, other.id]
    assert both.provenance["model"] == stored.provenance["model"]
    assert "conversation" not in both.provenance
    assert both.notes == (f"{stored.path} and {other.path} differ in conversation",)


def test_sketches_in_one_basis_are_joined_and_others_are_refused(stores, tmp_path):
    basis = basis_from(stores[0], 4)
    first, second = (
        sketch_store(store, tmp_path / f"sketch_{number}.agiqa", basis=basis).store
        for number, store in enumerate(stores)
    )
    both = union([first, second])
    assert both.basis().id == basis.id
    np.testing.assert_array_equal(both.read([44, 2]).rows[-len(first.read([2]).rows) :], first.read([2]).rows)
    own = sketch_store(stores[1], tmp_path / "own.agiqa", basis=basis_from(stores[1], 4)).store
    with pytest.raises(HeadError, match=rf"{basis.id[:12]}.*{own.basis().id[:12]}.*sketch HIDDEN_STORE OUT --basis"):
        union([first, own])
    with pytest.raises(SchemaError, match=rf"store sketch {stores[1].path} OUT --basis {first.path}"):
        union([first, stores[1]])
    with pytest.raises(SchemaError, match=rf"store sketch {stores[1].path} OUT --basis {first.path}"):
        union([stores[1], first])


def test_another_language_model_head_is_refused(stored, second, tmp_path):
    other = make_store(tmp_path / "c.agiqa", replace(second, lm_head=second.lm_head + 1))
    with pytest.raises(HeadError, match="live in different spaces"):
        union([stored, other])


def test_another_dtype_is_refused(stored, content, tmp_path):
    other = make_store(tmp_path / "c.agiqa", other_content(content, logical_dtype="float16"))
    with pytest.raises(SchemaError, match=r"logical dtype bfloat16.*has float16"):
        union([stored, other])


@dataclass(frozen=True, kw_only=True)
class KeyedContent(Content):
    """Content whose item keys do not follow from its names."""

    own_keys: list[bytes]

    @property
    def keys(self):
        return self.own_keys


def keyed(content, keys):
    return KeyedContent(own_keys=keys, **{part.name: getattr(content, part.name) for part in fields(content)})


def test_an_item_in_two_stores_is_refused_by_name(stored, content, second, tmp_path):
    """The same image and conversation, under another name."""
    shared = keyed(second, [*second.keys[:2], content.keys[7], *second.keys[3:]])
    other = make_store(tmp_path / "c.agiqa", shared)
    with pytest.raises(DataError, match=rf"'image_7.png' of {stored.path} is 'b/image_2.png' of {other.path}"):
        union([stored, other])
    with pytest.raises(DataError, match="40 problems"):
        union([stored, stored])


def test_a_name_may_be_used_in_both(stored, second, tmp_path):
    renamed = replace(second, items=replace(second.items, names=[*second.items.names[:5], "image_0.png"]))
    other = make_store(tmp_path / "c.agiqa", keyed(renamed, second.keys))
    assert union([stored, other]).items.names.count("image_0.png") == 2


def test_what_two_stores_differ_in_is_named_whole(stored, second, tmp_path):
    model = {"name": "a", "files": {"a: b.json": 1}}
    made = [
        make_store(
            tmp_path / f"{number}.agiqa", named(second, f"{number}/"), model={**model, "files": {"a: b.json": number}}
        )
        for number in range(2)
    ]
    assert union(made).notes == (f"{made[0].path} and {made[1].path} differ in model.files.a: b.json",)


def test_no_store_at_all_is_refused():
    with pytest.raises(ConfigError, match="at least one store"):
        union([])


def test_messages_of_heads_name_every_store_that_is_read(stores):
    both = union(stores)
    for source, place in [(stores[0], str(stores[0].path)), (both, f"{stores[0].path} + {stores[1].path}")]:
        assert location_of(source) == place
        with pytest.raises(DataError, match=re.escape(f"{place}: no item is in the split 'val'")):
            split_items(source, "val")
