"""Sketches, conversions, unions, labels, HDF5 files and copies keep the authors of texts."""

from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from agiqa.store import basis_from, convert_store, join_labels, open_store, sketch_store, store_summary, union, verify
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.importing import import_hdf5
from agiqa.store.reading.summary import data_card
from agiqa.store.sharing.pulling import pull
from agiqa.store.sharing.pushing import push
from agiqa.store.writing.creating import create_store
from tests.store.conftest import Content, make_content, make_store, plan_of

AUTHORS = ["teacher", None, "model", "teacher-blind", "model", "teacher"]


def authored(authors=AUTHORS, *, seed=1, prefix="") -> Content:
    content = make_content([3, 5, 20, 2, 11, 7], seed=seed)
    items = replace(content.items, text_authors=authors, names=[prefix + name for name in content.items.names])
    return replace(content, items=items, lm_head=make_content([1], seed=1).lm_head)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("authored") / "s.agiqa", authored())


def test_they_are_a_column_and_counted_by_split(store):
    assert pq.read_table(store.layout.items).column("text_author").to_pylist() == AUTHORS
    assert open_store(store.path).items.text_authors == AUTHORS
    counted = store_summary(store)["text_authors"]
    assert sum(counts.get("teacher", 0) for counts in counted.values()) == 2
    for split, counts in counted.items():
        of = [author or "unknown" for author, own in zip(AUTHORS, store.items.splits, strict=True) if own == split]
        assert counts == {author: of.count(author) for author in of}
    assert "| authors of the texts | model (2), teacher (2), teacher-blind (1), unknown (1) |" in data_card(store)


def test_a_store_without_them_has_no_column_and_says_nothing(tmp_path):
    bare = make_store(tmp_path / "bare.agiqa", authored([]))
    assert "text_author" not in pq.read_schema(bare.layout.items).names
    assert open_store(bare.path).items.text_authors == []
    assert store_summary(bare)["text_authors"] is None
    assert create_store(bare.path, plan_of(authored())).items.text_authors == []  # asked again by an agiqa that knows
    mixed = union([bare, make_store(tmp_path / "told.agiqa", authored(seed=2, prefix="b/"))])
    assert mixed.items.text_authors == [*[None] * 6, *AUTHORS]


def test_they_go_into_stores_that_are_made_of_it(store, tmp_path):
    assert sketch_store(store, tmp_path / "k.agiqa", basis=basis_from(store, 2)).store.items.text_authors == AUTHORS
    assert convert_store(store, tmp_path / "i.agiqa", "int8").items.text_authors == AUTHORS


def test_they_go_through_hdf5(store, tmp_path):
    export_hdf5(store, tmp_path / "s.h5", compression="gzip")
    back = import_hdf5(tmp_path / "s.h5", tmp_path / "back.agiqa")
    assert back.items.text_authors == AUTHORS


def test_labels_leave_them_alone_and_copies_have_them(store, tmp_path):
    push(store, f"file://{tmp_path}/pushed.agiqa")
    pull(f"file://{tmp_path}/pushed.agiqa", tmp_path / "pulled.agiqa")
    pull(f"file://{tmp_path}/pushed.agiqa", tmp_path / "part.agiqa", items=store.items.names[:1])
    assert open_store(tmp_path / "part.agiqa").items.text_authors == AUTHORS
    pulled = open_store(tmp_path / "pulled.agiqa")
    table = tmp_path / "t.csv"
    table.write_text(f"name,mos_quality,split\n{pulled.items.names[0]},1.5,test\n")
    assert join_labels(pulled, table).changed
    assert open_store(pulled.path).items.text_authors == AUTHORS
    assert verify(open_store(pulled.path), "full").sound
