"""False indices, item tables, manifests and records: an error names each, and no file outside the store is lost."""

import json
from contextlib import nullcontext, suppress

import numpy as np
import pyarrow as pa
import pytest

from agiqa.errors import DamagedStore, StoreError
from agiqa.store import collect_garbage, create_store, open_store, repair, seal, verify
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.format.liar import Liar, judged, refused

INDEX = {
    "a negative row": ({"row_start": -1}, "item 1 has 9 rows from -1 in unit"),
    "the last row there is": ({"row_start": 2**63 - 1}, "item 1 has 9 rows from 9223372036854775807"),
    "a negative length": ({"n_tokens": -1}, "item 1 has -1 rows"),
    "a huge length": ({"n_tokens": 2**31 - 1}, "item 1 has 2147483647 rows"),
    "a length into the next unit": ({"n_tokens": 40}, "outside of that unit"),
    "a unit that is not there": ({"unit": 2**31 - 1}, "in unit 2147483647"),
    "a negative unit": ({"unit": -1}, "in unit -1"),
    "another unit": ({"unit": 0}, "outside of that unit"),
    "a row less": ({"n_tokens": 8}, "where"),
}


@pytest.mark.parametrize(("changed", "says"), INDEX.values(), ids=INDEX)
def test_an_index_that_lies(liar, workers, changed, says):
    for name, value in changed.items():
        liar.some(f"index/{name}", at1=value)
    refused(workers, liar, "DamagedStore", says)


@pytest.mark.parametrize(
    ("change", "says"), [(1, "where 37 was next"), (-1, "where 37 was next")], ids=["gap", "overlap"]
)
def test_items_that_overlap_or_leave_a_gap(tmp_path, workers, change, says):
    store = make_store(tmp_path / "s.agiqa", make_content([37] * 60))
    assert store.units[1] == 0
    liar = Liar(store.path)
    starts = store.row_starts
    starts[1] += change
    lengths = store.n_tokens
    lengths[1] = 1
    liar.values("index/row_start", starts)
    liar.values("index/n_tokens", lengths)
    refused(workers, liar, "DamagedStore", f"item 1 begins at row {37 + change} of unit 0, {says}")


ITEMS = {
    "a row less": (lambda table: table.slice(0, 4), "does not have one entry for each of 4 items"),
    "a row more": (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "each of 6 items"),
    "two of one name": (
        lambda table: table.set_column(0, "name", pa.array(["a"] * 5)),
        "items.parquet has two rows of one name",
    ),
    "no name": (lambda table: table.set_column(0, "name", pa.array(["a", None, "b", "c", "d"])), "without a name"),
    "numbers for prompts": (lambda table: table.set_column(1, "prompt", pa.array(range(5))), "without a prompt"),
    "no column": (lambda table: table.drop_columns(["split"]), "items.parquet: the item table cannot be read"),
    "texts for MOS": (
        lambda table: table.set_column(table.column_names.index("mos_quality"), "mos_quality", pa.array(["good"] * 5)),
        "items.parquet has values of another kind",
    ),
    "a billion rows": (
        lambda _table: pa.table(
            {"name": pa.DictionaryArray.from_arrays(pa.array(np.zeros(2_000_000, np.int8)), ["a"])}
        ),
        "items.parquet says that it has 2000000 rows",
    ),
    "a long text for all": (
        lambda _table: pa.table(
            {
                "name": [str(row) for row in range(20_000)],
                "prompt": pa.DictionaryArray.from_arrays(pa.array(np.zeros(20_000, np.int8)), ["x" * 40_000]),
            }
        ),
        "items.parquet holds texts of 800088890 bytes",
    ),
}


@pytest.mark.parametrize(("change", "says"), ITEMS.values(), ids=ITEMS)
def test_an_item_table_that_lies(liar, workers, change, says):
    liar.items(change)
    refused(workers, liar, "DamagedStore", says)


