"""The scale of MOS is recorded with the values and kept in copies; two scales are converted or refused."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agiqa.errors import ConfigError, DamagedStore, DataError
from agiqa.store import basis_from, convert_store, open_store, sketch_store, store_summary
from agiqa.store.deriving.labelling import join_labels
from agiqa.store.format.items import Items, read_items, write_items
from agiqa.store.format.labels import check_range, convert_mos, is_plausible, range_record, read_range, scale_warning
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.importing import import_hdf5
from agiqa.store.reading.union import union
from agiqa.store.sharing.pulling import pull
from agiqa.store.sharing.pushing import push
from tests.store.conftest import make_content, make_store
from tests.store.deriving.test_labels import full_table, write_table
from tests.store.reading.test_union import named

FIVE, HUNDRED = (0.0, 5.0), (0.0, 100.0)


def on_scale(content, scale, *, recorded=True):
    """The content with MOS of quality spread over `scale`, and that scale in its items if it is `recorded`."""
    count, (low, high) = len(content.items), scale
    quality = low + (high - low) * np.random.default_rng(count).permutation(np.linspace(0.02, 0.98, count))
    ranges = {"quality": scale} if recorded else {}
    return replace(content, items=replace(content.items, labels={"quality": quality}, mos_ranges=ranges))


def scale_of(path):
    return open_store(path).items.mos_ranges.get("quality")


def without_listed_table(store):
    """Let an unfinished store take the table that is there, as those of an agiqa that did not record its hash."""
    record = json.loads(store.layout.plan_commit.read_text())
    del record["labels"]
    store.layout.plan_commit.write_text(json.dumps(record))


@pytest.fixture
def hundred(tmp_path, content):
    return make_store(tmp_path / "hundred.agiqa", on_scale(content, HUNDRED))


def two(tmp_path, first, second, *, recorded=(True, True)):
    """Two stores of one model, whose MOS are on these scales."""
    contents = [make_content([3, 5, 30, 2, 11, 7, 4, 6, 9, 8]), make_content([4, 6, 9, 8, 1, 2, 3, 4, 5], seed=3)]
    contents[1] = replace(named(contents[1], "b/"), lm_head=contents[0].lm_head)
    scaled = [on_scale(*one, recorded=known) for *one, known in zip(contents, (first, second), recorded, strict=True)]
    return [make_store(tmp_path / f"{k}.agiqa", one, data_set={"name": str(k)}) for k, one in enumerate(scaled)]


def test_the_scale_is_metadata_of_its_column(hundred, content, tmp_path):
    field = pq.read_schema(hundred.layout.items).field("mos_quality")
    assert json.loads(field.metadata[b"mos_range"]) == [0, 100]
    assert open_store(hundred.path).items.mos_ranges == {"quality": HUNDRED}
    write_items(tmp_path / "old.parquet", content.items)
    assert b"mos_range" not in (pq.read_schema(tmp_path / "old.parquet").field("mos_quality").metadata or {})
    assert read_items(tmp_path / "old.parquet").mos_ranges == {}


@pytest.mark.parametrize(
    "record", ["[0]", "[5,0]", "[0,NaN]", "[0,1e999]", '{"low":0}', "[true,5]", "0 5", "[" * 90, f"[0,{'9' * 4000}]"]
)
def test_a_scale_that_is_none_is_damage(stored, record):
    table = pq.read_table(stored.layout.items)
    at = table.column_names.index("mos_quality")
    schema = table.schema.set(at, table.schema.field(at).with_metadata({"mos_range": record}))
    stored.layout.manifest.unlink()
    pq.write_table(table.cast(schema), stored.layout.items)
    without_listed_table(stored)
    with pytest.raises(DamagedStore, match=r"mos_range is .*not \[low,high\]"):
        _ = open_store(stored.path, allow_partial=True).items
    table = write_table(stored.path.with_name("t.csv"), "name,mos", "image_3.png,2.5")
    with pytest.raises(DamagedStore, match=r"mos_range is .*not \[low,high\]"):
        join_labels(open_store(stored.path, allow_partial=True), table)


@pytest.mark.parametrize("scale", [(5.0, 0.0), (1.0, 1.0), (0.0, float("inf")), (float("nan"), 1.0), (-1e308, 1e308)])
def test_a_range_needs_two_ends(scale):
    with pytest.raises(ConfigError, match="the lowest value first"):
        check_range(scale)


def test_values_go_from_scale_to_scale_by_the_line_through_the_ends():
    values = np.array([0.0, 1.25, np.nan, 5.0])
    np.testing.assert_array_equal(convert_mos(values, FIVE, HUNDRED), [0, 25, np.nan, 100])
    np.testing.assert_allclose(convert_mos(np.array([1.0, 3.0, 5.0]), (1.0, 5.0), (-1.0, 1.0)), [-1, 0, 1], rtol=0)
    assert read_range(range_record((-1.5, 1e-3))) == (-1.5, 1e-3)


def test_values_tell_which_scales_they_are_not_on():
    spread = np.linspace(0.3, 4.8, 20)
    assert is_plausible(spread, FIVE)
    assert not is_plausible(spread, HUNDRED)
    assert not is_plausible(spread, (0.0, 1.0))
    assert is_plausible(np.array([0.1, np.nan]), HUNDRED)  # too few to tell
    assert scale_warning("quality", spread, FIVE) is None
    assert "the highest of 20 MOS of quality is 4.8, in the lowest quarter of 0 to 100" in str(
        scale_warning("quality", spread, HUNDRED)
    )


def test_items_of_two_scales_are_not_the_same(content):
    five, hundred = (replace(content.items, mos_ranges={"quality": scale}) for scale in (FIVE, HUNDRED))
    assert not five.same_as(hundred)
    assert five.same_as(content.items)
    assert content.items.same_as(five)


def test_the_scale_goes_where_the_labels_go(hundred, tmp_path):
    sketch_store(hundred, tmp_path / "sketch.agiqa", basis=basis_from(hundred, 4))
    convert_store(hundred, tmp_path / "int8.agiqa", "int8")
    export_hdf5(hundred, tmp_path / "s.h5", compression="gzip")
    import_hdf5(tmp_path / "s.h5", tmp_path / "imported.agiqa")
    push(hundred, f"file://{tmp_path / 'pushed.agiqa'}")
    pull(f"file://{tmp_path / 'pushed.agiqa'}", tmp_path / "pulled.agiqa")
    for name in ("sketch", "int8", "imported", "pushed", "pulled"):
        assert scale_of(tmp_path / f"{name}.agiqa") == HUNDRED, name


def test_an_export_of_another_scale_is_another(stored, tmp_path):
    export_hdf5(stored, tmp_path / "s.h5", compression="gzip")
    values = stored.items.labels["quality"].tolist()
    rows = [f"image_{k}.png,{value!r}" for k, value in enumerate(values) if not np.isnan(value)]
    report = join_labels(stored, write_table(tmp_path / "t.csv", "name,mos", *rows))
    assert (report.filled, report.replaced, report.rescaled) == ({}, {}, ("mos_quality",))
    with pytest.raises(Exception, match="with other labels"):
        export_hdf5(open_store(stored.path), tmp_path / "s.h5", compression="gzip")


def test_summary_and_card_tell_the_scale(hundred, tmp_path, content):
    assert store_summary(hundred)["mos_ranges"] == {"quality": HUNDRED}
    assert "quality 0 to 100" in hundred.layout.card.read_text()
    old = make_store(tmp_path / "old.agiqa", content)
    assert store_summary(old)["mos_ranges"] == {"quality": None}
    assert "quality a scale that is not recorded" in old.layout.card.read_text()


def test_a_table_for_some_items_is_converted_to_the_scale_of_the_others(hundred, tmp_path):
    before = hundred.items.labels["quality"]
    report = join_labels(hundred, write_table(tmp_path / "t.csv", "name,mos", "image_3.png,2.5"), mos_range=FIVE)
    items = open_store(hundred.path).items
    np.testing.assert_array_equal(items.labels["quality"], np.where(np.arange(40) == 3, 50.0, before))
    assert items.mos_ranges == {"quality": HUNDRED}
    assert (report.converted, report.mos_ranges) == ({"mos_quality": FIVE}, {"mos_quality": HUNDRED})
    assert "converted from 0 to 5 to 0 to 100" in report.notes[0]
    assert not join_labels(hundred, tmp_path / "t.csv", mos_range=FIVE).changed


def test_a_table_for_all_items_sets_their_scale(hundred, tmp_path):
    report = join_labels(hundred, full_table(tmp_path / "t.csv", "mos", 3.5), mos_range=FIVE)
    items = open_store(hundred.path).items
    assert set(items.labels["quality"]) == {3.5}
    assert (items.mos_ranges, report.converted, report.notes) == ({"quality": FIVE}, {}, ())
    assert "quality 0 to 5" in hundred.layout.card.read_text()
    assert not join_labels(hundred, tmp_path / "t.csv").changed


def test_a_table_is_on_the_scale_of_the_store_where_nobody_says(hundred, tmp_path):
    report = join_labels(hundred, write_table(tmp_path / "t.csv", "name,mos", "image_3.png,2.5", "image_4.png,73"))
    assert open_store(hundred.path).items.labels["quality"][[3, 4]].tolist() == [2.5, 73]
    assert (report.converted, report.notes) == ({}, ())


def test_labels_of_another_aspect_have_a_scale_of_their_own(hundred, tmp_path):
    join_labels(hundred, write_table(tmp_path / "t.csv", "name,mos_align", "image_3.png,2.5"))
    assert open_store(hundred.path).items.mos_ranges == {"quality": HUNDRED, "correspondence": FIVE}


def test_a_mixture_with_values_of_no_known_scale_is_refused(tmp_path, content):
    old = make_store(tmp_path / "old.agiqa", on_scale(content, HUNDRED, recorded=False))
    table = write_table(tmp_path / "t.csv", "name,mos", "image_3.png,2.5")
    before = old.layout.items.read_bytes()
    with pytest.raises(DataError, match=r"some of the quality MOS, on 0 to 5\. The 39 others go from .* to 98"):
        join_labels(old, table)
    assert old.layout.items.read_bytes() == before
    report = join_labels(old, table, mos_range=HUNDRED)
    assert report.mos_ranges == {"mos_quality": None}
    assert "not recorded; they are taken to be on 0 to 100 too" in report.notes[0]
    assert scale_of(old.path) is None


def test_a_union_is_on_the_scale_of_its_first_store(tmp_path):
    first, second = two(tmp_path, FIVE, HUNDRED)
    values = [store.items.labels["quality"] for store in (first, second)]
    both = union([first, second])
    np.testing.assert_allclose(both.items.labels["quality"], [*values[0], *(values[1] / 20)], rtol=1e-12)
    assert both.items.mos_ranges == {"quality": FIVE}
    (note,) = both.scale_notes
    assert note.startswith(f"the quality MOS of {second.path} are converted from 0 to 100 to 0 to 5")
    assert [items.tolist() for _, items in both.parts] == [list(range(10)), list(range(10, 19))]
    back = union([second, first])
    np.testing.assert_allclose(back.items.labels["quality"], [*values[1], *(values[0] * 20)], rtol=1e-12)
    assert back.items.mos_ranges == {"quality": HUNDRED}


def test_stores_of_one_scale_are_joined_as_they_are(tmp_path):
    stores = two(tmp_path, FIVE, FIVE)
    both = union(stores)
    values = np.concatenate([store.items.labels["quality"] for store in stores])
    np.testing.assert_array_equal(both.items.labels["quality"], values)
    assert (both.scale_notes, both.items.mos_ranges) == ((), {"quality": FIVE})


def test_a_store_whose_values_are_not_on_its_recorded_scale_is_told(tmp_path):
    """MOS on 0 to 1, extracted with the default range of 0 to 5: in a union they only identify their store."""
    first, second = two(tmp_path, FIVE, (0.0, 1.0))
    rows = [f"{name},{mos}" for name, mos in zip(second.items.names, second.items.labels["quality"], strict=True)]
    join_labels(second, write_table(tmp_path / "t.csv", "name,mos", *rows), mos_range=FIVE)
    (note,) = union([first, open_store(second.path)]).scale_notes
    assert note.startswith(f"the quality MOS of {second.path} are recorded on 0 to 5 and go from 0.02 to 0.98. ")
    assert "store labels STORE TABLE.csv --mos-range" in note
    assert union([open_store(second.path)]).scale_notes == ()


@pytest.mark.parametrize("recorded", [(True, False), (False, True), (False, False)])
def test_a_store_of_no_known_scale_is_joined_where_its_values_may_be_on_that_of_the_others(tmp_path, recorded):
    stores = two(tmp_path, FIVE, FIVE, recorded=recorded)
    both = union(stores)
    values = np.concatenate([store.items.labels["quality"] for store in stores])
    np.testing.assert_array_equal(both.items.labels["quality"], values)
    assert both.items.mos_ranges == ({"quality": FIVE} if any(recorded) else {})
    (note,) = both.scale_notes
    for store, known in zip(stores, recorded, strict=True):
        assert known or str(store.path) in note
    assert "not recorded" in note


@pytest.mark.parametrize(
    ("scales", "recorded"),
    [((FIVE, HUNDRED), (True, False)), ((FIVE, HUNDRED), (False, True)), ((HUNDRED, FIVE), (False, False))],
)
def test_a_store_of_no_known_scale_is_refused_where_its_values_are_on_another(tmp_path, scales, recorded):
    stores = two(tmp_path, *scales, recorded=recorded)
    with pytest.raises(DataError, match=r"quality MOS of these stores are on different scales") as caught:
        union(stores)
    assert "store labels STORE TABLE.csv --mos-range" in caught.value.__notes__[0]
    assert any(str(store.path) in str(caught.value) for store in stores)


def test_a_store_without_the_label_has_no_say(tmp_path):
    first, second = two(tmp_path, FIVE, HUNDRED)
    bare = replace(first.items, labels={"quality": np.full(10, np.nan)}, mos_ranges={})
    first.layout.manifest.unlink()
    write_items(first.layout.items, bare)
    without_listed_table(first)
    both = union([open_store(first.path, allow_partial=True), second])
    np.testing.assert_array_equal(both.items.labels["quality"][10:], second.items.labels["quality"])
    assert (both.items.mos_ranges, both.scale_notes) == ({"quality": HUNDRED}, ())


def test_an_arrow_reader_sees_plain_columns(hundred):
    """What does not know of scales reads the table as ever."""
    table = pq.read_table(hundred.layout.items)
    assert table.schema.field("mos_quality").type == pa.float64()
    assert isinstance(read_items(hundred.layout.items), Items)
