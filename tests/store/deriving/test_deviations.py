"""Standard deviations of ratings: read from tables, kept on the scale of the MOS, and carried along."""

from dataclasses import replace

import h5py
import numpy as np
import pytest

from agiqa.errors import DataError
from agiqa.store import create_store, join_labels, open_store, seal, store_summary, union
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.conftest import Content, fill, make_content, make_store, plan_of

COUNT = 4


def with_deviations(content: Content, values, scale) -> Content:
    items = replace(
        content.items,
        labels={"quality": np.array([1.0, 2.0, 3.0, 4.0]) * scale[1] / 5},
        mos_ranges={"quality": scale},
        deviations={"quality": np.array(values)},
    )
    return replace(content, items=items)


def table(path, *rows):
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


@pytest.fixture
def content():
    return make_content([3, 5, 2, 4])


def test_a_table_sets_and_replaces_them(content, tmp_path):
    store = make_store(tmp_path / "s.agiqa", with_deviations(content, [0.5, np.nan, 0.25, np.nan], (0.0, 5.0)))
    report = join_labels(store, table(tmp_path / "t.csv", "name,std_quality", "image_0.png,.75", "image_1.png,1"))
    assert (report.filled, report.replaced) == ({"std_quality": 1}, {"std_quality": 1})
    np.testing.assert_array_equal(open_store(store.path).items.deviations["quality"], [0.75, 1.0, 0.25, np.nan])
    assert store_summary(open_store(store.path))["deviations"] == {"quality": 3}
    with pytest.raises(DataError, match="std_quality is 'wide', not a standard deviation"):
        join_labels(store, table(tmp_path / "t.csv", "name,std_quality", "image_0.png,wide"))


def test_they_follow_the_scale_of_the_mos(content, tmp_path):
    store = make_store(tmp_path / "s.agiqa", with_deviations(content, [0.5, 1.0, np.nan, np.nan], (0.0, 5.0)))
    some = table(tmp_path / "some.csv", "name,mos_quality,std_quality", "image_3.png,60,20")
    assert join_labels(store, some, mos_range=(0.0, 100.0)).converted == {"mos_quality": (0.0, 100.0)}
    np.testing.assert_array_equal(open_store(store.path).items.deviations["quality"], [0.5, 1.0, np.nan, 1.0])
    every = table(tmp_path / "all.csv", "name,mos_quality", *(f"image_{item}.png,{10 * item}" for item in range(COUNT)))
    assert join_labels(open_store(store.path), every, mos_range=(0.0, 100.0)).rescaled == ("mos_quality",)
    np.testing.assert_array_equal(open_store(store.path).items.deviations["quality"], [10.0, 20.0, np.nan, 20.0])


def test_a_table_of_them_alone_may_be_on_a_scale_of_its_own(content, tmp_path):
    store = make_store(tmp_path / "s.agiqa", with_deviations(content, [np.nan] * 4, (0.0, 5.0)))
    join_labels(store, table(tmp_path / "t.csv", "name,std_quality", "image_0.png,20"), mos_range=(0.0, 100.0))
    items = open_store(store.path).items
    np.testing.assert_array_equal(items.deviations["quality"], [1.0, np.nan, np.nan, np.nan])
    assert items.mos_ranges == {"quality": (0.0, 5.0)}


def test_they_stay_where_only_the_record_of_the_scale_was_wrong(content, tmp_path):
    store = make_store(tmp_path / "s.agiqa", with_deviations(content, [0.5, 1.0, np.nan, 0.0], (0.0, 5.0)))
    same = [f"image_{item}.png,{item + 1}" for item in range(COUNT)]
    join_labels(store, table(tmp_path / "t.csv", "name,mos_quality", *same), mos_range=(1.0, 5.0))
    items = open_store(store.path).items
    assert items.mos_ranges == {"quality": (1.0, 5.0)}
    np.testing.assert_array_equal(items.deviations["quality"], [0.5, 1.0, np.nan, 0.0])


def test_hdf5_and_unions_hold_them(content, tmp_path):
    store = make_store(tmp_path / "s.agiqa", with_deviations(content, [0.5, 1.0, np.nan, 0.0], (0.0, 5.0)))
    exported = export_hdf5(store, tmp_path / "s.h5", compression="none").path
    with h5py.File(exported) as file:
        np.testing.assert_array_equal(file["items/std_quality"], [0.5, 1.0, np.nan, 0.0])
    again = import_hdf5(exported, tmp_path / "again.agiqa")
    assert again.items.same_as(store.items)
    other = replace(make_content([2, 3, 4, 5], seed=1), items=None)
    named = replace(content.items, names=[f"other_{item}.png" for item in range(COUNT)])
    other = with_deviations(replace(other, items=named), [10.0, np.nan, 20.0, 0.0], (0.0, 100.0))
    both = union([store, make_store(tmp_path / "other.agiqa", replace(other, lm_head=content.lm_head))])
    np.testing.assert_array_equal(both.items.deviations["quality"], [0.5, 1.0, np.nan, 0.0, 0.5, np.nan, 1.0, 0.0])


def test_a_finished_store_without_them_is_resumed_as_before(content, tmp_path):
    """Early stores have none: the same command with the same table goes on to do nothing."""
    plain = make_store(tmp_path / "s.agiqa", content)
    spread = replace(content, items=replace(content.items, deviations={"quality": np.ones(COUNT)}))
    assert create_store(plain.path, plan_of(spread)).id == plain.id
    unfinished = create_store(tmp_path / "u.agiqa", plan_of(content))
    create_store(unfinished.path, plan_of(spread))
    fill(open_store(unfinished.path, allow_partial=True), content)
    np.testing.assert_array_equal(
        seal(open_store(unfinished.path, allow_partial=True)).items.deviations["quality"], np.ones(COUNT)
    )
