"""bench/RESULTS.md is what `agiqa report` makes of the result lines beside it."""

from pathlib import Path

BENCH = Path(__file__).resolve().parents[3] / "bench"


def test_the_tables_of_the_results_come_from_their_lines(agiqa, tmp_path):
    folders = sorted(path.parent for path in (BENCH / "results").glob("*/about.json"))
    assert folders
    to = tmp_path / "report"
    told = agiqa("report", *folders, "--to", to, "--options", BENCH / "results" / "report.yaml", "--json").json
    assert told["document"] == str(to / "report.md")
    assert (to / "report.md").read_text(encoding="utf-8") == (BENCH / "RESULTS.md").read_text(encoding="utf-8")
