"""Which items a run means: by store and number where it knows the store, by name and prompt in any other."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import HeadError
from agiqa.heads import HeadConfig, TrainConfig, evaluate, load_run, train_head
from agiqa.heads.data.splits import split_items
from agiqa.heads.evaluation.leaks import count_known
from agiqa.heads.evaluation.scoring import part_items
from agiqa.store.deriving.labelling import join_labels
from agiqa.store.reading.store import open_local_store
from agiqa.store.reading.union import union
from tests.heads.conftest import MemoryStore
from tests.store.conftest import Content, make_content
from tests.store.conftest import make_store as make_real_store

QUICK = TrainConfig(epochs=1, device="cpu", threads=1)
SKETCHED = HeadConfig(projection="sketch", encoder="none", width=4)
HIDDEN = HeadConfig(projection="vocabulary", encoder="none", width=4)


class Keyed(Content):
    """Content whose item keys are those of images of its own."""

    @property
    def keys(self) -> list[bytes]:
        return [bytes([self.token_ids[0][0], number]) * 16 for number in range(len(self.items))]


def content_of(seed: int, splits: list[str | None]) -> Content:
    """40 images whose names and prompts are those of any other such content."""
    made = make_content([3] * 40, seed=seed)
    items = replace(made.items, splits=splits, labels={"quality": np.linspace(0, 5, 40)})
    first = [np.array([seed, 0, 0], np.int32), *made.token_ids[1:]]
    lm_head = make_content([3]).lm_head
    return Keyed(**{**vars(made), "items": items, "token_ids": first, "lm_head": lm_head})


@pytest.fixture
def opposite(tmp_path):
    """Two stores of other images under the same names and prompts: what one trains on, the other tests on."""
    halves = [["train", "test"] * 20, ["test", "train"] * 20]
    return [
        make_real_store(tmp_path / f"{k}.agiqa", content_of(k, splits), data_set={"name": str(k)})
        for k, splits in enumerate(halves, 1)
    ]


@pytest.fixture
def twice(make_store) -> MemoryStore:
    """A store that holds each image twice, once to train and once to test."""
    once = make_store(40, prompts=20)
    columns = {name: getattr(once.items, name) * 2 for name in ("names", "prompts", "generators")}
    mos = np.concatenate([once.items.labels["quality"]] * 2)
    items = replace(once.items, **columns, splits=["train"] * 40 + ["test"] * 40, labels={"quality": mos})
    return replace(once, features=once.features * 2, items=items)


def test_a_store_that_holds_a_pair_twice_is_tested_on_the_items_of_its_training(twice, tmp_path):
    run = train_head(twice, tmp_path / "run", head=SKETCHED, train=QUICK)
    assert run.metrics["split"]["test"] == run.metrics["test"]["n"] == 40
    assert run.metrics["split"]["leak"]["test_items_with_a_training_prompt_verbatim"] == 40
    assert part_items(run, twice, "test").tolist() == list(range(40, 80))
    told = evaluate(load_run(run.path), twice)
    assert told["n"] == 40
    assert told["srcc"] == pytest.approx(run.metrics["test"]["srcc"], abs=1e-6)
    assert told["warnings"] == ["40 of 40 items have a prompt that occurs in its training."]
    learned = np.concatenate([part_items(run, twice, part) for part in ("train", "validation")])
    assert sorted(learned.tolist()) == list(range(40))
    assert count_known(run, twice, learned)[0] == 40
    assert not set(part_items(run, twice, "train")) & set(part_items(run, twice, "validation"))


def test_a_mapping_is_applied_to_test_items_that_share_name_and_prompt_with_validation_ones(twice, tmp_path):
    several = replace(
        twice,
        features=twice.features * 3,
        items=replace(
            twice.items,
            names=twice.items.names * 3,
            prompts=twice.items.prompts * 3,
            generators=twice.items.generators * 3,
            splits=twice.items.splits * 3,
            labels={"quality": np.tile(twice.items.labels["quality"], 3)},
        ),
    )
    run = train_head(several, tmp_path / "run", head=SKETCHED, train=QUICK.model_copy(update={"validation": 0.5}))
    assert evaluate(run, several)["logistic"] == run.metrics["logistic"]
    assert "were fitted to" in json.dumps(evaluate(run, several, "validation")["logistic"])


def test_a_union_of_stores_with_the_same_names_keeps_their_items_apart(opposite, tmp_path):
    joined = union(opposite)
    run = train_head(joined, tmp_path / "run", head=HIDDEN, train=QUICK)
    expected = split_items(joined, "test")
    assert part_items(run, joined, "test").tolist() == expected.tolist()
    assert evaluate(run, joined)["n"] == run.metrics["test"]["n"] == 40
    assert count_known(run, joined, expected)[0] == 0
    recorded = json.loads((run.path / "parts.json").read_text())
    tested = [list(range(1, 40, 2)), list(range(0, 40, 2))]
    for store, ids, entry in zip(opposite, tested, recorded["items"], strict=True):
        assert (entry["store"], entry["test"]) == (store.id, ids)
        assert count_known(run, store, np.array(ids))[0] == 0
        assert count_known(run, store, np.array(ids) ^ 1)[0] == 20


def test_two_stores_that_were_made_alike_are_kept_apart_too(tmp_path):
    """Their ids are equal: the id says how a store was made."""
    halves = [["train", "test"] * 20, ["test", "train"] * 20]
    stores = [make_real_store(tmp_path / f"{k}.agiqa", content_of(k, splits)) for k, splits in enumerate(halves, 1)]
    assert stores[0].id == stores[1].id
    joined = union(stores)
    run = train_head(joined, tmp_path / "run", head=HIDDEN, train=QUICK)
    assert part_items(run, joined, "test").tolist() == [*range(1, 40, 2), *range(40, 80, 2)]
    assert count_known(run, stores[1], np.arange(40))[0] == 40


def test_other_labels_and_splits_leave_the_items_of_a_run_what_they_are(opposite, tmp_path):
    store = opposite[0]
    run = train_head(store, tmp_path / "run", head=HIDDEN, train=QUICK)
    rows = [f"{name},{'test' if k < 30 else 'train'}" for k, name in enumerate(store.items.names)]
    (tmp_path / "labels.csv").write_text("\n".join(["name,split", *rows]) + "\n")
    join_labels(store, tmp_path / "labels.csv")
    again = open_local_store(store.path)
    assert len(again.items.in_split("test")) == 30
    assert part_items(run, again, "test").tolist() == list(range(1, 40, 2))


def test_in_another_store_an_item_is_the_same_by_name_and_prompt(opposite, tmp_path):
    first, second = opposite
    run = train_head(first, tmp_path / "run", head=HIDDEN, train=QUICK)
    assert part_items(run, second, "test").tolist() == list(range(0, 40, 2))
    assert count_known(run, second, np.arange(0, 40))[0] == 20
    assert "20 of 20 items were in the training of this head." in evaluate(run, second)["warnings"]


def test_a_run_of_an_agiqa_that_recorded_names_and_prompts_means_them(opposite, tmp_path):
    store = opposite[0]
    run = train_head(store, tmp_path / "run", head=HIDDEN, train=QUICK)
    recorded = json.loads((run.path / "parts.json").read_text())
    del recorded["items"]
    (run.path / "parts.json").write_text(json.dumps(recorded))
    old = load_run(run.path)
    assert part_items(old, store, "test").tolist() == list(range(1, 40, 2))
    assert count_known(old, store, np.arange(40))[0] == 20


@pytest.mark.parametrize(
    "wrong", [7, [{"store": "memory"}], [{"store": "memory", "train": ["a"], "validation": [], "test": []}]]
)
def test_item_numbers_that_no_training_wrote_are_told_with_their_file(twice, tmp_path, wrong):
    run = train_head(twice, tmp_path / "run", head=SKETCHED, train=QUICK)
    recorded = json.loads((run.path / "parts.json").read_text())
    (run.path / "parts.json").write_text(json.dumps({**recorded, "items": wrong}))
    with pytest.raises(HeadError, match=r"run/parts\.json is not what a training writes"):
        evaluate(load_run(run.path), twice)


def test_predictions_tell_the_item(twice, tmp_path):
    run = train_head(twice, tmp_path / "run", head=SKETCHED, train=QUICK)
    with (run.path / "predictions.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    assert [int(row["item"]) for row in rows] == list(range(40, 80))
    assert [row["name"] for row in rows] == twice.items.names[40:]
