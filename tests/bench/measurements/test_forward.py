"""The benchmark of the forward pass: a tiny model goes through the parts, and the lines make tables."""

import json

from click.testing import CliRunner

from agiqa.bench.measurements.forward import FORMS, main


def test_every_way_computes_the_same(tmp_path):
    out = tmp_path / "lines.jsonl"
    options = ["--model-shape", "tiny", "--device", "cpu", "--parts", "text,vision", "--sizes", "1", "--repeats", "1"]
    outcome = CliRunner().invoke(main, [*options, "--out", str(out)])
    assert outcome.exit_code == 0, outcome.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    ways = [
        "text: transformers",
        "text: packed",
        "vision: transformers",
        *(f"vision: packed, {form}" for form in FORMS),
    ]
    assert [line["name"] for line in lines] == ways
    assert all(line["measured"]["difference"] < 1e-5 for line in lines)
    assert all(line["measured"]["ms_per_image"] > 0 for line in lines)
    assert f"| {ways[-1]} | 1 |" in outcome.output
    assert CliRunner().invoke(main, ["--table", str(out)]).output.strip() in outcome.output
