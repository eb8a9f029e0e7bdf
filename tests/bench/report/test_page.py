"""The folder of a report: one page that needs nothing else, tables and pictures, whatever the results are called."""

import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from agiqa.bench.report.pictures import draw, safe
from agiqa.bench.report.sections import ReportSettings
from agiqa.bench.report.writing import write_report
from agiqa.errors import DataError
from tests.bench.report import made
from tests.bench.report.conftest import SCRIPT


class Elements(HTMLParser):
    """All start tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def elements(report):
    return Elements(report.page.read_text(encoding="utf-8"))


def test_the_page_refers_to_nothing_outside_itself(elements):
    for tag, attributes in elements.tags:
        for name in ("src", "href", "xlink:href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    assert not [tag for tag, _ in elements.tags if tag in ("iframe", "object", "embed", "base", "form")]
    assert len([tag for tag, _ in elements.tags if tag == "script"]) == 1


def test_text_of_the_results_stays_text(report, elements):
    page = report.page.read_text(encoding="utf-8")
    assert SCRIPT not in page
    assert "Mind <script>alert(1)</script>" in "".join(elements.text)
    assert "<title>A &amp; B</title>" in page
    assert "<b>item</b>" not in page


def test_names_are_unique_and_links_lead_to_them(elements):
    names = [attributes["id"] for _, attributes in elements.tags if "id" in attributes]
    assert len(set(names)) == len(names)
    links = {
        attributes["href"][1:] for tag, attributes in elements.tags if tag == "a" and attributes["href"].startswith("#")
    }
    assert links <= set(names)
    assert len(links) > 8
    used = set(re.findall(r"url\(#([^)]*)\)", str(elements.tags)))
    assert used <= set(names)


def test_every_picture_says_what_it_shows(elements):
    alts = [attributes["aria-label"] for _, attributes in elements.tags if attributes.get("role") == "img"]
    assert len(alts) > 10
    assert all(len(alt) > 60 for alt in alts)
    assert len(set(alts)) == len(alts)
    images = [attributes["alt"] for tag, attributes in elements.tags if tag == "img"]
    assert images
    assert all("made for the prompt" in alt for alt in images)


def test_pictures_and_tables_are_files_too(report):
    assert report.page.stat().st_size < 5_000_000
    assert len({path.name for path in (*report.tables, *report.pictures)}) == len(report.tables) + len(report.pictures)
    assert {path.parent.name for path in report.tables} == {"tables"}
    for path in report.pictures:
        if path.suffix == ".png":
            with Image.open(path) as image:
                assert min(image.size) > 300
        else:
            assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert all(path.stat().st_size > 20 for path in report.tables)


def test_the_same_results_make_the_same_files(results, tmp_path):
    first, again = (
        write_report([results.ranks], tmp_path / name, ReportSettings(images=results.images))
        for name in ("first", "again")
    )
    files = [(one.page, *one.tables, *one.pictures) for one in (first, again)]
    for one, other in zip(*files, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def test_a_report_is_replaced_and_other_folders_are_not_touched(results, copy, tmp_path):
    first = write_report([results.ranks], tmp_path / "out")
    (tmp_path / "out" / "tables" / "mine.txt").write_text("kept")
    second = write_report(
        [copy(results.ranks).rename(tmp_path / "other")], tmp_path / "out", ReportSettings(notes=["new"])
    )
    assert {path.name for path in first.tables} == {path.name for path in second.tables}
    lines = [line for line in made.read_lines(tmp_path / "other" / "rows.jsonl") if line["store_name"] == "r2"]
    made.write_lines(tmp_path / "other" / "rows.jsonl", lines)
    third = write_report([tmp_path / "other"], tmp_path / "out")
    gone = set(second.tables) - set(third.tables)
    assert gone
    assert not any(path.exists() for path in gone)
    assert (tmp_path / "out" / "tables" / "mine.txt").read_text() == "kept"
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "letter.txt").write_text("mine")
    with pytest.raises(DataError, match="letters exists and is no report"):
        write_report([results.ranks], tmp_path / "letters")
    assert [path.name for path in (tmp_path / "letters").iterdir()] == ["letter.txt"]


def test_odd_names_of_rows_are_drawn_and_written_as_they_are(results, copy, tmp_path):
    folder = copy(results.ranks)
    odd = 'a $x_1$ | <b>"row"</b>'
    for name in ("rows.jsonl", "results.jsonl"):
        lines = made.read_lines(folder / name)
        for line in lines:
            if line["row"] == "encoder=none":
                line["row"] = odd
            if (line.get("against") or {}).get("row") == "encoder=none":
                line["against"]["row"] = odd
        made.write_lines(folder / name, lines)
    report = write_report([folder], tmp_path / "odd")
    elements = Elements(report.page.read_text(encoding="utf-8"))
    assert "".join(elements.text).count(odd) > 5
    assert not [attributes for tag, attributes in elements.tags if tag == "b"]


def test_a_picture_takes_the_colours_of_the_page(tmp_path):
    picture = draw(
        "p",
        "t",
        alt="a",
        caption="c",
        height=2.0,
        paint=lambda figure: figure.add_subplot().plot([0, 1], label=safe("$5")),
    )
    assert "var(--ink)" in picture.inline
    assert "var(--card)" in picture.inline
    assert 'id="p-' in picture.inline
    assert "#24292f" in picture.svg
    assert "var(" not in picture.svg
