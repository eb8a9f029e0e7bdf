"""Batches: every item once, deterministic, of like length, and padded as a loop would pad."""

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agiqa.heads.batches import BatchLoader, collate, shuffled_plan, sorted_plan
from agiqa.heads.features import FeatureSet


@given(
    lengths=st.lists(st.integers(1, 50), max_size=200),
    batch_size=st.integers(1, 9),
    seed=st.integers(0, 9),
    epoch=st.integers(0, 9),
)
def test_plans_hold_every_item_once(lengths, batch_size, seed, epoch):
    lengths = np.array(lengths, dtype=np.int64)
    for plan in (shuffled_plan(lengths, batch_size, seed, epoch), sorted_plan(lengths, batch_size)):
        assert sorted(np.concatenate([*plan, np.arange(0)]).tolist()) == list(range(len(lengths)))
        assert len(plan) == -(-len(lengths) // batch_size)


def test_a_plan_follows_seed_and_epoch_and_spares_padding():
    lengths = np.random.default_rng(0).integers(10, 500, size=1000)
    plans = [np.concatenate(shuffled_plan(lengths, 8, *order)) for order in [(0, 0), (0, 0), (0, 1), (1, 0)]]
    assert (plans[0] == plans[1]).all()
    assert not (plans[0] == plans[2]).all()
    assert not (plans[0] == plans[3]).all()
    padded = sum(len(b) * lengths[b].max() for b in shuffled_plan(lengths, 8, 0, 0))
    assert padded < 1.1 * lengths.sum()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_collate_pads_as_a_loop_would(make_store, dtype):
    store = make_store(20, logical_dtype=dtype)
    features = FeatureSet.from_store(store, range(20), label="quality")
    batch = collate(features, np.array([4, 19, 0]))
    assert batch.features.dtype == torch.float32
    for row, item in enumerate([4, 19, 0]):
        rows = torch.from_numpy(store.features[item]).to(features.rows.dtype).float()
        assert torch.equal(batch.features[row, : len(rows)], rows)
        assert (batch.features[row, len(rows) :] == 0).all()
        assert batch.mask[row].tolist() == [True] * len(rows) + [False] * (batch.mask.shape[1] - len(rows))
        assert batch.lengths[row] == len(rows)
        assert batch.targets[row].item() == pytest.approx(store.items.labels["quality"][item])
    assert batch.positions.tolist() == [4, 19, 0]


def test_a_loader_is_the_same_each_time_and_keeps_to_its_positions(make_store):
    features = FeatureSet.from_store(make_store(30), range(30), label=None)
    loader = BatchLoader(features, np.arange(10, 25), batch_size=4, order=(3, 1))
    first, second = ([batch.positions.tolist() for batch in loader] for _ in range(2))
    assert first == second
    assert sorted(chain.from_iterable(first)) == list(range(10, 25))
    assert len(loader) == len(first) == 4
    assert all(batch.targets is None for batch in loader)
