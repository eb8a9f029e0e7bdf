"""Single ratings: columns of raters, rows of ratings and counts become MOS, deviations and counts of a store."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import DataError
from agiqa.extract.data.labels import read_rows
from agiqa.store import join_labels, open_store, store_summary, union
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.conftest import make_content, make_store

ONE_TO_FIVE = (1.0, 5.0)
GIVEN = np.array([[4, 5, 3, 4], [1, 1, 2, 1], [5, 5, 5, 5]])
"""Ratings of image 0 to 2 by four raters."""
WIDE = ["name,rater_1_quality,rater_2_quality,rater_3_quality,rater_4_quality"]
WIDE += [f"image_{k}.png,{','.join(map(str, row))}" for k, row in enumerate(GIVEN)]
LONG = ["name,rater,quality", *(f"image_{k}.png,r{j},{GIVEN[k, j]}" for j in range(4) for k in range(3))]
COUNTED = ["name,c1,c2,c3,c4,c5", "image_0.png,0,0,1,2,1", "image_1.png,3,1,0,0,0", "image_2.png,0,0,0,0,4"]
FORMS = {
    "wide": (WIDE, None),
    "subjects": ([WIDE[0].replace("rater_", "Subject ").replace("_quality", ""), *WIDE[1:]], None),
    "aspect first": (["name,quality_rater1,quality_rater2,quality_rater3,quality_rater4", *WIDE[1:]], None),
    "pattern": (["name,s1,s2,s3,s4", *WIDE[1:]], {"ratings_quality": "s?"}),
    "long": (LONG, None),
    "workers": (["name,worker_id,score", *LONG[1:]], None),
    "own names": (["name,who,mark", *LONG[1:]], {"rater": "who", "quality": "mark"}),
    "counted": (COUNTED, None),
}


@pytest.fixture
def store(tmp_path):
    content = make_content([3, 5, 2, 4])
    return make_store(tmp_path / "s.agiqa", replace(content, items=replace(content.items, labels={})))


def table(path, lines):
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def counts_of(items):
    return np.stack([items.counts[f"quality_{level}"] for level in range(1, 6)], axis=1)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_labels(store, tmp_path, form):
    lines, columns = FORMS[form]
    file = table(tmp_path / "t.csv", lines)
    join_labels(store, file, mos_range=ONE_TO_FIVE, columns=columns)
    items = open_store(store.path).items
    np.testing.assert_allclose(items.labels["quality"], [*GIVEN.mean(axis=1), np.nan])
    np.testing.assert_allclose(items.deviations["quality"], [*GIVEN.std(axis=1, ddof=1), np.nan])
    expected = [[*np.bincount(row, minlength=6)[1:]] for row in GIVEN]
    np.testing.assert_array_equal(counts_of(items), [*expected, [np.nan] * 5])
    assert items.mos_ranges == {"quality": ONE_TO_FIVE}
    assert store_summary(open_store(store.path))["counts"] == {"quality": 3}
    rows = read_rows(file, ONE_TO_FIVE, columns=columns, prompts=False).rows
    assert [row.labels["quality"] for row in rows] == pytest.approx(GIVEN.mean(axis=1))
    assert [row.deviations["quality"] for row in rows] == pytest.approx(GIVEN.std(axis=1, ddof=1))
    assert [[row.counts[f"quality_{level}"] for level in range(1, 6)] for row in rows] == expected
    assert [row.problems for row in rows] == [()] * 3


def test_unions_and_hdf5_keep_counts(store, tmp_path):
    join_labels(store, table(tmp_path / "t.csv", WIDE), mos_range=ONE_TO_FIVE)
    store = open_store(store.path)
    exported = export_hdf5(store, tmp_path / "s.h5", compression="none").path
    again = import_hdf5(exported, tmp_path / "again.agiqa")
    assert again.items.same_as(store.items)
    content = make_content([2, 2], seed=3)
    content = replace(content, items=replace(content.items, names=["a.png", "b.png"]), lm_head=store.lm_head())
    other = make_store(tmp_path / "o.agiqa", content)
    both = counts_of(union([store, other]).items)
    np.testing.assert_array_equal(both, [*counts_of(store.items), *[[np.nan] * 5] * 2])
    assert counts_of(store.items.first(2)).tolist() == counts_of(store.items)[:2].tolist()


@pytest.mark.parametrize(("mos", "std"), [("4", "0.82"), ("4.0", "0.8165"), ("4.00", "0.71"), ("", "")])
def test_a_mos_and_std_that_agree_are_kept_as_written(store, tmp_path, mos, std):
    lines = [f"{WIDE[0]},mos_quality,std_quality", f"{WIDE[1]},{mos},{std}"]
    join_labels(store, table(tmp_path / "t.csv", lines), mos_range=ONE_TO_FIVE)
    items = open_store(store.path).items
    assert items.labels["quality"][0] == float(mos or 4.0)
    assert items.deviations["quality"][0] == pytest.approx(float(std or np.sqrt(2 / 3)))


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        ("mos_quality", "3.5", "mos_quality is 3.5, and the mean of its 4 ratings is 4; keep one of both"),
        ("std_quality", "1.5", "std_quality is 1.5, and the standard deviation of its 4 ratings is 0.8165"),
    ],
)
def test_contradictions_are_refused(store, tmp_path, header, cells, message):
    file = table(tmp_path / "t.csv", [f"{WIDE[0]},{header}", f"{WIDE[1]},{cells}"])
    with pytest.raises(DataError, match=message):
        join_labels(store, file, mos_range=ONE_TO_FIVE)
    (row,) = read_rows(file, ONE_TO_FIVE, prompts=False).rows
    assert message in row.problems[0]
    assert open_store(store.path).items.labels == {}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([WIDE[0], "image_0.png,4,-1,3,4"], "rater_2_quality is '-1', not a rating from 1 to 5"),
        ([WIDE[0], "image_0.png,4,good,3,4"], "rater_2_quality is 'good', not a rating"),
        ([*LONG, "image_0.png,r1,4"], "line 14: the rater 'r1' rated 'image_0.png' twice"),
        ([*LONG, "image_0.png,,4"], "line 14: the rater is empty"),
        (["name,rater,split", "image_0.png,a,train"], "has a rating in each row, in a column such as mos_quality"),
        (
            ["name,rater,quality,split", "image_0.png,a,4,train", "image_0.png,b,4,test"],
            "line 3, 'image_0.png': split is 'test', in line 2 'train'",
        ),
        (["name,count_quality_1,count_quality_2", "image_0.png,1,2"], "Counts need all of count_quality_1"),
        ([COUNTED[0], "image_0.png,1,2,half,0,0"], "c3 is 'half', not a number of ratings"),
    ],
)
def test_what_are_no_ratings(store, tmp_path, lines, message):
    with pytest.raises(DataError, match=message):
        join_labels(store, table(tmp_path / "t.csv", lines), mos_range=ONE_TO_FIVE)


def test_a_pattern_without_a_column(store, tmp_path):
    with pytest.raises(DataError, match=r"no column matches 'score_\*', which --columns gives for ratings_quality"):
        join_labels(store, table(tmp_path / "t.csv", WIDE), columns={"ratings_quality": "score_*"})


def test_ratings_between_the_levels_make_no_counts(store, tmp_path):
    """Whole numbers from 1 to 5 are not the five levels of 0 to 5."""
    report = join_labels(store, table(tmp_path / "t.csv", WIDE), mos_range=(0.0, 5.0))
    assert "If they are whole numbers from 1 to 5, add --mos-range 1 5" in report.notes[-1]
    items = open_store(store.path).items
    assert items.counts == {}
    assert items.labels["quality"][0] == 4.0


def test_counts_of_any_size_are_summarised(store, tmp_path):
    lines = [COUNTED[0], f"image_0.png,{10**12},0,0,0,{3 * 10**12}"]
    join_labels(store, table(tmp_path / "t.csv", lines), mos_range=ONE_TO_FIVE)
    items = open_store(store.path).items
    assert items.labels["quality"][0] == 4.0
    assert items.deviations["quality"][0] == pytest.approx(np.sqrt(3.0))


def test_images_may_have_different_numbers_of_ratings(store, tmp_path):
    lines = [WIDE[0], "image_0.png,4,,,", "image_1.png,,1,,2", "image_2.png,,,,"]
    join_labels(store, table(tmp_path / "t.csv", lines), mos_range=ONE_TO_FIVE)
    items = open_store(store.path).items
    np.testing.assert_array_equal(items.labels["quality"], [4.0, 1.5, np.nan, np.nan])
    np.testing.assert_allclose(items.deviations["quality"], [np.nan, np.sqrt(0.5), np.nan, np.nan])
