"""`agiqa store labels`, `repair` and `gc` as their users and scripts see them."""

import shutil

import pytest

from tests.cli.conftest import ITEMS


@pytest.fixture
def store(example, tmp_path):
    """A copy of the store that the command line made."""
    return shutil.copytree(example.store, tmp_path / "copy.agiqa")


def test_labels_are_joined_and_reported(agiqa, store, tmp_path):
    table = tmp_path / "more.csv"
    table.write_text("name,mos_align,note\n000.png,62,a\n001.png,80,b\nstranger.png,10,c\n")
    shown = agiqa("store", "labels", store, table, "--mos-range", 0, 100)
    assert shown.code == 0, shown.err
    assert f"2 items named in {table}, {ITEMS - 2} items not" in shown.out
    assert "1 rows match no item: stranger.png" in shown.out
    assert "mos_correspondence: 2 new, 0 replaced" in shown.out
    assert "columns that hold no labels: note" in shown.out
    again = agiqa("store", "labels", store, table, "--mos-range", 0, 100, "--json").json
    assert (again["changed"], again["matched"], again["unmatched_rows"]) == (False, 2, ["stranger.png"])
    assert agiqa("store", "info", store, "--json").json["labels"] == {"quality": ITEMS, "correspondence": 2}
    assert agiqa("store", "verify", store, "--level", "full").code == 0


def test_a_bad_table_is_one_message_and_exit_1(agiqa, store, tmp_path):
    table = tmp_path / "bad.csv"
    table.write_text("name,mos\n000.png,high\n001.png,9\n")
    outcome = agiqa("store", "labels", store, table)
    assert (outcome.code, outcome.out) == (1, "")
    assert "line 2, '000.png': mos is 'high', not a number" in outcome.err
    assert "line 3, '001.png': mos is 9, outside 0 to 5" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_damaged_unit_is_repaired_by_the_next_extract(agiqa, example, store):
    shard = store / "store.zarr" / "features" / "c" / "2" / "0"
    roles = store / "store.zarr" / "tokens" / "roles" / "c" / "1"
    sound = shard.read_bytes(), roles.read_bytes()
    for path, raw in zip((shard, roles), sound, strict=True):
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert agiqa("store", "verify", store, "--level", "full").code == 1
    report = agiqa("store", "repair", store, "--json").json
    assert (report["changed"], report["units"], report["model"]) == (True, [2], False)
    assert report["tokens"] == ["store.zarr/tokens/roles/c/1"]
    assert agiqa("store", "info", store, "--json").json["state"].startswith("unfinished")
    assert agiqa(*example.extract(store), "--json").json["filled"]["units"] == 1
    assert agiqa("store", "verify", store, "--level", "numeric").code == 0
    assert (shard.read_bytes(), roles.read_bytes()) == sound
    assert "nothing to repair" in agiqa("store", "repair", store).out


def test_damage_in_the_plan_exits_1_with_what_to_do(agiqa, store):
    keys = store / "store.zarr" / "index" / "item_key" / "c" / "0" / "0"
    keys.write_bytes(keys.read_bytes()[:-1])
    outcome = agiqa("store", "repair", store)
    assert outcome.code == 1
    assert "store.zarr/index/item_key/c/0/0" in outcome.err
    assert "Nothing was changed. Copy the store again" in outcome.err
    assert (store / "MANIFEST.json").exists()


def test_garbage_is_listed_first_and_then_removed(agiqa, store):
    stray = store / "store.zarr" / "features" / "c" / "99" / "0"
    stray.parent.mkdir()
    stray.write_bytes(b"12345")
    assert f"agiqa store gc {store}" in agiqa("store", "repair", store).out
    planned = agiqa("store", "gc", store, "--dry-run")
    assert f"{stray}  5 bytes" in planned.out
    assert "1 files, 5 bytes would be removed" in planned.out
    assert stray.exists()
    report = agiqa("store", "gc", store, "--json").json
    assert (report["files"], report["bytes"], report["dry_run"]) == (1, 5, False)
    assert not stray.exists()
    assert agiqa("store", "verify", store, "--level", "full").code == 0
