"""`agiqa tune-head` on a small store: the whole way, a kill at any moment, and wrong usage."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.store.conftest import make_content
from tests.store.conftest import make_store as write_store

pytest.importorskip("optuna", reason="optuna, the extra `search`, is not installed")

SPACE = "encoder: [none]\npooling: [mean, max]\nprojection: [hidden]\nwidth: [4, 8]\nlr: {from: 0.001, to: 0.03, log: true}\n"
OPTIONS = ("--epochs", 2, "--validation", 0.4, "--jobs", 1, "--seeds", 2)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store of 120 items in 60 prompts, whose quality depends on the hidden states."""
    rng = np.random.default_rng(3)
    content = make_content(rng.integers(4, 9, 120).tolist(), width=8)
    rows = [torch.from_numpy(item).view(torch.bfloat16).float().numpy() for item in content.hidden]
    quality = np.array([item[:, 0].mean() for item in rows])
    items = replace(content.items, labels={"quality": quality})
    return write_store(tmp_path_factory.mktemp("tune") / "small.agiqa", replace(content, items=items)).path


@pytest.fixture
def space(tmp_path):
    file = tmp_path / "space.yaml"
    file.write_text(SPACE)
    return file


def test_a_search_ends_with_tested_heads_that_a_report_shows(agiqa, store, space, tmp_path):
    out = tmp_path / "out"
    found = agiqa("tune-head", store, out, "--space", space, "--trials", 3, *OPTIONS, "--json")
    result = found.json
    lines = [json.loads(line) for line in (out / "trials.jsonl").read_text().splitlines()]
    best = max(lines, key=lambda line: line["validation_srcc"])
    assert result["trials"] == {"asked": 3, "ended": 3, "complete": 3, "pruned": 0, "failed": 0}
    assert result["best"]["settings"] == best["settings"]
    assert "too high as an estimate" in result["best"]["optimistic"]
    assert "3 complete trials are too few" in result["importance"]["caution"]
    tuned = result["rows"][0]
    assert (tuned["row"], tuned["seeds"], tuned["protocol"]) == ("tuned", 2, "one group held out")
    low, high = tuned["test"]["ci"]["srcc"]
    assert low < tuned["test"]["srcc"] < high
    assert json.loads((out / "search.json").read_text())["rows"] == result["rows"]
    about = json.loads((out / "about.json").read_text())
    assert tuned["test"]["n"] == about["counts"]["test, not read"]
    assert "[3/3] trial 2" in found.err
    first = best["number"] == 0
    assert [row["row"] for row in result["rows"] if row["kind"] == "head"] == ["tuned", *([] if first else ["untuned"])]
    assert agiqa("report", out / "final").code == 0
    run = agiqa("train", store, tmp_path / "run", "--config", out / "best.yaml", "--seed", 1, "--json").json
    repeated = json.loads((out / "final" / "runs" / "tuned,seed=1" / "metrics.json").read_text())
    assert run["test"] == repeated["test"]
    again = agiqa("tune-head", store, out, "--space", space, "--trials", 3, *OPTIONS)
    assert again.code == 0
    assert "all 3 trials exist already" in again.err
    assert "(optimistic)" in again.out
    assert "| tuned | 2 |" in again.out


@pytest.mark.parametrize("place", ["search", "final"])
def test_a_killed_command_goes_on(agiqa, store, space, tmp_path, place):
    whole = agiqa("tune-head", store, tmp_path / "whole", "--space", space, "--trials", 3, *OPTIONS, "--json").json
    out = tmp_path / "killed"
    command = ("tune-head", store, out, "--space", space, "--trials", 3, *OPTIONS, "--json")
    made = out / "trials.jsonl" if place == "search" else out / "final" / "results.jsonl"
    killed = agiqa.killed(*command, when=lambda: made.exists() and made.stat().st_size > 0)
    assert killed.code == -9
    result = agiqa(*command).json
    for one in (result, whole):
        for row in one["rows"]:
            row.pop("seconds", None)
    assert [result["best"]["settings"], result["rows"]] == [whole["best"]["settings"], whole["rows"]]


def test_a_dry_run_says_how_long_it_takes_and_writes_nothing(agiqa, store, tmp_path):
    out, file = tmp_path / "out", tmp_path / "slow.yaml"
    file.write_text("encoder: [none, gru, xlstm]\nwidth: [8]\nblocks: [2]\n")
    command = ("tune-head", store, out, "--space", file, "--trials", 20, "--dry-run", *OPTIONS)
    result = agiqa(*command, "--json").json
    per_trial = result["seconds_per_trial"]
    assert list(per_trial) == ["none", "gru", "xlstm"]
    mean = sum(per_trial.values()) / 3
    assert result["expected_seconds"] == pytest.approx(20 * mean + result["reading_seconds"], abs=0.5)
    printed = agiqa(*command, "--timeout", "30m")
    assert "20 trials, 1 at a time: about" in printed.out
    assert "at most 30 min 0 s by --timeout" in printed.out
    assert "warning: xlstm runs slowly here" in printed.err
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--timeout", "soon"), 2, "'soon' is no time such as 90s, 30m or 2h"),
        (("--trials", 0), 2, "0 is not in the range"),
        (("--pruner", "medium"), 2, "Did you mean 'median'"),
        (("--label", "alignment"), 1, "No label of"),
        (("--validation", 0.1), 1, "There are"),
        (("--devices", 2, "--device", "cpu"), 1, "--devices 2 needs as many GPUs"),
    ],
)
def test_wrong_usage_is_one_message(agiqa, store, space, tmp_path, options, code, message):
    outcome = agiqa("tune-head", store, tmp_path / "out", "--space", space, *OPTIONS, *options)
    assert outcome.code == code
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not (tmp_path / "out").exists()
