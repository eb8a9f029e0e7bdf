"""Stores that lie, with checksums that agree with the lie: an error that says what is wrong, little memory, little time."""

import hashlib
import json
import os
import random
import struct
import warnings
from contextlib import nullcontext, suppress

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr

from agiqa.errors import DamagedStore, StoreError
from agiqa.store import UnitWriter, collect_garbage, create_store, create_whole_array, open_store, repair, seal, verify
from agiqa.store.files import canonical_json, sha256_of_file
from agiqa.store.objects import ObjectCodec
from tests.store import golden
from tests.store.conftest import fill, make_content, make_store, plan_of
from tests.store.workers import Workers

MEMORY, SECONDS = 2 << 30, 20


@pytest.fixture(scope="module")
def workers():
    started = Workers()
    yield started
    started.close()


class Liar:
    """A sound store, to be changed, and its records to be made to agree with the changes."""

    def __init__(self, path):
        self.path = path
        self.zarr = path / "store.zarr"
        self.manifest = path / "MANIFEST.json"

    def root(self, change):
        """Change the metadata of all arrays and groups, and the root attributes, in the one file that has them."""
        self._rewrite(self.zarr / "zarr.json", change)

    def attributes(self, **changed):
        """Change root attributes; those that the provenance has too in both places, with the id that belongs to it."""

        def change(metadata):
            attributes = metadata["attributes"]
            attributes.update(changed)
            shared = {name: value for name, value in changed.items() if name in attributes["provenance"]}
            attributes["provenance"].update(shared)
            attributes["id"] = hashlib.sha256(canonical_json(attributes["provenance"]).encode()).hexdigest()

        self.root(change)

    def array(self, name, change):
        """Change the metadata of the array `name`, in both places that have them."""
        self.root(lambda metadata: change(metadata["consolidated_metadata"]["metadata"][name]))
        self._rewrite(self.zarr / name / "zarr.json", change)

    def shape(self, name, *shape, chunk=None):
        def change(metadata):
            metadata["shape"] = list(shape)
            if chunk is not None:
                metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = chunk

        self.array(name, change)

    def values(self, name, values):
        """Put another array in the place of `name`."""
        group = zarr.open_group(self.zarr, mode="r+", use_consolidated=False)
        create_whole_array(group, name, values)
        with warnings.catch_warnings(action="ignore"):  # of Zarr, that consolidated metadata are young
            zarr.consolidate_metadata(self.zarr)

    def some(self, name, **changed):
        """Change some entries of an array of the index."""
        values = np.asarray(zarr.open_group(self.zarr, mode="r")[name][...])
        for position, value in changed.items():
            values[int(position.removeprefix("at"))] = value
        self.values(name, values)

    def items(self, change):
        table = pq.ParquetFile(self.path / "items.parquet").read()
        pq.write_table(change(table), self.path / "items.parquet")

    def listed(self, change):
        """Change MANIFEST.json, which is made to agree with the files first."""
        self.agree()
        self._rewrite(self.manifest, change)

    def agree(self):
        """Make MANIFEST.json agree with the files that are there, commit records left out."""
        manifest, root = json.loads(self.manifest.read_text()), self._metadata()
        files = sorted(file for file in self.zarr.rglob("*") if file.is_file())
        manifest["objects"] = [self._entry(file) for file in files]
        manifest["labels"] = self._entry(self.path / "items.parquet")
        with suppress(AttributeError, KeyError, TypeError):  # where the lie is that there is none
            manifest["id"] = root["attributes"]["id"]
        self.manifest.write_text(json.dumps(manifest))
        for record in (self.path / "commits").glob("*"):
            record.unlink()

    def _metadata(self):
        with suppress(RecursionError):
            return json.loads((self.zarr / "zarr.json").read_text())

    def _entry(self, file):
        size = file.stat().st_size
        sha256 = sha256_of_file(file) if size < 1 << 30 else "0" * 64
        return {"path": file.relative_to(self.path).as_posix(), "bytes": size, "sha256": sha256}

    def _rewrite(self, path, change):
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))


