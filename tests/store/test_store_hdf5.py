"""Stores as HDF5 files and back: every bit, any kill, and no lie goes unnoticed."""

import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from agiqa.errors import (
    AgiqaError,
    BusyStore,
    DamagedStore,
    IncompleteStore,
    SchemaError,
    SettingsConflict,
    UnknownName,
)
from agiqa.store import (
    Items,
    UnitWriter,
    basis_from,
    convert_store,
    create_store,
    open_store,
    seal,
    sketch_store,
    to_float32,
    verify,
)
from agiqa.store.arrays import Geometry
from agiqa.store.files import exclusive_lock
from agiqa.store.hdf5 import METADATA_SHA256, metadata_sha256, read_attributes, write_attributes
from agiqa.store.hdf5_export import export_hdf5
from agiqa.store.hdf5_import import import_hdf5
from agiqa.store.planning import place_items
from tests.store.conftest import fill, make_content, make_store, plan_of, unit_features, write_model

REPOSITORY = Path(__file__).resolve().parents[2]


def arrays_of(store):
    return {name: node for name, node in store.group.members(max_depth=None) if isinstance(node, zarr.Array)}


def assert_same_store(found, expected):
    assert found.id == expected.id
    assert found.provenance == expected.provenance
    assert found.items.same_as(expected.items)
    here, there = arrays_of(found), arrays_of(expected)
    assert sorted(here) == sorted(there)
    for name, array in there.items():
        assert here[name].dtype == array.dtype
        np.testing.assert_array_equal(here[name][...], array[...], err_msg=name)
        assert dict(here[name].attrs) == dict(array.attrs)
    assert verify(found, "numeric").sound


