"""Writing stores with layers and pooled rows: what a plan refuses, resuming after kills, and growing."""

from dataclasses import replace

import numpy as np
import pytest

from agiqa.errors import ConfigError, DataError, SettingsConflict
from agiqa.store import UnitWriter, convert_store, create_store, seal, verify
from agiqa.store.format.arrays import choose_geometry
from agiqa.store.writing.growing import begin_growth, copy_rows, install_growth
from tests.store.damage import contents
from tests.store.layered import begin, begin_in, fill, make_layered, make_store

LENGTHS = (3, 9, 0, 5, 1, 30)


@pytest.fixture(scope="module")
def content():
    return make_layered(LENGTHS, widths={"0": 5})


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"layers": ()}, ConfigError, "it has 0 layers"),
        ({"layers": ("last", "3")}, ConfigError, "do not ascend, with 'last' at the end"),
        ({"layers": ("3", "3")}, ConfigError, "do not ascend"),
        ({"layers": ("-1",)}, ConfigError, "a layer is called '-1'"),
        ({"layer_widths": {"7": 4}}, ConfigError, "'7', which is none of its other layers"),
        ({"tap": "Vision Tower"}, ConfigError, "its tap is 'Vision Tower'"),
        ({"pooled": ("mean@picture",)}, ConfigError, "'mean@picture' is no pooling"),
        ({"pooled": ("mean", "last")}, DataError, r"item 'image_0\.png' has 3 rows, .* one per pooling .*: mean, last"),
        ({"encoding": "logits", "tap": "timm"}, ConfigError, "this one holds timm"),
        ({"encoding": "logits", "layers": ("0", "3")}, ConfigError, "its last layer is 3"),
        ({"kept_logits": 12, "layers": ("0", "3")}, ConfigError, "its last layer is 3"),
        ({"kept_logits": 12, "pooled": ("mean",)}, ConfigError, "Raw logits are kept per token"),
    ],
)
def test_what_no_store_holds_is_refused_at_planning(content, change, error, says):
    with pytest.raises(error, match=says):
        replace(content.plan(), **{"layer_widths": {}, **change})


def test_a_plan_of_the_last_layer_alone_is_that_of_version_1(content):
    plan = make_layered(LENGTHS, layers=("last",), layer_count=4).plan()
    assert plan.content.version == 1
    assert plan.full_provenance().keys() == {"model", "encoding", "logical_dtype", "width"}
    assert content.plan().full_provenance()["layer_widths"] == {"0": 5}


def test_units_shrink_with_the_number_of_layers():
    """A unit is what a killed run loses: 64 MiB in all layers together, and at least the longest item."""
    rows = {"total_rows": 1 << 20, "longest": 100, "width": 1024, "itemsize": 4}
    assert choose_geometry(**rows).unit_rows == 16384
    assert choose_geometry(**rows, other_bytes=30 * 4096).unit_rows == 768  # 64 MiB are 528 rows, in chunks of 256
    assert choose_geometry(**{**rows, "longest": 3000}, other_bytes=30 * 4096).unit_rows == 3072


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (lambda rows: {}, "unit 0 has the layers none besides the last, the plan expects 0, 3"),
        (lambda rows: {**rows, "7": rows["3"]}, "has the layers 0, 3, 7 besides"),
        (lambda rows: {**rows, "3": rows["3"][:-1]}, r"unit 0: layers/3 are float32 \(\d+, 8\), the plan expects"),
        (
            lambda rows: {**rows, "0": rows["3"]},
            r"layers/0 are float32 \(\d+, 8\), the plan expects float32 \(\d+, 5\)",
        ),
        (lambda rows: {**rows, "3": rows["3"] * np.nan}, "infinite value at token 0 of layer 3"),
    ],
)
def test_wrong_layers_are_refused_and_leave_no_unit(tmp_path, content, layers, says):
    writer = begin(tmp_path / "s.agiqa", content)
    items = writer.store.items_of(0)
    rows = {layer: np.concatenate([content.states[layer][item] for item in items]) for layer in content.layers}
    last = rows.pop("last")
    with pytest.raises(DataError, match=says):
        writer.write_unit(0, last, layers=layers(rows), seconds=0.0)
    assert 0 in writer.pending()


