"""The measurement of describing and extracting in one pass on the tiny model, from the command line to its tables."""

import json

import pytest
from click.testing import CliRunner

from agiqa.bench.measurements.one_pass import APART, TOGETHER, main, tables

OPTIONS = ["--model-shape", "tiny", "--items", "4", "--new-tokens", "6", "--pixels", "60", "--device", "cpu"]


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    out = tmp_path_factory.mktemp("one-pass") / "lines.jsonl"
    outcome = CliRunner().invoke(main, [*OPTIONS, "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_both_ways_fill_stores_with_the_same_rows(lines):
    assert [line["name"] for line in lines] == [APART, TOGETHER, "rows"]
    apart, together, rows = (line["measured"] for line in lines)
    assert (apart["reused"], together["reused"]) == (0, 4)
    assert (rows["same"], rows["largest_row_error"] < 1e-5) == (4, True)
    assert f"| {TOGETHER} | 4 |" in tables(lines)
