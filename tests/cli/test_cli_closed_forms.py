"""Closed forms, networks on top of them, and stacks, by the command line."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.special import softmax
from transformers import AutoModelForCausalLM

from agiqa.store import open_store
from agiqa.store.format.labels import RATING_WORDS
from tests.cli.conftest import SMALL_HEAD


def csv_column(path):
    with path.open(newline="") as file:
        return [float(row["predicted"]) for row in csv.DictReader(file)]


def test_closed_forms_and_their_stack_are_runs_like_others(agiqa, example, tmp_path):
    runs = tmp_path / "runs"
    for encoder in ("ridge", "krr", "tfidf"):
        shown = agiqa("train", example.store, runs / encoder, "--encoder", encoder, "--device", "cpu")
        assert "chosen by inner folds (" in shown.out
    agiqa("train", example.store, runs / "on-ridge", *SMALL_HEAD, "--init", "ridge", "--lr", 0.01)
    agiqa("train", example.store, runs / "words", "--encoder", "krr", "--kernel", "linear", "--strength", 10)
    members = [runs / name for name in ("ridge", "tfidf", "on-ridge")]
    stacked = agiqa("stack", *members, runs / "stack", "--store", example.store, "--json").json
    assert stacked["chosen_by"] == "0.33 ridge + 0.33 tfidf + 0.33 on-ridge"  # too few validation items to fit weights
    predicted = []
    for name in ("ridge", "tfidf", "on-ridge", "stack"):
        agiqa("predict", runs / name, example.store, tmp_path / f"{name}.csv")
        predicted.append(csv_column(tmp_path / f"{name}.csv"))
    assert np.mean(predicted[:3], axis=0) == pytest.approx(predicted[3], abs=1e-5)
    scores = agiqa("evaluate", runs / "stack", example.store, "--json").json
    assert scores["srcc"] == pytest.approx(stacked["test"]["srcc"])
    listed = agiqa("runs", runs, "--json").json["runs"]
    assert len(listed) == 6


def test_a_grid_compares_closed_forms_with_networks(agiqa, example, tmp_path):
    grid = tmp_path / "grid.yaml"
    settings = {
        "base": {"device": "cpu", "width": 8, "epochs": 1},
        "runs": [{"encoder": "gru"}, {"encoder": "ridge"}, {"encoder": "gru", "init": "krr"}],
        "seeds": [0, 1],
    }
    grid.write_text(json.dumps(settings))
    done = agiqa("ablate", example.store, tmp_path / "out", "--grid", grid, "--train-workers", 1, "--json").json
    assert done["failed"] == []
    heads = [row["row"] for row in done["table"] if row["kind"] != "baseline"]
    assert {"encoder=ridge", "encoder=gru,init=krr"} <= set(heads)


def test_rating_words_of_a_full_conversation_are_those_of_transformers(agiqa, example, tmp_path):
    store = tmp_path / "full.agiqa"
    agiqa(*example.extract(store, "--variant", "full"))
    agiqa("train", store, tmp_path / "run", "--encoder", "rating-words", "--device", "cpu")
    agiqa("predict", tmp_path / "run", store, tmp_path / "scores.csv")
    told, opened = csv_column(tmp_path / "scores.csv"), open_store(store)
    tokens = [opened.provenance["rating_tokens"][word] for word in RATING_WORDS]
    model = AutoModelForCausalLM.from_pretrained(example.model, dtype=torch.float32)
    low, high = opened.items.mos_ranges["quality"]
    middles = low + (np.arange(5) + 0.5) * (high - low) / 5
    for item, (ids, roles) in enumerate(opened.tokens(range(4))):
        word = np.flatnonzero(roles == 3)[-1]
        while roles[word - 1] == 3:
            word -= 1
        with torch.no_grad():
            logits = model(torch.from_numpy(ids[:word].astype(np.int64))[None]).logits[0, -1, tokens]
        assert told[item] == pytest.approx(softmax(logits.double().numpy()) @ middles, abs=2e-2)
    assert np.ptp(told) > 0
