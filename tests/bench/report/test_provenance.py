"""What a report says of how its results were made, and of runs that failed, against the files."""

import json
import re

import numpy as np
import pytest

from agiqa.bench.report.provenance import failures_table, runs_table
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.row_tables import bias_table
from agiqa.heads.settings.config import TrainConfig
from tests.bench.report import made
from tests.bench.report.made import cells_of


def test_failed_runs_are_shown_with_their_errors(results, copy):
    folder = copy(results.ablation)
    lines = made.read_lines(folder / "results.jsonl")
    failed = {
        **{key: lines[0][key] for key in ("config", "seed", "store", "row", "protocol")},
        "name": lines[0]["name"],
    }
    made.write_lines(folder / "results.jsonl", [*lines, {**failed, "error": "HeadError: the loss is <NaN>"}])
    (found,) = read_all([folder])
    (row,) = cells_of(failures_table(found))
    assert row == {"run": lines[0]["name"], "error": "HeadError: the loss is <NaN>"}
    told = {row["what"]: row["value"] for row in cells_of(runs_table(found))}
    assert told["Runs"] == f"{len(lines) - 1} done, 1 failed"
    assert failures_table(read_all([results.ablation])[0]) is None


def test_runs_of_a_row_that_fail_alike_are_told_once(results, copy):
    folder = copy(results.ablation)
    lines = made.read_lines(folder / "results.jsonl")
    failed = []
    for number, line in enumerate(lines[:3]):
        kept = {key: line[key] for key in ("name", "config", "seed", "store", "protocol")}
        items = "\n".join(f"  {number}-{item}.png has no image token" for item in range(20))
        told = f"s.agiqa: 20 problems\n{items}\nChoose another pooling."
        failed.append({**kept, "row": "pooling=mean@image", "error": told})
    other = {**failed[0], "row": "lr=3", "name": "lr=3,seed=0", "error": "HeadError: the loss is NaN"}
    made.write_lines(folder / "results.jsonl", [*lines[3:], *failed, other])
    table = failures_table(read_all([folder])[0])
    assert table.title.endswith("4 failed runs")
    assert cells_of(table) == [
        {
            "run": f"{lines[0]['name']} and 2 runs like it",
            "error": "s.agiqa: 20 problems\n  0-0.png has no image token\n...\nChoose another pooling.",
        },
        {"run": "lr=3,seed=0", "error": "HeadError: the loss is NaN"},
    ]


def test_failed_runs_of_other_rows_of_a_transfer_stay_apart(results, copy):
    folder = copy(results.transfer)
    lines = made.read_lines(folder / "results.jsonl")
    rows = {re.sub(r",seed=\d+$", "", line["name"]): line for line in lines}
    failed = [{"name": line["name"], "seed": line["seed"], "error": "no"} for line in rows.values()]
    assert len(failed) > 3
    made.write_lines(folder / "results.jsonl", failed)
    assert [row["run"] for row in cells_of(failures_table(read_all([folder])[0]))] == [line["name"] for line in failed]


def test_the_settings_of_all_runs_are_told(results, copy):
    folder = copy(results.ablation)
    lines = made.read_lines(folder / "results.jsonl")
    usual = TrainConfig().model_dump(mode="json")
    for number, line in enumerate(lines):
        line["config"] |= usual | {"ema": 0.99, "calibrate": True, "seed": number, "threads": 2}
        line["config"] |= {"width": 64, "lr": (0.001, 0.002)[number % 2]}
    made.write_lines(folder / "results.jsonl", lines)
    told = {row["what"]: row["value"] for row in cells_of(runs_table(read_all([folder])[0]))}
    assert {"ema 0.99", "calibrate true", "width 64", "others by default"} <= set(told["Settings of all"].split(", "))
    assert "seed" not in told["Settings of all"] + told["Settings that differ"]
    assert "threads" not in told["Settings of all"]
    assert "lr 0.001, 0.002" in told["Settings that differ"].split("; ")
    del lines[0]["config"]["calibrate"]  # as of an agiqa that had no such setting
    made.write_lines(folder / "results.jsonl", lines)
    told = {row["what"]: row["value"] for row in cells_of(runs_table(read_all([folder])[0]))}
    assert "calibrate false, true" in told["Settings that differ"].split("; ")


def test_the_bias_of_the_best_epoch_on_test_is_the_mean_over_runs(results, copy):
    folder = copy(results.ablation)
    rng, told = np.random.default_rng(3), {}
    for line in made.read_lines(folder / "results.jsonl"):
        path = folder / "runs" / line["name"] / "metrics.json"
        metrics = json.loads(path.read_text())
        both = {}
        for label in ("quality", "correspondence"):
            bias = dict(zip(("srcc", "plcc"), rng.uniform(0, 0.1, 2).tolist(), strict=True))
            best = {metric: metrics["test"][label][metric] + bias[metric] for metric in bias}
            both[label] = {"chosen_by": "highest test SRCC", "epoch": 2, **best, "bias": bias}
        path.write_text(json.dumps({**metrics, "paper_compatible": both}))
        told.setdefault((line["row"], line["protocol"]), []).append((metrics["test"]["quality"], both["quality"]))
    (found,) = read_all([folder])
    rows = [row for row in cells_of(bias_table(found)) if row["label"] == "quality"]
    assert len(rows) == len(told) == 4
    for runs in told.values():
        honest, bias = (
            np.mean(values) for values in zip(*((test["srcc"], one["bias"]["srcc"]) for test, one in runs), strict=True)
        )
        (row,) = [row for row in rows if float(row["srcc_bias"]) == pytest.approx(bias)]
        assert float(row["srcc_honest"]) == pytest.approx(honest)
        assert float(row["srcc_best_epoch"]) == pytest.approx(honest + bias)
        assert row["runs"] == str(len(runs))
    assert bias_table(read_all([results.ablation])[0]) is None
