"""What a training and an evaluation report about items that read the text of a teacher that knew their MOS."""

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from agiqa.heads import HeadConfig, TrainConfig, evaluate, train_head
from tests.heads.conftest import MemoryItems, MemoryStore

HEAD = HeadConfig(projection="sketch", encoder="none", width=8)
TRAIN = TrainConfig(split="published", epochs=1, device="cpu", batch_size=16)


@dataclass(frozen=True, kw_only=True)
class AuthoredItems(MemoryItems):
    text_authors: list[str | None]


@dataclass(frozen=True, kw_only=True)
class MadeStore(MemoryStore):
    provenance: dict[str, Any]


def authored(store, authors, variant):
    """The store with the author of each item by its split, made under a variant."""
    items = AuthoredItems(**vars(store.items), text_authors=[authors[split] for split in store.items.splits])
    provenance = {"conversation": {"variant": variant, "aspect": "quality"}} if variant else {}
    return MadeStore(**{**vars(store), "items": items}, provenance=provenance)


def lines_of(metrics, kind):
    return [line for line in metrics[kind] if "read the text of a teacher" in line]


@pytest.mark.parametrize(("variant", "kind"), [("full", "warnings"), (None, "warnings"), ("id", "notes")])
def test_test_and_validation_items_of_a_teacher_are_told_and_recorded(make_store, tmp_path, variant, kind):
    store = authored(make_store(60, published=True), {"train": "teacher", "test": "teacher"}, variant)
    run = train_head(store, tmp_path / "run", head=HEAD, train=TRAIN)
    validation = run.metrics["split"]["validation"]
    told = lines_of(run.metrics, kind)
    assert [line.split(" items")[0] for line in told] == [f"{validation} of {validation} validation", "12 of 12 test"]
    assert all(("its rating word included" in line) == (kind == "warnings") for line in told)
    assert lines_of(run.metrics, {"warnings": "notes", "notes": "warnings"}[kind]) == []
    assert json.loads((run.path / "metrics.json").read_text())["text_authors"] == {
        "train": {"teacher": 48 - validation},
        "validation": {"teacher": validation},
        "test": {"teacher": 12},
    }
    assert len(lines_of(evaluate(run, store), "warnings")) == (kind == "warnings")


def test_the_models_own_answers_leave_the_validation_part_to_be_told(make_store, tmp_path):
    """As with the published files: training words are the teacher's, test words the model's."""
    store = authored(make_store(60, published=True), {"train": "teacher", "test": "model"}, "full")
    run = train_head(store, tmp_path / "run", head=HEAD, train=TRAIN)
    (told,) = lines_of(run.metrics, "warnings")
    assert " validation items read" in told
    assert run.metrics["text_authors"]["test"] == {"model": 12}
    assert lines_of(evaluate(run, store), "warnings") == []
    assert len(lines_of(evaluate(run, store, "all"), "warnings")) == 1


@pytest.mark.parametrize("author", ["model", "teacher-blind", None])
def test_other_authors_and_unknown_ones_are_counted_alone(make_store, tmp_path, author):
    store = authored(make_store(60, published=True), {"train": "model", "test": author}, "full")
    run = train_head(store, tmp_path / "run", head=HEAD, train=TRAIN)
    assert lines_of(run.metrics, "warnings") == lines_of(run.metrics, "notes") == []
    assert run.metrics["text_authors"]["test"] == {author or "unknown": 12}


def test_a_source_that_tells_of_no_author_has_none_recorded(make_store, tmp_path):
    plain = make_store(60, published=True)
    run = train_head(plain, tmp_path / "run", head=HEAD, train=TRAIN)
    assert (run.metrics["text_authors"], run.metrics["notes"]) == ({}, [])
    empty = replace(authored(plain, {"train": None, "test": None}, "full"))
    empty = replace(empty, items=replace(empty.items, text_authors=[]))
    assert train_head(empty, tmp_path / "empty", head=HEAD, train=TRAIN).metrics["text_authors"] == {}
