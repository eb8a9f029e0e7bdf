"""Stores as HDF5 files and back: every bit of every encoding, and a file that h5py alone can read."""

import hashlib
import subprocess
import sys
import textwrap
from dataclasses import replace

import h5py
import numpy as np
import pytest

from agiqa.store import Items, UnitWriter, basis_from, convert_store, create_store, seal, sketch_store, to_float32
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.files import read_attributes, write_attributes
from agiqa.store.hdf5.importing import import_hdf5
from tests.store.conftest import make_content, make_store, plan_of, unit_features, write_model
from tests.store.crash_points import REPOSITORY
from tests.store.hdf5_files import arrays_of, assert_same_store


def odd_content(logical_dtype):
    """Zero-token items, and an item table with every kind of gap and letter."""
    content = make_content([0, 0, 37, 5, 0, 60, 1, 44, 29, 0, 58, 12, 0], logical_dtype=logical_dtype)
    count = len(content.hidden)
    items = Items(
        names=[f"Bücher/{position} 本.png" for position in range(count)],
        prompts=["", "two\nlines", *[f"ein “Zitat” {position}" for position in range(count - 2)]],
        splits=[None, "", *["train"] * (count - 3), "test"],
        generators=["SDXL 🎨", *[None] * (count - 1)],
        descriptions=[None] * count,
        labels={"quality": content.items.labels["quality"], "authenticity": np.full(count, np.nan)},
    )
    return replace(content, items=items)


@pytest.mark.parametrize(
    ("logical_dtype", "compression"), [("bfloat16", "zstd"), ("float16", "gzip"), ("float32", "none")]
)
def test_a_store_comes_back_in_its_own_bits(tmp_path, logical_dtype, compression):
    store = make_store(tmp_path / "s.agiqa", odd_content(logical_dtype))
    done = []
    written = export_hdf5(store, tmp_path / "s.h5", compression=compression, advance=done.append)
    assert (written.compression, written.already_there) == (compression, False)
    assert sum(done) == store.n_tokens.sum()
    assert_same_store(import_hdf5(written.path, tmp_path / "again.agiqa"), store)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.agiqa", "s.agiqa", "s.h5"]


def with_logits(path, content):
    """A store that keeps raw logits, in its own dtype, beside the hidden states."""
    store = create_store(path, replace(plan_of(content), kept_logits=len(content.lm_head)))
    writer = UnitWriter(store)
    write_model(writer, content)
    for unit in writer.pending():
        rows = unit_features(store, content, unit)
        logits = (to_float32(rows, content.logical_dtype) @ content.lm_head.T).astype(rows.dtype)
        writer.write_unit(unit, rows, seconds=0.0, logits=lambda start, stop, logits=logits: logits[start:stop])
    return seal(store)


@pytest.mark.parametrize("kind", ["sketch", "int8", "logits", "kept logits"])
def test_every_encoding_comes_back(stored, content, tmp_path, kind):
    path = tmp_path / "other.agiqa"
    if kind == "sketch":
        store = sketch_store(stored, path, basis=basis_from(stored, 5)).store
    elif kind == "kept logits":
        store = with_logits(path, make_content([len(rows) for rows in content.hidden], logical_dtype="float32"))
    else:  # of a float32 store, whose logits are not rounded more than those of its probe
        source = make_store(tmp_path / "f.agiqa", make_content([9, 30, 22], logical_dtype="float32"))
        store = convert_store(source, path, kind)
    again = import_hdf5(export_hdf5(store, tmp_path / "s.h5").path, tmp_path / "again.agiqa")
    assert again.encoding == store.encoding
    assert_same_store(again, store)


def test_an_array_of_the_model_with_as_many_rows_as_the_features_is_exported_whole(tmp_path):
    store = make_store(tmp_path / "s.agiqa", make_content([37], vocabulary=40))
    assert store.rows_used(0) < len(store.lm_head()) == store.geometry.shape[0]
    exported = export_hdf5(store, tmp_path / "s.h5")
    assert_same_store(import_hdf5(exported.path, tmp_path / "again.agiqa"), store)


