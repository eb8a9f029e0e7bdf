"""Grids over layers: what `layer: all` stands for, rows by layer, baselines of each layer, and the report's picture."""

import csv
import io
import json

import numpy as np
import pytest
import yaml

from agiqa.bench.ablation.ablation import run_ablation
from agiqa.bench.ablation.grids import find_grid, read_grid, unread_settings
from agiqa.bench.ablation.protocols import layers_of
from agiqa.bench.ablation.sources import KERNEL_LAYERS
from agiqa.bench.report.layers import depth_of, layer_chart, layer_table
from agiqa.bench.report.reading import read_all
from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.heads import HeadConfig, TrainConfig, load_run
from agiqa.heads.model.reading import usual_settings
from tests.heads.layered_stores import LAYERS, made_states, mos_of, pooled_states, write_store

POOLED = ("mean@question", "mean@answer")
STATES = made_states()
MOS = mos_of(STATES["16"])
BASE = {"projection": "hidden", "encoder": "none", "width": 4, "epochs": 1, "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("grids")


@pytest.fixture(scope="module")
def store(folder):
    return write_store(folder / "pooled.agiqa", pooled_states(STATES, POOLED), MOS, pooled=POOLED)


def plan_of(file, store):
    return read_grid(file, usual={"": usual_settings(store)}, layers=lambda: layers_of(store))


@pytest.fixture(scope="module")
def ablation(store, folder):
    """Every layer, and all of them joined, on the published split; folder and outcome."""
    file = folder / "grid.yaml"
    sections = {
        "base": BASE,
        "grid": {"layer": "all"},
        "runs": [{"layer": "8+16+last", "layer_mix": "softmax"}],
        "seeds": [0, 1],
        "protocols": ["published"],
    }
    file.write_text(yaml.safe_dump(sections, sort_keys=False))
    done = run_ablation({"": store}, plan_of(file, store), folder / "out", grid=file, workers=1)
    return folder / "out", done


def test_all_layers_are_those_of_the_store(store, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "grid": {"layer": "all"}}))
    plan = plan_of(file, store)
    assert [run.train.layer for run in plan] == list(LAYERS)
    assert [run.row for run in plan] == [f"layer={layer}" for layer in LAYERS]
    assert {(run.head.encoder, run.head.pooling) for run in plan} == {("none", "mean@answer")}


def test_a_layer_is_a_number_or_a_text(store, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "grid": {"layer": [8, "last", "8+last"]}}))
    assert [run.train.layer for run in plan_of(file, store)] == ["8", "last", "8+last"]


