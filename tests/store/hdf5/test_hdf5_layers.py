"""HDF5 files of stores with layers, pooled rows, or without W_lm: the store comes back, and lies are refused."""

import json

import h5py
import numpy as np
import pytest

from agiqa.errors import DamagedStore, SchemaError
from agiqa.store import open_store, verify
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.files import METADATA_SHA256, metadata_sha256
from agiqa.store.hdf5.importing import import_hdf5
from tests.store import golden_layers as golden
from tests.store.damage import contents


@pytest.mark.parametrize("kind", [kind for kind in golden.KINDS if kind not in golden.READABLE])
def test_a_store_comes_back_with_all_its_layers(tmp_path, kind):
    store = golden.write(kind, tmp_path / f"{kind}.agiqa")
    exported = export_hdf5(store, tmp_path / "s.h5", compression="gzip").path
    again = import_hdf5(exported, tmp_path / "again.agiqa")
    assert again.id == store.id
    others = ["README.md", "MANIFEST.json", "zarr.json"]  # the name of the store, and another order of attributes
    assert contents(again, but=others) == contents(store, but=others)
    for path in store.layout.zarr.rglob("zarr.json"):
        found = json.loads((again.path / path.relative_to(store.path)).read_text())
        assert found == json.loads(path.read_text())
    assert verify(open_store(again.path), "numeric").sound
    with h5py.File(exported) as file:
        for layer in store.layers[:-1]:
            first, last = int(store.row_starts[1]), int(store.row_ends[1])
            np.testing.assert_array_equal(
                file[f"layers/{layer}"][first:last], store.stored_rows(f"layers/{layer}", first, last)
            )


def remove(name):
    def lie(file):
        del file[name]

    return lie


def add(name):
    def lie(file):
        file.create_dataset(name, data=file["features"][...])

    return lie


def attribute(where, name, value):
    def lie(file):
        (file[where] if where else file).attrs[name] = value

    return lie


def three_rows(file):
    counts = file["index/n_tokens"]
    counts[2] = 1


@pytest.mark.parametrize(
    ("kind", "lie", "error", "says"),
    [
        ("layers", remove("layers/10"), SchemaError, "has no array layers/10"),
        ("layers", add("layers/11"), SchemaError, "unknown arrays: layers/11"),
        ("layers", attribute("", "layers", '["10","last"]'), DamagedStore, "layers is not that of its provenance"),
        ("layers", attribute("", "version", 1), DamagedStore, "its version is 1, and what it holds is version 2"),
        ("layers", attribute("probe/layers/10", "logical_dtype", "float16"), DamagedStore, "says to hold 'float16'"),
        ("layers-int8", remove("tokens/layers_scale/0"), SchemaError, "has no array tokens/layers_scale/0"),
        ("layers-int8", remove("layers_scale/0/rms"), SchemaError, "has no array layers_scale/0/rms"),
        ("layers-sketch", remove("layers_basis/0/map"), SchemaError, "has no array layers_basis/0/map"),
        ("middle", remove("probe/rows"), DamagedStore, "has probe/layers/10 and no probe/rows"),
        ("pooled", three_rows, DamagedStore, "does not have one row for each of 3 poolings"),
    ],
)
def test_lies_about_layers_are_refused_before_anything_is_written(tmp_path, kind, lie, error, says):
    store = golden.write(kind, tmp_path / f"{kind}.agiqa")
    exported = export_hdf5(store, tmp_path / "s.h5", compression="none").path
    with h5py.File(exported, "r+") as file:
        lie(file)
        file.attrs[METADATA_SHA256] = metadata_sha256(file)
    with pytest.raises(error, match=says):
        import_hdf5(exported, tmp_path / "again.agiqa")
    assert not (tmp_path / "again.agiqa").exists()


def test_a_flipped_bit_in_a_layer_is_found(tmp_path):
    store = golden.write("layers", tmp_path / "layers.agiqa")
    exported = export_hdf5(store, tmp_path / "s.h5", compression="none").path
    with h5py.File(exported) as file:
        where = file["layers/10"].id.get_chunk_info(0).byte_offset
    raw = bytearray(exported.read_bytes())
    raw[where] ^= 4
    exported.write_bytes(raw)
    with pytest.raises(DamagedStore, match="'layers/10' rows"):
        import_hdf5(exported, tmp_path / "again.agiqa")
