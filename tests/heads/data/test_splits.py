"""Splits: disjoint, grouped by prompt, deterministic, and honest about leaks."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agiqa.errors import DataError
from agiqa.heads.data.prompt_groups import normalise_prompt, prompt_groups
from agiqa.heads.data.splits import make_partition, split_items
from agiqa.heads.settings.config import TrainConfig


def with_splits(store, splits):
    return replace(store, items=replace(store.items, splits=splits))


def prompts_of(store, items):
    return {normalise_prompt(store.items.prompts[k]) for k in items}


@given(st.text(max_size=20))
def test_normalising_a_prompt_twice_changes_nothing(prompt):
    assert normalise_prompt(normalise_prompt(prompt)) == normalise_prompt(prompt)


def test_prompts_that_differ_in_case_and_space_are_one_group():
    assert prompt_groups(["A cat", "a  CAT\n", "b"]).tolist() == [0, 0, 1]


@pytest.mark.parametrize("validation", [0.0, 0.1, 0.3])
def test_grouped_parts_share_no_prompt_and_have_the_asked_sizes(make_store, validation):
    store = make_store(200, prompts=50)
    partition = make_partition(store, TrainConfig(split="grouped", test_share=0.2, validation=validation))
    parts = [partition.train, partition.validation, partition.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    groups = [prompts_of(store, part) for part in parts]
    assert not groups[0] & groups[1]
    assert not (groups[0] | groups[1]) & groups[2]
    assert len(partition.test) == pytest.approx(40, abs=4)
    assert len(partition.validation) == pytest.approx(160 * validation, abs=4)
    assert partition.leak.same == 0
    assert partition.warnings() == []


def test_the_split_follows_its_own_seed_only(make_store):
    store = make_store(100)
    base = make_partition(store, TrainConfig(split="grouped"))
    same = make_partition(store, TrainConfig(split="grouped", seed=5))
    other = make_partition(store, TrainConfig(split="grouped", split_seed=5))
    assert (base.test == same.test).all()
    assert (base.validation == same.validation).all()
    assert set(base.test) != set(other.test)


def test_published_takes_the_column_and_counts_the_leak(make_store):
    store = make_store(100, prompts=31, published=True)
    partition = make_partition(store, TrainConfig())
    assert partition.test.tolist() == list(range(0, 100, 5))
    assert not prompts_of(store, partition.train) & prompts_of(store, partition.validation)
    known = prompts_of(store, [*partition.train, *partition.validation])
    expected = sum(normalise_prompt(store.items.prompts[k]) in known for k in partition.test)
    assert partition.leak.same == expected > 0
    assert partition.record()["leak"]["share"] == expected / 20
    assert f"{expected} of 20 test items have a prompt that also occurs" in partition.warnings()[0]


def test_a_published_val_part_is_the_validation_part(make_store):
    names = ["train", "val", "test", None, "train", "test"]
    store = with_splits(make_store(6), names)
    partition = make_partition(store, TrainConfig())
    assert [p.tolist() for p in (partition.train, partition.validation, partition.test)] == [[0, 4], [1], [2, 5]]
    assert "1 items of the store are in no part" in partition.warnings()[0]
    assert make_partition(store, TrainConfig(validation=0.0)).validation.tolist() == []


def test_a_store_without_the_split_says_what_it_has(make_store):
    with pytest.raises(DataError, match=r"holds: no value \(6\).*grouped"):
        make_partition(make_store(6), TrainConfig())
    with pytest.raises(DataError, match=r"split 'test'.*train \(6\)"):
        split_items(with_splits(make_store(6), ["train"] * 6), "test")
    with pytest.raises(DataError, match="two different prompts"):
        make_partition(make_store(6, prompts=1), TrainConfig(split="grouped"))


def test_a_draw_of_nothing_but_val_items_is_refused_with_what_to_do(make_store):
    store = with_splits(make_store(40), ["train", "test", *["val"] * 38])
    with pytest.raises(DataError, match=r"memory: all of the 1 training items that were drawn.*Raise `training_items`"):
        make_partition(store, TrainConfig(training_items=1))
    alone = make_partition(store, TrainConfig(training_items=1, validation=0.0))
    assert (alone.train.tolist(), alone.validation.tolist()) == ([0], [])
