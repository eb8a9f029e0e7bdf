"""Data sets that got more rows, or other orders: only the new items are computed."""

import numpy as np
import pytest

from agiqa.errors import BusyStore, SettingsConflict
from agiqa.extract.filling import job
from agiqa.progress import said_to
from agiqa.store import open_store, verify
from agiqa.store.deriving.labelling import join_labels
from tests.extract.jobs import extract
from tests.extract.small_sets import read_table, write_set, write_table

OLD, NEW = 12, 20


def shuffled(folder, count, seed):
    """The set of `count` items, its rows in another order."""
    write_set(folder, count)
    rows = [list(row.values()) for row in read_table(folder)]
    order = np.random.default_rng(seed).permutation(count)
    return write_table(folder, [rows[position] for position in order])


def rows_by_name(store):
    return {name: store.read([item]).rows.tobytes() for item, name in enumerate(store.items.names)}


@pytest.mark.parametrize(
    "settings",
    [{}, {"keep_logits": True}, {"encoding": "sketch", "rank": 6}, {"encoding": "int8"}, {"encoding": "logits"}],
    ids=["hidden", "logits beside", "sketch", "int8", "logits"],
)
def test_only_new_items_are_computed(settings, tiny_text_checkpoint, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    old = extract(write_set(folder, OLD), tiny_text_checkpoint, path, **settings).store
    names, before = list(old.items.names), rows_by_name(old)
    result = extract(shuffled(folder, NEW, 1), tiny_text_checkpoint, path, **settings)
    assert result.fill is not None
    assert result.fill.items == NEW - OLD
    store = open_store(path)
    assert store.items.names[:OLD] == names
    assert len(store.items) == NEW
    after = rows_by_name(store)
    assert {name: after[name] for name in names} == before
    assert verify(store, "numeric").sound
    if not settings:
        fresh = extract(folder, tiny_text_checkpoint, tmp_path / "fresh.agiqa").store
        position = {name: item for item, name in enumerate(fresh.items.names)}
        for item, name in enumerate(store.items.names):
            there, here = fresh.read([position[name]]).float32(), store.read([item]).float32()
            np.testing.assert_allclose(here, there, rtol=5e-3, atol=5e-3)
    again = extract(shuffled(folder, NEW, 2), tiny_text_checkpoint, path, **settings)
    assert (again.fill, again.store.id) == (None, store.id)
    more = extract(shuffled(folder, NEW + 2, 3), tiny_text_checkpoint, path, **settings)
    assert more.fill is not None
    assert (more.fill.items, more.store.provenance["data_set"]["grown"]) == (2, [OLD, NEW])
    assert sorted(one.name for one in tmp_path.iterdir() if one.name.startswith(".")) == []


def test_another_order_changes_nothing(tiny_text_checkpoint, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    extract(write_set(folder, OLD), tiny_text_checkpoint, path)
    files = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    assert extract(shuffled(folder, OLD, 1), tiny_text_checkpoint, path).fill is None
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == files


def test_a_growth_that_stops_goes_on(tiny_text_checkpoint, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    first = extract(write_set(folder, OLD), tiny_text_checkpoint, path).store
    write_set(folder, NEW)
    planned = extract(folder, tiny_text_checkpoint, path, plan_only=True)
    assert planned.fill is None
    half = extract(folder, tiny_text_checkpoint, path, part=(1, 2))
    assert open_store(path).id == first.id
    rest = extract(folder, tiny_text_checkpoint, path)
    assert half.fill is not None
    assert rest.fill is not None
    assert (half.fill.items + rest.fill.items, len(open_store(path).items)) == (NEW - OLD, NEW)


def test_rows_that_changed_or_are_gone_are_refused(tiny_text_checkpoint, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    extract(write_set(folder, OLD), tiny_text_checkpoint, path)
    write_set(folder, NEW)
    rows = [list(row.values()) for row in read_table(folder)]
    name, prompt, mos, split, description = rows[0]
    for changed, message in (
        ([[name, prompt, mos, split, "another text"], *rows[1:]], f"changed items: {name}"),
        (rows[1:], f"items only stored: {name}"),
        ([[name, prompt, 0.125, split, description], *rows[1:]], r"differ from those given now \(mos_quality\)"),
    ):
        with pytest.raises(SettingsConflict, match=message):
            extract(write_table(folder, changed), tiny_text_checkpoint, path)
    assert [one.name for one in tmp_path.iterdir()] == ["s.agiqa", "set"] or len(list(tmp_path.iterdir())) == 2


def test_an_unfinished_store_is_finished_first(tiny_text_checkpoint, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    extract(write_set(folder, OLD), tiny_text_checkpoint, path, plan_only=True)
    with pytest.raises(SettingsConflict, match="is unfinished, and the data set has 8 items more"):
        extract(write_set(folder, NEW), tiny_text_checkpoint, path)


def test_a_reader_of_the_old_store_hears_of_the_larger_one(tiny_text_checkpoint, tmp_path):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    extract(write_set(folder, OLD), tiny_text_checkpoint, path)
    begun, fresh = open_store(path), open_store(path)
    begun.read([0])
    extract(write_set(folder, NEW), tiny_text_checkpoint, path)
    for read in (lambda: begun.read([0]), lambda: fresh.read([0]), lambda: fresh.items, lambda: begun.read([1])):
        with pytest.raises(BusyStore, match="was replaced by another store while it was open"):
            read()
    assert open_store(path).read([0]).rows.size


def test_another_scale_is_refused_by_name(tiny_text_checkpoint, tmp_path):
    """The MOS of the old items come from `agiqa store labels`, those of the new ones from the table, on its scale."""
    path, folder = tmp_path / "s.agiqa", write_set(tmp_path / "set", OLD)
    rows = read_table(folder)
    hidden = [{**row, "mos_quality": "", "split": "test"} for row in rows]
    without = [name for name in rows[0] if name != "mos_quality"]
    extract(
        write_table(folder, [[row[name] for name in without] for row in hidden], without), tiny_text_checkpoint, path
    )
    write_table(tmp_path / "mos", [[row["name"], 50] for row in rows], ["name", "mos_quality"])
    join_labels(open_store(path), tmp_path / "mos" / "data.csv", mos_range=(0.0, 100.0))
    new = read_table(write_set(folder, NEW))[OLD:]
    write_table(folder, [list(row.values()) for row in (*hidden, *new)])
    told = r"given now \(the scale of quality: 0 to 100 in the store, 0 to 5 now\)\. Give the scale of the store"
    with pytest.raises(SettingsConflict, match=told):
        extract(folder, tiny_text_checkpoint, path)


@pytest.mark.parametrize("settings", [{"encoding": "sketch", "rank": 6}, {"encoding": "int8"}], ids=["sketch", "int8"])
def test_other_splits_keep_the_calibration(settings, tiny_text_checkpoint, tmp_path):
    """`agiqa store labels` moved items that the store was calibrated on to the split test."""
    path, folder, said = tmp_path / "s.agiqa", tmp_path / "set", []
    extract(write_set(folder, OLD), tiny_text_checkpoint, path, **settings)
    rows = read_table(write_set(folder, NEW))
    for row in rows[:3]:
        row["split"] = "test"
    write_table(folder, [list(row.values()) for row in rows])
    join_labels(open_store(path), folder / "data.csv")
    if "rank" in settings:
        with said_to(said.append), pytest.raises(SettingsConflict, match=r"sketch\.calibration: stored"):
            extract(folder, tiny_text_checkpoint, path, **settings)
        assert f"give --basis {path} in place of --rank 6" in "".join(said)
        settings = {"encoding": "sketch", "basis": path}
    result = extract(folder, tiny_text_checkpoint, path, **settings)
    assert result.fill is not None
    assert (result.fill.items, result.store.items.splits[0]) == (NEW - OLD, "test")
    assert verify(result.store, "numeric").sound


def test_a_run_whose_work_another_one_finishes_returns_the_larger_store(tiny_text_checkpoint, tmp_path, monkeypatch):
    path, folder = tmp_path / "s.agiqa", tmp_path / "set"
    extract(write_set(folder, OLD), tiny_text_checkpoint, path)
    write_set(folder, NEW)
    copy = job.copy_rows

    def copy_late(*arguments):
        monkeypatch.setattr(job, "copy_rows", copy)
        extract(folder, tiny_text_checkpoint, path)
        copy(*arguments)

    monkeypatch.setattr(job, "copy_rows", copy_late)
    found = extract(folder, tiny_text_checkpoint, path)
    assert (found.store.path, len(found.store.items), found.fill) == (path, NEW, None)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["s.agiqa", "set"]
