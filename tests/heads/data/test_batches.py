"""Batches: every item once, deterministic, of like length, and padded as a loop would pad."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agiqa.errors import ConfigError
from agiqa.heads.data.batches import (
    BatchLoader,
    LabelledItems,
    batches_per_epoch,
    collate,
    gather,
    shuffled_plan,
    sorted_plan,
)
from agiqa.heads.data.features import FeatureSet


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


@given(items=st.integers(0, 200), batch_size=st.integers(2, 9), seed=st.integers(0, 9))
def test_a_plan_with_a_smallest_batch_merges_what_is_left_over(items, batch_size, seed):
    lengths = np.random.default_rng(seed).integers(1, 50, size=items)
    plan = shuffled_plan(lengths, batch_size, seed, 0, smallest=2)
    assert sorted(np.concatenate([*plan, np.arange(0)]).tolist()) == list(range(items))
    assert len(plan) == batches_per_epoch(items, batch_size, smallest=2)
    sizes = sorted(len(batch) for batch in plan)
    if items >= 2:
        assert sizes[0] >= 2
    assert all(size <= batch_size for size in sizes[:-1])
    assert sum(sizes[-1:]) <= batch_size + 1


def test_a_plan_without_left_overs_is_the_same_with_a_smallest_batch():
    lengths = np.random.default_rng(0).integers(1, 50, size=70)
    plain, paired = (shuffled_plan(lengths, 8, 3, 1, smallest=smallest) for smallest in (1, 2))
    assert [batch.tolist() for batch in plain] == [batch.tolist() for batch in paired]


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
    features = FeatureSet.from_store(store, range(20))
    chosen = LabelledItems.at(features, np.array([4, 19, 0]), "quality")
    batch = collate(features, chosen.positions, chosen.labels)
    assert batch.features.dtype == torch.float32
    for row, item in enumerate([4, 19, 0]):
        rows = torch.from_numpy(store.features[item]).to(features.rows.dtype).float()
        assert torch.equal(batch.features[row, : len(rows)], rows)
        assert (batch.features[row, len(rows) :] == 0).all()
        assert batch.mask[row].tolist() == [True] * len(rows) + [False] * (batch.mask.shape[1] - len(rows))
        assert batch.lengths[row] == len(rows)
        assert batch.roles[row].tolist() == [3] * len(rows) + [0] * (batch.mask.shape[1] - len(rows))
        assert batch.targets[row].item() == pytest.approx(store.items.labels["quality"][item])
    assert batch.positions.tolist() == [4, 19, 0]
    assert batch.roles.dtype == torch.uint8


def test_collate_keeps_each_tokens_role_beside_its_row(make_store):
    store = make_store(6)
    random = np.random.default_rng(0)
    store = replace(store, roles=[random.integers(0, 4, len(rows)).astype(np.uint8) for rows in store.features])
    features = FeatureSet.from_store(store, [5, 1, 3])
    batch = collate(features, np.array([2, 0])).to(torch.device("cpu"))
    for row, item in enumerate([3, 5]):
        assert batch.roles[row][batch.mask[row]].tolist() == store.roles[item].tolist()
        assert (batch.roles[row][~batch.mask[row]] == 0).all()
    assert [part.data_ptr() for part in batch.inputs] == [
        part.data_ptr() for part in (batch.features, batch.mask, batch.roles)
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_gather_of_devices_makes_the_batch_that_copies_make(make_store, dtype):
    features = FeatureSet.from_store(make_store(20, logical_dtype=dtype), range(20))
    chosen = LabelledItems.at(features, np.array([4, 19, 0, 4]), "quality")
    gathered, copied = (make(features, chosen.positions, chosen.labels) for make in (gather, collate))
    for name in vars(copied):
        assert torch.equal(getattr(gathered, name), getattr(copied, name)), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_batch_made_on_a_device_is_that_of_the_cpu(make_store):
    store = make_store(20, logical_dtype="bfloat16")
    cuda = torch.device("cuda")
    there, here = (FeatureSet.from_store(store, range(20), device=d) for d in (cuda, torch.device("cpu")))
    chosen = LabelledItems.at(here, np.array([4, 19, 0]), "quality")
    found, wanted = (collate(features, chosen.positions, chosen.labels) for features in (there, here))
    assert found.features.device.type == "cuda"
    for name in vars(wanted):
        assert torch.equal(getattr(found, name).cpu(), getattr(wanted, name)), name
    assert torch.equal(there.statistics(np.arange(20)).std, here.statistics(np.arange(20)).std)


@pytest.mark.parametrize("order", [None, (3, 1)])
def test_a_loader_resumes_in_the_middle_of_a_pass(make_store, order):
    features = FeatureSet.from_store(make_store(30), range(30))
    whole = [batch.positions.tolist() for batch in BatchLoader(features, np.arange(30), batch_size=4, order=order)]
    for skip in (0, 3, 8):
        rest = BatchLoader(features, np.arange(30), batch_size=4, order=order, skip=skip)
        assert len(rest) == 8 - skip
        assert [batch.positions.tolist() for batch in rest] == whole[skip:]
    for skip in (-1, 9):
        with pytest.raises(ConfigError, match=f"Of 8 batches {skip} cannot be skipped"):
            BatchLoader(features, np.arange(30), batch_size=4, order=order, skip=skip)


def test_a_loader_is_the_same_each_time_and_keeps_to_its_positions(make_store):
    features = FeatureSet.from_store(make_store(30), range(30))
    loader = BatchLoader(features, np.arange(10, 25), batch_size=4, order=(3, 1))
    first, second = ([batch.positions.tolist() for batch in loader] for _ in range(2))
    assert first == second
    assert sorted(chain.from_iterable(first)) == list(range(10, 25))
    assert len(loader) == len(first) == 4
    assert all(batch.targets is None for batch in loader)
