"""Repair: what is damaged is dropped and computed anew, and what is sound is kept."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import DamagedStore
from agiqa.store import (
    StorePlan,
    UnitWriter,
    basis_from,
    convert_store,
    create_store,
    create_whole_array,
    from_float32,
    open_store,
    save_basis,
    seal,
    sketch_store,
    to_float32,
    verify,
)
from agiqa.store.care.repairing import repair
from agiqa.store.deriving.labelling import join_labels
from agiqa.store.writing.records import owner_of
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.crash_points import states_after_kills
from tests.store.damage import contents, everything, harm, object_of, refill


@pytest.mark.parametrize("records", ["kept", "left out", "unreadable"])
@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_a_damaged_unit_is_dropped_and_computed_anew(stored, content, how, records):
    before = contents(stored)
    kept = everything(stored.layout.commits)
    if records == "left out":
        shutil.rmtree(stored.layout.commits)
    if records == "unreadable":
        stored.layout.commit(5).write_text("{")
        stored.layout.plan_commit.write_text("[]")
    harm(stored.layout.features_object(1), how)
    harm(stored.layout.features_object(3), how)
    report = repair(stored)
    assert (report.units, report.model, report.strays) == ((1, 3), False, ())
    assert report.items == len(stored.items_of(1)) + len(stored.items_of(3))
    assert set(report.damage[0].items) == {content.items.names[item] for item in stored.items_of(1)}
    unfinished = open_store(stored.path, allow_partial=True)
    assert UnitWriter(unfinished).pending() == [1, 3]
    assert not unfinished.layout.features_object(1).exists()
    if records == "kept":
        assert everything(stored.layout.commits) == {
            name: raw for name, raw in kept.items() if name not in ("00000001.json", "00000003.json")
        }
    whole = refill(stored, content)
    assert contents(whole) == before
    assert verify(whole, "numeric").sound


def test_a_sound_store_is_left_as_it_is(stored):
    before = everything(stored.path)
    report = repair(stored)
    assert not report.changed
    assert everything(stored.path) == before
    assert not stored.layout.locks.exists()


@pytest.mark.parametrize("array", ["lm_head/weight", "probe/logits"])
def test_damaged_model_arrays_are_computed_anew_and_units_kept(stored, content, array):
    before = contents(stored)
    written = [stored.layout.features_object(unit).stat().st_mtime_ns for unit in range(stored.geometry.units)]
    damaged = object_of(stored, array)
    harm(damaged, "flip")
    report = repair(stored)
    assert (report.units, report.model) == ((), True)
    unfinished = open_store(stored.path, allow_partial=True)
    assert unfinished.committed_units() == list(range(stored.geometry.units))
    assert not damaged.exists()
    assert contents(refill(stored, content)) == before
    assert [stored.layout.features_object(unit).stat().st_mtime_ns for unit in range(len(written))] == written


@pytest.mark.parametrize("name", ["lm_head/zarr.json", "lm_head/weight/zarr.json", "probe/rows/zarr.json"])
def test_metadata_of_model_arrays_are_written_anew(stored, content, name):
    before = contents(stored)
    harm(stored.layout.zarr / name, "truncate")
    assert repair(stored).model
    assert contents(refill(stored, content)) == before


@pytest.mark.parametrize(
    "name",
    ["index/row_start", "index/item_key", "zarr.json", "features/zarr.json", "items"],
)
def test_damage_in_the_plan_is_told_and_nothing_changed(stored, name):
    path = stored.layout.zarr / name
    if name == "items":
        harm(stored.layout.items, "flip")
    elif path.suffix:
        path.write_text(path.read_text() + " ")
    else:
        harm(object_of(stored, name), "flip")
    harm(stored.layout.features_object(2), "flip")
    before = everything(stored.path)
    with pytest.raises(DamagedStore, match=r"(?i)copy the store again"):
        repair(open_store(stored.path))
    assert everything(stored.path) == before


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("sealed", [True, False])
def test_damaged_tokens_are_written_again_by_the_run_that_resumes(stored, content, tmp_path, how, sealed):
    before = contents(stored)
    if not sealed:
        stored.layout.manifest.unlink()
    damaged = [stored.layout.zarr / "tokens" / name for name in ("ids/c/1", "roles/c/3")]
    for path in damaged:
        harm(path, how)
    report = repair(open_store(stored.path, allow_partial=True))
    assert (report.units, report.model, report.changed) == ((), False, True)
    assert list(report.tokens) == [path.relative_to(stored.path).as_posix() for path in damaged]
    assert {found.unit for found in report.damage} == {1, 3}
    unfinished = open_store(stored.path, allow_partial=True)
    with pytest.raises(DamagedStore, match="is missing"):
        seal(unfinished)
    resumed = create_store(stored.path, plan_of(content))
    assert contents(seal(resumed)) == before
    assert [left.name for left in tmp_path.iterdir()] == [stored.path.name]


def test_tokens_of_a_sketch_are_written_again_from_its_source(stored, tmp_path):
    basis = basis_from(stored, 4)
    sketch = sketch_store(stored, tmp_path / "k.agiqa", basis=basis).store
    before = contents(sketch)
    harm(sketch.layout.zarr / "tokens" / "roles" / "c" / "2", "flip")
    assert repair(sketch).tokens == ("store.zarr/tokens/roles/c/2",)
    assert contents(sketch_store(stored, sketch.path, basis=basis).store) == before


def test_other_tokens_are_not_written_in_the_place_of_removed_ones(stored, content):
    harm(stored.layout.zarr / "tokens" / "ids" / "c" / "1", "flip")
    repair(stored)
    before = everything(stored.path)
    other = replace(plan_of(content), token_ids=[ids + 1 for ids in content.token_ids])
    with pytest.raises(DamagedStore, match=r"tokens/ids/c/1 is missing, and would now be written with other bytes"):
        create_store(stored.path, other)
    assert everything(stored.path) == before


LIES = ("../mine.txt", "store.zarr/features/c/1/../../../../../mine.txt", "/etc/hostname", "store.zarr/features/c/99/0")


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lists_files_of_others_deletes_none(stored, tmp_path, lie):
    (tmp_path / "mine.txt").write_text("mine")
    manifest = json.loads(stored.layout.manifest.read_text())
    manifest["objects"].append({"path": lie, "bytes": 1, "sha256": "0" * 64})
    stored.layout.manifest.write_text(json.dumps(manifest))
    with pytest.raises(DamagedStore, match=r"is no object of a store|of a unit that the store does not have"):
        repair(stored)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_an_unfinished_store_loses_its_damaged_units_and_records(content, tmp_path):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=range(5))
    harm(store.layout.features_object(2), "flip")
    store.layout.commit(4).write_text("{")
    report = repair(store)
    assert report.units == (2, 4)
    assert {damage.where for damage in report.damage} == {"store.zarr/features/c/2/0", "commits/00000004.json"}
    assert contents(refill(store, content)) == contents(make_store(tmp_path / "s2.agiqa", content), but=()) | {
        "README.md": store.layout.card.read_bytes()
    }


def test_labels_joined_to_a_finished_store_outlive_its_repair(stored, content, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("name,mos_authenticity\nimage_3.png,2.5\n")
    join_labels(stored, table)
    before = contents(stored)
    harm(stored.layout.features_object(0), "flip")
    repair(stored)
    whole = refill(stored, content)
    assert contents(whole) == before
    assert whole.items.labels["authenticity"][3] == 2.5


def test_a_sketch_in_a_named_basis_keeps_its_units(stored, tmp_path):
    basis = basis_from(stored, 4)
    sketch = sketch_store(stored, tmp_path / "k.agiqa", basis=basis).store
    before = contents(sketch)
    harm(object_of(sketch, "basis/q"), "flip")
    report = repair(sketch)
    assert (report.units, report.model) == ((), True)
    assert contents(sketch_store(stored, sketch.path, basis=basis).store) == before


def unnamed_sketch(path, stored, content):
    """A sketch whose provenance does not name its basis, as `agiqa extract --encoding sketch --rank 4` makes it."""
    basis = basis_from(stored, 4)
    hidden = plan_of(content)
    settings = {name: getattr(hidden, name) for name in ("items", "token_ids", "roles", "item_keys", "truncated")}
    plan = StorePlan(
        encoding="sketch", logical_dtype="float32", width=4, provenance={"sketch": {"rank": 4}}, **settings
    )
    store = create_store(path, plan)
    writer = UnitWriter(store)

    def write(group):
        save_basis(group, basis)
        create_whole_array(group, "probe/rows", np.zeros(0, np.int64))
        logits = np.zeros((0, 40), np.float32)
        create_whole_array(group, "probe/logits", logits, attributes={"logical_dtype": "float32"})

    writer.write_model_arrays(write)
    for unit in writer.pending():
        hidden_rows = [to_float32(content.hidden[item], content.logical_dtype) for item in store.items_of(unit)]
        rows = from_float32(basis.coordinates(np.concatenate(hidden_rows)), "float32")
        writer.write_unit(unit, rows, seconds=0.0)
    return seal(store)


@pytest.mark.parametrize("array", ["basis/map", "probe/rows"])
def test_a_sketch_in_a_basis_of_its_own_loses_the_units_with_it(stored, content, tmp_path, array):
    """A basis calibrated anew may have other signs; units of the old one would be in another space."""
    sketch = unnamed_sketch(tmp_path / "k.agiqa", stored, content)
    harm(next(path for path in sorted((sketch.layout.zarr / array).rglob("*")) if path.is_file()), "truncate")
    report = repair(sketch)
    assert report.model
    assert report.units == tuple(range(sketch.geometry.units))
    again = open_store(sketch.path, allow_partial=True)
    assert again.committed_units() == []


@pytest.mark.parametrize(("array", "units", "model"), [("tokens/scale", (0,), False), ("scale/mean", (), True)])
def test_int8_units_and_scale_are_dropped_apart(stored, tmp_path, array, units, model):
    int8 = convert_store(stored, tmp_path / "i.agiqa", "int8")
    before = contents(int8)
    shutil.rmtree(int8.layout.commits)
    harm(object_of(int8, array), "flip")
    report = repair(int8)
    assert (report.units, report.model) == (units, model)
    assert contents(convert_store(stored, int8.path, "int8")) == before


def test_each_object_of_kept_logits_belongs_to_one_unit(content, tmp_path):
    plan = replace(plan_of(content), kept_logits=1_000_000)
    store = create_store(tmp_path / "s.agiqa", plan)
    rows = store.array("logits").shards[0]
    assert rows < store.geometry.unit_rows
    per_unit = store.geometry.unit_rows // rows
    for unit in range(store.geometry.units):
        for number in range(unit * per_unit, (unit + 1) * per_unit):
            assert owner_of(store, f"store.zarr/logits/c/{number}/0") == unit
            assert owner_of(store, f"store.zarr/logits/c/{number}/0.12ab.partial") == unit
    assert owner_of(store, "store.zarr/logits/zarr.json") == "plan"
    assert owner_of(store, "store.zarr/tokens/ids/c/0") == "plan"
    assert owner_of(store, "store.zarr/probe/logits/c/0/0") == "model"


def test_killed_before_any_change_on_disk_a_repair_can_be_repeated(tmp_path):
    content = make_content([5] * 4)
    stored = make_store(tmp_path / "s.agiqa", content)
    assert stored.geometry.units == 4
    before = contents(stored)
    harm(stored.layout.features_object(1), "flip")
    harm(object_of(stored, "lm_head/weight"), "flip")
    stored.layout.plan_commit.unlink()
    stored.layout.commit(2).unlink()
    states = states_after_kills(
        stored.path,
        tmp_path / "states",
        imports="from agiqa.store import open_store\nfrom agiqa.store.care.repairing import repair",
        job="repair(open_store(path))",
    )
    finished, previous = [], {}
    for state in states:
        now = {name: raw for name, raw in everything(state).items() if "/." not in name}
        if now == previous:  # only a temporary file more, and what follows would be the same
            continue
        previous = now
        store = open_store(state, allow_partial=True)
        finished.append(store.is_sealed)
        if store.is_sealed:
            assert [damage.unit for damage in verify(store, "full").damage if damage.unit is not None] == [1]
        else:
            assert not verify(store, "full").damage
            assert 1 not in store.committed_units()
            assert not store.layout.model_commit.exists()
        repair(store)
        assert contents(refill(store, content)) == before
    assert finished == sorted(finished, reverse=True)
    assert len(set(finished)) == 2