@pytest.mark.parametrize(
    ("encoding", "change", "says"),
    [
        ("int8", {"scale": None}, "unit 0 has scales of the layers 0, 3, and a store of int8 has those of 0, 3, last"),
        ("int8", {"layer_scales": None}, "has scales of the layers last, and a store of int8 has those of 0, 3, last"),
        (
            "int8",
            {"scale": np.ones(2, np.float32)},
            r"the scales of layer last are float32 \(2,\), .* float32 \(\d+,\)",
        ),
        ("int8", {"scale": np.ones(3)}, r"the scales of layer last are float64 \(3,\)"),
        ("hidden", {}, "has scales of the layers 0, 3, last, and a store of hidden has those of none"),
    ],
)
def test_rows_of_int8_need_a_scale_each_and_others_have_none(tmp_path, content, encoding, change, says):
    scaled = {"logical_dtype": "float16", "layer_dtypes": {}} if encoding == "int8" else {}
    writer = UnitWriter(create_store(tmp_path / "s.agiqa", replace(content.plan(), encoding=encoding, **scaled)))
    used, store = writer.store.rows_used(0), writer.store
    rows = {
        layer: np.ones((used, store.layer_shape(layer)[0]), store.array(store.array_of_layer(layer)).dtype)
        for layer in content.layers
    }
    last, scales = rows.pop("last"), {layer: np.ones(used, np.float32) for layer in content.layers}
    given = {"scale": scales.pop("last"), "layer_scales": scales, **change}
    with pytest.raises(DataError, match=says):
        writer.write_unit(0, last, layers=rows, seconds=0.0, **given)
    assert 0 in writer.pending()


def test_an_interrupted_store_is_resumed_to_the_same_bytes(tmp_path, content):
    whole = make_store(tmp_path / "whole.agiqa", content)
    writer = begin(tmp_path / "s.agiqa", content)
    fill(writer, content, [1])
    left = writer.store.layout.object_of("layers/3", 0, dimensions=2)
    left.parent.mkdir(parents=True, exist_ok=True)
    left.write_bytes(b"of a killed run, without a record")
    resumed = create_store(tmp_path / "s.agiqa", content.plan())
    assert resumed.committed_units() == [1]
    np.testing.assert_array_equal(
        resumed.layer("0").read(resumed.items_of(1)).rows,
        np.concatenate([content.states["0"][item] for item in resumed.items_of(1)]),
    )
    fill(begin_in(resumed, content), content)
    assert contents(seal(resumed), but=["README.md"]) == contents(whole, but=["README.md"])


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"layers": ("3", "last")}, r"layers: stored \['0', '3', 'last'\], asked \['3', 'last'\]"),
        ({"layers": ("last",)}, r"layers: stored \['0', '3', 'last'\], asked None"),
        ({"tap": "timm"}, "tap: stored None, asked 'timm'"),
    ],
)
def test_a_store_of_other_layers_is_not_resumed(tmp_path, content, other, says):
    make_store(tmp_path / "s.agiqa", content)
    with pytest.raises(SettingsConflict, match=says):
        create_store(tmp_path / "s.agiqa", make_layered(LENGTHS, **other).plan())


@pytest.mark.parametrize("encoding", ["hidden", "int8"])
def test_a_store_grows_with_all_its_layers(tmp_path, content, encoding):
    content = replace(content, provenance={"data_set": {"items": 6}})
    old = make_store(tmp_path / "h.agiqa", replace(content.first(4), provenance={"data_set": {"items": 4}}))
    larger = replace(content.plan(), breaks=[4])
    if encoding == "int8":
        old = convert_store(old, tmp_path / "i.agiqa", "int8")
        made = {name: old.provenance[name] for name in ("source", "scale", "layer_scales")}
        larger = replace(
            larger,
            encoding="int8",
            logical_dtype="float16",
            layer_dtypes={},
            provenance={**larger.provenance, **made},
        )
    grown = begin_growth(old, larger)
    done = []
    copy_rows(old, grown, done.append)
    assert sum(done) == 4
    for layer in old.layers:
        np.testing.assert_array_equal(stored(grown, layer), stored(old, layer))
    if encoding == "hidden":
        fill(begin_in(grown, content), content)
        seal(grown)
        new = install_growth(old.path)
        for layer in content.layers:
            expected = np.concatenate([content.states[layer][item] for item in (1, 5)])
            np.testing.assert_array_equal(new.layer(layer).read([1, 5]).rows, expected)
        assert verify(new, "numeric").sound


def stored(store, layer):
    """The rows of the first four items, and their scales in `int8`, as they are stored."""
    arrays = [store.array_of_layer(layer)]
    if store.encoding == "int8":
        arrays.append("tokens/scale" if layer == "last" else f"tokens/layers_scale/{layer}")
    spans = list(zip(store.row_starts[:4].tolist(), store.row_ends[:4].tolist(), strict=True))
    parts = [[store.stored_rows(array, *span).ravel() for span in spans] for array in arrays]
    return np.concatenate([values for part in parts for values in part])
