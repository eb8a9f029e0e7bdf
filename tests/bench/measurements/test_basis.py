"""The benchmark of a basis, at a small size, and within the memory that it claims."""

import json
import subprocess
import sys

import pytest

SMALL = ("--vocabulary", "600", "--width", "64", "--items", "3", "--rank", "8")


def run(*options):
    command = [sys.executable, "-m", "agiqa.bench.measurements.basis", *SMALL, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_both_methods_are_measured(tmp_path):
    out = tmp_path / "lines.jsonl"
    outcome = run("--out", str(out))
    assert outcome.returncode == 0, outcome.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["basis second-moment", "basis lm_head"]
    for line in lines:
        measured = line["measured"]
        assert 0 < measured["energy_kept"] < 1
        # random hidden states have no leading directions, so a sketch keeps what chance gives
        assert measured["logit_error"] == pytest.approx((1 - measured["energy_kept"]) ** 0.5, abs=0.1)


def test_too_little_memory_fails():
    assert run("--limit-gb", "0.05").returncode != 0
