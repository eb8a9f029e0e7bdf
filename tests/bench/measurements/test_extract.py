"""The benchmark of extraction: a tiny model goes through all steps, and the lines make tables of their form."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from agiqa.bench.measurements import devices as extract_devices
from agiqa.bench.measurements.extract import ENCODINGS, made_up_work, main, tables
from agiqa.bench.recording.tables import read_results
from agiqa.extract.data.images import open_image
from agiqa.extract.data.items import read_image

TINY = [
    *("--model-shape", "tiny", "--items", "12", "--logit-items", "2", "--tokens", "480", "--pixels", "64"),
    *("--rank", "8", "--device", "cpu", "--workers", "0"),
]


def test_every_encoding_goes_the_whole_way_beside_the_bare_forward(tmp_path):
    out, folder = tmp_path / "lines.jsonl", tmp_path / "folder"
    folder.mkdir()
    outcome = CliRunner().invoke(main, [*TINY, "--out", str(out), "--folder", str(folder)])
    assert outcome.exit_code == 0, outcome.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["name"] for line in lines] == list(ENCODINGS)
    for line in lines:
        measured = line["measured"]
        assert line["config"]["items"] == (2 if line["name"] == "logits" else 12)
        assert abs(line["config"]["tokens"] - 480) < 40
        assert measured["ratio"] * measured["bare_images_per_second"] - measured["images_per_second"] < 1e-6
        assert measured["fill_seconds"] > 0
        assert measured["peak_gb"] == 0  # of a GPU only
        assert measured.get("disk_mb_per_second", 1.0) > 0
        assert ("disk_mb_per_second" in measured) == (line["name"] == "logits")
    assert tables(lines) in outcome.output
    assert tables(lines) == CliRunner().invoke(main, ["--table", str(out)]).output.strip()
    assert "goal" not in tables(lines)
    assert list(folder.iterdir()) == []


def test_made_up_images_are_checked_as_those_of_a_command(tmp_path):
    """So that a plan needs no pixels here either, and waits for no workers."""
    options = {"model_shape": "tiny", "items": 2, "tokens": 300, "pixels": 64, "device": "cpu", "folder": tmp_path}
    with made_up_work(options) as (_, _, _, data):
        for item in data.items:
            read_image(item)
            assert item.is_checked
            assert item.checked_size == open_image(item.image).size


def test_lines_that_cannot_be_kept_leave_no_pictures_or_stores_behind(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    options = [
        *TINY,
        "--encodings",
        "logits",
        "--folder",
        str(folder),
        "--out",
        str(tmp_path / "nowhere" / "lines.jsonl"),
    ]
    outcome = CliRunner().invoke(main, options)
    assert isinstance(outcome.exception, FileNotFoundError)
    assert list(folder.iterdir()) == []


def test_goals_are_for_a_gpu_and_say_whether_they_are_met():
    measured = {
        **dict.fromkeys(("whole_images_per_second", "row_mb_per_second", "store_gb"), 1.0),
        **{f"{phase}_seconds": 1.0 for phase in ("plan", "load", "calibrate", "model", "fill", "seal")},
        "images_per_second": 53.0,
        "bare_images_per_second": 47.0,
        "ratio": 53 / 47,
        "forward_images_per_second": 57.0,
        "peak_gb": 9.0,
    }
    config = {"items": 512, "tokens": 477.0, "batch_size": 17}
    lines = [{"stage": "extract", "name": name, "config": config, "measured": measured} for name in ENCODINGS]
    rows = [row for row in tables(lines).splitlines() if row.endswith((" yes |", " no |"))]
    assert len(rows) == 7
    assert [row.endswith(" yes |") for row in rows] == [False, True, True, False, True, True, True]


def test_the_tables_of_the_log_come_from_their_lines():
    bench = Path(__file__).resolve().parents[3] / "bench"
    log = (bench / "LOG.md").read_text()
    rows = [row for row in tables(read_results(bench / "results" / "extract" / "h100.jsonl")).splitlines() if row]
    assert len(rows) > 10
    assert [row for row in rows if row not in log] == []


def test_devices_are_compared_with_one(tmp_path):
    """Of a CPU: two processes fill as many items each, and the table holds the goal."""
    out = tmp_path / "lines.jsonl"
    options = [
        "--model-shape",
        "tiny",
        "--items",
        "12",
        "--tokens",
        "90",
        "--pixels",
        "56",
        "--device",
        "cpu",
        "--workers",
        "0",
    ]
    done = CliRunner().invoke(extract_devices.main, [*options, "--out", str(out)])
    assert done.exit_code == 0, done.output
    lines = read_results(out)
    assert [(line["config"]["devices"], line["config"]["items"]) for line in lines] == [(1, 12), (2, 24)]
    rates = [line["measured"]["images_per_second"] for line in lines]
    assert [line["measured"]["linear"] for line in lines] == pytest.approx([1.0, rates[1] / (2 * rates[0])])


@pytest.mark.parametrize("name", ["h200-x2", "h200-x4"])
def test_the_log_has_the_rows_of_the_lines(name):
    bench = Path(__file__).resolve().parents[3] / "bench"
    rows = extract_devices.tables(read_results(bench / "results" / "extract" / f"{name}.jsonl")).splitlines()
    log = (bench / "LOG.md").read_text().splitlines()
    assert [row for row in rows if row not in log] == []
