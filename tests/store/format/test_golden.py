"""agiqa, and a reader written from FORMAT.md alone, read the stores of every released version."""

import hashlib
import json
import re
import tarfile
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agiqa.errors import IncompleteStore
from agiqa.extract.data.items import Item, Message, item_key
from agiqa.store import Scale, convert_store, open_store, verify, view
from agiqa.store.disk.files import canonical_json
from agiqa.store.hdf5.export import export_hdf5
from tests.store import golden, independent_reader
from tests.store.conftest import make_content, make_store
from tests.store.independent_reader import FormatError, IndependentReader, NotThere

ARCHIVES = sorted(golden.FOLDER.glob("v1-*.tar.gz"))
FORMAT = Path(__file__).resolve().parents[3] / "store" / "FORMAT.md"
ROW_ARRAYS = ("tokens/ids", "tokens/roles", "tokens/scale", "logits")
OTHER_ARRAYS = (
    *(
        f"index/{name}"
        for name in ("row_start", "n_tokens", "unit", "item_key", "status", "prefixes", "prefix_authors", "prefix_keys")
    ),
    *("lm_head/weight", "basis/map", "basis/q", "basis/energy", "basis/mean", "scale/mean", "scale/rms"),
    *("probe/rows", "probe/logits"),
)


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.gz"))
def unpacked(request, tmp_path) -> tuple[str, Path]:
    with tarfile.open(request.param) as file:
        # Python 3.11 before 3.11.4, which Debian 12 has, knows no filters; Python 3.12 warns without one.
        file.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder,) = tmp_path.iterdir()
    return folder.stem, folder


def in_bits(values):
    """Values with dtype and shape, and with the sign of zeros."""
    return values.dtype.newbyteorder("="), values.shape, np.ascontiguousarray(values).tobytes()


def test_there_is_a_golden_store_of_every_kind():
    assert {path.name for path in ARCHIVES} >= {f"v1-{kind}.tar.gz" for kind in golden.ALL_KINDS}


def test_agiqa_reads_it(unpacked):
    kind, folder = unpacked
    store = open_store(folder, allow_partial=True)
    report = verify(store, "numeric")
    assert (report.sound, report.damage) == (kind != "unfinished", ())
    assert store.items.same_as(golden.items(kind))
    assert store.items.mos_ranges == golden.items(kind).mos_ranges
    assert store.status.tolist() == golden.status(kind)
    for item in golden.readable(kind):
        np.testing.assert_array_equal(store.read([item]).roles, golden.roles(item, kind))
        explicit = golden.hidden_of(item, kind) @ golden.lm_head().T
        if kind == "sketch":
            coordinates = view(store, "sketch").item(item)
            np.testing.assert_allclose(coordinates, explicit @ store.basis().q, atol=1e-2)
            continue
        close = {"hidden": 1e-5, "int8": 0.03, "partial": 0.03}
        atol = close.get(kind, 2**-7 * np.abs(explicit).max(initial=1.0))
        np.testing.assert_allclose(view(store, "logits").item(item), explicit, atol=atol)


@pytest.mark.parametrize("kind", golden.VIEW_KINDS)
def test_both_read_shorter_conversations_alike(kind, tmp_path):
    with tarfile.open(golden.FOLDER / f"v1-{kind}.tar.gz") as file:
        file.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    store, other = open_store(tmp_path / f"{kind}.agiqa"), IndependentReader(tmp_path / f"{kind}.agiqa")
    for name, rows in golden.SHORTER.items():
        view = store.variant(name)
        assert view.n_tokens.tolist() == list(rows)
        assert view.id == hashlib.sha256(canonical_json([store.id, f"variant:{name}"]).encode()).hexdigest()
        for item in range(5):
            found, author = other.prefix(item, name)
            assert in_bits(found) == in_bits(view.read([item]).rows)
            np.testing.assert_array_equal(other.floats(found), golden.hidden_of(item)[: rows[item]])
            assert author == (view.items.text_authors[item] if view.items.text_authors else None)
            expected = golden.item_key(item, name) if kind == "view-keys" else golden.item_key(item)
            assert other.prefix_key(item, name) == view.item_keys[item].tobytes() == expected


