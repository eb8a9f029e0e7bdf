"""Tables are computed from result lines."""

import json
from pathlib import Path

import pytest

from agiqa.bench.recording.tables import read_results, tables

RESULTS = sorted((Path(__file__).resolve().parents[3] / "bench" / "results").glob("*.jsonl"))
LOG = (Path(__file__).resolve().parents[3] / "bench" / "LOG.md").read_text()


def line(seed, srcc, *, stage="final", **config):
    scores = {"srcc": srcc, "plcc": srcc / 2}
    return {"stage": stage, "config": {"lr": 1, **config}, "seed": seed, "validation": scores, "test": scores}


def test_means_and_deviations_over_seeds_by_hand(tmp_path):
    runs = [line(0, 0.5, encoder="gru"), line(1, 0.7, encoder="gru"), line(0, 0.4, encoder="gru", ema=0.9)]
    path = tmp_path / "r.jsonl"
    path.write_text("\n".join(json.dumps(run) for run in runs))
    found = tables(read_results(path)).splitlines()
    assert "| as said | 2 | 0.6000 ± 0.1414 | 0.3000 ± 0.0707 | 0.6000 ± 0.1414 | 0.3000 ± 0.0707 |" in found
    assert found[-1].startswith("| ema 0.9 | 1 | 0.4000 |")


def test_runs_that_differ_in_one_setting_are_named_by_it():
    found = tables([{"stage": "s", "config": {"head": name}, "test": {"srcc": 1, "plcc": 1}} for name in "ab"])
    assert "| a | 1 | 1.0000 | 1.0000 |" in found
    assert "Unless" not in found


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_table_in_the_log_is_computed_from_the_lines(path):
    rows = [row for row in tables(read_results(path)).splitlines() if row.startswith("| ")]
    assert rows
    assert [row for row in rows if row not in LOG] == []