def content_of(path):
    """All that an HDF5 file says: values by name, and attributes by name."""
    with h5py.File(path) as file:
        values, attributes = {}, {"": dict(file.attrs)}

        def visit(name, node):
            attributes[name] = dict(node.attrs)
            if isinstance(node, h5py.Dataset):
                values[name] = node[...].tobytes(), node.shape, node.dtype.str, node.chunks

        file.visititems(visit)
    return values, attributes


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A store that no test changes."""
    lengths = np.random.default_rng(7).integers(1, 60, 40).tolist()
    return make_store(tmp_path_factory.mktemp("original") / "small.agiqa", make_content(lengths))


@pytest.fixture(scope="module")
def exported(original):
    """Its export with bare chunks, from which tests take copies to harm."""
    return export_hdf5(original, original.path.with_name("original.h5"), compression="none").path


@pytest.fixture
def copy(exported, tmp_path):
    return Path(shutil.copy(exported, tmp_path / "s.h5"))


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


def test_a_text_that_hdf5_would_shorten_is_refused(tmp_path):
    content = make_content([3, 4])
    content.items.prompts[1] = "ends in NUL\0"
    with pytest.raises(SchemaError, match="'prompt'"):
        export_hdf5(make_store(tmp_path / "s.agiqa", content), tmp_path / "s.h5")


class Stop(Exception):
    """Ends a run from inside, at a place that the test chooses."""


def stop_after(units):
    counts = []

    def advance(tokens):
        counts.append(tokens)
        if len(counts) == units:
            raise Stop

    return advance


def test_finished_units_of_a_stopped_export_are_kept(stored, tmp_path):
    expected = export_hdf5(stored, tmp_path / "whole.h5", compression="gzip").path
    with pytest.raises(Stop):
        export_hdf5(stored, tmp_path / "s.h5", compression="gzip", advance=stop_after(3))
    parts = sorted((tmp_path / ".s.h5.parts").glob("*.h5"))
    assert len(parts) == 4  # three units and what belongs to none
    for part in parts[:3]:
        part.chmod(0o400)  # the mark by which they are known again
    kept = []

    def advance(_tokens):
        kept.append(sum(part.stat().st_mode & 0o777 == 0o400 for part in parts[:3]))

    export_hdf5(stored, tmp_path / "s.h5", compression="gzip", advance=advance)
    assert set(kept) == {3}
    assert content_of(tmp_path / "s.h5") == content_of(expected)


@pytest.mark.parametrize("other", ["compression", "store"])
def test_parts_of_another_export_are_not_used(stored, tmp_path, other):
    with pytest.raises(Stop):
        export_hdf5(stored, tmp_path / "s.h5", compression="gzip", advance=stop_after(3))
    lengths = stored.n_tokens.tolist()
    changed = stored if other == "compression" else make_store(tmp_path / "o.agiqa", make_content(lengths, seed=5))
    compression = "none" if other == "compression" else "gzip"
    export_hdf5(changed, tmp_path / "s.h5", compression=compression)
    export_hdf5(changed, tmp_path / "fresh.h5", compression=compression)
    assert content_of(tmp_path / "s.h5") == content_of(tmp_path / "fresh.h5")


def test_an_export_that_is_there_is_left_as_it_is(stored, tmp_path):
    first = export_hdf5(stored, tmp_path / "s.h5", compression="gzip")
    before = first.path.stat().st_mtime_ns
    assert export_hdf5(stored, tmp_path / "s.h5") == replace(first, already_there=True)
    with pytest.raises(SettingsConflict, match="already, compressed with gzip"):
        export_hdf5(stored, tmp_path / "s.h5", compression="zstd")
    assert first.path.stat().st_mtime_ns == before


@pytest.mark.parametrize("there", ["text", "hdf5", "relabelled", "folder"])
def test_anything_else_at_the_path_is_not_touched(stored, content, tmp_path, there):
    out = tmp_path / "s.h5"
    if there == "text":
        out.write_text("mine")
    elif there == "folder":
        out.mkdir()
    elif there == "hdf5":
        with h5py.File(out, "w") as file:
            file["mine"] = 1
    else:
        relabelled = make_content([len(rows) for rows in content.hidden])
        relabelled.items.labels["quality"][0] = 1.25
        export_hdf5(make_store(tmp_path / "o.agiqa", relabelled), out)
    before = None if there == "folder" else out.read_bytes()
    with pytest.raises(SettingsConflict, match="other labels" if there == "relabelled" else "not an export"):
        export_hdf5(stored, out)
    assert before is None or out.read_bytes() == before
    assert not (tmp_path / ".s.h5.parts").exists()


def test_an_unfinished_store_a_busy_path_and_an_unknown_compression_are_refused(stored, content, tmp_path):
    unfinished = create_store(tmp_path / "u.agiqa", plan_of(content))
    fill(unfinished, content, units=[0])
    with pytest.raises(IncompleteStore, match="only finished stores"):
        export_hdf5(unfinished, tmp_path / "s.h5")
    with pytest.raises(UnknownName, match="'zstd'"):
        export_hdf5(stored, tmp_path / "s.h5", compression="zst")
    with pytest.raises(SettingsConflict, match="inside the store"):
        export_hdf5(stored, stored.path / "s.h5")
    with exclusive_lock(tmp_path / ".s.h5.parts" / "lock"), pytest.raises(BusyStore, match="Another process"):
        export_hdf5(stored, tmp_path / "s.h5")


@pytest.mark.parametrize("harm", ["remove", "flip"])
def test_a_damaged_store_is_not_exported(stored, tmp_path, harm):
    path = stored.layout.features_object(2)
    if harm == "remove":
        path.unlink()
    else:
        raw = bytearray(path.read_bytes())
        raw[40] ^= 4
        path.write_bytes(raw)
    with pytest.raises(DamagedStore, match="features/c/2/0 is missing" if harm == "remove" else "'features'"):
        export_hdf5(stored, tmp_path / "s.h5")
    assert not (tmp_path / "s.h5").exists()


WITHOUT_PLUGIN = """
    import sys
    sys.modules["hdf5plugin"] = None  # as if it were not installed
    from pathlib import Path
    from agiqa.errors import AgiqaError
    from agiqa.store import open_store
    from agiqa.store.hdf5_export import export_hdf5
    from agiqa.store.hdf5_import import import_hdf5
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
    "foreign format": (set_attribute("format", "other"), SchemaError, "no feature store"),
    "foreign version": (set_attribute("version", 7), SchemaError, r"agiqa\.features v7; this agiqa reads .* v1"),
    "unknown encoding": (set_attribute("encoding", "wavelet"), SchemaError, "wavelet"),
    "other dtype": (set_attribute("logical_dtype", "float16"), DamagedStore, "logical_dtype"),
    "other width": (set_attribute("width", 17), DamagedStore, "width"),
    "no units": (set_attribute("units", 0), DamagedStore, "units"),
    "other provenance": (set_attribute("provenance", '{"width":16}'), DamagedStore, "id is not the sha256"),
    "missing features": (without("features"), SchemaError, "no array features"),
    "missing probe": (without("probe"), SchemaError, "no array probe/logits, probe/rows"),
    "missing items": (without("items/prompt"), DamagedStore, "item table"),
    "unknown array": (add_array, SchemaError, "attention/weights"),
    "short features": (replace_array("features", lambda rows: rows[:-1]), SchemaError, "'features'.*expected"),
    "narrow features": (replace_array("features", lambda rows: rows[:, 1:]), SchemaError, "'features'.*expected"),
    "wide index": (replace_array("index/unit", lambda units: units.astype("i8")), SchemaError, "'index/unit'"),
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


