"""An opened store keeps the listing that it was opened with: a listed object is read or causes an error, never zeros."""

import numpy as np
import pytest

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store import (
    basis_from,
    convert_store,
    create_store,
    open_store,
    seal,
    sketch_store,
)
from agiqa.store.care.repairing import repair
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.damage import harm, object_of, refill

LENGTHS = [37] * 30
RACES = 4


def test_a_store_opened_before_its_repair_gives_no_zeros_for_what_was_dropped(stored, content):
    opened = open_store(stored.path)
    right = opened.read(opened.items_of(1)).rows
    assert right.any()
    harm(stored.layout.features_object(1), "flip")
    harm(object_of(stored, "probe/logits"), "flip")
    assert repair(open_store(stored.path)).units == (1,)
    with pytest.raises(DamagedStore, match=r"unit 1 of 'features'.*it is missing"):
        opened.read(opened.items_of(1))
    with pytest.raises(DamagedStore, match=r"'probe/logits'.*it is missing"):
        opened.whole("probe/logits")
    np.testing.assert_array_equal(
        opened.read(opened.items_of(2)).rows, np.concatenate([content.hidden[item] for item in opened.items_of(2)])
    )
    unfinished = open_store(stored.path, allow_partial=True)
    with pytest.raises(IncompleteStore, match="has no features yet"):
        unfinished.read(unfinished.items_of(1))
    with pytest.raises(IncompleteStore, match="has no array 'probe/logits' yet"):
        unfinished.whole("probe/logits")
    fill(unfinished, content)
    seal(unfinished)
    np.testing.assert_array_equal(opened.read(opened.items_of(1)).rows, right)


def test_a_unit_without_a_record_is_no_unit_of_zeros(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    with pytest.raises(IncompleteStore, match=r"features/c/1/0 does not count before commits/00000001\.json"):
        store.read_unit(1)
    fill(store, content, units=[0])
    store.layout.features_object(0).unlink()
    with pytest.raises(DamagedStore, match="it is missing"):
        store.read_unit(0)
    assert store.read_unit(1, "tokens/ids").tolist() == [
        token for item in store.items_of(1) for token in content.token_ids[item]
    ]


def test_an_item_without_tokens_at_the_end_of_a_unit_is_read_while_the_next_has_no_record(tmp_path):
    content = make_content([8, 0, 8])
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0])
    assert (store.units[1], store.row_starts[1]) == (0, store.geometry.unit_rows)  # the first row of unit 1
    assert store.read([1]).rows.shape == (0, store.width)
    assert store.read_unit(0).shape == (8, store.width)


@pytest.mark.parametrize("name", ["features", "tokens/ids", "lm_head/weight"])
def test_an_object_of_another_size_is_refused_before_the_seal_too(tmp_path, content, name):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content)
    harm(object_of(store, name), "truncate")
    with pytest.raises(DamagedStore, match=rf"{name}.*bytes, its commit record lists \d"):
        store.whole(name) if name == "lm_head/weight" else store.read_unit(0, name)


@pytest.mark.parametrize(
    ("made", "name"),
    [("int8", "lm_head/weight"), ("int8", "probe/logits"), ("basis", "lm_head/weight"), ("sketch", "probe/logits")],
)
def test_a_store_is_not_made_of_one_that_lacks_an_object(stored, tmp_path, name, made):
    """Once, zeros were copied and sealed in place of the missing arrays."""
    basis = basis_from(stored, 4)
    object_of(stored, name).unlink()
    out, source = tmp_path / "out.agiqa", open_store(stored.path)
    makers = {
        "int8": lambda: convert_store(source, out, "int8"),
        "basis": lambda: basis_from(source, 4),
        "sketch": lambda: sketch_store(source, out, basis=basis),
    }
    with pytest.raises(DamagedStore, match=f"'{name}'.*it is missing"):
        makers[made]()
    assert not (out / "MANIFEST.json").exists()


@pytest.mark.parametrize("seed", range(2))
def test_a_reader_beside_repairs_gets_the_rows_or_an_error(tmp_path, workers, seed):
    """It opens the store and reads it again and again, while its last unit is dropped, filled and sealed."""
    content = make_content(LENGTHS)
    store = make_store(tmp_path / "s.agiqa", content)
    last = store.layout.features_object(store.geometry.units - 1)
    raw = last.read_bytes()
    reader = workers.start("read_until", store.path, tmp_path / "stop", LENGTHS, seed, 0.01)
    reader.wait_for("right")
    for race in range(RACES):
        harm(last, "flip")
        repair(open_store(store.path))
        if race == 0:
            reader.wait_for("refused")
        refill(store, content)
    (tmp_path / "stop").touch()
    outcome = reader.ended()
    assert (outcome.code, outcome.message) == (0, "")
    assert outcome.result["wrong"] == 0
    assert min(outcome.result["right"], outcome.result["refused"]) > 0
    assert last.read_bytes() == raw
