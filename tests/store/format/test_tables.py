"""Tables of labels in every format: the same header and rows, whatever the file."""

import json

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agiqa.errors import DataError
from agiqa.progress import said_to
from agiqa.store.format.tables import holds_conversations, open_table, read_table

HEADER = ["name", "prompt", "mos"]
ROWS = [["a.png", "a cat, sleeping", "1.5"], ["b.png", "ein Bär", "4"]]
CSV = 'name,prompt,mos\na.png,"a cat, sleeping",1.5\nb.png,ein Bär,4\n'


def read(path):
    """Header, cells and numbers of the rows, and what was said."""
    said = []
    with said_to(said.append):
        header, rows = read_table(path)
    return header, [row.cells for row in rows], [row.number for row in rows], said


def split_by(separator):
    return "\n".join(separator.join(cells) for cells in (HEADER, *ROWS)) + "\n"


@pytest.mark.parametrize(
    ("content", "announced"),
    [
        (CSV.encode(), None),
        (b"\xef\xbb\xbf" + CSV.encode(), None),
        (CSV.replace("\n", "\r\n").encode(), None),
        (split_by(";").encode(), "semicolons"),
        (split_by("\t").encode(), "tabs"),
        (b"sep=;\n" + split_by(";").encode(), "semicolons"),
        (CSV.encode("utf-16"), "UTF-16"),
        (CSV.encode("cp1252"), "CP1252"),
        (CSV.replace("\n", ",,\n").encode(), None),
        ((CSV + ",,\n,,\n\n").encode(), None),
    ],
    ids=["plain", "bom", "crlf", "semicolon", "tab", "sep", "utf-16", "cp1252", "empty columns", "empty rows"],
)
def test_the_dialects_of_csv_hold_the_same_table(tmp_path, content, announced):
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    header, cells, numbers, said = read(path)
    assert (header, cells) == (HEADER, ROWS)
    assert numbers == ([3, 4] if content.startswith(b"sep=") else [2, 3])
    assert [announced in line and str(path) in line for line in said] == ([] if announced is None else [True])


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("一只猫在睡觉、阳光很好", "gb18030"),
        ("ねこがねている、ひなたで", "shift_jis"),
        ("café crème", "cp1252"),
        ("“café” \u2013 it\u2019s", "cp1252"),
        ("a cat", "utf-16-le"),
        ("a cat", "utf-16-be"),
    ],
)
def test_older_encodings_are_tried_and_announced(tmp_path, text, encoding):
    path = tmp_path / "t.csv"
    path.write_bytes(f"name,prompt\na.png,{text}\n".encode(encoding))
    _, cells, _, said = read(path)
    assert cells == [["a.png", text]]
    assert len(said) == 1
    assert encoding.upper() in said[0]
    assert ("save it as UTF-8" in said[0]) == (not encoding.startswith("utf-16"))


