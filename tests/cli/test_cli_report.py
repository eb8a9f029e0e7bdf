"""`agiqa report` by real processes."""

import json

import pytest

from tests.bench.report import made
from tests.cli.refusals import misuse, refuse

TEST = {"n": 9, "srcc": 0.5, "plcc": 0.6, "ci": {"srcc": [0.4, 0.6], "plcc": [0.5, 0.7]}}
ROW = {"kind": "head", "row": "encoder=gru", "settings": {"encoder": "gru"}, "protocol": "grouped", "label": "quality"}


def write(folder, *rows):
    made.write_lines(folder / "rows.jsonl", rows)
    (folder / "about.json").write_text(json.dumps({"kind": "ablation", "stores": {"": {"id": "a", "data": "demo"}}}))
    return folder


def test_a_report_is_written_beside_the_results_and_told(agiqa, tmp_path):
    out = write(tmp_path / "out", {**ROW, "test": TEST})
    told = agiqa("report", out, "--json", "--title", "Mine", "--note", "one", "--note", "two").json
    assert told["page"] == str(out / "report" / "index.html")
    page = (out / "report" / "index.html").read_text()
    assert "<h1>Mine</h1>" in page
    assert "<li>one</li>" in page
    assert "<li>two</li>" in page
    files = {str(path) for path in (out / "report").rglob("*.*")} - {told["page"], told["document"]}
    assert files == {*told["tables"], *told["pictures"]}
    assert {"what", "command", "how"} == set(told["missing"][0])
    spoken = agiqa("report", out, "--to", tmp_path / "elsewhere")
    assert spoken.code == 0
    assert str(tmp_path / "elsewhere" / "index.html") in spoken.out
    assert "not in it: Results across data sets, few-shot curve: agiqa transfer" in spoken.out


def test_columns_latex_and_pdf_are_there_when_they_are_asked_for(agiqa, tmp_path):
    out = write(tmp_path / "out", {**ROW, "test": {**TEST, "krcc": 0.4, "rmse": 0.7}})
    document = out / "report" / "report.md"
    plain = agiqa("report", out, "--json").json
    assert "KRCC" not in document.read_text()
    told = agiqa("report", out, "--show", "krcc", "--show", "rmse", "--latex", "--pdf", "--json").json
    assert "| Row | SRCC | PLCC | KRCC | RMSE |" in document.read_text()
    suffixes = [{path.rpartition(".")[2] for path in (*one["tables"], *one["pictures"])} for one in (plain, told)]
    assert suffixes == [{"md", "csv", "png", "svg"}, {"md", "csv", "tex", "png", "svg", "pdf"}]
    agiqa("report", out, "--json").json  # noqa: B018  # raises unless it succeeds
    assert not [path for path in (out / "report").rglob("*") if path.suffix in (".tex", ".pdf")]
    misuse(agiqa("report", out, "--show", "kcc"), "kcc", "krcc")


def test_what_cannot_be_reported_is_refused_by_one_message(agiqa, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(agiqa("report", tmp_path / "empty"), "empty is no folder of results", "Give the OUT of `agiqa ablate`")
    refuse(agiqa("report", write(tmp_path / "none")), "rows.jsonl holds no results", "agiqa ablate")
    out = write(tmp_path / "out", {**ROW, "test": TEST})
    refuse(agiqa("report", out, out), "is given twice")
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter").write_text("mine")
    refuse(agiqa("report", out, "--to", tmp_path / "letters"), "exists and is no report")
    assert agiqa("report", tmp_path / "nowhere").code == 2
    assert agiqa("report").code == 2


def test_a_damaged_line_is_told_and_the_rest_reported(agiqa, tmp_path):
    out = write(tmp_path / "out", {**ROW, "test": TEST})
    with (out / "rows.jsonl").open("a") as file:
        file.write("broken\n")
    told = agiqa("report", out, "--json").json
    assert len(told["problems"]) == 1
    assert "rows.jsonl, line 2 is damaged and was left out" in told["problems"][0]
    assert "rows.jsonl, line 2 is damaged" in (out / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("place", "options", "there"),
    [
        ("/stores/agiqa-3k-r128.agiqa", [], True),
        ("https://host/AGIQA-3k.agiqa/", [], True),
        ("/stores/mine.agiqa", [], False),
        ("/stores/mine.agiqa", ["--data", "AGIQA-3k"], True),
    ],
)
def test_the_paper_stands_beside_stores_whose_place_or_reader_tells_the_data_set(
    agiqa, tmp_path, place, options, there
):
    """Stores themselves name no data set: `facts_of` has counts and hashes of it."""
    name = "encoder=gru,pooling=mean"
    settings = {"projection": "sketch", "encoder": "gru", "pooling": "mean"}
    out = write(tmp_path / "out", {**ROW, "row": name, "settings": settings, "test": TEST})
    about = {"id": "a", "path": place, "data": {"items": 9, "skipped": 0, "plan_sha256": "b"}, "model": "demo"}
    (out / "about.json").write_text(json.dumps({"kind": "ablation", "stores": {"": about}}))
    line = {"name": f"{name},seed=0", "row": name, "protocol": "grouped", "config": {**settings, "label": "quality"}}
    made.write_lines(out / "results.jsonl", [line])
    told = agiqa("report", out, *options, "--json").json
    assert any("paper-agiqa-3k-quality" in path for path in told["tables"]) == there
    assert ("0.8928" in (out / "report" / "index.html").read_text()) == there  # GRU in Table IV
