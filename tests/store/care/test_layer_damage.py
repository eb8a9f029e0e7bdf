"""Damage to the layers of a store: found by verifying and by reading, and mended unit by unit."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import DamagedStore, IncompleteStore
from agiqa.store import collect_garbage, convert_store, open_store, repair, seal, verify
from tests.store.damage import contents, harm, object_of
from tests.store.layered import begin, begin_in, fill, make_layered, make_store

LENGTHS = (3, 9, 0, 5, 1, 30)


@pytest.fixture
def content():
    return make_layered(LENGTHS)


@pytest.fixture
def stored(tmp_path, content):
    return make_store(tmp_path / "s.agiqa", content)


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
def test_damage_in_a_layer_is_found_by_verifying_and_by_reading(stored, content, how):
    harm(stored.layout.object_of("layers/3", 1, dimensions=2), how)
    report = verify(stored, "full" if how == "flip" else "quick")
    (found,) = report.damage
    assert (found.where, found.unit) == ("store.zarr/layers/3/c/1/0", 1)
    assert found.items == tuple(content.names[item] for item in stored.items_of(1))
    item = int(stored.items_of(1)[0])
    with pytest.raises(DamagedStore, match="unit 1 of 'layers/3' cannot be decoded"):
        open_store(stored.path).layer("3").read([item])
    np.testing.assert_array_equal(open_store(stored.path).layer("0").read([item]).rows, content.states["0"][item])


def test_an_unlisted_object_of_a_layer_is_found(stored):
    extra = stored.layout.object_of("layers/3", 99, dimensions=2)
    extra.parent.mkdir()
    extra.write_bytes(b"more")
    assert [found.where for found in verify(stored).damage] == ["store.zarr/layers/3/c/99/0"]
    assert [found.path for found in collect_garbage(stored).garbage] == [str(extra)]
    assert verify(open_store(stored.path), "numeric").sound


def test_a_repair_costs_the_units_of_damaged_layers_alone(stored, content):
    before = contents(stored)
    harm(stored.layout.object_of("layers/3", 1, dimensions=2), "flip")
    report = repair(stored)
    assert (report.units, report.model) == ((1,), False)
    store = open_store(stored.path, allow_partial=True)
    with pytest.raises(IncompleteStore):
        store.layer("3").read(store.items_of(1))
    fill(begin_in(store, content), content)
    sealed = seal(store)
    assert contents(sealed) == before
    assert verify(sealed, "numeric").sound


@pytest.mark.parametrize("array", ["layers_scale/3/mean", "tokens/layers_scale/3"])
def test_damage_in_the_scales_of_a_layer_is_found(stored, tmp_path, array):
    eighth = convert_store(stored, tmp_path / "i.agiqa", "int8")
    harm(object_of(eighth, array), "flip")
    assert [found.where.split("/c/")[0] for found in verify(eighth, "full").damage] == [f"store.zarr/{array}"]
    with pytest.raises(DamagedStore, match=array):
        open_store(eighth.path).layer("3").read([0, 1, 2, 3, 4, 5])


def test_a_state_of_zeros_is_no_damage(tmp_path, content):
    """As that of a padding patch, or of an embedding that a model does not use."""
    states = {**content.states, "3": [rows * 0 for rows in content.states["3"]]}
    assert verify(make_store(tmp_path / "z.agiqa", replace(content, states=states)), "numeric").sound
    writer = begin(tmp_path / "s.agiqa", replace(content, states=states))
    fill(writer, content)
    report = verify(seal(writer.store), "numeric")
    assert (report.probe_error, len(report.damage)) == (1.0, 1)


@pytest.mark.parametrize("encoding", ["hidden", "int8"])
def test_states_of_another_layer_than_they_should_be_are_noticed(tmp_path, content, encoding):
    """A writer that mixes up layers writes sound bytes: only the probe, computed apart, can tell."""
    writer = begin(tmp_path / "s.agiqa", content)
    fill(writer, replace(content, states={**content.states, "0": content.states["3"], "3": content.states["0"]}))
    store = seal(writer.store)
    if encoding == "int8":
        store = convert_store(store, tmp_path / "i.agiqa", "int8")
    assert verify(store, "full").sound
    report = verify(store, "numeric")
    assert [found.where for found in report.damage] == ["probe", "probe"]
    assert "states of layer 0 rebuilt from the features are off" in report.damage[0].problem
