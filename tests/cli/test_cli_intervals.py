"""Spreads and conformal intervals on the command line: train, evaluate, predict, score, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import misuse, refuse
from tests.extract.small_sets import read_table, write_table

HELD_OUT = ("--validation", 0.6)


@pytest.fixture(scope="module")
def spread(agiqa, example, tmp_path_factory):
    """A store with standard deviations, and the run of a head that predicts a spread."""
    folder = tmp_path_factory.mktemp("spread")
    store = shutil.copytree(example.store, folder / "std.agiqa")
    rows = [[row["name"], 0.3 + 0.02 * k] for k, row in enumerate(read_table(example.data))]
    assert (
        agiqa("store", "labels", store, write_table(folder / "t", rows, ["name", "std_quality"]) / "data.csv").code == 0
    )
    run = folder / "run"
    return store, run, agiqa("train", store, run, *SMALL_HEAD, *HELD_OUT, "--loss", "kl", "--json")


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predict_writes_spread_and_interval(agiqa, spread, tmp_path):
    store, run, trained = spread
    assert trained.json["test"]["spread"]["n_std"] == trained.json["test"]["n"]
    told = agiqa("predict", run, store, tmp_path / "out.csv", "--interval", 0.8, "--json")
    assert told.json["interval"] == 0.8
    assert told.json["validation_items"] == trained.json["validation"]["n"]
    rows = rows_of(tmp_path / "out.csv")
    assert list(rows[0]) == ["name", "prompt", "predicted", "spread", "low", "high"]
    errors = sorted(
        abs(float(row["mos"]) - float(row["predicted"])) / float(row["spread"])
        for row in rows_of(run / "predictions.csv")
        if row["split"] == "validation"
    )
    quantile = errors[int(np.ceil(round(0.8 * (len(errors) + 1), 9))) - 1]
    for row in rows:
        half = quantile * float(row["spread"])
        assert float(row["low"]) == pytest.approx(max(0.0, float(row["predicted"]) - half), abs=1e-4)
        assert float(row["high"]) == pytest.approx(min(5.0, float(row["predicted"]) + half), abs=1e-4)
    assert "intervals from" in agiqa("predict", run, store, tmp_path / "out.csv", "--interval", 0.8).out
    assert agiqa("predict", run, store, tmp_path / "plain.csv").code == 0
    assert list(rows_of(tmp_path / "plain.csv")[0]) == ["name", "prompt", "predicted", "spread"]


def test_evaluate_tells_of_spread_and_coverage(agiqa, spread):
    store, run, trained = spread
    scores = agiqa("evaluate", run, store, "--interval", 0.8, "--json").json
    assert scores["intervals"]["level"] == 0.8
    assert scores["intervals"]["coverage"]["n"] == trained.json["test"]["n"]
    shown = agiqa("evaluate", run, store, "--interval", 0.8).out.splitlines()
    assert "SRCC with the known std" in next(line for line in shown if line.startswith("spread"))
    assert "80 % from" in next(line for line in shown if line.startswith("intervals"))


def test_another_store_gets_a_warning(agiqa, example, spread, tmp_path):
    _, run, _ = spread
    other = tmp_path / "other.agiqa"
    assert agiqa(*example.extract(other, "--max-tokens", 12, "--truncate")).code == 0
    told = agiqa("predict", run, other, tmp_path / "out.csv", "--interval", 0.8)
    assert "Intervals promise nothing for other generators" in told.err


def test_what_is_refused(agiqa, example, spread, tmp_path):
    store, run, _ = spread
    out = tmp_path / "out.csv"
    refuse(agiqa("train", example.store, tmp_path / "r", "--loss", "kl"), "no std column for quality", "--label-std")
    misuse(agiqa("train", store, tmp_path / "r", "--loss", "kl+ordinal"), "heads have different outputs")
    refuse(agiqa("predict", run, store, out, "--interval", 0.99), "An interval of 0.99 needs 99 validation items")
    misuse(agiqa("predict", run, store, out, "--interval", 90), "90")
    assert not out.exists()
    fixed = agiqa(
        "train", example.store, tmp_path / "r", *SMALL_HEAD, "--loss", "ordinal", "--label-std", 0.6, "--json"
    )
    assert json.loads((tmp_path / "r" / "config.json").read_text())["readout"] == "graded"
    assert fixed.json["test"]["spread"]["n_std"] == 0