def test_a_separator_that_cannot_be_told_is_asked_for(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,a;b\nx,1;2\n")
    with pytest.raises(DataError, match="commas or semicolons; add a first line such as 'sep=;'"):
        read_table(path)
    path.write_text("sep=,\nname,a;b\nx,1;2\n")
    assert read(path)[1] == [["x", "1;2"]]


def test_prompts_with_other_separators_do_not_mislead(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name;prompt;mos\na.png;a, b, c, d;1\nb.png;e, f;2\n")
    assert read(path)[1] == [["a.png", "a, b, c, d", "1"], ["b.png", "e, f", "2"]]


def test_a_csv_is_read_row_by_row(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("name,mos\n" + "a.png,1\n" * 10 + '"b"x,2\n')
    rows = open_table(path).rows
    assert [next(rows).number for _ in range(10)] == list(range(2, 12))
    with pytest.raises(DataError, match="line 12: not a csv file"):
        next(rows)


def write_xlsx(path, **sheets):
    book = openpyxl.Workbook()
    book.remove(book.active)
    for title, rows in sheets.items():
        sheet = book.create_sheet(title)
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def test_xlsx(tmp_path):
    rows = [HEADER, ["a.png", "a cat, sleeping", 1.5], ["b.png", "ein Bär", None], [None, None, None]]
    path = write_xlsx(tmp_path / "t.xlsx", info=rows, notes=[["made in 2024"]], empty=[])
    header, cells, numbers, _ = read(path)
    assert header == HEADER
    assert cells == [ROWS[0], ["b.png", "ein Bär", ""]]
    assert numbers == [2, 3]
    both = write_xlsx(tmp_path / "u.xlsx", train=rows, test=rows)
    with pytest.raises(DataError, match=r"2 sheets have rows \(train, test\)"):
        read_table(both)
    (tmp_path / "v.xlsx").write_text("no sheet")
    with pytest.raises(DataError, match="cannot be read as xlsx"):
        read_table(tmp_path / "v.xlsx")


@pytest.mark.parametrize("form", ["list", "lines", "columns"])
def test_json(tmp_path, form):
    records = [{"name": "a.png", "prompt": "x", "mos": 1.5}, {"name": "b.png", "mos": None}]
    columns = {"name": ["a.png", "b.png"], "prompt": ["x", ""], "mos": [1.5, None]}
    lines = "\n".join(json.dumps(record) for record in records)
    path = tmp_path / ("t.jsonl" if form == "lines" else "t.json")
    path.write_text({"list": json.dumps(records), "lines": lines, "columns": json.dumps(columns)}[form])
    header, cells, numbers, _ = read(path)
    assert header == HEADER
    assert cells == [["a.png", "x", "1.5"], ["b.png", "", ""]]
    assert numbers == [1, 2]
    assert not holds_conversations(path)


def test_json_of_scores_by_name(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"a.png": 1.5, "b.png": 4}))
    header, cells, _, said = read(path)
    assert header == ["name", "mos_quality"]
    assert cells == [["a.png", "1.5"], ["b.png", "4"]]
    assert "keys as image names" in said[0]
    path.write_text(json.dumps({"a.png": {"mos": 1.5, "prompt": "x"}, "b.png": {"mos": 4}}))
    assert not holds_conversations(path)
    header, cells, _, _ = read(path)
    assert header == ["name", "mos", "prompt"]
    assert cells == [["a.png", "1.5", "x"], ["b.png", "4", ""]]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"a": [1, 2], "b": [1]}', "differ in length (a 2, b 1)"),
        ("[1, 2]", "record 1: not a JSON object"),
        ('{"a": 1}\n{oops', "line 2: not JSON"),
        ("[{}]", "the file has no records"),
        ("[{", "not JSON"),
    ],
)
def test_json_that_is_no_table(tmp_path, text, complaint):
    path = tmp_path / "t.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_table(path)
    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_conversations_are_told_from_tables(tmp_path):
    path = tmp_path / "t.json"
    for record, talks in (
        ({"image": "a.png", "conversations": []}, True),
        ({"messages": []}, True),
        ({"img_path": "a.png", "gt_score": "1"}, False),
    ):
        path.write_text(json.dumps([record]))
        assert holds_conversations(path) is talks


def test_parquet_with_images_as_dicts(tmp_path):
    images = [{"bytes": b"x", "path": "a.png"}, {"bytes": b"y", "path": "b.png"}]
    pq.write_table(pa.table({"image": images, "mos": [1.5, None]}), tmp_path / "t.parquet")
    header, cells, numbers, _ = read(tmp_path / "t.parquet")
    assert header == ["image", "mos"]
    assert cells == [["a.png", "1.5"], ["b.png", ""]]
    assert numbers == [1, 2]
    (tmp_path / "u.parquet").write_text("none")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        read_table(tmp_path / "u.parquet")


def test_a_damaged_workbook_is_one_line(tmp_path):
    """Bytes are changed where the compressed parts of a workbook are, so that each step of reading it may fail."""
    path, book = tmp_path / "t.xlsx", openpyxl.Workbook()
    for row in (["name", "mos"], *([f"{k}.png", k] for k in range(20))):
        book.active.append(row)
    book.save(path)
    whole = path.read_bytes()
    refused = []
    for start in range(40, len(whole), 97):
        path.write_bytes(whole[:start] + bytes(9) + whole[start + 9 :])
        try:
            read(path)
        except DataError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert [message for message in refused if "\n" in message or str(path) not in message] == []
