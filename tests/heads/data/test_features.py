"""FeatureSet: the store's bits, the right items, and refusals by name."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from agiqa.errors import DataError, UnknownName
from agiqa.heads.data.batches import LabelledItems
from agiqa.heads.data.features import FeatureSet, FeatureSource, read_labels


def test_the_memory_store_is_a_feature_source(make_store):
    assert isinstance(make_store(3), FeatureSource)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_rows_are_the_stores_in_its_own_dtype_and_the_asked_order(make_store, dtype):
    store = make_store(300, logical_dtype=dtype)
    items = np.random.default_rng(0).permutation(300)[:280]
    features = FeatureSet.from_store(store, items)
    assert features.rows.dtype == getattr(torch, dtype)
    for position in (0, 17, 279):
        rows = features.rows[features.offsets[position] : features.offsets[position + 1]]
        expected = torch.from_numpy(store.features[items[position]]).to(rows.dtype)
        assert torch.equal(rows, expected)
    assert (
        LabelledItems.at(features, np.arange(280), "quality").labels.numpy().tolist()
        == store.items.labels["quality"][items, None].tolist()
    )
    assert set(features.roles.tolist()) == {3}


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_non_finite_features_name_the_item(make_store, value, dtype):
    store = make_store(5, logical_dtype=dtype)
    store.features[2][-1, 1] = value
    store.features[3][0, 0] = value
    with pytest.raises(DataError, match=r"2 problems\n.*'0002.png' holds NaN or inf.*\n.*'0003.png'"):
        FeatureSet.from_store(store, range(5))
    FeatureSet.from_store(store, [0, 1, 4])


def test_missing_labels_name_items_and_what_there_is(make_store):
    store = make_store(4)
    store.items.labels["quality"][1] = np.nan
    with pytest.raises(DataError, match=r"'0001.png' has no quality MOS") as caught:
        read_labels(store, np.arange(4), label="quality")
    assert "quality on 3 of 4 items" in caught.value.__notes__[0]
    with pytest.raises(UnknownName, match="Did you mean 'quality'"):
        read_labels(store, np.arange(4), label="qualty")


def test_an_item_without_tokens_is_refused(make_store):
    store = make_store(3)
    empty = replace(store, features=[store.features[0], store.features[1][:0], store.features[2]])
    with pytest.raises(DataError, match=r"'0001\.png' has no tokens"):
        FeatureSet.from_store(empty, range(3))


def test_statistics_are_those_of_the_chosen_tokens_in_float64(make_store):
    store = make_store(40)
    for rows in store.features:
        rows += 1000.0
    features = FeatureSet.from_store(store, range(40))
    chosen = np.array([3, 5, 30])
    statistics = features.statistics(chosen, sample=7)
    tokens = np.concatenate([store.features[k] for k in chosen]).astype(np.float64)
    assert statistics.mean.numpy() == pytest.approx(tokens.mean(0), rel=1e-12)
    assert statistics.std.numpy() == pytest.approx(tokens.std(0), rel=1e-9)
    assert statistics.sample.shape == (7, 4)
    assert np.isin(statistics.sample.numpy(), tokens.astype(np.float32)).all()


def test_some_items_are_kept_and_the_others_are_read_when_asked_for(make_store):
    store = make_store(20, logical_dtype="bfloat16")
    items = np.random.default_rng(0).permutation(20)
    whole, part = (FeatureSet.from_store(store, items, kept=kept) for kept in (None, 8))
    assert not whole.is_streamed
    assert part.is_streamed
    assert len(part.rows) == part.offsets[8]
    assert part.row_bytes == whole.row_bytes == whole.rows.nbytes
    assert torch.equal(part.roles, whole.roles)
    positions = np.array([12, 3, 19, 3, 12, 0])
    for found, wanted in zip(part.take(positions), whole.take(positions), strict=True):
        assert torch.equal(found.rows, wanted.rows)
        assert torch.equal(found.roles, wanted.roles)


def test_no_items_make_an_empty_set(make_store):
    features = FeatureSet.from_store(make_store(3), [])
    assert LabelledItems.at(features, np.arange(0), "quality").labels.shape == (0, 1)
    assert (len(features), features.rows.shape, features.is_streamed) == (0, (0, 4), False)
