"""Folds, held-out generators and few training items: laws of the parts, and what is refused."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import GroupKFold

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.heads import HeadConfig, HeadJob, TrainConfig, train_head, train_heads
from agiqa.heads.data.prompt_groups import normalise_prompt
from agiqa.heads.data.splits import PARTITION_SETTINGS, make_partition
from agiqa.heads.settings.config import load_settings
from agiqa.heads.sweeps.sweeping import Partitions
from tests.heads.conftest import MemoryItems, MemoryStore

GRU = HeadConfig(projection="sketch", encoder="gru", width=8)
QUICK = TrainConfig(epochs=1, lr=1e-2, batch_size=16, device="cpu")
prompt_sizes = st.lists(st.integers(1, 9), min_size=5, max_size=25)


def store_of(prompts, *, generators=None, splits=None) -> MemoryStore:
    n = len(prompts)
    items = MemoryItems(
        names=[f"{k:04d}.png" for k in range(n)],
        prompts=list(prompts),
        splits=splits or [None] * n,
        generators=generators or [None] * n,
        labels={"quality": np.arange(float(n))},
    )
    return MemoryStore(features=[np.zeros((3, 2), np.float32)] * n, items=items)


def shuffled_prompts(sizes, seed=0):
    """So many items of each prompt, which differ in case and white space, in random order."""
    prompts = [
        f"{' ' * (k % 3)}{'Prompt' if k % 2 else 'PROMPT'} {number}" for number, n in enumerate(sizes) for k in range(n)
    ]
    return np.random.default_rng(seed).permutation(prompts).tolist()


def normal(store, items):
    return {normalise_prompt(store.items.prompts[k]) for k in items}


def folds_of(store, folds, **settings):
    return [make_partition(store, TrainConfig(split="folds", folds=folds, fold=k, **settings)) for k in range(folds)]


@settings(deadline=None)
@given(prompt_sizes, st.integers(2, 5), st.integers(0, 50))
def test_folds_are_disjoint_cover_all_items_and_share_no_prompt(sizes, folds, seed):
    store = store_of(shuffled_prompts(sizes, seed))
    partitions = folds_of(store, folds, split_seed=seed, validation=0.0)
    assert sorted(np.concatenate([one.test for one in partitions]).tolist()) == list(range(sum(sizes)))
    for one in partitions:
        assert sorted([*one.train, *one.test]) == list(range(sum(sizes)))
        assert not normal(store, one.train) & normal(store, one.test)
        assert (one.leak.same, one.left_out, one.warnings()) == (0, 0, [])


@settings(deadline=None)
@given(prompt_sizes, st.integers(2, 5))
def test_folds_are_as_even_as_those_of_scikit_learn(sizes, folds):
    store = store_of(shuffled_prompts(sizes))
    found = [len(one.test) for one in folds_of(store, folds, validation=0.0)]
    assert max(found) - min(found) <= max(sizes)
    groups = [normalise_prompt(prompt) for prompt in store.items.prompts]
    theirs = [len(test) for _, test in GroupKFold(folds).split(groups, groups=groups)]
    assert sorted(found) == sorted(theirs)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=12, max_size=25), st.floats(0.05, 0.5))
def test_validation_is_drawn_by_prompt_from_what_a_fold_leaves(sizes, share):
    store = store_of(shuffled_prompts(sizes))
    for one in folds_of(store, 3, validation=share):
        parts = [one.train, one.validation, one.test]
        assert sorted(np.concatenate(parts).tolist()) == list(range(sum(sizes)))
        assert len(one.validation) > 0
        assert len({prompt for part in parts for prompt in normal(store, part)}) == sum(
            len(normal(store, part)) for part in parts
        )


def test_folds_follow_the_split_seed_only():
    store = store_of(shuffled_prompts([3] * 40))
    first, same, other = (
        [one.test.tolist() for one in folds_of(store, 4, **seeds)]
        for seeds in ({}, {"seed": 9, "validation": 0.3}, {"split_seed": 9})
    )
    assert first == same != other


def test_too_few_prompts_for_the_folds_are_told():
    with pytest.raises(DataError, match=r"5 folds need as many different prompts, and 8 items have 4\."):
        make_partition(store_of(shuffled_prompts([2] * 4)), TrainConfig(split="folds"))
    with pytest.raises(DataError, match=r"two different prompts or more, and 4 items have 1\. Set `validation` to 0"):
        make_partition(store_of(shuffled_prompts([4] * 2)), TrainConfig(split="folds", folds=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"folds": 1}, "folds: Input should be greater than or equal to 2"),
        ({"split": "folds", "fold": 5}, "`fold` is 5, and of 5 `folds` the last is number 4"),
        ({"split": "folds", "folds": 3, "fold": 3}, "of 3 `folds` the last is number 2"),
        ({"fold": 1}, "which goes with the split 'folds', and the split is 'published'"),
        ({"split": "grouped", "held_out": "DALLE"}, "`held_out` is 'DALLE', which goes with the split 'generator'"),
        ({"training_items": 0}, "training_items: Input should be greater than or equal to 1"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        TrainConfig(**settings)
    with pytest.raises(ConfigError, match=said):
        load_settings(overrides=settings)


@pytest.fixture
def made_by_three():
    """60 items of 20 prompts, each prompt drawn by three generators."""
    prompts = [f"prompt {k % 20}" for k in range(60)]
    return store_of(prompts, generators=[("DALLE2", "Midjourney", "SD1.5")[k // 20] for k in range(60)])


@pytest.mark.parametrize("generator", ["DALLE2", "Midjourney", "SD1.5"])
def test_a_generator_is_held_out_whole_and_its_prompts_are_told_as_known(made_by_three, generator):
    partition = make_partition(made_by_three, TrainConfig(split="generator", held_out=generator))
    generators = np.array(made_by_three.items.generators)
    assert set(generators[partition.test]) == {generator}
    assert len(partition.test) == 20
    assert generator not in generators[np.concatenate([partition.train, partition.validation])]
    assert not normal(made_by_three, partition.train) & normal(made_by_three, partition.validation)
    assert len(partition.validation) == 4
    assert partition.record()["leak"]["share"] == 1.0
    assert "20 of 20 test items have a prompt that also occurs in training" in partition.warnings()[0]


def test_generators_that_cannot_be_held_out_are_told(made_by_three):
    def make(store, **settings):
        return make_partition(store, TrainConfig(split="generator", **settings))

    with pytest.raises(
        UnknownName, match=r"'Midjurney'\. Did you mean 'Midjourney'\? Known: DALLE2, Midjourney, SD1\.5"
    ):
        make(made_by_three, held_out="Midjurney")
    with pytest.raises(ConfigError, match=r"needs `held_out`.* has: DALLE2, Midjourney, SD1\.5\."):
        make(made_by_three)
    some = list(made_by_three.items.generators)
    some[3], some[7] = None, ""
    with pytest.raises(DataError, match=r"2 problems\n  '0003\.png' has no generator\n  '0007") as caught:
        make(replace(made_by_three, items=replace(made_by_three.items, generators=some)), held_out="SD1.5")
    assert "agiqa store labels" in caught.value.__notes__[0]
    alone = replace(made_by_three.items, generators=["SD1.5"] * 60)
    with pytest.raises(DataError, match=r"all 60 items are of the generator 'SD1\.5'.*nothing to train on"):
        make(replace(made_by_three, items=alone), held_out="SD1.5")


@pytest.mark.parametrize("split", ["published", "grouped", "folds"])
@pytest.mark.parametrize("validation", [0.0, 0.3])
def test_few_items_are_among_more_and_the_test_part_stays(split, validation):
    store = store_of([f"p {k % 40}" for k in range(80)], splits=["test" if k % 4 == 0 else "train" for k in range(80)])
    config = TrainConfig(split=split, validation=validation)
    whole = make_partition(store, config)
    before: set[int] = set()
    for count in (5, 10, 30, 80 - len(whole.test)):
        few = make_partition(store, config.model_copy(update={"training_items": count}))
        used = {*few.train.tolist(), *few.validation.tolist()}
        assert few.test.tolist() == whole.test.tolist()
        assert before < used
        assert len(used) == count
        assert (len(few.validation) > 0) == (validation > 0)
        assert few.left_out == 80 - count - len(few.test)
        assert not normal(store, few.train) & normal(store, few.validation)
        before = used
    assert few.train.tolist() == whole.train.tolist()
    assert few.validation.tolist() == whole.validation.tolist()
    other = make_partition(store, config.model_copy(update={"training_items": 10, "split_seed": 1}))
    assert (
        other.train.tolist() != make_partition(store, config.model_copy(update={"training_items": 10})).train.tolist()
    )


@pytest.mark.parametrize("split", ["published", "grouped", "folds"])
def test_a_training_seed_draws_other_items_and_leaves_the_test_part(split):
    store = store_of([f"p {k % 40}" for k in range(80)], splits=["test" if k % 4 == 0 else "train" for k in range(80)])

    def make(**settings):
        return make_partition(store, TrainConfig(split=split, split_seed=3, validation=0.0, **settings))

    without, same, other = (make(training_items=10, training_seed=seed) for seed in (None, 3, 4))
    assert same.train.tolist() == without.train.tolist()
    assert other.train.tolist() != without.train.tolist()
    assert same.test.tolist() == other.test.tolist() == make().test.tolist()
    assert set(other.train) < set(make(training_items=30, training_seed=4).train)
    assert make(training_seed=4).train.tolist() == make().train.tolist()


def test_few_items_of_a_published_val_part_stay_in_it():
    splits = [("train", "val", "test")[min(k % 5, 2)] for k in range(100)]
    store = store_of([f"p {k}" for k in range(100)], splits=splits)
    few = make_partition(store, TrainConfig(training_items=20))
    assert len(few.train) + len(few.validation) == 20
    assert Counter(splits[k] for k in few.train) == {"train": len(few.train)}
    assert Counter(splits[k] for k in few.validation) == {"val": len(few.validation)}
    last = make_partition(store, TrainConfig(training_items=20, validation=0.0))
    assert {splits[k] for k in last.train} == {"train"}
    assert len(last.train) == 20


def test_more_training_items_than_there_are_and_too_few_to_choose_an_epoch_are_told():
    store = store_of([f"p {k % 2}" for k in range(40)], splits=["test" if k < 10 else "train" for k in range(40)])
    with pytest.raises(DataError, match="`training_items` is 31, and only 30 items are not in the test part"):
        make_partition(store, TrainConfig(training_items=31))
    with pytest.raises(DataError, match=r"and 1 items have 1\. Set `validation` to 0"):
        make_partition(store, TrainConfig(training_items=1))


def test_a_run_of_few_items_of_a_fold_says_so(make_store, tmp_path):
    store = make_store(80, prompts=30)
    config = QUICK.model_copy(update={"split": "folds", "fold": 2, "training_items": 20, "validation": 0.0})
    run = train_head(store, tmp_path / "run", head=GRU, train=config)
    split = run.metrics["split"]
    assert (split["name"], split["train"], split["validation"]) == ("folds", 20, 0)
    assert split["left_out"] == 60 - split["test"]
    assert run.metrics["chosen_by"] == "last epoch, as there are no validation items"
    assert (run.train.fold, run.train.folds, run.train.training_items) == (2, 5, 20)


def test_every_setting_that_changes_the_parts_is_asked_for():
    """Two configs that differ in one of the others have equal parts, so a sweep may draw them once."""
    items = {
        "prompts": [f"p {k}" for k in range(60)],
        "generators": ["ab"[k % 2] for k in range(60)],
        "splits": [("train", "test")[k % 2] for k in range(60)],
    }
    store, base = store_of(**items), TrainConfig(split="folds")
    changes = {
        "split": "grouped", "folds": 4, "fold": 1, "validation": 0.4, "training_items": 20, "split_seed": 3
    }  # fmt: skip
    pairs = [(base, base.model_copy(update={name: value})) for name, value in changes.items()]
    pairs.append((TrainConfig(split="grouped"), TrainConfig(split="grouped", test_share=0.4)))
    pairs.append(tuple(TrainConfig(split="generator", held_out=name) for name in "ab"))
    pairs.append(tuple(base.model_copy(update={"training_items": 20, "training_seed": seed}) for seed in (1, 2)))
    assert {*changes, "test_share", "held_out", "training_seed"} == set(PARTITION_SETTINGS)
    partitions = Partitions(store)
    for pair in pairs:
        one, other = (partitions.of(config).parts().values() for config in pair)
        assert not all(np.array_equal(here, there) for here, there in zip(one, other, strict=True))


def test_the_folds_of_a_sweep_share_one_decode_and_have_the_numbers_of_single_trainings(make_store, tmp_path):
    store = make_store(60, prompts=20)
    read: list[int] = []

    class Counting(MemoryStore):
        def read(self, items):
            read.extend(np.asarray(items).tolist())
            return super().read(items)

    counting = Counting(**vars(store))
    configs = [QUICK.model_copy(update={"split": "folds", "folds": 3, "fold": fold}) for fold in range(3)]
    jobs = [HeadJob(run=tmp_path / str(fold), head=GRU, train=config) for fold, config in enumerate(configs)]
    outcomes = list(train_heads(counting, jobs, workers=1))
    assert [one.status for one in outcomes] == ["trained"] * 3
    assert sorted(read) == list(range(60))
    for fold, config in enumerate(configs):
        alone = train_head(store, tmp_path / f"alone {fold}", head=GRU, train=config)
        for name in ("predictions.csv", "head.safetensors", "parts.json"):
            assert (alone.path / name).read_bytes() == (tmp_path / str(fold) / name).read_bytes()