@pytest.fixture
def liar(tmp_path):
    return Liar(golden.write("kept-logits", tmp_path / "s.agiqa").path)


def judged(workers, liar, *, agree=True):
    """What each step of reading came to, in a process with little memory and little time."""
    if agree:
        liar.agree()
    outcome = workers.run("read_everything", liar.path, memory=MEMORY, seconds=SECONDS)
    assert (outcome.code, outcome.error, outcome.message) == (0, "", "")
    assert outcome.peak < 512 << 20
    return {name: (error, text) for name, (error, text) in outcome.result.items()}


def refused(workers, liar, error, says, *, agree=True):
    """A step failed with `error` and a message that has `says` in it, and all that failed, failed on purpose."""
    found = judged(workers, liar, agree=agree)
    failures = [step for step in found.values() if step[0]]
    assert any(name == error and says in text for name, text in failures), found
    assert {name for name, _ in failures} <= {"SchemaError", "DamagedStore", "StoreError", "DataError"}, found


def huge_dtype(name):
    return lambda metadata: metadata.update(data_type=name)


def nested(depth):
    return "[" * depth + "]" * depth


ATTRIBUTES = {
    "foreign format": (lambda liar: liar.attributes(format="other.features"), "SchemaError", "other.features v1"),
    "foreign version": (lambda liar: liar.attributes(version=7), "SchemaError", "agiqa.features v7; this agiqa reads"),
    "foreign encoding": (lambda liar: liar.attributes(encoding="fp4"), "SchemaError", "encoding 'fp4'"),
    "foreign dtype": (lambda liar: liar.attributes(logical_dtype="fp8"), "SchemaError", "logical_dtype 'fp8'"),
    "other encoding": (
        lambda liar: liar.root(lambda metadata: metadata["attributes"].update(encoding="int8")),
        "DamagedStore",
        "its attribute encoding is not that of its provenance",
    ),
    "other encoding everywhere": (
        lambda liar: liar.attributes(encoding="sketch"),
        "DamagedStore",
        "it has no array basis/",
    ),
    "int8 everywhere": (lambda liar: liar.attributes(encoding="int8"), "DamagedStore", "features is uint16"),
    "other dtype everywhere": (
        lambda liar: liar.attributes(logical_dtype="float16"),
        "DamagedStore",
        "features is uint16 (",
    ),
    "other provenance": (
        lambda liar: liar.root(lambda metadata: metadata["attributes"]["provenance"].update(model="another")),
        "DamagedStore",
        "its id is not the hash of its provenance",
    ),
    "NaN in the provenance": (
        lambda liar: liar.root(lambda metadata: metadata["attributes"]["provenance"].update(model=float("nan"))),
        "DamagedStore",
        "its provenance has no canonical JSON",
    ),
    "no attributes": (
        lambda liar: liar.root(lambda metadata: metadata.update(attributes={})),
        "SchemaError",
        "is None vNone",
    ),
    "attributes of another kind": (
        lambda liar: liar.root(lambda metadata: metadata.update(attributes=[1])),
        "DamagedStore",
        "store.zarr/zarr.json",
    ),
    "metadata of another kind": (
        lambda liar: (liar.zarr / "zarr.json").write_text("[]"),
        "DamagedStore",
        "store.zarr/zarr.json",
    ),
    "metadata without end": (
        lambda liar: (liar.zarr / "zarr.json").write_text(nested(200_000)),
        "DamagedStore",
        "store.zarr/zarr.json",
    ),
    **{
        f"units {value}": (lambda liar, value=value: liar.attributes(units=value), "DamagedStore", "attribute units is")
        for value in (0, -1, 1.5, True, "5", None, 10**18)
    },
    "a billion units": (
        lambda liar: (
            liar.attributes(units=10**9),
            liar.shape("features", 4 * 10**9, 8),
            liar.shape("tokens/ids", 4 * 10**9),
            liar.shape("index/unit", 10**9),
        ),
        "DamagedStore",
        "no plausible number",
    ),
    "huge units": (lambda liar: liar.attributes(unit_rows=10**12), "DamagedStore", "features is uint16"),
    "huge units everywhere": (
        lambda liar: (
            liar.attributes(units=1, unit_rows=2**40, chunk_rows=2),
            liar.shape("features", 2**40, 8, chunk=2**40),
        ),
        "DamagedStore",
        "no plausible size",
    ),
    "huge width everywhere": (
        lambda liar: (
            liar.attributes(width=10**12),
            liar.array("features", lambda metadata: widen(metadata, 10**12)),
        ),
        "DamagedStore",
        "no plausible size",
    ),
    "other chunks": (lambda liar: liar.attributes(chunk_rows=1), "DamagedStore", "features is cut into objects of"),
}