WORKER = """
    import sys
    from pathlib import Path
    from agiqa.store import open_store
    from agiqa.store.hdf5_export import export_hdf5
    from agiqa.store.hdf5_import import import_hdf5
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    print("ready", flush=True)
    if source.suffix == ".h5":
        import_hdf5(source, out)
    else:
        export_hdf5(open_store(source), out, compression="gzip")
"""


def run_with_kills(source, out, *, seed):
    """Run until it ends by itself, six times at most killed before at a random moment; the number of kills."""
    moments, kills = random.Random(seed), 0
    command = [sys.executable, "-c", textwrap.dedent(WORKER), source, out]
    while True:
        worker = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE)
        assert worker.stdout is not None
        worker.stdout.readline()
        if kills < 6:
            time.sleep(moments.uniform(0.0, 0.25))
            worker.send_signal(signal.SIGKILL)
        worker.communicate()
        if worker.returncode == 0:
            return kills
        assert worker.returncode == -signal.SIGKILL
        kills += 1


def test_exports_and_imports_killed_at_random_moments_end_as_if_never_killed(tmp_path):
    store = make_store(tmp_path / "s.agiqa", make_content([37] * 300, width=64))
    whole = export_hdf5(store, tmp_path / "whole.h5", compression="gzip").path
    killed = tmp_path / "killed.h5"
    assert run_with_kills(store.path, killed, seed=1) >= 2
    assert content_of(killed) == content_of(whole)
    assert run_with_kills(killed, tmp_path / "killed.agiqa", seed=2) >= 2
    assert_same_store(open_store(tmp_path / "killed.agiqa"), store)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"s.agiqa", "whole.h5", "killed.h5", "killed.agiqa"}


def test_an_import_to_a_finished_store_leaves_it_and_to_another_one_is_refused(stored, tmp_path):
    path = export_hdf5(stored, tmp_path / "s.h5").path
    before = json.loads(stored.layout.manifest.read_text())
    assert import_hdf5(path, stored.path).id == stored.id
    assert json.loads(stored.layout.manifest.read_text()) == before
    other = make_store(tmp_path / "o.agiqa", make_content([3, 4, 5]), model={"name": "other"})
    with pytest.raises(SettingsConflict, match="made with other settings"):
        import_hdf5(path, other.path)
