"""HDF5 files from elsewhere: other cuts give the same store, and no lie, flipped bit or missing end goes unnoticed."""

import random

import h5py
import numpy as np
import pytest

from agiqa.errors import AgiqaError, DamagedStore, SchemaError
from agiqa.store.format.arrays import Geometry
from agiqa.store.hdf5.export import export_hdf5
from agiqa.store.hdf5.files import METADATA_SHA256, metadata_sha256
from agiqa.store.hdf5.importing import import_hdf5
from agiqa.store.writing.planning import place_items
from tests.store.conftest import make_content, make_store
from tests.store.hdf5_files import assert_same_store


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store that no test changes."""
    lengths = np.random.default_rng(7).integers(1, 60, 40).tolist()
    return make_store(tmp_path_factory.mktemp("original") / "small.agiqa", make_content(lengths))


def test_a_file_whose_units_are_cut_otherwise_gives_the_same_store(original, copy, tmp_path):
    """As by an agiqa that chooses other unit sizes: rows move, and the probe rows with them."""
    shape = Geometry(units=1, unit_rows=330, chunk_rows=30, width=original.width)
    placed = place_items(original.n_tokens, shape)
    everything = original.read(np.arange(40))
    with h5py.File(copy, "r+") as file:
        old = {name: file[f"tokens/{name}"][...] for name in ("ids", "roles")}
        probe, item = file["probe/rows"][...], 0
        assert probe.tolist() == [original.row_starts[item]]
        new = {
            "features": np.zeros(placed.geometry.shape, np.uint16),
            "tokens/ids": np.zeros(placed.geometry.shape[0], np.int32),
            "tokens/roles": np.zeros(placed.geometry.shape[0], np.uint8),
        }
        for position in range(40):
            there = slice(original.row_starts[position], original.row_ends[position])
            here = slice(placed.row_starts[position], placed.row_starts[position] + original.n_tokens[position])
            new["features"][here] = everything.rows[everything.offsets[position] : everything.offsets[position + 1]]
            new["tokens/ids"][here], new["tokens/roles"][here] = old["ids"][there], old["roles"][there]
        for name, values in new.items():
            attributes = dict(file[name].attrs)
            del file[name]
            file[name] = values
            file[name].attrs.update(attributes)
        file["index/row_start"][...], file["index/unit"][...] = placed.row_starts, placed.units
        file["probe/rows"][...] = placed.row_starts[[item]]
        file.attrs["units"], file.attrs["unit_rows"] = placed.geometry.units, 330
        file.attrs["chunk_rows"] = 30
        file.attrs[METADATA_SHA256] = metadata_sha256(file)
    assert placed.geometry.units != original.geometry.units
    assert_same_store(import_hdf5(copy, tmp_path / "again.agiqa"), original)


def set_attribute(name, value):
    def lie(file):
        file.attrs[name] = value

    return lie


def change(name, position, value):
    def lie(file):
        file[name][position] = value

    return lie


def replace_array(name, make):
    def lie(file):
        values, attributes = make(file[name][...]), dict(file[name].attrs)
        del file[name]
        file[name] = values
        file[name].attrs.update(attributes)

    return lie


def without(name):
    def lie(file):
        del file[name]

    return lie


def add_array(file):
    file["attention/weights"] = np.zeros(3)


LIES = {
    "foreign format": (set_attribute("format", "other"), SchemaError, "is no feature store: its format is 'other'"),
    "foreign version": (set_attribute("version", 7), SchemaError, r"agiqa\.features v7; this agiqa reads .* v1"),
    "unknown encoding": (set_attribute("encoding", "wavelet"), SchemaError, "wavelet"),
    "other dtype": (set_attribute("logical_dtype", "float16"), DamagedStore, "logical_dtype"),
    "other width": (set_attribute("width", 17), DamagedStore, "width"),
    "no units": (set_attribute("units", 0), DamagedStore, "units"),
    "other provenance": (set_attribute("provenance", '{"width":16}'), DamagedStore, "id is not the hash"),
    "missing features": (without("features"), SchemaError, "no array features"),
    "missing probe": (without("probe"), SchemaError, "no array probe/logits, probe/rows"),
    "missing items": (without("items/prompt"), DamagedStore, "item table"),
    "unknown array": (add_array, SchemaError, "attention/weights"),
    "short features": (replace_array("features", lambda rows: rows[:-1]), SchemaError, "features is uint16.*say"),
    "narrow features": (replace_array("features", lambda rows: rows[:, 1:]), SchemaError, "features is uint16.*say"),
    "wide index": (replace_array("index/unit", lambda units: units.astype("i8")), SchemaError, "index/unit is int64"),
    "an index of nothing": (
        replace_array("index/unit", lambda _units: h5py.Empty("i4")),
        SchemaError,
        r"is int32 \(\)",
    ),
    "a count of nothing": (replace_array("index/n_tokens", lambda _n: h5py.Empty("i4")), SchemaError, "index/"),
    "short item table": (replace_array("items/name", lambda names: names[:-1]), DamagedStore, "item table"),
    "a name twice": (change("items/name", 3, b"image_4.png"), DamagedStore, "twice"),
    "rows out of range": (change("index/row_start", 39, 1 << 40), DamagedStore, "image_39.png"),
    "negative rows": (change("index/row_start", 0, -5), DamagedStore, "image_0.png"),
    "negative length": (change("index/n_tokens", 5, -1), DamagedStore, "image_5.png"),
    "too long an item": (change("index/n_tokens", 39, 1 << 30), DamagedStore, "image_39.png"),
    "items that overlap": (change("index/n_tokens", 0, 60), DamagedStore, "image_1.png"),
    "a unit that does not match": (change("index/unit", 20, 0), DamagedStore, "image_20.png"),
    "a unit out of range": (change("index/unit", 39, 99), DamagedStore, "image_39.png"),
    "unknown status": (change("index/status", 2, 9), DamagedStore, "status"),
    "unknown role": (change("tokens/roles", 1, 9), DamagedStore, "unit 0 has an unknown role"),
    "probe out of range": (change("probe/rows", 0, 1 << 40), DamagedStore, "probe rows"),
    "more probes": (replace_array("probe/rows", lambda rows: np.repeat(rows, 2)), DamagedStore, "probe rows"),
    "another W_lm": (change("lm_head/weight", (0, 0), 1.0), DamagedStore, "lm_head/weight"),
    "another dtype of W_lm": (replace_array("lm_head/weight", lambda w: w.view("u4")), DamagedStore, "uint32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies_are_refused_before_anything_is_written(copy, tmp_path, lie):
    tell, error, pattern = LIES[lie]
    with h5py.File(copy, "r+") as file:
        tell(file)
        file.attrs[METADATA_SHA256] = metadata_sha256(file)
    with pytest.raises(error, match=pattern):
        import_hdf5(copy, tmp_path / "again.agiqa")
    assert [path.name for path in tmp_path.iterdir()] == ["s.h5"]


def test_a_changed_attribute_is_noticed(copy, tmp_path):
    with h5py.File(copy, "r+") as file:
        file["features"].attrs["logical_dtype"] = "float16"
    with pytest.raises(DamagedStore, match="metadata_sha256"):
        import_hdf5(copy, tmp_path / "again.agiqa")


def test_what_is_no_hdf5_file_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SchemaError, match="no HDF5 file"):
        import_hdf5(tmp_path / "notes.txt", tmp_path / "s.agiqa")
    with pytest.raises(SchemaError, match="not there"):
        import_hdf5(tmp_path, tmp_path / "s.agiqa")


@pytest.mark.parametrize("share", [0.2, 0.6, 0.999])
def test_a_file_that_is_cut_off_is_named(copy, tmp_path, share):
    raw = copy.read_bytes()
    copy.write_bytes(raw[: int(share * len(raw))])
    with pytest.raises(DamagedStore, match=r"s\.h5.*damaged or cut off"):
        import_hdf5(copy, tmp_path / "again.agiqa")


@pytest.mark.parametrize("compression", ["gzip", "none"])
def test_a_flipped_bit_is_an_error_or_harmless(original, tmp_path, compression):
    path = export_hdf5(original, tmp_path / "s.h5", compression=compression).path
    raw, moments = path.read_bytes(), random.Random(4)
    refusals, harmless = [], 0
    for trial in range(10):
        damaged = bytearray(raw)
        damaged[moments.randrange(len(raw))] ^= 1 << moments.randrange(8)
        path.write_bytes(damaged)
        try:
            again = import_hdf5(path, tmp_path / f"{trial}.agiqa")
        except AgiqaError as error:
            refusals.append(str(error))
        else:  # the bit was in space that holds nothing
            assert_same_store(again, original)
            harmless += 1
    assert len(refusals) > harmless
    assert all(str(path) in message for message in refusals)


def test_a_flipped_bit_in_a_row_names_array_and_rows(stored, tmp_path):
    path = export_hdf5(stored, tmp_path / "s.h5", compression="gzip").path
    with h5py.File(path) as file:
        where = file["features"].id.get_chunk_info(2).byte_offset
    raw = bytearray(path.read_bytes())
    raw[where + 20] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DamagedStore, match=r"'features' rows \d+ to \d+"):
        import_hdf5(path, tmp_path / "again.agiqa")
