"""The benchmark of image networks: a tiny run, its tables, and the rates that a reproduction is estimated by."""

from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from agiqa.bench.measurements.networks import main, rates_of, tables
from agiqa.bench.networks.config import TABLE_II
from agiqa.bench.recording.tables import read_results
from agiqa.bench.reproducing.costs import RATES, with_network_rates

BENCH = Path(__file__).resolve().parents[3] / "bench"
LINES = BENCH / "results" / "networks" / "h200.jsonl"
TINY = ["--images", "20", "--pixels", "48", "--image-size", "32", "--batch-size", "4", "--device", "cpu"]


def run(*arguments):
    outcome = CliRunner().invoke(main, list(map(str, arguments)))
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def test_a_short_run_times_every_network_that_it_names(tmp_path):
    out = tmp_path / "lines.jsonl"
    names = ["test_resnet", "test_efficientnet"]
    run(*TINY, "--short", "--most-crops", 8, *(word for name in names for word in ("--network", name)), "--out", out)
    lines = read_results(out)
    assert [line["name"] for line in lines] == names
    for line in lines:
        assert line["config"]["epochs"] == 3
        assert line["config"]["recipe_epochs"] == 20
        assert line["config"]["images"] == 11  # of which 72 % are trained on
        trained = 11 - round(0.28 * 11)
        measured = line["measured"]
        assert measured["images_per_s"] == pytest.approx(trained / measured["epoch_s"])
        assert measured["peak_gb"] == 0  # of a GPU only
    assert "at most" not in tables(lines)  # the goal is one of 20 epochs


def test_the_tables_of_the_log_come_from_their_lines():
    log = (BENCH / "LOG.md").read_text()
    for path in (BENCH / "results" / "networks").glob("*.jsonl"):
        rows = [row for row in tables(read_results(path)).splitlines() if row]
        assert len(rows) > 3
        assert [row for row in rows if row not in log] == []


def test_estimates_use_the_measured_rates():
    measured = rates_of(read_results(LINES))
    shipped = yaml.safe_load(RATES.read_text())["networks"]
    assert shipped == {name: round(measured[name]) if name in measured else None for name in TABLE_II}


def test_rates_are_written_among_comments_that_stay():
    text = "a: 1  # one\n# two\nnetworks: {resnet50: 3, vil: null, dbcnn: 4}\nb: 2\n"
    written = with_network_rates(text, {"vil": 5.6, "resnet50": 7.2, "other": 1.0})
    assert written == "a: 1  # one\n# two\nnetworks: {resnet50: 7, vil: 6, dbcnn: 4}\nb: 2\n"


def test_rates_need_lines():
    outcome = CliRunner().invoke(main, [*TINY, "--write-rates"])
    assert outcome.exit_code == 2
    assert "--write-rates needs --table" in outcome.output


def test_of_several_lines_of_a_network_the_last_counts():
    lines = [{"name": "vil", "measured": {"images_per_s": rate}} for rate in (1.0, 2.0)]
    assert rates_of(lines) == {"vil": 2.0}
