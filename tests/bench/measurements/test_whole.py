"""The benchmark of the whole command: the real command on files of a tiny model, and the tables of its lines."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from agiqa.bench.measurements.whole import main, tables
from agiqa.bench.recording.tables import read_results

PHASES = ("start", "check", "plan", "load", "calibrate", "model", "fill", "seal")


def test_the_phases_make_up_the_whole_command(tmp_path):
    out, folder = tmp_path / "lines.jsonl", tmp_path / "folder"
    folder.mkdir()
    options = ["--model-shape", "tiny", "--items", "8", "--tokens", "480", "--pixels", "64", "--device", "cpu"]
    outcome = CliRunner().invoke(main, [*options, "--folder", str(folder), "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    (line,) = [json.loads(text) for text in out.read_text().splitlines()]
    measured = line["measured"]
    assert line["config"]["items"] == measured["items"] == 8
    assert sum(measured[f"{phase}_seconds"] for phase in PHASES) == pytest.approx(measured["whole_seconds"])
    assert measured["start_seconds"] > 0
    assert measured["fill_rate"] >= measured["whole_rate"] == pytest.approx(8 / measured["whole_seconds"])
    assert tables([line]) in outcome.output
    assert list(folder.iterdir()) == []


def test_goals_are_of_this_version_and_of_the_path():
    measured = dict.fromkeys((f"{phase}_seconds" for phase in (*PHASES, "whole")), 1.0)
    rates = ("fill_rate", "whole_rate", "rate_without_load", "linear", "of_fill", "waited_for_items")
    measured |= dict.fromkeys(rates, 0.97)
    lines = [
        {"config": {"version": version, "devices": devices, "model": "m", "items": items}, "measured": measured}
        for version, devices, items in (("before", 1, 5), ("now", 1, 5), ("now", 2, 10), ("now", 1, "all"))
    ]
    goals = [row for row in tables(lines).splitlines() if row.startswith("| m")]
    assert [row.split("|")[-2].strip() for row in goals] == ["no", "yes", "yes", "yes"]


def test_the_log_has_the_rows_of_the_lines():
    bench = Path(__file__).resolve().parents[3] / "bench"
    rows = tables(read_results(bench / "results" / "extract" / "h200-whole.jsonl")).splitlines()
    log = (bench / "LOG.md").read_text().splitlines()
    assert len(rows) > 8
    assert [row for row in rows if row not in log] == []