PLAIN_READER = """
    import sys, h5py, hashlib
    with h5py.File(sys.argv[1]) as file:
        item = file["items/name"].asstr()[...].tolist().index(sys.argv[2])
        first, length = file["index/row_start"][item], file["index/n_tokens"][item]
        rows = file["features"][first : first + length]
        missing = file["items/missing/generator"][item]
        print(hashlib.sha256(rows.tobytes()).hexdigest(), rows.shape, file["features"].attrs["logical_dtype"], missing)
        print(file["items/prompt"].asstr()[item], file["items/mos_quality"][item], file.attrs["id"])
        assert not [name for name in sys.modules if name.startswith(("agiqa", "hdf5plugin"))]
"""


def test_h5py_alone_reads_an_item_by_its_name(stored, tmp_path):
    path = export_hdf5(stored, tmp_path / "s.h5", compression="gzip").path
    item = 17
    command = [sys.executable, "-c", textwrap.dedent(PLAIN_READER), path, stored.items.names[item]]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.splitlines()
    rows = stored.read([item]).rows
    assert lines == [
        f"{hashlib.sha256(rows.tobytes()).hexdigest()} {rows.shape} bfloat16 1",
        f"{stored.items.prompts[item]} {stored.items.labels['quality'][item]} {stored.id}",
    ]


def test_all_chunks_are_checksummed_and_cut_as_in_the_store(stored, tmp_path):
    path = export_hdf5(stored, tmp_path / "s.h5", compression="zstd").path
    with h5py.File(path) as file:
        for name, array in arrays_of(stored).items():
            dataset = file[name]
            assert dataset.shape == array.shape
            assert dataset.fletcher32
            assert dataset.shuffle
            assert dataset.chunks == tuple(map(min, array.chunks, array.shape))
        chunks = -(-stored.n_tokens.sum() // stored.geometry.chunk_rows) + stored.geometry.units
        assert file["features"].id.get_num_chunks() <= chunks  # the unused rows of a unit take no bytes


def test_attributes_of_every_kind_come_back(tmp_path):
    attributes = {
        "text": "naïve 本",
        "empty": "",
        "number": -3,
        "huge": 1 << 70,
        "share": 0.1,
        "yes": True,
        "nothing": None,
        "nested": {"list": [1, 2.5, None, "x"], "long": "x" * 100_000},
    }
    with h5py.File(tmp_path / "a.h5", "w", libver="v110") as file:
        write_attributes(file, attributes)
    with h5py.File(tmp_path / "a.h5") as file:
        found = read_attributes(file)
    assert found == attributes
    assert {name: type(value) for name, value in found.items()} == {name: type(v) for name, v in attributes.items()}


WITHOUT_PLUGIN = """
    import sys
    sys.modules["hdf5plugin"] = None  # as if it were not installed
    from pathlib import Path
    from agiqa.errors import AgiqaError
    from agiqa.store import open_store
    from agiqa.store.hdf5.export import export_hdf5
    from agiqa.store.hdf5.importing import import_hdf5
    store, zstd, folder = open_store(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
    for attempt in (
        lambda: import_hdf5(zstd, folder / "i.agiqa"),
        lambda: export_hdf5(store, folder / "z.h5", compression="zstd"),
        lambda: export_hdf5(store, folder / "a.h5", compression="auto"),
    ):
        try:
            print(attempt().compression)
        except AgiqaError as error:
            print(type(error).__name__, error)
"""


def test_without_the_plugin_gzip_is_taken_and_zstd_says_what_to_install(stored, tmp_path):
    zstd = export_hdf5(stored, tmp_path / "s.h5", compression="auto")
    assert zstd.compression == "zstd"
    arguments = [sys.executable, "-c", textwrap.dedent(WITHOUT_PLUGIN), stored.path, zstd.path, tmp_path]
    outcome = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    imported, exported, chosen = outcome.stdout.splitlines()
    for line, error in ((imported, "SchemaError"), (exported, "ConfigError")):
        assert line.startswith(error)
        assert "pip install 'agiqa[hdf5]'" in line
    assert chosen == "gzip"
    assert not (tmp_path / "i.agiqa").exists()
