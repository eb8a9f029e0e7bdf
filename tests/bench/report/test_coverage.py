"""The table of intervals: its coverage is counted anew from the predictions of all runs."""

import csv

import numpy as np
import pytest

from agiqa.bench.report.coverage import coverage_table
from agiqa.bench.report.reading import read_all
from agiqa.bench.report.sections import ReportSettings, compose
from agiqa.heads.evaluation.conformal import clopper_pearson
from tests.bench.report import made
from tests.bench.report.conftest import BASE
from tests.bench.report.made import cells_of


def covered(runs):
    """By generator, and whether each test item of all runs is inside the interval that the validation rows make."""
    inside = {"all": []}
    for run in runs:
        with (run / "predictions.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        errors = {"validation": [], "test": []}
        for row in rows:
            gap = abs(float(row["mos"]) - float(row["predicted"])) / float(row["spread"])
            errors[row["split"]].append((gap, f"generator {int(row['item']) % 3}"))
        gaps = sorted(gap for gap, _ in errors["validation"])
        half = gaps[int(np.ceil(round(0.9 * (len(gaps) + 1), 9))) - 1]
        for gap, generator in errors["test"]:
            for group in ("all", generator):
                inside.setdefault(group, []).append(gap <= half)
    return inside


def test_coverage_is_counted_over_folds_and_averaged_over_seeds(results, tmp_path):
    settings = {**BASE, "loss": "kl", "label_std": 0.6, "label": "quality", "validation": 0.5}
    out = made.write_ablation(
        tmp_path / "out", {"": results.stores["ours"]}, [{"encoder": "none"}], protocols=["grouped"], **settings
    )
    (found,) = read_all([out])
    table = coverage_table(found, "quality", "grouped")
    assert table is not None
    cells = cells_of(table)
    expected = covered(sorted((out / "runs").iterdir()))
    assert [row["images"] for row in cells] == ["all", "generator 0", "generator 1", "generator 2"]
    for row in cells:
        hits = expected[row["images"]]
        assert int(row["n"]) == len(hits) / 2  # two seeds
        assert float(row["coverage"]) == pytest.approx(np.mean(hits))
        interval = clopper_pearson(round(np.mean(hits) * len(hits) / 2), len(hits) // 2)
        assert [float(row[f"coverage_{end}"]) for end in ("low", "high")] == pytest.approx(interval)
    assert float(cells[0]["nll"]) > 0
    assert "nothing is promised" in table.notes[0]
    sections = [section.name for section in compose([found], ReportSettings()).sections]
    assert "coverage" in sections


def test_results_without_enough_validation_items_have_no_table(results):
    (found,) = read_all([results.ablation])
    assert [coverage_table(found, *group) for group in found.groups()] == [None] * len(found.groups())
