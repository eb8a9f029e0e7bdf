"""Image encoders on the command line: extraction, training and scores agree."""

import csv

import numpy as np
import pytest

from agiqa.errors import ConfigError, ViewRefused
from agiqa.extract import extract, open_backbone
from agiqa.store import open_store
from agiqa.store.care.verification import verify
from tests.cli.refusals import refuse
from tests.extract.tiny_minicpm import write_minicpm_checkpoint
from tests.extract.tiny_timm import needs_timm, write_pictures, write_weights


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "images").mkdir()
    names = [path.name for path in write_pictures(folder / "images", 12)]
    with (folder / "data.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["name", "prompt", "mos_quality"])
        table.writerows([name, f"p{place // 2}", 1 + place % 5] for place, name in enumerate(names))
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_weights(tmp_path_factory.mktemp("weights"), "resnet10t")


def extracted(data, path, weights, **options):
    return extract(data, path, model="timm:resnet10t", weights=weights, image_size=64, device="cpu", **options).store


@needs_timm
@pytest.mark.parametrize("encoding", [{}, {"encoding": "int8"}, {"encoding": "sketch", "rank": 8}])
def test_stages_of_different_sizes_are_stored_pooled(data, weights, tmp_path, encoding):
    store = extracted(data, tmp_path / "s.agiqa", weights, layers="1,3,last", pool_tokens="mean,max@image", **encoding)
    assert (store.tap, store.layers, store.pooled) == ("timm", ("1", "3", "last"), ("mean", "max@image"))
    assert store.n_tokens.tolist() == [2] * 12
    assert verify(store, "numeric").sound
    backbone = open_backbone("timm:resnet10t", weights=weights, image_size=64, device="cpu")
    item = backbone.prepare((), data / "images" / "3.png")
    (states,) = backbone.layer_states([item], ["1", "3", "last"])
    for layer, rows in states.items():
        wide = rows.double().numpy()
        found = store.layer(layer).read([3]).float32()
        expected = np.stack([wide.mean(0), wide.max(0)])
        if not encoding:
            assert np.allclose(found, expected, atol=1e-5)
        else:
            assert found.shape == (2, 8 if "rank" in encoding else expected.shape[1])
    with pytest.raises(ViewRefused):
        store.lm_head()


@needs_timm
def test_stages_of_different_sizes_are_refused_together_and_stored_alone(data, weights, tmp_path):
    with pytest.raises(ConfigError, match=r"layer 2 has 256, layer last has 4\).*Give --pool-tokens"):
        extracted(data, tmp_path / "s.agiqa", weights, layers="2,last")
    store = extracted(data, tmp_path / "s.agiqa", weights, layers="4")
    assert store.n_tokens.tolist() == [16] * 12


@needs_timm
@pytest.mark.parametrize(("tap", "recorded"), [((), "timm"), (("--tap", "blocks"), "timm:blocks")])
def test_scores_are_those_of_the_stored_features(agiqa, data, weights, tmp_path, tap, recorded):
    options = ("--model", "timm:resnet10t", "--weights", weights)
    layers = ("--layers", "2,last", "--pool-tokens", "mean")
    said = agiqa("extract", data, tmp_path / "s.agiqa", *options, *tap, *layers, "--image-size", 64).err
    assert open_store(tmp_path / "s.agiqa").tap == recorded
    assert said.count("these features are the same for every prompt and conversation") == 1
    training = ("--split", "grouped", "--epochs", 1, "--encoder", "none", "--layer", "2+last")
    agiqa("train", tmp_path / "s.agiqa", tmp_path / "run", *training)
    with (tmp_path / "run" / "predictions.csv").open() as file:
        stored = {row["name"]: float(row["predicted"]) for row in csv.DictReader(file)}
    images = [data / "images" / name for name in stored]
    found = agiqa("score", *images, "--run", tmp_path / "run", *options, "--json").json
    assert {one["image"].rpartition("/")[2]: one["mos"] for one in found["images"]} == pytest.approx(stored, abs=1e-4)
    refuse(
        agiqa("score", images[0], "--run", tmp_path / "run", *options, "--describe"),
        f"reads '{recorded}' of timm:resnet10t alone, which writes no text. Leave --describe out",
    )


def test_a_tap_of_a_vision_language_model_is_stored(data, tmp_path):
    checkpoint = str(write_minicpm_checkpoint(tmp_path / "model"))
    store = extract(data, tmp_path / "s.agiqa", model=checkpoint, device="cpu", tap="projector").store
    assert store.tap == "projector"
    assert verify(store, "numeric").sound
    backbone = open_backbone(checkpoint, device="cpu", tap="projector")
    (states,) = backbone.hidden_states([backbone.prepare((), data / "images" / "5.png")])
    assert np.allclose(store.read([5]).float32(), states.float().numpy(), atol=1e-5)
    assert open_store(store.path).lm_head_sha256 == ""