def test_a_mix_of_one_layer_is_the_same_head(store, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": {**BASE, "layer": 8}, "grid": {"layer_mix": ["concat", "softmax"]}}))
    with pytest.raises(ConfigError, match="`layer_mix`, which a head of one layer does not read"):
        plan_of(file, store)
    assert "layer_mix" not in unread_settings(HeadConfig(), TrainConfig(layer="8+16"))


def test_stores_of_other_layers_have_no_all(store, folder):
    other = write_store(folder / "other.agiqa", {"8": STATES["8"]}, MOS)
    with pytest.raises(ConfigError, match=r"has the layers 8, and .* has 8, 16, last: `layer: all` needs the same"):
        layers_of(store, other)


def test_the_shipped_grid_reads_every_layer(store):
    plan = plan_of(find_grid("layers"), store)
    assert {run.train.layer for run in plan} == set(LAYERS)
    assert len(plan) == len(LAYERS) * 5 * 6
    assert {(run.head.encoder, run.head.pooling, run.head.projection) for run in plan} == {
        ("none", "mean@answer", "hidden")
    }


def test_every_head_has_read_its_layer(ablation):
    out, done = ablation
    assert done.failed == {}
    for layer in (*LAYERS, "8+16+last"):
        name = f"layer={layer}" if layer in LAYERS else f"layer={layer},layer_mix=softmax"
        run = load_run(out / "runs" / f"{name},seed=0,protocol=published")
        assert (run.spec.layer, run.spec.pooled) == (layer, ("mean@answer",))
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    mixed = [line for line in lines if "layer_weights" in line]
    assert {line["config"]["layer"] for line in mixed} == {"8+16+last"}


def test_a_second_call_trains_nothing(ablation, store, folder):
    again = run_ablation(
        {"": store}, plan_of(folder / "grid.yaml", store), folder / "out", grid=folder / "grid.yaml", workers=1
    )
    assert again.trained == 0
    assert [row["row"] for row in again.rows] == [row["row"] for row in ablation[1].rows]


def test_every_layer_has_its_closed_form_and_other_baselines_are_there_once(ablation):
    baselines = [row for row in ablation[1].rows if row["kind"] == "baseline"]
    features = {row["settings"]["layer"]: row for row in baselines if row["settings"]["baseline"] == "features"}
    assert list(features) == [*LAYERS, "8+16+last"]
    assert features["16"]["fits"][0]["tokens"] == "mean@answer"
    assert features["16"]["row"] == "ridge (hidden states of layer 16, mean@answer), layer=16"
    assert features["16"]["test"]["srcc"] > 0.99  # the MOS is linear in this row
    assert abs(features["8"]["test"]["srcc"]) < 0.9
    assert len([row for row in baselines if row["settings"]["baseline"] == "text"]) == 1


def test_many_layers_get_no_kernel_ridge_on_a_cpu_and_the_line_says_so(tmp_path):
    names = [*map(str, range(1, KERNEL_LAYERS + 1)), "last"]
    states = {name: STATES["16" if name == "3" else "8"] for name in names}
    store = write_store(tmp_path / "deep.agiqa", states, MOS)
    file = tmp_path / "grid.yaml"
    protocols = ["published", {"grouped": {"folds": 2}}]
    file.write_text(yaml.safe_dump({"base": BASE, "grid": {"layer": "all"}, "seeds": [0], "protocols": protocols}))
    done = run_ablation({"": store}, plan_of(file, store), tmp_path / "out", grid=file, workers=1)
    lines = [row for row in done.rows if row["settings"].get("baseline") == "features"]
    assert [(line["protocol"], line["settings"]["layer"]) for line in lines] == [
        (protocol, name) for protocol in ("published", "grouped") for name in names
    ]
    for line in lines:
        assert {one["regression"] for fit in line["fits"] for one in fit["candidates"]} == {"ridge"}
        assert "kernel ridge is not tried on more than 8 layers without a GPU, and there are 9" in line["notes"]
    (results,) = read_all([tmp_path / "out"])
    table = layer_table(results, "quality", "published")
    assert {line["row"] for line in csv.DictReader(io.StringIO(table.csv()))} == {"head", "ridge"}


def test_the_table_goes_by_depth(ablation):
    (results,) = read_all([ablation[0]])
    table = layer_table(results, "quality", "published")
    assert table is not None
    cells = list(csv.DictReader(io.StringIO(table.csv())))
    heads = [line["layer"] for line in cells if line["row"] == "head"]
    assert heads == list(LAYERS)
    rows = {
        row.settings["layer"]: row for row in results.rows if row.kind == "head" and "layer_mix" not in row.settings
    }
    for line in cells[:3]:
        assert float(line["srcc"]) == rows[line["layer"]].test.srcc


def test_the_picture_shows_each_layer_with_its_interval(ablation):
    (results,) = read_all([ablation[0]])
    picture = layer_chart(results, "quality", "published")
    assert picture is not None
    assert picture.name == "layers-quality-published"
    for layer in LAYERS:
        assert f">{layer}</text>" in picture.svg
    assert "head: from" in picture.alt
    assert "chosen by validation: layer" in picture.alt
    assert picture.pdf().startswith(b"%PDF")


def test_a_grid_of_one_layer_has_no_picture(store, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "grid": {"layer": ["16"]}, "protocols": ["published"]}))
    run_ablation({"": store}, plan_of(file, store), tmp_path / "out", grid=file, workers=1)
    (results,) = read_all([tmp_path / "out"])
    assert layer_chart(results, "quality", "published") is None
    assert layer_table(results, "quality", "published") is None


def test_layers_have_an_order():
    layers = ["last", "8+16", "16", "0", "-2", "8"]
    assert sorted(layers, key=depth_of) == ["0", "8", "16", "-2", "last", "8+16"]


def test_a_layer_that_the_store_lacks_is_refused_before_anything_is_trained(store, tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "grid": {"layer": ["8", "9"]}}))
    with pytest.raises(UnknownName, match=r"no layer '9'.*Stored: 8, 16, last"):
        run_ablation({"": store}, plan_of(file, store), tmp_path / "out", grid=file, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_baseline_store_is_read_at_the_layer_of_the_heads(store, folder, tmp_path):
    tokens = write_store(folder / "tokens.agiqa", STATES, MOS)
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump({"base": BASE, "grid": {"layer": ["16"]}, "protocols": ["published"]}))
    plan = plan_of(file, store)
    done = run_ablation({"": store}, plan, tmp_path / "out", grid=file, workers=1, baseline_store=tokens)
    (row,) = [row for row in done.rows if row["settings"].get("baseline") == "features"]
    assert (row["features_store"], row["reads"]) == (tokens.layer("16").id, "hidden states of layer 16")
    last = write_store(folder / "last.agiqa", {"last": STATES["last"]}, MOS)
    with pytest.raises((DataError, UnknownName), match="no layer '16'"):
        run_ablation({"": store}, plan, tmp_path / "other", grid=file, workers=1, baseline_store=last)


def test_mean_features_of_pooled_rows_are_these_rows(store):
    from agiqa.bench.baselines.evidence import MeanFeatures

    found = MeanFeatures(store.layer("8")).of(np.array([4, 2]))
    assert list(found) == list(POOLED)
    for number, name in enumerate(POOLED):
        expected = [pooled_states(STATES, POOLED)["8"][item][number] for item in (4, 2)]
        np.testing.assert_array_equal(found[name], np.stack(expected))