def object_entry(path):
    return {"path": path, "bytes": 1, "sha256": "0" * 64}


MANIFESTS = {
    "a path out of it": (lambda found: found["objects"].append(object_entry("../mine.txt")), "lists '../mine.txt'"),
    "a detour": (
        lambda found: found["objects"].append(object_entry("store.zarr/../../mine.txt")),
        "lists 'store.zarr/../../mine.txt'",
    ),
    "an absolute path": (lambda found: found["objects"].append(object_entry("/etc/passwd")), "lists '/etc/passwd'"),
    "no path": (lambda found: found["objects"].append({"bytes": 1}), "MANIFEST.json is damaged"),
    "a path of another kind": (lambda found: found["objects"].append(object_entry(7)), "MANIFEST.json is damaged"),
    "an endless number": (
        lambda found: found["objects"].append(object_entry(f"store.zarr/features/c/{'9' * 5000}/0")),
        "which is no object of a store",
    ),
    "another table": (lambda found: found["labels"].update(path="README.md"), "does not list items.parquet"),
    "no table": (lambda found: found.pop("labels"), "does not list items.parquet"),
    "another store": (lambda found: found.update(id="0" * 64), "MANIFEST.json is damaged: it is that of the store"),
    "another state": (lambda found: found.update(state="fine"), "its state is 'fine'"),
    "a part of nothing": (lambda found: found.update(state="partial"), "its state is 'partial'"),
    "units of another kind": (lambda found: found.update(state="partial", units=["a"]), "its units are no numbers"),
    "no objects": (lambda found: found.update(objects=None), "it does not list objects"),
    "no root": (
        lambda found: found.update(objects=[e for e in found["objects"] if e["path"] != "store.zarr/zarr.json"]),
        "zarr.json is damaged: it is not what MANIFEST.json lists",
    ),
    "another version": (lambda found: found.update(version=3), "MANIFEST.json is agiqa.features v3"),
}


@pytest.mark.parametrize(("change", "says"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_lies(liar, workers, tmp_path, change, says):
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    liar.listed(change)
    found = judged(workers, liar, agree=False)
    told = [text for name, text in found.values() if name in ("SchemaError", "DamagedStore")]
    assert any(says in text for text in (*told, found["verify"][1])), found
    for work in (repair, collect_garbage, seal):
        with suppress(StoreError):
            work(open_store(liar.path))
    assert mine.read_text() == "mine"


RECORDS = ("../../mine.txt", "store.zarr/../../mine.txt", "/etc/hostname", "", "store.zarr", "a\0b", "store.zarr\\x")


@pytest.mark.parametrize("record", ["00000001.json", "model.json", "plan.json"])
@pytest.mark.parametrize("path", RECORDS)
def test_a_record_that_lists_what_is_not_the_stores(tmp_path, record, path):
    mine, content = tmp_path / "mine.txt", make_content([5] * 4)
    mine.write_text("mine")
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content)
    entry = {**object_entry(path), "bytes": 4}
    (store.layout.commits / record).write_text(json.dumps({"objects": [entry]}))
    assert any("no object of a store" in damage.problem for damage in verify(store, "full").damage)
    with pytest.raises(DamagedStore):
        seal(store)
    with pytest.raises(DamagedStore) if record == "plan.json" else nullcontext():
        assert repair(store).changed
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("text", ["[]", "{}", '{"objects": 3}', '{"objects": [{}]}', "1", "", "[" * 100_000])
def test_a_record_that_is_none_is_named_and_repaired(tmp_path, text):
    content = make_content([5] * 4)
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content)
    store.layout.commit(1).write_text(text)
    assert [damage.where for damage in verify(store, "full").damage] == ["commits/00000001.json"]
    with pytest.raises(DamagedStore, match=r"00000001\.json is damaged.*agiqa store repair"):
        seal(store)
    assert repair(store).units == (1,)
