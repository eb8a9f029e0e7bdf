"""One head for several labels on the command line: train, evaluate, predict, and what is refused."""

import csv
import json
import shutil

import numpy as np
import pytest

from tests.cli.conftest import ITEMS, SMALL_HEAD
from tests.cli.refusals import refuse
from tests.extract.small_sets import read_table, write_table

BOTH = ("--label", "quality+correspondence")
LABELS = ("quality", "correspondence")


def joined(agiqa, example, folder, *, items=ITEMS):
    """A copy of the example's store whose first `items` have a MOS of correspondence too."""
    store = shutil.copytree(example.store, folder / "both.agiqa")
    rows = [[row["name"], round(5.0 - float(row["mos_quality"]), 3)] for row in read_table(example.data)[:items]]
    table = write_table(folder / "table", rows, ["name", "mos_correspondence"]) / "data.csv"
    assert agiqa("store", "labels", store, table).code == 0
    return store


@pytest.fixture(scope="module")
def both(agiqa, example, tmp_path_factory):
    """The store, the run folder, and what `agiqa train` wrote."""
    folder = tmp_path_factory.mktemp("both")
    store, run = joined(agiqa, example, folder), folder / "run"
    return store, run, agiqa("train", store, run, *SMALL_HEAD, *BOTH, "--validation", 0.4, "--json")


def test_train_tells_of_every_label(agiqa, both, tmp_path):
    store, run, outcome = both
    told = outcome.json
    assert {key: value for key, value in told.items() if key != "run"} == json.loads((run / "metrics.json").read_text())
    assert told["label"] == "quality+correspondence"
    for part in ("validation", "test", "logistic"):
        assert list(told[part]) == list(LABELS)
    assert "ask for quality, and the head learns quality and correspondence" in outcome.err
    shown = agiqa("train", store, tmp_path / "run", *SMALL_HEAD, *BOTH).out.splitlines()
    assert "2 validation items are too few to choose by" in shown[0]
    assert [line.split()[0] for line in shown[1:]] == [
        *("quality:", "validation", "test"),
        *("correspondence:", "validation", "test"),
    ]


def test_evaluate_tells_of_every_label(agiqa, both):
    store, run, trained = both
    scores = agiqa("evaluate", run, store, "--json").json
    assert list(scores) == [*LABELS, "warnings"]
    for label in LABELS:
        for name in ("n", "srcc", "plcc", "krcc", "rmse"):
            assert scores[label][name] == pytest.approx(trained.json["test"][label][name], abs=1e-5)
        assert scores[label]["logistic"] == trained.json["logistic"][label]
    shown = agiqa("evaluate", run, store).out.splitlines()
    starts = [line.split()[0] for line in shown]
    assert starts[0] == "quality:"
    assert starts[starts.index("correspondence:") + 1] == "test"
    assert f"RMSE {scores['correspondence']['rmse']:.4f}" in shown[starts.index("correspondence:") + 1]


def test_predict_fills_a_column_per_label(agiqa, both, tmp_path):
    store, run, _ = both
    out = tmp_path / "scores.csv"
    scales = {"quality": [0.0, 5.0], "correspondence": [0.0, 5.0]}
    assert agiqa("predict", run, store, out, "--json").json == {"out": str(out), "items": ITEMS, "mos_ranges": scales}
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["name", "prompt", "predicted_quality", "predicted_correspondence"]
    predicted = {row["name"]: [float(row[f"predicted_{label}"]) for label in LABELS] for row in rows}
    with (run / "predictions.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            told = [float(row[f"predicted_{label}"]) for label in LABELS]
            assert predicted[row["name"]] == pytest.approx(told, abs=1e-5)
    assert np.std(list(predicted.values()), axis=0).min() > 0


def test_a_store_that_lacks_a_label_is_predicted_and_not_evaluated(agiqa, both, example, tmp_path):
    _, run, _ = both
    refuse(agiqa("evaluate", run, example.store), "No label of", "'correspondence'", "Known: quality")
    assert agiqa("predict", run, example.store, tmp_path / "scores.csv").code == 0


def test_labels_that_cannot_be_learned(agiqa, example, tmp_path):
    store, run = joined(agiqa, example, tmp_path, items=ITEMS - 1), tmp_path / "run"
    for label, *mentions in [
        ("quality+", "'quality+' has an empty part", "'quality+correspondence'"),
        ("quality+quality", "'quality+quality' has a name twice"),
        ("quality+corespondence", "'corespondence'", "Did you mean 'correspondence'?"),
        ("correspondence", f"{ITEMS - 1:03d}.png", "has no correspondence MOS", "agiqa store labels"),
        ("quality,correspondence", "'quality,correspondence'", "Known: correspondence, quality"),
    ]:
        refuse(agiqa("train", store, run, *SMALL_HEAD, "--label", label), *mentions)
    config = tmp_path / "c.yaml"
    config.write_text("train:\n  label: [quality, correspondence]\n")
    refuse(agiqa("train", store, run, "--config", config), "label", "valid string", config)
    assert not run.exists()
    both = agiqa("train", store, run, *SMALL_HEAD, *BOTH, "--json").json  # each label from the items that have it
    assert [both["test"][label]["n"] for label in LABELS] == [10, 9]