def assert_read_alike(other, store):
    """Both read the same bits: rows, tokens, and whole arrays."""
    here = [item for item, unit in enumerate(store.units.tolist()) if unit in other.units]
    arrays = {node for node in [*OTHER_ARRAYS, *ROW_ARRAYS] if (other.folder / f"store.zarr/{node}/zarr.json").exists()}
    for item in here:
        assert in_bits(other.features(item)) == in_bits(store.read([item]).rows)
        assert in_bits(other.floats(other.features(item))) == in_bits(store.read([item]).float32())
        for name in arrays.intersection(ROW_ARRAYS):
            start, stop = other.spans[item]
            assert in_bits(other.of_item(item, name)) == in_bits(store.stored_rows(name, start, stop))
    for name in arrays.intersection(OTHER_ARRAYS):
        assert in_bits(other.whole(name)) == in_bits(store.whole(name))
    return here


def test_a_reader_made_from_the_specification_agrees_to_the_bit(unpacked):
    kind, folder = unpacked
    other = IndependentReader(folder, finished_part=True)
    assert tuple(assert_read_alike(other, open_store(folder, allow_partial=True))) == golden.readable(kind)
    for item in golden.readable(kind):
        np.testing.assert_array_equal(other.of_item(item, "tokens/ids"), golden.token_ids(item, kind))
        np.testing.assert_array_equal(other.of_item(item, "tokens/roles"), golden.roles(item, kind))
    keys = [hashlib.sha256(bytes([item])).digest() for item in range(5)]
    assert [key.tobytes() for key in other.whole("index/item_key")] == keys


def test_that_reader_finds_the_item_table_as_specified(unpacked):
    kind, folder = unpacked
    table, expected = pq.read_table(folder / "items.parquet"), golden.items(kind)
    rows = table.to_pylist()
    assert [row["name"] for row in rows] == expected.names
    assert [row["mos_quality"] for row in rows] == [1.5, 2.0, None, 4.25, 5.0]
    assert [row.get("text_author") for row in rows] == (expected.text_authors or [None] * 5)
    recorded = table.schema.field("mos_quality").metadata or {}
    assert recorded.get(b"mos_range") == (b"[1.0,5.5]" if kind in golden.SPARSE else None)


def test_ids_follow_from_content(unpacked):
    kind, folder = unpacked
    other, store = IndependentReader(folder, finished_part=True), open_store(folder, allow_partial=True)
    provenance = other.attributes["provenance"]
    assert independent_reader.sha256(independent_reader.canonical(provenance)) == store.id
    if kind == "sketch":
        assert other.basis_id() == store.basis().id == provenance["basis"] == other.form("basis/q").attributes["id"]
    if kind in ("int8", "partial"):
        assert other.scale_id() == store.scale.id == provenance["scale"] == other.form("scale/mean").attributes["id"]
    if kind not in ("sketch", "logits"):
        assert other.lm_head_sha256() == store.lm_head_sha256 == hashlib.sha256(golden.lm_head().tobytes()).hexdigest()


def test_that_reader_refuses_what_is_not_there(unpacked):
    kind, folder = unpacked
    if kind == "unfinished":
        with pytest.raises(FormatError, match="not sealed"):
            IndependentReader(folder)
    other, store = IndependentReader(folder, finished_part=True), open_store(folder, allow_partial=True)
    for item in set(range(5)) - {*golden.readable(kind)}:
        with pytest.raises(NotThere):
            other.features(item)
        with pytest.raises(IncompleteStore):
            store.read([item])
    (folder / "store.zarr/features/c/0/0").unlink()
    with pytest.raises(FormatError, match="disagree"):
        other.features(0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_that_reader_agrees_on_objects_of_many_chunks(tmp_path, dtype):
    store = make_store(tmp_path / "s.agiqa", make_content([0, 37, 5, 0, 260, 1, 44, 529, 58], logical_dtype=dtype))
    assert_read_alike(IndependentReader(store.path), store)
    eighth = convert_store(store, tmp_path / "i.agiqa", "int8")
    assert_read_alike(IndependentReader(eighth.path), eighth)


def test_eight_bits_are_rounded_in_the_order_that_is_specified():
    """Compared with exact products and sums in float64, each rounded once; any other order gives other bits somewhere."""
    rng = np.random.default_rng(0)
    q = rng.integers(-127, 128, (2000, 256)).astype(np.int8)
    scale, rms = rng.uniform(0.01, 0.1, 2000).astype(np.float32), rng.uniform(0.1, 9, 256).astype(np.float32)
    mean = rng.normal(0, 5, 256).astype(np.float32)

    def float32(values):
        return values.astype(np.float32).astype(np.float64)

    step = float32(scale[:, None].astype(np.float64) * rms)
    right = float32(float32(q * step) + mean).astype(np.float16)
    fused, exact = float32(q * step + mean), q * (scale[:, None].astype(np.float64) * rms) + mean
    other_orders = [fused, exact, (q * scale[:, None]) * rms + mean]
    assert all((values.astype(np.float16) != right).any() for values in other_orders)
    assert in_bits(Scale(mean=mean, rms=rms, calibration="").decode(q, scale)) == in_bits(right)
    assert in_bits(independent_reader.hidden_of_int8(q, scale, mean=mean, rms=rms)) == in_bits(right)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None)
