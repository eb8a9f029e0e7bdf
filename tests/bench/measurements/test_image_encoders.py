"""The benchmark of image encoders: tiny encoders in both ways, and the table of the log is that of its lines."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from agiqa.bench.measurements.image_encoders import main, tables
from agiqa.bench.recording.tables import read_results
from tests.extract.tiny_timm import needs_timm

BENCH = Path(__file__).resolve().parents[3] / "bench"
TINY = ["--images", "4", "--pixels", "64", "--batch-size", "3", "--repeats", "1", "--device", "cpu"]


@needs_timm
def test_each_encoder_has_a_line_of_both_ways(tmp_path):
    out = tmp_path / "lines.jsonl"
    encoders = ["--encoder", "timm:test_vit", "--encoder", "tiny/vision", "--encoder", "tiny/projector"]
    outcome = CliRunner().invoke(main, [*encoders, *TINY, "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == encoders[1::2]
    for line in lines:
        measured, config = line["measured"], line["config"]
        assert measured["ratio"] == pytest.approx(measured["together_images_per_s"] / measured["alone_images_per_s"])
        assert (config["images"], config["batch_size"], config["device"]) == (4, 3, "cpu")
        assert config["rows"] > 10
    assert tables(lines) in outcome.output
    assert tables(lines) == CliRunner().invoke(main, ["--table", str(out)]).output.strip()


@pytest.mark.parametrize("name", ["huge/vision", "tiny/visoin", "resnet50"])
def test_an_encoder_that_there_is_not_is_told(name):
    outcome = CliRunner().invoke(main, ["--encoder", name, *TINY])
    assert outcome.exit_code == 1
    assert "Error: " in outcome.output


def test_the_tables_of_the_log_are_those_of_the_lines():
    log = (BENCH / "LOG.md").read_text()
    assert tables(read_results(BENCH / "results" / "extract" / "cpu-image-encoders.jsonl")) in log
