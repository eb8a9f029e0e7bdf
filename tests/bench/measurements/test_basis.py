"""The benchmark of a basis, at a small size, and within the memory that it claims."""

import json
import subprocess

import pytest
from click.testing import CliRunner

from agiqa.bench.measurements.basis import main

SMALL = ("--vocabulary", "600", "--width", "64", "--items", "3", "--rank", "8")


def run(*options):
    """The command in this process; each measurement is in a process of its own, as always."""
    return CliRunner().invoke(main, [*SMALL, *options])


def test_both_methods_are_measured(tmp_path):
    out = tmp_path / "lines.jsonl"
    outcome = run("--out", str(out))
    assert outcome.exit_code == 0, outcome.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == ["basis second-moment", "basis lm_head"]
    for line in lines:
        measured = line["measured"]
        assert 0 < measured["energy_kept"] < 1
        # random hidden states have no leading directions, so a sketch keeps what chance gives
        assert measured["logit_error"] == pytest.approx((1 - measured["energy_kept"]) ** 0.5, abs=0.1)


def test_too_little_memory_fails():
    outcome = run("--limit-gb", "0.05")
    assert isinstance(outcome.exception, subprocess.CalledProcessError)
    assert "--measure" in outcome.exception.cmd
