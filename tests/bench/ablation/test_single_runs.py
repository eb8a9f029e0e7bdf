"""Single trainings as rows: seeds together, compared on the same images, each number against scipy."""

import shutil

import numpy as np
import pytest
import torch
from scipy import stats

from agiqa.bench.ablation.single_runs import compare_runs
from agiqa.bench.recording.trained_runs import find_runs
from agiqa.heads import train_head
from tests.bench.report import made
from tests.bench.report.conftest import BASE, stored


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return stored(tmp_path_factory.mktemp("single") / "faces.agiqa", "faces", 3)


@pytest.fixture(scope="module")
def train(store, tmp_path_factory):
    """Trains a run of some settings in a folder of runs, and returns the folder."""
    folder = tmp_path_factory.mktemp("trained")

    def make(name, **settings):
        before = torch.get_num_threads()
        head, config = made.configs({**BASE, **settings})
        train_head(store, folder / name, head=head, train=config)
        torch.set_num_threads(before)
        return folder

    return make


@pytest.fixture(scope="module")
def runs(train):
    for encoder in ("gru", "none"):
        for seed in (0, 1):
            folder = train(f"{encoder}-{seed}", encoder=encoder, seed=seed, split="published")
    return folder


def scores(folder, *names):
    """The SRCC of the test items of each run."""
    found = []
    for name in names:
        pairs = made.predictions_of(folder / name / "predictions.csv").values()
        found.append(float(stats.spearmanr(*zip(*pairs, strict=True)).statistic))
    return found


def compared(*folders):
    found, problems = find_runs(folders)
    assert problems == []
    return compare_runs(found)


def test_runs_that_differ_in_their_seed_are_one_row_and_rows_are_compared(runs):
    result = compared(*(runs / name for name in ("gru-0", "gru-1", "none-0", "none-1")))
    rows = {row["row"]: row for row in result.rows}
    assert set(rows) == {"encoder=gru", "encoder=none"}
    means = {}
    for encoder in ("gru", "none"):
        row, values = rows[f"encoder={encoder}"], scores(runs, f"{encoder}-0", f"{encoder}-1")
        means[row["row"]] = np.mean(values)
        assert row["test"]["srcc"] == pytest.approx(np.mean(values))
        assert row["test"]["sd"]["srcc"] == pytest.approx(np.std(values, ddof=1))
        assert (row["protocol"], row["seeds"], row["settings"]) == ("published", 2, {"encoder": encoder})
    best, other = sorted(rows.values(), key=lambda row: -row["validation"]["srcc"][0])
    assert best["against"] is None
    assert other["against"]["row"] == best["row"]
    assert other["against"]["difference"]["srcc"] == pytest.approx(means[other["row"]] - means[best["row"]])
    assert result.problems == []


def test_one_run_is_a_row_called_by_its_folder(runs):
    (row,) = compared(runs / "gru-0").rows
    assert (row["row"], row["settings"], row["against"]) == ("gru-0", {}, None)
    assert row["test"]["srcc"] == pytest.approx(scores(runs, "gru-0")[0])


def test_a_copy_of_a_run_is_told_and_counts_once(runs, tmp_path):
    shutil.copytree(runs / "gru-0", tmp_path / "again")
    result = compared(runs / "gru-0", runs / "gru-1", tmp_path / "again")
    (row,) = result.rows
    assert row["seeds"] == 2
    (problem,) = result.problems
    assert "again has the settings and the seed of" in problem


def test_a_run_without_predictions_is_told_and_the_others_compared(runs, tmp_path):
    shutil.copytree(runs / "gru-0", tmp_path / "torn")
    (tmp_path / "torn" / "predictions.csv").unlink()
    result = compared(runs / "none-0", tmp_path / "torn")
    assert [row["runs"] for row in result.rows] == [1]
    (problem,) = result.problems
    assert "torn is in no table: " in problem


def test_folds_are_joined_and_a_seed_that_lacks_one_is_left_out(train):
    names = [("f0", 0, 0), ("f1", 0, 1), ("g0", 1, 0)]
    for name, seed, fold in names:
        folder = train(name, encoder="none", split="folds", folds=2, fold=fold, seed=seed)
    result = compared(*(folder / name for name, _, _ in names))
    (row,) = result.rows
    pairs = [pair for name in ("f0", "f1") for pair in made.predictions_of(folder / name / "predictions.csv").values()]
    assert row["test"]["n"] == len(pairs) == 60
    assert row["test"]["srcc"] == pytest.approx(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    assert (row["protocol"], row["runs"]) == ("grouped", 2)
    (problem,) = result.problems
    assert "g0 has seed 1, of which other folds are missing" in problem


def test_runs_are_found_at_any_depth_and_what_cannot_be_read_is_told(runs, tmp_path):
    shutil.copytree(runs / "gru-0", tmp_path / "deep" / "er" / "gru-0")
    shutil.copytree(runs / "gru-1", tmp_path / ".gru-1.state" / "run")
    shutil.copytree(runs / "none-0", tmp_path / "torn")
    (tmp_path / "torn" / "metrics.json").write_text('{"test": [')
    shutil.copytree(runs / "none-0", tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text('{"format": "model"}')
    found, problems = find_runs([tmp_path, tmp_path / "deep"])
    assert [run.path for run in found] == [tmp_path / "deep" / "er" / "gru-0"]
    assert (found[0].store, found[0].trained_at[:2]) == ("faces.agiqa", "20")
    assert len(problems) == 2
    assert any("torn" in problem and "cannot be read" in problem for problem in problems)
    assert any("other" in problem and "'model'" in problem for problem in problems)
