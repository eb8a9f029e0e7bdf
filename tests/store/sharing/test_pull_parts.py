"""Pulls of some items: their bytes and no others, and parts that grow into the store."""

import json

import numpy as np
import pytest

from agiqa.errors import BusyStore, ConfigError, DataError, IncompleteStore
from agiqa.store import basis_from, convert_store, create_store, open_store, sketch_store
from agiqa.store.sharing.pulling import plan_pull, pull, run_pull
from agiqa.store.sharing.pushing import push, push_bytes
from tests.store.conftest import make_content, plan_of
from tests.store.sharing.copies import assert_equal_stores, files_below, objects_of


def names_in(store, units):
    return [store.items.names[int(item)] for unit in units for item in store.items_of(unit)[:1]]


def manifest_of(path):
    return json.loads((path / "MANIFEST.json").read_text())


def test_some_items_cost_some_bytes_and_further_pulls_add_theirs(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    first = pull(served.url, copy, items=names_in(stored, [2]))
    assert manifest_of(copy)["state"] == "partial"
    assert manifest_of(copy)["units"] == [2]
    part = served.behaviour.bytes_sent
    assert part < push_bytes(stored) * 0.7
    assert files_below(copy / "store.zarr" / "features" / "c") == {"2/0"}
    assert {f"store.zarr/{name}" for name in files_below(copy / "store.zarr")} | {"items.parquet"} == set(
        objects_of(copy)
    )
    features = served.behaviour.asked_for("store.zarr/features/c/5/0")
    second = pull(served.url, copy, items=names_in(stored, [5, 2]))
    assert manifest_of(copy)["units"] == [2, 5]
    assert features == []
    assert served.behaviour.asked_for("store.zarr/features/c/2/0") == [0]
    assert second.objects == 3  # features, token ids and roles of one unit
    assert first.objects + second.objects < pull(served.url, copy).objects + first.objects + second.objects
    assert_equal_stores(copy, stored.path)


@pytest.mark.parametrize("units", [[5], None], ids=["another unit", "the whole store"])
def test_units_that_another_pull_brings_after_the_plan_stay_listed(stored, served, tmp_path, units):
    copy = tmp_path / "copy.agiqa"
    plan = plan_pull(served.url, copy, items=names_in(stored, [2]))
    pull(served.url, copy, items=None if units is None else names_in(stored, units))
    before = (copy / "MANIFEST.json").read_text()
    with pytest.raises(BusyStore, match="brought more of the store"):
        run_pull(plan)
    assert (copy / "MANIFEST.json").read_text() == before
    pull(served.url, copy, items=names_in(stored, [2]))
    assert manifest_of(copy).get("units") == (None if units is None else [2, 5])


def test_rows_of_a_part_are_those_of_the_store(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy, items=names_in(stored, [1, 4]))
    part = open_store(copy, allow_partial=True)
    for unit in (1, 4):
        np.testing.assert_array_equal(part.read_unit(unit), stored.read_unit(unit))
        np.testing.assert_array_equal(part.read_unit(unit, "tokens/roles"), stored.read_unit(unit, "tokens/roles"))
    np.testing.assert_array_equal(part.lm_head(), stored.lm_head())
    assert part.items.same_as(stored.items)


def test_a_part_of_all_units_is_the_store(stored, served, tmp_path):
    pull(served.url, tmp_path / "copy.agiqa", items=stored.items.names)
    assert_equal_stores(tmp_path / "copy.agiqa", stored.path)


def test_unknown_items_are_named_with_the_nearest(served, tmp_path):
    with pytest.raises(DataError, match=r"'image_7\.pgn'; did you mean 'image_7\.png'"):
        pull(served.url, tmp_path / "copy.agiqa", items=["image_7.pgn", "image_0.png"])
    with pytest.raises(ConfigError, match="No items are named"):
        pull(served.url, tmp_path / "copy.agiqa", items=[])


def test_a_part_is_not_pushed(served, stored, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy, items=names_in(stored, [2]))
    with pytest.raises(IncompleteStore, match="'partial'"):
        push(open_store(copy, allow_partial=True), (tmp_path / "there").as_uri())


def test_items_asked_of_a_complete_copy_leave_it_complete(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy)
    pull(served.url, copy, items=names_in(stored, [2]))
    assert_equal_stores(copy, stored.path)


def test_the_run_that_made_a_store_does_not_call_a_part_of_it_complete(stored, served, tmp_path):
    copy = tmp_path / "copy.agiqa"
    pull(served.url, copy, items=names_in(stored, [2]))
    content = make_content(stored.n_tokens.tolist())
    with pytest.raises(IncompleteStore, match=rf"holds 1 of {stored.geometry.units} units.*agiqa store pull"):
        create_store(copy, plan_of(content))
    assert create_store(stored.path, plan_of(content)).is_sealed


def test_a_sketch_of_a_part_is_refused_before_it_is_planned(stored, served, tmp_path):
    """Its plan held zeros for the tokens that were not pulled, and outlived the refusal."""
    copy, out = tmp_path / "copy.agiqa", tmp_path / "sketch.agiqa"
    pull(served.url, copy, items=names_in(stored, [2]))
    basis = basis_from(stored, 4)
    part = open_store(copy)
    for array in ("features", "tokens/ids", "tokens/roles"):
        with pytest.raises(IncompleteStore, match="unit 3 was not pulled"):
            part.read_unit(3, array)
    with pytest.raises(IncompleteStore, match=r"was not pulled.*`agiqa store pull` it again"):
        sketch_store(part, out, basis=basis)
    assert not out.exists()
    with pytest.raises(IncompleteStore):
        convert_store(part, out, "logits")
    assert not out.exists()
    pull(served.url, copy)
    sketch = sketch_store(open_store(copy), out, basis=basis).store
    items = range(len(stored.n_tokens))
    np.testing.assert_array_equal(sketch.read(items).roles, stored.read(items).roles)