@given(JSON)
@example(
    {
        "\U0001f600": 1,
        "\uffee": 2,
        "é": [1e16, 1e-5, 9999999999999998.0, 1e-4, -0.0, 5e-324, 1.7e308, 2.0**-24, 780297213244385.75],
    }
)
def test_canonical_json_is_as_specified(value):
    assert independent_reader.canonical(value) == canonical_json(value).encode()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text()), max_size=4))
@example([("user", 'é 🎨 \x7f "quoted" \\ \n/\u2028')])
def test_the_key_of_an_item_is_as_specified(turns):
    conversation = tuple(Message(role=role, content=content) for role, content in turns)
    item = Item(
        name="a.png", prompt="", conversation=conversation, image=None, labels={}, split=None, generator=None,
        description=None,
    )  # fmt: skip
    assert independent_reader.item_key(turns) == item_key(item)


def test_the_key_of_an_item_holds_the_bytes_of_its_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"image")
    item = Item(
        name="a.png", prompt="", conversation=(Message(role="user", content="é?"),), image=tmp_path / "a.png",
        labels={}, split=None, generator=None, description=None,
    )  # fmt: skip
    assert item_key(item) == independent_reader.item_key([("user", "é?")], b"image")


def test_the_examples_of_the_specification_are_right():
    text = FORMAT.read_text()
    sections = {part.split(".")[0]: part for part in text.split("\n## ")[1:]}
    (example_json, size) = re.search(r"The sha256 of `(.+?)`, (\d+) bytes", sections["2"]).groups()
    (hash_of_json,) = re.findall(r"^`([0-9a-f]{64})`", sections["2"], re.MULTILINE)
    assert independent_reader.canonical(json.loads(example_json)) == example_json.encode()
    assert (int(size), hash_of_json) == (len(example_json.encode()), independent_reader.sha256(example_json.encode()))
    (hash_of_item,) = re.findall(r"^`([0-9a-f]{64})`", sections["6"], re.MULTILINE)
    assert independent_reader.item_key([("user", "é?")], b"image").hex() == hash_of_item


def test_the_hashes_of_an_hdf5_file_are_as_specified(tmp_path):
    store = golden.write("absent", tmp_path / "s.agiqa")
    path = export_hdf5(store, tmp_path / "s.h5", compression="gzip").path
    listed = sorted([entry["path"], entry["sha256"]] for entry in store.manifest["objects"])
    table = pq.read_table(store.path / "items.parquet").to_pydict()
    content = {"objects": listed, "items": table, "mos_ranges": {"quality": [1.0, 5.5]}}
    with h5py.File(path) as file:
        nodes = {"": file}
        file.visititems(lambda name, node: nodes.update({name: node}))
        attributes = {name: attributes_of(node) for name, node in nodes.items()}
        assert {"items/name", "items/missing/generator", "tokens", "index/unit"} <= set(attributes)
    stated = attributes[""].pop("metadata_sha256")
    assert stated == independent_reader.sha256(independent_reader.canonical(attributes))
    assert attributes[""]["content_sha256"] == independent_reader.sha256(independent_reader.canonical(content))


def attributes_of(node):
    """The attributes of a group or dataset as JSON values; section 10."""
    found = {name: getattr(value, "tolist", lambda value=value: value)() for name, value in node.attrs.items()}
    for name in json.loads(found.pop("json_attributes", "[]")):
        found[name] = json.loads(found[name])
    return found


@pytest.mark.parametrize("kind", golden.ALL_KINDS)
def test_todays_stores_have_the_layout_of_the_golden_ones(kind, tmp_path):
    made = golden.write(kind, tmp_path / f"{kind}.agiqa").path
    with tarfile.open(golden.FOLDER / f"v1-{kind}.tar.gz") as file:
        names = {member.name.partition("/")[2] for member in file.getmembers() if member.isfile()}
    assert {path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file()} == names