def widen(metadata, width):
    metadata["shape"][1] = width
    metadata["chunk_grid"]["configuration"]["chunk_shape"][1] = width
    metadata["codecs"][0]["configuration"]["chunk_shape"][1] = width


@pytest.mark.parametrize(("lie", "error", "says"), ATTRIBUTES.values(), ids=ATTRIBUTES)
def test_attributes_that_lie(liar, workers, lie, error, says):
    lie(liar)
    refused(workers, liar, error, says)


ARRAYS = {
    "features of another dtype": (lambda liar: liar.array("features", huge_dtype("float32")), "features is float32"),
    "roles of another dtype": (lambda liar: liar.array("tokens/roles", huge_dtype("uint16")), "tokens/roles is uint16"),
    "lengths of another dtype": (
        lambda liar: liar.values("index/n_tokens", np.array([3, 9, 0, 5, 1])),
        "index/n_tokens is int64",
    ),
    "keys of another width": (lambda liar: liar.values("index/item_key", np.ones((5, 8), np.uint8)), "(any, 32)"),
    "huge features": (lambda liar: liar.shape("features", 10**15, 8), "features is uint16 (1000000000000000, 8)"),
    "huge roles": (lambda liar: liar.shape("tokens/roles", 10**15), "tokens/roles is uint8 (1000000000000000,)"),
    "huge W_lm": (lambda liar: liar.shape("lm_head/weight", 10**12, 8), "lm_head/weight is cut into objects of"),
    "huge W_lm in one object": (
        lambda liar: liar.shape("lm_head/weight", 10**12, 8, chunk=12 * 10**11),
        "lm_head/weight has the shape",
    ),
    "large W_lm": (
        lambda liar: liar.shape("lm_head/weight", 2**30, 8, chunk=12 * 2**28),
        "'lm_head/weight' takes more memory than there is",
    ),
    "W_lm turned": (lambda liar: liar.shape("lm_head/weight", 8, 12), "lm_head/weight is float32 (8, 12)"),
    "W_lm of another dtype": (
        lambda liar: liar.array(
            "lm_head/weight", lambda metadata: metadata["attributes"].update(logical_dtype="float16")
        ),
        "lm_head/weight is float32, which cannot be float16",
    ),
    "W_lm without its hash": (
        lambda liar: liar.array("lm_head/weight", lambda metadata: metadata["attributes"].pop("lm_head_sha256")),
        "lm_head/weight has no attribute lm_head_sha256",
    ),
    "W_lm of another model": (
        lambda liar: liar.values("lm_head/weight", np.ones((12, 8), np.float32)),
        "lm_head/weight has no attribute",
    ),
    "a huge index": (lambda liar: liar.shape("index/unit", 10**12), "index/unit is cut into objects of"),
    "a longer index": (
        lambda liar: liar.values("index/unit", np.zeros(6, np.int32)),
        "index/unit does not have one entry for each of 5 items",
    ),
    "a shorter index": (
        lambda liar: liar.values("index/row_start", np.zeros(4, np.int64)),
        "index/row_start does not have one entry for each of 5 items",
    ),
    "fewer keys": (
        lambda liar: liar.values("index/item_key", np.ones((4, 32), np.uint8)),
        "index/item_key does not have one entry for each of 5 items",
    ),
    "chunks of nothing": (lambda liar: liar.array("tokens/ids", lambda metadata: cut(metadata, 0)), "tokens/ids"),
    "chunks of one": (lambda liar: liar.array("tokens/ids", lambda metadata: cut(metadata, 1)), "tokens/ids is cut"),
    "no shape": (lambda liar: liar.array("index/unit", lambda metadata: metadata.pop("shape")), "zarr.json"),
    "unknown codec": (
        lambda liar: liar.array("index/unit", lambda metadata: metadata["codecs"].append({"name": "rot13"})),
        "zarr.json cannot be read (Unknown codec: 'rot13')",
    ),
    "a group for an array": (
        lambda liar: liar.array("index/unit", lambda metadata: as_group(metadata)),
        "index/unit is a group",
    ),
}


