"""Push: the same store arrives or none, nothing is sent twice, and no other store is written over."""

import random
import sys

import pytest

from agiqa.errors import ConfigError, DamagedStore, IncompleteStore, SchemaError, SettingsConflict, UnknownName
from agiqa.store import create_store, open_store, verify
from agiqa.store.sharing.pulling import pull
from agiqa.store.sharing.pushing import push, push_bytes
from tests.store.conftest import fill, make_store, plan_of
from tests.store.sharing.copies import assert_equal_stores, files_below, largest_object, objects_of
from tests.store.sharing.movers import kill_after, start_mover


def test_a_store_pushed_and_pulled_is_the_same_store(stored, tmp_path):
    moved = []
    there = (tmp_path / "there").as_uri()
    done = push(stored, there, advance=moved.append)
    assert sum(moved) == push_bytes(stored)
    assert done.skipped == 0
    assert done.objects == len(files_below(stored.path))
    assert_equal_stores(tmp_path / "there", stored.path)
    assert files_below(tmp_path / "there") == files_below(stored.path)
    moved.clear()
    done = pull(there, tmp_path / "back.agiqa", advance=moved.append)
    assert sum(moved) == push_bytes(stored)
    assert done.objects == len(objects_of(stored.path))
    assert_equal_stores(tmp_path / "back.agiqa", stored.path)
    assert (tmp_path / "back.agiqa" / "README.md").read_text() == (stored.path / "README.md").read_text()


def test_pushing_again_sends_nothing_but_what_was_damaged_there(stored, tmp_path):
    there = tmp_path / "there"
    push(stored, there.as_uri())
    assert push(stored, there.as_uri()).objects == 0
    name = largest_object(stored)
    raw = bytearray((there / name).read_bytes())
    raw[7] ^= 1
    (there / name).write_bytes(raw)
    assert push(stored, there.as_uri()).objects == 1
    assert_equal_stores(there, stored.path)


def test_new_labels_are_pushed_over_the_old_ones(stored, tmp_path, content):
    push(stored, (tmp_path / "there").as_uri())
    content.items.labels["quality"][0] = 1.25
    relabelled = make_store(tmp_path / "relabelled.agiqa", content)
    assert relabelled.id == stored.id
    done = push(relabelled, (tmp_path / "there").as_uri())
    assert done.objects <= 20  # labels, manifest, and the records with their times; no features
    assert open_store(tmp_path / "there").items.labels["quality"][0] == 1.25
    assert_equal_stores(tmp_path / "there", relabelled.path)


@pytest.mark.parametrize("begun", ["whole", "MANIFEST.json", "store.zarr/zarr.json"])
def test_a_folder_with_another_store_is_refused(stored, tmp_path, content, begun):
    other = make_store(tmp_path / "other.agiqa", content, dataset="another")
    there = tmp_path / "there"
    push(other, there.as_uri())
    if begun != "whole":
        for path in files_below(there) - {begun}:
            (there / path).unlink()
    before = files_below(there)
    with pytest.raises(SettingsConflict, match=f"{other.id[:12]}.*{stored.id[:12]}.*nothing was sent"):
        push(stored, there.as_uri())
    assert files_below(there) == before


def test_a_damaged_store_is_not_pushed(stored, tmp_path):
    name = largest_object(stored)
    raw = bytearray((stored.path / name).read_bytes())
    raw[7] ^= 1
    (stored.path / name).write_bytes(raw)
    with pytest.raises(DamagedStore, match=name):
        push(stored, (tmp_path / "there").as_uri())
    assert not (tmp_path / "there").exists()


def test_an_unfinished_store_is_not_pushed(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0, 1])
    with pytest.raises(IncompleteStore, match="not finished"):
        push(store, (tmp_path / "there").as_uri())


def test_the_card_of_a_repository_stays(stored, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "README.md").write_text("my own words")
    push(stored, there.as_uri())
    assert (there / "README.md").read_text() == "my own words"
    assert verify(open_store(there), "full").sound


def test_urls_that_cannot_be_pushed_to_are_refused(stored, served, monkeypatch):
    with pytest.raises(ConfigError, match="can only be read"):
        push(stored, served.url)
    with pytest.raises(UnknownName, match=r"'s4'.*'s3'"):
        push(stored, "s4://bucket/folder")
    with pytest.raises(ConfigError, match=r"not a URL.*file://"):
        push(stored, "some/folder")
    with pytest.raises(ConfigError, match=r"with \?"):
        push(stored, "s3://bucket/folder?token=1")
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError, match=r"gcsfs.*pip install 'agiqa\[remote\]'"):
        push(stored, "gs://bucket/folder")


def test_a_killed_push_shows_no_store_and_is_taken_up(stored, tmp_path):
    there = tmp_path / "there"
    moments = random.Random(3)
    for turn in range(3):
        assert kill_after(start_mover("push", stored.path, there.as_uri()), 15 * turn + moments.randrange(5, 15))
        assert not (there / "MANIFEST.json").exists()
        with pytest.raises(SchemaError, match="not a finished feature store"):
            pull(there.as_uri(), tmp_path / "copy.agiqa")
    before = len(files_below(there) & set(objects_of(stored.path)))
    done = push(stored, there.as_uri())
    assert before >= 3
    assert done.skipped >= before
    assert_equal_stores(there, stored.path)
