"""Rows come out of a store as they went in, bit for bit, for all lengths and dtypes."""

import shutil

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agiqa.errors import DataError, IncompleteStore, SchemaError, ViewRefused
from agiqa.store import create_store, create_whole_array, from_float32, open_store, to_float32
from tests.store.conftest import fill, make_content, make_store, plan_of


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=25),
    logical_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
    seed=st.integers(0, 1000),
)
def test_every_item_comes_back_in_its_own_bits(tmp_path_factory, lengths, logical_dtype, seed):
    content = make_content(lengths, logical_dtype=logical_dtype, seed=seed)
    store = make_store(tmp_path_factory.mktemp("round") / "s.agiqa", content)
    order = np.random.default_rng(seed).permutation(len(lengths))
    read = store.read(order)
    for place, item in enumerate(order):
        rows = slice(read.offsets[place], read.offsets[place + 1])
        np.testing.assert_array_equal(read.rows[rows], content.hidden[item])
        np.testing.assert_array_equal(read.roles[rows], content.roles[item])
    assert store.n_tokens.tolist() == lengths


def test_items_keep_names_splits_and_missing_labels(stored, content):
    items = open_store(stored.path).items
    assert items.names == content.items.names
    assert items.splits == content.items.splits
    assert items.generators == [None] * 40
    np.testing.assert_array_equal(items.labels["quality"], content.items.labels["quality"])


def test_no_item_crosses_a_unit_and_units_are_several(stored):
    first = stored.row_starts // stored.geometry.unit_rows
    last = (stored.row_ends - 1) // stored.geometry.unit_rows
    assert (first == last).all()
    assert (first == stored.units).all()
    assert stored.geometry.units > 4


@pytest.mark.parametrize("items", [[-1], [40], [0.0], [[0]], ["0"], [True]])
def test_positions_that_the_store_does_not_have_are_refused(stored, items):
    with pytest.raises(DataError, match="whole numbers from 0 to 39"):
        stored.read(items)


def test_language_model_head_comes_back(stored, content):
    np.testing.assert_array_equal(stored.lm_head(), content.lm_head)


def test_unfinished_store_is_refused_unless_asked_for(tmp_path, content):
    store = create_store(tmp_path / "s.agiqa", plan_of(content))
    fill(store, content, units=[0, 1])
    with pytest.raises(IncompleteStore, match=r"2 of \d+ units"):
        open_store(store.path)
    partial = open_store(store.path, allow_partial=True)
    assert len(partial.read(partial.items_of(1)).rows) == partial.rows_used(1)
    missing = int(partial.items_of(2)[0])
    with pytest.raises(IncompleteStore, match=content.items.names[missing]):
        partial.read([missing])


def test_what_the_encoding_cannot_answer_is_refused(stored):
    with pytest.raises(ViewRefused, match="store sketch"):
        stored.basis()


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(SchemaError, match="not a feature store"):
        open_store(tmp_path)


@pytest.mark.parametrize("logical_dtype", ["bfloat16", "float16", "float32"])
def test_bits_round_to_nearest_even_as_torch_does(logical_dtype):
    import torch

    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(size=5000) * 10.0 ** rng.integers(-6, 4, 5000), [0.0, -0.0, 1.00390625]])
    values = values.astype(np.float32)
    expected = torch.from_numpy(values).to(getattr(torch, logical_dtype)).float().numpy()
    np.testing.assert_array_equal(to_float32(from_float32(values, logical_dtype), logical_dtype), expected)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((300, 4096), "u2"), ((40_000, 512), "f4"), ((1000,), "i8"), ((0, 8), "f4"), ((9, 2, 3), "u1")]
)
def test_an_array_written_whole_has_the_bytes_that_zarr_writes(tmp_path, shape, dtype):
    values = np.random.default_rng(3).integers(0, 200, shape).astype(dtype)
    values[: len(values) // 2] = 0  # and some objects are not there at all
    create_whole_array(zarr.open_group(tmp_path / "ours", mode="w"), "lm_head/weight", values)
    shutil.copytree(tmp_path / "ours", tmp_path / "theirs")
    shutil.rmtree(tmp_path / "theirs" / "lm_head" / "weight" / "c", ignore_errors=True)
    theirs = zarr.open_group(tmp_path / "theirs", mode="r+")["lm_head/weight"]
    assert isinstance(theirs, zarr.Array)
    theirs[...] = values
    ours, theirs = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("ours", "theirs")
    )
    assert ours.keys() == theirs.keys()
    assert ours == theirs
