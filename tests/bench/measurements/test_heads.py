"""The benchmark of heads: every head trains in a tiny run, and its lines make tables of their form."""

import json
from pathlib import Path

from click.testing import CliRunner

from agiqa.bench.measurements.heads import HEADS, main, tables
from agiqa.bench.recording.tables import read_results

TINY = ["--items", "24", "--tokens", "12", "--channels", "16", "--vocabulary", "40", "--width", "16", "--device", "cpu"]


def run(*arguments):
    outcome = CliRunner().invoke(main, [*TINY, *map(str, arguments)])
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


BENCH = Path(__file__).resolve().parents[3] / "bench"


def test_the_tables_of_the_log_come_from_their_lines():
    log = (BENCH / "LOG.md").read_text()
    for path in (BENCH / "results" / "heads").glob("*.jsonl"):
        rows = [row for row in tables(read_results(path)).splitlines() if row]
        assert len(rows) > 3
        assert [row for row in rows if row not in log] == []


def test_every_head_is_timed_and_the_tables_come_from_the_lines(tmp_path):
    out = tmp_path / "lines.jsonl"
    printed = run("--out", out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == list(HEADS)
    for line in lines:
        assert line["measured"]["ms_per_image"] > 0
        assert line["measured"]["peak_gb"] == 0  # of a GPU only
        assert line["config"]["items"] == 24
        assert line["config"]["parameters"] > 16 * 16
    assert tables(lines) in printed
    assert tables(lines) == CliRunner().invoke(main, ["--table", str(out)]).output.strip()


def test_goals_are_for_a_gpu_and_say_whether_they_are_met():
    measured = {"ms_per_image": 0.7, "epoch_seconds": 1.7, "first_epoch_seconds": 9.0, "set_up_seconds": 4.0}
    lines = [
        {
            "stage": "heads",
            "name": name,
            "config": {"batch_size": HEADS[name][0], "projection": "vocabulary"},
            "measured": {**measured, "peak_gb": 5.0},
        }
        for name in HEADS
    ]
    uncached = {"ms_per_image": 21.0, "model_ms_per_image": 20.0, "epoch_seconds": 50.0}
    lines.append({"stage": "uncached", "name": "xlstm", "config": {"batch_size": 32}, "measured": uncached})
    rows = [row for row in tables(lines).splitlines() if row.endswith((" yes |", " no |"))]
    met = {row.split("|")[1].strip(): row.endswith(" yes |") for row in rows}
    assert met["lstm, ms per image"]
    assert not met["xlstm, ms per image"]
    assert not met["gru, ms per image"]
    assert met["times faster than uncached at batch 32"]  # 21 / 0.7 = 30
    assert not met["nine heads of Table IV x 20 epochs, s"]  # 9 x (4 + 9 + 19 x 1.7) = 407.7
