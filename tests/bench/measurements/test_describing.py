"""The measurement of descriptions on the tiny model, from the command line to its tables."""

import json

import pytest
from click.testing import CliRunner

from agiqa.bench.measurements.describing import main, tables

OPTIONS = ["--model-shape", "tiny", "--items", "4", "--old-items", "2", "--new-tokens", "6", "--pixels", "60"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    out = tmp_path_factory.mktemp("describing") / "lines.jsonl"
    outcome = CliRunner().invoke(main, [*OPTIONS, "--device", "cpu", "--phase-slots", "2", "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_every_part_is_measured(lines):
    assert [(line["stage"], line["name"]) for line in lines] == [
        ("describe", "slots"),
        ("describe", "batches of 8"),
        ("describe phases", "2 slots"),
        ("describe agreement", "slots"),
        ("describe agreement", "batches of 8"),
    ]
    slots, batches, phases, *agreement = lines
    assert (slots["config"]["decoder"], slots["config"]["items"]) == ("slots", 4)
    assert (batches["config"]["decoder"], batches["config"]["items"]) == ("batches", 2)
    assert slots["config"]["new_tokens"] == 6 + 16  # no answer ends before its limit
    assert all(value > 0 for key, value in phases["measured"].items())
    assert [line["measured"]["differing"] for line in agreement] == [0, 0]  # in float32


def test_the_tables_have_goals_for_a_gpu_alone(lines):
    assert "images per second, from files to lines" not in tables(lines)
    on_gpu = [{**line, "config": {**line["config"], "device": "a GPU"}} for line in lines]
    assert "| images per second, from files to lines | at least 20 |" in tables(on_gpu)
    assert "| 2 slots: new tokens per second | at least 8000 |" in tables(on_gpu)
