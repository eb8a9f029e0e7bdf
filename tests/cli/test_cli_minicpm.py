"""`agiqa extract` with a MiniCPM-Llama3-V-2.5 checkpoint: images of every kind, into a store of its own numbers."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from agiqa.extract import Message, open_backbone
from agiqa.extract.data.templates import fill, template_of
from agiqa.store import open_store
from tests.extract.small_sets import read_table, write_table
from tests.extract.tiny_minicpm import write_minicpm_checkpoint

COLUMNS = ["name", "prompt", "mos_quality", "description"]
ORACLE = Path(__file__).resolve().parents[3] / "shared" / "models"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_minicpm_checkpoint(tmp_path_factory.mktemp("cli-minicpm"))


def save_every_kind(folder):
    """Names of images that cameras, editors and models write, and that must all be read."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def noise(height, width, channels=3):
        return random.integers(0, 255, (height, width, channels), dtype=np.uint8)

    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise(1, 1)).save(folder / "one-pixel.png")
    Image.fromarray(noise(10, 20000)).save(folder / "very-wide.png")
    Image.fromarray(noise(60, 40, 4), "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(noise(60, 40)).quantize(16).save(folder / "palette.png")
    Image.fromarray(random.integers(0, 65535, (60, 40)).astype(np.uint16)).save(folder / "sixteen.png")
    frames = [Image.fromarray(noise(60, 40)) for _ in range(3)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.fromarray(noise(60, 140)).save(folder / "turned.jpg", exif=turned)
    Image.fromarray(noise(60, 140, 4)).save(folder / "alpha.webp")
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "set"
    names = save_every_kind(folder / "images")
    rows = [[name, f"a picture of {name}", n / 2, "it is a blurry dog"] for n, name in enumerate(names)]
    return write_table(folder, rows, COLUMNS)


def test_images_of_every_kind_become_a_store_of_the_models_own_numbers(agiqa, data, checkpoint, tmp_path):
    path = tmp_path / "s.agiqa"
    printed = agiqa("extract", data, path, "--model", checkpoint, "--device", "cpu", "--json").json
    assert (printed["items"], printed["state"]) == (8, "complete")
    assert agiqa("store", "verify", path, "--level", "numeric", "--json").code == 0
    store, backbone = open_store(path), open_backbone(str(checkpoint), device="cpu")
    provenance = json.loads(agiqa("store", "info", path, "--json").out)["provenance"]["model"]
    assert (provenance["kind"], provenance["model_type"]) == ("minicpm", "minicpmv")
    for row in read_table(data)[:3]:
        place = store.items.names.index(row["name"])
        item = backbone.prepare(turns(row["prompt"]), data / "images" / row["name"])
        found = store.read([place]).float32()
        expected = backbone.hidden_states([item])[0].numpy()
        assert np.linalg.norm(found - expected) <= 1e-5 * np.linalg.norm(expected)


def turns(prompt):
    wording = template_of("quality")
    contents = [fill(wording.describe, prompt), "it is a blurry dog", wording.rate]
    return [
        Message(role=role, content=text) for role, text in zip(("user", "assistant", "user"), contents, strict=True)
    ]


def test_a_broken_image_is_named_before_the_model_runs(agiqa, data, checkpoint, tmp_path):
    (data / "images" / "cmyk.jpg").write_bytes(b"no image")
    outcome = agiqa("extract", data, tmp_path / "s.agiqa", "--model", checkpoint, "--device", "cpu")
    assert outcome.code == 1
    assert "cmyk.jpg" in outcome.err
    assert "not a readable image" in outcome.err
    assert not (tmp_path / "s.agiqa").exists()


def test_from_describe_to_a_score_with_fewer_slices(agiqa, data, checkpoint, tmp_path):
    """The README's way with the published checkpoints, on the tiny one."""
    model = ("--model", checkpoint, "--device", "cpu", "--max-slices", 2)
    told, store, run = tmp_path / "told.jsonl", tmp_path / "s.agiqa", tmp_path / "run"
    assert agiqa("describe", data, told, *model, "--max-new-tokens", 8, "--on-bad-item", "skip").code == 0
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert lines
    printed = agiqa("extract", data, store, *model, "--conversations", told, "--json").json
    assert printed["items"] == len(lines)
    places = agiqa("store", "info", store, "--json").json["provenance"]["model"]["image"]
    assert places["slices"] == 2
    head = ("--width", 8, "--encoder", "gru", "--epochs", 1, "--batch-size", 2, "--split", "grouped")
    assert agiqa("train", store, run, *head, "--device", "cpu").code == 0
    image = data / "images" / lines[0]["name"]
    asked = ("--prompt", lines[0]["prompt"], "--run", run, "--max-new-tokens", 8)
    scored = agiqa("score", image, *asked, *model, "--json").json["images"][0]
    left_open = agiqa("score", image, *asked, *model[:4], "--json").json["images"][0]
    assert left_open == scored
    refused = agiqa("score", image, *asked, *model[:4], "--max-slices", 5)
    assert refused.code == 1
    assert "trained with at most 2 slices" in refused.err
    table = tmp_path / "scores.csv"
    agiqa("predict", run, store, table)
    scores = {row["name"]: float(row["predicted"]) for row in csv.DictReader(table.read_text().splitlines())}
    assert scored["description"] == lines[0]["description"]
    assert scored["mos"] == pytest.approx(scores[lines[0]["name"]], abs=1e-3)


def test_slices_are_for_models_that_are_cut_here(agiqa, data, tiny_vision_checkpoint, tmp_path):
    given = ("--model", tiny_vision_checkpoint, "--max-slices", 4, "--device", "cpu")
    outcome = agiqa("extract", data, tmp_path / "s.agiqa", *given)
    assert outcome.code == 1
    assert "--max-slices is for MiniCPM-Llama3-V-2.5" in outcome.err


def test_a_checkpoint_with_a_tensor_too_many_is_named_before_any_image_and_leaves_no_store(
    agiqa, data, checkpoint, tmp_path
):
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    shard = broken / "model-00001-of-00002.safetensors"
    save_file({**load_file(shard), "vpm.zzz": torch.zeros(2)}, shard)
    (data / "images" / "cmyk.jpg").write_bytes(b"no image")  # would be told of, were images looked at first
    outcome = agiqa("extract", data, tmp_path / "s.agiqa", "--model", broken, "--device", "cpu")
    assert outcome.code == 1
    assert "1 unknown tensors" in outcome.err
    assert "vpm.zzz." in outcome.err
    assert "cmyk" not in outcome.err
    assert not (tmp_path / "s.agiqa").exists()


@pytest.mark.skipif(not ORACLE.is_dir(), reason="the shared folder with the published oracle is absent")
@pytest.mark.parametrize("adapter", [None, "minicpm-tiny-adapter"])
def test_a_store_of_the_published_oracle_holds_its_numbers(agiqa, adapter, tmp_path):
    golden = ORACLE / "golden"
    (tmp_path / "set" / "images").mkdir(parents=True)
    shutil.copy(golden / "square512.png", tmp_path / "set" / "images")
    turns = json.loads((golden / "square512.json").read_text())
    prompt = turns[0]["content"].partition("prompt is: '")[2].partition("'. Could")[0]
    write_table(tmp_path / "set", [["square512.png", prompt, 3.0]], COLUMNS[:3])
    told = [{"id": "0", "image": "square512.png", "conversations": turns}]
    (tmp_path / "told.json").write_text(json.dumps(told))
    options = ["--model", ORACLE / "minicpm-tiny", "--device", "cpu", "--conversations", tmp_path / "told.json"]
    if adapter:
        options += ["--adapter", ORACLE / adapter]
    assert agiqa("extract", tmp_path / "set", tmp_path / "s.agiqa", *options).code == 0
    expected = np.load(golden / f"square512{'+adapter' if adapter else ''}.npz")
    store = open_store(tmp_path / "s.agiqa")
    assert store.n_tokens.tolist() == [len(expected["input_ids"])]
    rows = store.read([0]).float32()
    assert np.linalg.norm(rows - expected["hidden"]) <= 1e-4 * np.linalg.norm(expected["hidden"])
    last = rows[-1].astype(np.float64) @ np.asarray(store.lm_head(), np.float64).T
    assert np.linalg.norm(last - expected["logits_last"]) <= 1e-4 * np.linalg.norm(expected["logits_last"])