def cut(metadata, rows):
    metadata["chunk_grid"]["configuration"]["chunk_shape"][0] = rows


def as_group(metadata):
    metadata.clear()
    metadata.update(zarr_format=3, node_type="group", attributes={})


@pytest.mark.parametrize(("lie", "says"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_that_lie(liar, workers, lie, says):
    lie(liar)
    error = "StoreError" if "memory" in says else "DamagedStore"
    refused(workers, liar, error, says)


BASES = {
    "of another hidden size": (
        lambda liar: liar.values("basis/energy", np.ones(5)),
        "the arrays of its basis do not fit each other",
    ),
    "of another rank": (
        lambda liar: liar.array("basis/q", lambda metadata: metadata["attributes"].update(rank=2)),
        "the arrays of its basis do not fit each other",
    ),
    "with a mean of another": (
        lambda liar: liar.values("basis/mean", np.ones(2, np.float32)),
        "basis/mean is float32 (2,)",
    ),
    "without an id": (
        lambda liar: liar.array("basis/q", lambda metadata: metadata["attributes"].pop("id")),
        "basis/q has no attribute id",
    ),
}


@pytest.mark.parametrize(("lie", "says"), BASES.values(), ids=BASES)
def test_a_basis_that_lies(tmp_path, workers, lie, says):
    liar = Liar(golden.write("sketch", tmp_path / "s.agiqa").path)
    lie(liar)
    refused(workers, liar, "DamagedStore", says)


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
    "another version": (lambda found: found.update(version=2), "MANIFEST.json is agiqa.features v2"),
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


def linked(place, elsewhere):
    """Move what is at `place` to `elsewhere`, and leave a link."""
    place.rename(elsewhere)
    place.symlink_to(elsewhere)


@pytest.mark.parametrize("part", ["features/c/1/0", "features/c/1", "features", "tokens/roles/c/0", "lm_head"])
def test_links_out_of_a_store_are_named_and_nothing_is_written_or_removed_behind_them(tmp_path, part):
    content = make_content([5] * 4)
    store = make_store(tmp_path / "s.agiqa", content)
    outside = tmp_path / "outside"
    linked(store.layout.zarr / part, outside)
    before = {file: file.read_bytes() for file in [outside, *outside.rglob("*")] if file.is_file()}
    np.testing.assert_array_equal(open_store(store.path).read(range(4)).rows, np.concatenate(content.hidden))
    for work in (lambda: verify(open_store(store.path), "full"), lambda: repair(open_store(store.path))):
        with pytest.raises(DamagedStore, match=r"is a link out of the store.*cp -RL"):
            work()
    store.layout.manifest.unlink()
    with pytest.raises(DamagedStore, match="is a link out of the store"):
        seal(open_store(store.path, allow_partial=True))
    assert {file: file.read_bytes() for file in before} == before


def test_a_unit_is_not_written_through_a_link(tmp_path):
    content = make_content([5] * 4)
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0])
    outside = tmp_path / "outside"
    linked(store.layout.zarr / "features" / "c", outside)
    before = sorted(outside.rglob("*"))
    with pytest.raises(DamagedStore, match="is a link out of the store"):
        fill(store, content)
    assert sorted(outside.rglob("*")) == before


