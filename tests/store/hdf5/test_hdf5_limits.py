"""HDF5 files of a few bytes that state gigabytes: refused before memory is taken; files that repeat themselves are read."""

import tracemalloc
from dataclasses import replace

import h5py
import pytest

from agiqa.errors import DamagedStore
from agiqa.store import UnitWriter, create_store, seal
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.files import METADATA_SHA256, metadata_sha256
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.conftest import make_content, plan_of, write_model
from tests.store.hdf5_files import assert_same_store

ITEMS, HUGE = 3, 50_000_000
INDEX = ("row_start", "n_tokens", "unit", "item_key", "status")


def again(file, name, shape, *, chunks=None, **settings):
    """Make the dataset `name` anew, in another shape and without values."""
    dtype, attributes = settings.pop("dtype", file[name].dtype), dict(file[name].attrs)
    del file[name]
    file.create_dataset(name, shape=shape, dtype=dtype, chunks=chunks, **settings)
    for key, value in attributes.items():
        file[name].attrs[key] = value


def huge_index(file):
    for name in INDEX:
        tail = (32,) if name == "item_key" else ()
        again(file, f"index/{name}", (HUGE, *tail), chunks=(1 << 16, *tail))


def huge_probe(file):
    again(file, "probe/rows", (HUGE,), chunks=(1 << 16,))
    again(file, "probe/logits", (HUGE, 40), chunks=(1 << 14, 40))


def huge_chunk(file):
    values = file["index/status"][...]
    again(file, "index/status", (ITEMS,), chunks=(HUGE,), maxshape=(None,), compression="gzip")
    file["index/status"][...] = values


def contiguous(file):
    again(file, "lm_head/weight", (HUGE, 16))


LIES = {
    "index": (huge_index, "/index/item_key takes 1600000000 bytes, and the file holds 0 of it"),
    "contiguous W_lm": (contiguous, "/lm_head/weight takes 3200000000 bytes"),
    "W_lm": (lambda file: again(file, "lm_head/weight", (HUGE, 16), chunks=(1 << 14, 16)), "/lm_head/weight takes"),
    "probe": (huge_probe, "/probe/logits takes"),
    "one chunk": (huge_chunk, r"/index/status has the shape \(3,\), in chunks of \(50000000,\)"),
    "texts": (
        lambda file: again(file, "items/prompt", (ITEMS,), chunks=(1,), dtype="S400000000"),
        "/items/prompt takes 400000000 bytes",
    ),
    "more texts": (lambda file: again(file, "items/prompt", (HUGE,), chunks=(1,), dtype="S9"), "its index has 3 items"),
    "numbers as texts": (lambda file: again(file, "items/prompt", (ITEMS,), dtype="i8"), "/items/prompt of its item"),
    "texts as MOS": (lambda file: again(file, "items/mos_quality", (ITEMS,), dtype="S4"), "/items/mos_quality of its"),
    "texts elsewhere in the file": (
        lambda file: again(file, "items/prompt", (ITEMS,), dtype=h5py.string_dtype()),
        "/items/prompt of its item table is object",
    ),
    "references": (
        lambda file: again(file, "items/prompt", (ITEMS,), dtype=h5py.ref_dtype),
        "/items/prompt of its item table is object",
    ),
    "a table of texts": (lambda file: again(file, "items/split", (ITEMS, 2)), "/items/split of its item table"),
    "marks": (lambda file: again(file, "items/missing/generator", (HUGE,), chunks=(9,)), "/items/missing/generator of"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_small_file_takes_no_large_memory(copy, tmp_path, lie):
    tell, pattern = LIES[lie]
    with h5py.File(copy, "r+") as file:
        tell(file)
        file.attrs[METADATA_SHA256] = metadata_sha256(file)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedStore, match=pattern):
            import_hdf5(copy, tmp_path / "again.agiqa")
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]


def test_texts_that_are_short_but_for_one_are_read(tmp_path):
    """HDF5 pads them all to the longest: 3,000 items and one text of 40,000 characters are 120 MB, nearly all zeros."""
    pytest.importorskip("hdf5plugin")
    count = 3_000
    content = make_content([0] * (count - 1) + [3], width=2, vocabulary=3)
    descriptions = [None] * (count - 1) + ["x" * 40_000]
    content = replace(content, items=replace(content.items, descriptions=descriptions))
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    writer = UnitWriter(store)
    write_model(writer, content)
    writer.write_unit(0, content.hidden[-1], seconds=0.0)
    file = export_hdf5(seal(store), tmp_path / "s.h5", compression="zstd").path
    assert_same_store(import_hdf5(file, tmp_path / "again.agiqa"), seal(store))
