"""Damage to the item table and the root attributes of an unfinished store, which a seal cannot compute again."""

import json
import shutil

import numpy as np
import pytest

from agiqa.errors import AgiqaError, DamagedStore
from agiqa.store import create_store, open_store, seal, verify
from agiqa.store.care.repairing import repair
from agiqa.store.deriving.labelling import join_labels
from tests.store.conftest import fill, make_content, plan_of
from tests.store.damage import contents, harm, refill

EVERY = 31
"""Of the bytes of a file every so many are flipped here; all of them were, by hand."""


@pytest.fixture
def filled(tmp_path):
    """An unfinished store of which only the seal is missing, and what goes into it."""
    content = make_content([3, 5, 2, 4])
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content)
    return store, content


@pytest.mark.parametrize("name", ["items.parquet", "store.zarr/zarr.json"])
def test_no_flip_of_a_file_without_a_checksum_of_its_own_is_sealed(filled, tmp_path, name):
    store, _ = filled
    whole = contents(seal(open_store(shutil.copytree(store.path, tmp_path / "whole" / "s.agiqa"), allow_partial=True)))
    raw = (store.path / name).read_bytes()
    sealed = 0
    for position in range(0, len(raw), EVERY):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << position % 8
        (store.path / name).write_bytes(flipped)
        try:
            again = seal(open_store(store.path, allow_partial=True))
        except AgiqaError:
            assert not store.layout.manifest.exists()
            continue
        assert contents(again) == whole
        sealed += 1
        store.layout.manifest.unlink()
    assert sealed < len(raw) / EVERY / 4


def test_root_attributes_that_the_plan_did_not_write_are_refused(filled):
    store, _ = filled
    path = store.layout.zarr / "zarr.json"
    path.write_text(path.read_text().replace('"attributes": {', '"attributes": {"license": "none",'))
    with pytest.raises(DamagedStore, match=r"zarr\.json is damaged"):
        open_store(store.path, allow_partial=True)


def test_a_damaged_table_is_told_and_the_run_that_resumes_writes_it_anew(filled):
    store, content = filled
    raw = store.layout.items.read_bytes()
    harm(store.layout.items, "flip")
    damaged = open_store(store.path, allow_partial=True)
    assert [found.where for found in verify(damaged, "quick").damage] == ["items.parquet"]
    for attempt in (lambda: damaged.items, lambda: seal(damaged), lambda: repair(damaged)):
        with pytest.raises(DamagedStore, match=r"items\.parquet is not the item table that plan\.json lists"):
            attempt()
    create_store(store.path, plan_of(content))
    assert store.layout.items.read_bytes() == raw
    assert seal(open_store(store.path, allow_partial=True)).items.same_as(content.items)


def test_an_unfinished_store_of_a_plan_that_recorded_neither_can_be_finished_and_labelled(filled, tmp_path):
    store, content = filled
    record = json.loads(store.layout.plan_commit.read_text())
    store.layout.plan_commit.write_text(json.dumps({"objects": record["objects"]}))
    old = open_store(store.path, allow_partial=True)
    assert old.items.same_as(content.items)
    assert not verify(old, "full").damage
    (tmp_path / "t.csv").write_text("name,mos\nimage_1.png,2.5\n")
    join_labels(old, tmp_path / "t.csv")
    record = json.loads(store.layout.plan_commit.read_text())
    assert set(record) == {"objects", "labels"}
    sealed = seal(open_store(store.path, allow_partial=True))
    assert sealed.items.labels["quality"][1] == 2.5
    assert verify(sealed, "full").sound


def test_a_repair_records_the_labels_of_the_finished_store(filled, tmp_path):
    """Those were joined after the seal, so the record of the plan named another table."""
    store, content = filled
    sealed = seal(store)
    (tmp_path / "t.csv").write_text("name,mos\nimage_1.png,2.5\n")
    join_labels(sealed, tmp_path / "t.csv")
    before = contents(sealed)
    sealed.layout.features_object(1).unlink()
    assert repair(open_store(sealed.path)).units == (1,)
    unfinished = open_store(sealed.path, allow_partial=True)
    assert unfinished.items.labels["quality"][1] == 2.5
    assert {found.where for found in verify(unfinished, "full").damage} == set()
    assert contents(refill(sealed, content)) == before
    np.testing.assert_array_equal(open_store(sealed.path).items.labels["quality"][1], 2.5)


def test_a_store_without_the_record_of_its_plan_is_not_sealed(filled):
    store, _ = filled
    store.layout.plan_commit.unlink()
    with pytest.raises(DamagedStore, match=r"plan\.json is missing"):
        seal(open_store(store.path, allow_partial=True))
    assert not store.layout.manifest.exists()