def replaced(liar, kind):
    place = liar.zarr / "tokens" / "roles" / "c" / "0"
    place.unlink()
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "circle":
        place.symlink_to(place)
    elif kind == "zeros without end":
        place.symlink_to("/dev/zero")
    else:
        with place.open("wb") as file:
            file.truncate(1 << 40)


@pytest.mark.parametrize("kind", ["pipe", "folder", "circle", "zeros without end", "a terabyte"])
def test_what_is_no_object_is_not_waited_for_or_read(liar, workers, kind):
    liar.agree()
    replaced(liar, kind)
    found = judged(workers, liar, agree=False)
    assert (found["rows"][0], "tokens/roles" in found["rows"][1]) == ("DamagedStore", True)
    assert "tokens/roles/c/0" in found["verify"][1]


def with_crc(raw):
    return raw + struct.pack("<I", google_crc32c.value(raw))


SHARD_INDICES = {
    "beyond the file": [(2**40, 100)],
    "a chunk without end": [(0, 2**62)],
    "around the end of numbers": [(2**64 - 8, 16)],
    "into the index": [(10, 200)],
    "a chunk of nothing": [(0, 0)],
    "a chunk of a checksum": [(0, 4)],
    "overlapping the header": [(4, 60)],
}


@pytest.mark.parametrize("entries", SHARD_INDICES.values(), ids=SHARD_INDICES)
def test_the_index_of_a_shard_that_lies(liar, workers, entries):
    file = liar.zarr / "features" / "c" / "0" / "0"
    codec = ObjectCodec.of(open_store(liar.path).array("features"))
    chunks = codec.rows // codec.chunk_rows
    index = np.full((chunks, 2), 2**64 - 1, "<u8")
    index[: len(entries)] = entries
    file.write_bytes(file.read_bytes()[: -16 * chunks - 4] + with_crc(index.tobytes()))
    refused(workers, liar, "DamagedStore", "unit 0 of 'features'")


def test_headers_of_compressed_chunks_that_lie(liar, workers, tmp_path):
    """Every field of Blosc's header, with checksums that agree: never a crash, never other values."""
    file = liar.zarr / "tokens" / "roles" / "c" / "0"
    sound, moments = file.read_bytes()[:-4], random.Random(0)
    right = judged(workers, liar)["rows"]
    interesting = (0, 1, 2, 15, 16, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, len(sound) - 1, len(sound) + 1)
    lies = [sound[:at] + bytes([value]) + sound[at + 1 :] for at in range(4) for value in (0, 1, 7, 0x93, 255)]
    lies += [
        sound[:at] + struct.pack("<I", value) + sound[at + 4 :] for at in (4, 8, 12, 16, 20) for value in interesting
    ]
    for _ in range(100):
        lie = bytearray(sound)
        for _ in range(moments.randint(1, 4)):
            lie[moments.randrange(len(lie))] = moments.randrange(256)
        lies.append(bytes(lie))
    told = workers.run("read_chunks", liar.path, [with_crc(lie).hex() for lie in lies], memory=MEMORY, seconds=SECONDS)
    assert (told.code, told.message) == (0, "")
    assert told.peak < 512 << 20
    assert {error for error, _ in told.result} <= {"", "DamagedStore"}
    assert sum(error == "DamagedStore" for error, _ in told.result) > 40
    assert right[0] == ""


def test_an_unfinished_store_that_lies_is_told_to_who_resumes_it(tmp_path):
    content = make_content([5] * 4)
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0])
    metadata = store.layout.zarr / "features" / "zarr.json"
    for text in ("{}", "[]", metadata.read_text().replace('"uint16"', '"float32"'), metadata.read_text()[:-9]):
        kept = metadata.read_text()
        metadata.write_text(text)
        with pytest.raises(DamagedStore, match="features"):
            create_store(store.path, plan_of(content))
        metadata.write_text(kept)
    assert UnitWriter(create_store(store.path, plan_of(content))).pending() == [1, 2, 3]
