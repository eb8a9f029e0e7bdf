"""False metadata of types and sizes cause an error that says what is wrong, with little memory and time."""

import shutil

import numpy as np
import pytest

from agiqa.errors import DamagedStore
from agiqa.store import UnitWriter, create_store
from tests.store import golden
from tests.store.conftest import fill, make_content, plan_of
from tests.store.format.liar import Liar, refused


def huge_dtype(name):
    return lambda metadata: metadata.update(data_type=name)


def nested(depth):
    return "[" * depth + "]" * depth


ATTRIBUTES = {
    "foreign format": (
        lambda liar: liar.attributes(format="other.features"),
        "SchemaError",
        "its format is 'other.features'",
    ),
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
        "is no feature store: its format is None",
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
        "lm_head/weight has the shape (1073741824, 8), 34359738368 bytes, in objects of",
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
    refused(workers, liar, "DamagedStore", says)


def test_a_large_w_lm_of_nothing_is_refused_before_it_takes_memory(liar, workers):
    """24 copies of an object of ones: 1.5 GiB in 400 KB."""
    liar.values("lm_head/weight", np.ones((1 << 21, 8), np.float32))
    liar.array("lm_head/weight", lambda metadata: metadata["attributes"].update(as_of_a_model()))
    liar.shape("lm_head/weight", 24 << 21, 8)
    objects = liar.zarr / "lm_head" / "weight" / "c"
    for position in range(1, 24):
        shutil.copytree(objects / "0", objects / str(position))
    refused(workers, liar, "DamagedStore", "lm_head/weight has the shape (50331648, 8), 1610612736 bytes, in objects")


def as_of_a_model():
    return {"logical_dtype": "float32", "lm_head_sha256": "0" * 64}


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
