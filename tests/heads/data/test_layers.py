"""Layers and pooled rows of stores, as heads read them."""

import numpy as np
import pytest

from agiqa.errors import HeadError, UnknownName
from agiqa.heads.data.batches import LabelledItems, collate, pad
from agiqa.heads.data.features import FeatureSet
from agiqa.heads.data.layers import PooledRow, base_of, layer_of, pooled_rows, read_layer, stored_layers, tap_of
from agiqa.heads.data.reopening import SourceAddress
from tests.heads.layered_stores import LAYERS, made_states, mos_of, pooled_states, write_store

POOLED = ("mean@question", "mean@answer", "last")
STATES = made_states(12)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("layers") / "tokens.agiqa", STATES, mos_of(STATES["16"]))


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    path = tmp_path_factory.mktemp("layers") / "pooled.agiqa"
    return write_store(path, pooled_states(STATES, POOLED), mos_of(STATES["16"]), pooled=POOLED)


def rows_of(source, items):
    block = source.read(np.array(items))
    return [block.rows[first:last] for first, last in zip(block.offsets[:-1], block.offsets[1:], strict=True)]


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_its_own_states(store, layer):
    read = read_layer(store, layer)
    assert layer_of(read) == layer
    assert base_of(read) is store
    for rows, item in zip(rows_of(read, [5, 0]), (5, 0), strict=True):
        np.testing.assert_array_equal(rows, STATES[layer][item])


def test_joined_layers_have_the_channels_of_each(store):
    read = read_layer(store, "8+last")
    (rows,) = rows_of(read, [3])
    np.testing.assert_array_equal(rows, np.concatenate([STATES["8"][3], STATES["last"][3]], axis=1))
    assert (layer_of(read), read.width) == ("8+last", 8)


def test_a_pooled_row_is_the_row_of_that_name(pooled):
    for number, name in enumerate(POOLED):
        row = PooledRow.of(read_layer(pooled, "16"), name)
        for rows, item in zip(rows_of(row, [7, 2]), (7, 2), strict=True):
            np.testing.assert_array_equal(rows, pooled_states(STATES, POOLED)["16"][item][[number]])
        assert (layer_of(row), pooled_rows(row), row.n_tokens.tolist()) == ("16", (name,), [1] * 12)


def test_views_of_different_rows_have_different_ids(pooled):
    views = [PooledRow.of(read_layer(pooled, layer), name) for layer in LAYERS for name in POOLED]
    assert len({view.id for view in views} | {view.content for view in views}) == 2 * len(views)


@pytest.mark.parametrize("layer", ["8", "8+16", "last"])
def test_another_process_opens_the_same_view(pooled, layer):
    view = PooledRow.of(read_layer(pooled, layer), "mean@answer")
    again = SourceAddress.of(view).open()
    assert again.id == view.id
    np.testing.assert_array_equal(again.read([4]).rows, view.read([4]).rows)


def test_a_view_stays_what_it_is(pooled):
    view = PooledRow.of(read_layer(pooled, "8"), "last")
    assert read_layer(view, "8") is view
    assert PooledRow.of(view, "last") is view
    with pytest.raises(HeadError, match=r"Layer 16 of .* is asked for, and the source is its layer 8"):
        read_layer(view, "16")


def test_a_layer_that_is_not_stored_is_refused_with_those_that_are(store):
    with pytest.raises(UnknownName, match=r"no layer '12'.*8, 16, last.*agiqa extract --layers"):
        read_layer(store, "12")


def test_a_source_without_layers_has_the_last_one(make_store):
    source = make_store(4)
    assert (layer_of(source), stored_layers(source), pooled_rows(source), tap_of(source)) == (
        "last",
        ("last",),
        (),
        None,
    )
    assert read_layer(source, "last") is source
    with pytest.raises(HeadError, match="has the last layer only, and layer '8' is asked for"):
        read_layer(source, "8")


def test_kept_features_of_a_view_are_its_rows(pooled):
    view = PooledRow.of(read_layer(pooled, "8"), "mean@answer")
    kept = FeatureSet.from_store(view, [6, 1])
    expected = [pooled_states(STATES, POOLED)["8"][item][1] for item in (6, 1)]
    np.testing.assert_array_equal(kept.rows.numpy(), np.stack(expected))


def test_batches_of_single_rows_are_those_of_any_rows(pooled):
    kept = FeatureSet.from_store(PooledRow.of(read_layer(pooled, "16"), "last"), np.arange(12))
    items = LabelledItems.at(kept, np.array([5, 0, 9]), "quality")
    fast = collate(kept, items.positions, items.labels)
    plain = pad(kept.take(items.positions), positions=items.positions, targets=items.labels)
    for name in ("features", "mask", "roles", "lengths", "targets", "positions"):
        assert getattr(fast, name).dtype == getattr(plain, name).dtype
        np.testing.assert_array_equal(getattr(fast, name).numpy(), getattr(plain, name).numpy())
