"""Finished stores that get more items: what is copied, what a kill leaves, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import SettingsConflict
from agiqa.store import UnitWriter, join_labels, open_store, seal, verify
from agiqa.store.writing.growing import begin_growth, copy_rows, growing_path, install_growth, recover_growth
from tests.store.conftest import Content, fill, make_content, make_store, plan_of
from tests.store.crash_points import states_after_kills

LENGTHS = [9, 30, 0, 12, 17, 5, 41, 3]
OLD = 5


def head(content: Content, count: int) -> Content:
    """The first `count` items."""
    return replace(
        content,
        hidden=content.hidden[:count],
        token_ids=content.token_ids[:count],
        roles=content.roles[:count],
        items=content.items.first(count),
    )


def grow(path):
    """What a run does that extends the store at `path` to all items, in a process that may be killed."""
    content = make_content(LENGTHS)
    recover_growth(path)
    store = open_store(path)
    if len(store.items) == OLD:
        grown = begin_growth(store, replace(plan_of(content, data_set={"items": 8}), breaks=[OLD]))
        if not grown.is_sealed:
            copy_rows(store, grown, lambda _items: None)
            fill(grown, content)
            seal(grown)
        install_growth(path)


@pytest.fixture
def old(tmp_path):
    return make_store(tmp_path / "s.agiqa", head(make_content(LENGTHS), OLD), data_set={"items": OLD})


def rows_of(store):
    return [store.read([item]).rows.tobytes() for item in range(len(store.items))]


def test_old_rows_are_copied_and_new_ones_begin_a_unit(old):
    content = make_content(LENGTHS)
    grown = begin_growth(old, replace(plan_of(content, data_set={"items": 8}), breaks=[OLD]))
    assert grown.path == growing_path(old.path)
    done = []
    copy_rows(old, grown, done.append)
    assert sum(done) == OLD
    left = UnitWriter(grown).pending()
    assert sorted(item for unit in left for item in grown.items_of(unit)) == [5, 6, 7]
    fill(grown, content)
    seal(grown)
    assert open_store(old.path).id == old.id
    new = install_growth(old.path)
    assert (new.id, len(new.items)) == (grown.id, 8)
    assert rows_of(new) == [rows.tobytes() for rows in content.hidden]
    assert verify(open_store(old.path), "numeric").sound
    assert [path.name for path in old.path.parent.iterdir()] == ["s.agiqa"]


def test_a_killed_growth_goes_on(old, tmp_path):
    wanted = [rows.tobytes() for rows in make_content(LENGTHS).hidden]
    imports = "from tests.store.writing.test_growing import grow"
    states = states_after_kills(old.path, tmp_path / "states", imports=imports, job="grow(path)", every=23)
    for state in states:
        found = open_store(state)
        assert rows_of(found) == wanted[: len(found.items)]
        grow(state)
        assert rows_of(open_store(state)) == wanted
        assert [path.name for path in state.parent.iterdir()] == ["s.agiqa"]
    assert len(states) > 4


def test_killed_before_any_change_on_disk_the_replacement_is_finished(old, tmp_path):
    content, folder = make_content(LENGTHS), old.path.parent
    grown = begin_growth(old, plan_of(content, data_set={"items": 8}))
    fill(grown, content)
    seal(grown)
    imports = "from agiqa.store.writing.growing import install_growth"
    job, states = "install_growth(path / 's.agiqa')", tmp_path.with_name(f"{tmp_path.name}-states")
    absent = 0
    for state in states_after_kills(folder, states, imports=imports, job=job):
        path = state / "s.agiqa"
        absent += not path.exists()
        recover_growth(path)
        if open_store(path).id == old.id:
            install_growth(path)
        assert rows_of(open_store(path)) == [rows.tobytes() for rows in content.hidden]
        assert [left.name for left in state.iterdir()] == ["s.agiqa"]
    assert absent == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda plan: replace(plan, provenance={**plan.provenance, "model": {"name": "other"}}), "model.name"),
        (lambda plan: replace(plan, items=replace(plan.items, splits=["val"] * 8)), r"differ .* \(split\)"),
    ],
)
def test_what_is_stored_must_not_have_changed(old, change, message):
    plan = plan_of(make_content(LENGTHS), data_set={"items": 8})
    with pytest.raises(SettingsConflict, match=message):
        begin_growth(old, change(plan))
    assert not growing_path(old.path).exists()


def test_a_growth_to_other_items_is_finished_first(old):
    begin_growth(old, plan_of(make_content(LENGTHS), data_set={"items": 8}))
    with pytest.raises(SettingsConflict, match="was being extended to other items"):
        begin_growth(old, plan_of(head(make_content(LENGTHS), 7), data_set={"items": 7}))


def test_labels_of_new_items_alone_are_no_difference(old):
    content = make_content(LENGTHS)
    align = np.array([np.nan] * OLD + [1.0] * 3)
    items = replace(content.items, labels={**content.items.labels, "correspondence": align})
    grown = begin_growth(old, plan_of(replace(content, items=items), data_set={"items": 8}))
    np.testing.assert_array_equal(grown.items.labels["correspondence"], align)


def test_labels_that_were_replaced_meanwhile_are_not_lost(old, tmp_path):
    content = make_content(LENGTHS)
    grown = begin_growth(old, plan_of(content, data_set={"items": 8}))
    fill(grown, content)
    seal(grown)
    table = tmp_path / "t.csv"
    table.write_text("name,mos\nimage_0.png,0.25\n")
    join_labels(old, table)
    with pytest.raises(SettingsConflict, match=r"labels of .* were replaced while .*growing TABLE"):
        install_growth(old.path)
    assert len(open_store(old.path).items) == OLD
    join_labels(open_store(grown.path), table)
    assert install_growth(old.path).items.labels["quality"][0] == 0.25


def test_labels_that_were_joined_before_are_kept(old, tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("name,mos_align,std_align,generator\nimage_0.png,1.5,.25,sdxl\n")
    join_labels(old, table)
    grown = begin_growth(open_store(old.path), plan_of(make_content(LENGTHS), data_set={"items": 8}))
    assert grown.items.labels["correspondence"].tolist()[:1] == [1.5]
    assert grown.items.deviations["correspondence"].tolist()[:1] == [0.25]
    assert grown.items.generators == ["sdxl", *[None] * 7]
    assert grown.items.mos_ranges == {"correspondence": (0.0, 5.0)}
    assert np.isnan(grown.items.labels["correspondence"][1:]).all()


def test_a_replacement_whose_larger_store_is_gone_is_undone(old):
    rows = rows_of(old)
    old.path.rename(old.path.with_name(".s.agiqa.before-growing"))
    for _ in range(2):
        recover_growth(old.path)
        assert rows_of(open_store(old.path)) == rows
        assert [left.name for left in old.path.parent.iterdir()] == ["s.agiqa"]
