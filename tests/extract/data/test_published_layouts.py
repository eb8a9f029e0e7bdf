"""Label files in the layouts that public repositories publish, read without editing. All values are made up."""

import csv
import json

import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.labels import read_rows
from agiqa.progress import said_to


def write_csv(path, *rows, encoding="utf-8"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as stream:
        csv.writer(stream).writerows(rows)
    return path


def write_xlsx(path, *rows):
    book = openpyxl.Workbook()
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


def write_json(path, value):
    path.write_text(json.dumps(value))
    return path


def save_image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (len(path.name), 9, 9)).save(path)
    return path


def load(data, *, images=False, **options):
    """The data set, and what was said of it."""
    said = []
    with said_to(said.append):
        loaded = load_data_set(data, variant="no_id", images=images, **options)
    return loaded, [line for line in said if not line.startswith("check:")]


def shown(data):
    return [(item.name, item.prompt, dict(item.labels)) for item in data.items]


def test_agiqa_1k(tmp_path):
    """Image and Score, without prompts."""
    table = write_csv(tmp_path / "AIGC_all.csv", ["Image", "Score"], ["sd_0_1.jpg", "2.5"], ["sd_0_2.jpg", "3.5"])
    with pytest.raises(DataError) as caught:
        load(table)
    assert str(caught.value) == (
        f"{table}: no column 'prompt' (found: Image, Score), which the questions name; if another column holds it, add "
        "--columns prompt=COLUMN, or --prompt TEXT if all images have the same."
    )
    assert shown(load(table, prompt="an animal")[0])[0] == ("sd_0_1.jpg", "an animal", {"quality": 2.5})
    rows = read_rows(table, (0, 5), prompts=False)
    assert [(row.name, row.prompt, row.labels) for row in rows.rows] == [
        ("sd_0_1.jpg", "", {"quality": 2.5}),
        ("sd_0_2.jpg", "", {"quality": 3.5}),
    ]


def test_agiqa_3k(tmp_path):
    header = ["name", "prompt", "adj1", "adj2", "style", "mos_quality", "std_quality", "mos_align", "std_align"]
    table = write_csv(tmp_path / "data.csv", header, ["a.jpg", "a cat", "", "", "", "1.5", "0.5", "2.5", "0.5"])
    data, said = load(table)
    assert shown(data) == [("a.jpg", "a cat", {"quality": 1.5, "correspondence": 2.5})]
    assert said == []


def test_aigciqa2023_with_backslashes_on_a_scale_of_100(tmp_path):
    rows = [[f"AIGCIQA2023\\Image\\allimg\\{k}.png", f"p{k}", 30 + 10 * k] for k in range(4)]
    table = write_csv(tmp_path / "all.csv", ["name", "prompt", "MOS"], *rows)
    for k in range(4):
        save_image(tmp_path / "images" / f"{k}.png")
    with pytest.raises(DataError) as caught:
        load(table, images=True)
    assert str(caught.value) == (
        f"{table}: 4 of 4 values of MOS are outside 0 to 5; they go from 30 to 60. If all are right, add --mos-range "
        "0 100, or the two ends of their scale if those are others."
    )
    data, said = load(table, images=True, mos_range=(0, 100))
    assert [item.name for item in data.items] == ["0.png", "1.png", "2.png", "3.png"]
    assert data.items[3].labels == {"quality": 60.0}
    assert len(said) == 3
    assert "reading column 'MOS' as quality" in said[0]
    assert "4 names are written with backslashes" in said[1]
    assert "differ in folder: 4, such as 'AIGCIQA2023/Image/allimg/0.png', read as '0.png'" in said[2]


def test_diff_agiqa(tmp_path):
    table = write_csv(tmp_path / "train.csv", ["Image", "Prompt", "MOS"], ["a.jpg", "a cat", "2.5"])
    data, said = load(table)
    assert shown(data) == [("a.jpg", "a cat", {"quality": 2.5})]
    assert said == [f"{table}: reading columns 'Image' as name, 'Prompt' as prompt, 'MOS' as quality"]


def test_sc_agiqa_repeats_its_last_row(tmp_path):
    header, rows = ["Image", "prompt", "MOS"], [["a.jpg", "a cat", "2.5"], ["b.jpg", "a dog", "3.5"]]
    table = write_csv(tmp_path / "t.csv", header, *rows, rows[1])
    data, _ = load(table)
    assert shown(data) == [("a.jpg", "a cat", {"quality": 2.5}), ("b.jpg", "a dog", {"quality": 3.5})]
    note = f"note: {table}: rows that repeat an earlier row are left out: 1; line 4 (b.jpg) repeats line 3"
    assert note in data.notes
    other = write_csv(tmp_path / "u.csv", header, *rows, ["b.jpg", "a dog", "4.5"])
    with pytest.raises(DataError, match=r"b\.jpg \(u\.csv, line 4\): duplicate of line 3"):
        load(other)


def test_mint_iqa_csv_without_header_in_another_encoding(tmp_path):
    rows = [["0", "0-0.png", "Glide", "3", "2", "车头扭曲畸变"], ["1", "0-1.png", "Glide", "4", "1", ""]]
    table = write_csv(tmp_path / "t.csv", *rows, encoding="gb18030")
    with pytest.raises(DataError, match=r"no header; .*--columns name=1,mos_quality=4"):
        load(table)
    columns = {"name": "1", "generator": "2", "mos_quality": "3", "prompt": "5"}
    data, said = load(table, columns=columns, on_bad_item="skip")
    assert shown(data) == [("0-0.png", "车头扭曲畸变", {"quality": 3.0})]
    assert data.items[0].generator == "Glide"
    assert "GB18030" in said[0]


def test_mint_iqa_json_says_the_same_several_times(tmp_path):
    one = {"id": "0", "img": "0.png", "prompt": "a cat", "moz1": 0.25, "moz2": 0.5, "moz3": 0.75}
    table = write_json(tmp_path / "t.json", [{**one, "q1": "?", "a1": "Clear."}, {**one, "q1": "!", "a1": "Dull."}])
    columns = {"quality": "moz1", "authenticity": "moz2", "correspondence": "moz3"}
    data, _ = load(table, columns=columns, mos_range=(0, 1))
    labels = {"quality": 0.25, "authenticity": 0.5, "correspondence": 0.75}
    assert shown(data) == [("0.png", "a cat", labels)]


def test_ma_agiqa_json(tmp_path):
    record = {"name": "a.jpg", "prompt": "a cat", "adj1": "", "mos_quality": 1.5, "std_quality": 0.5, "mos_align": 2}
    data, _ = load(write_json(tmp_path / "AGIQA_3k.json", [record]))
    assert shown(data) == [("a.jpg", "a cat", {"quality": 1.5, "correspondence": 2.0})]


def test_q_align_json(tmp_path):
    table = write_json(tmp_path / "agi.json", [{"img_path": "agiqa3k/a.jpg", "gt_score": "2.5"}])
    rows = read_rows(table, (0, 5), prompts=False)
    assert [(row.name, row.labels) for row in rows.rows] == [("agiqa3k/a.jpg", {"quality": 2.5})]
    with pytest.raises(DataError, match="no column 'prompt'"):
        load(table)


def test_aigiqa_20k_xlsx_whose_test_mos_are_hidden(tmp_path):
    rows = [["a.png", "a cat", 2.5, "train"], ["b.png", "a dog", None, "test"], [None, None, None, None]]
    table = write_xlsx(tmp_path / "info.xlsx", ["name", "prompt", "mos", "split"], *rows)
    data, _ = load(table)
    assert shown(data) == [("a.png", "a cat", {"quality": 2.5}), ("b.png", "a dog", {})]
    assert any("1 test rows" in note and "have no MOS" in note for note in data.notes)
    hidden = write_xlsx(tmp_path / "info_test.xlsx", ["name", "prompt", "mos"], ["b.png", "a dog", None])
    assert shown(load(hidden)[0]) == [("b.png", "a dog", {})]


def test_evalmi_50k_xlsx_from_16_to_73(tmp_path):
    rows = [[f"{k}.png", f"p{k}", 16 + 6.3 * k] for k in range(10)]
    table = write_xlsx(tmp_path / "t.xlsx", ["image_name", "prompt", "gt_score"], *rows)
    with pytest.raises(DataError) as caught:
        load(table, on_bad_item="skip")
    assert "10 of 10 values of gt_score are outside 0 to 5; they go from 16 to 72.7" in str(caught.value)
    assert "--mos-range 0 100" in str(caught.value)
    assert len(load(table, mos_range=(0, 100))[0].items) == 10


@pytest.mark.parametrize(
    ("values", "option"), [((-0.5, -0.2, 0.9), "--mos-range -1 1"), ((7, 9.5, 1), "0 10"), ((300, -9.5, 0), "-10 301")]
)
def test_the_scale_is_told_from_the_values(tmp_path, values, option):
    table = write_csv(tmp_path / "t.csv", ["name", "prompt", "mos"], *([f"{k}.png", "x", k] for k in values))
    with pytest.raises(DataError) as caught:
        load(table)
    assert option in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_smaller_scale_is_noted_with_the_option(tmp_path):
    rows = [[f"{k}.png", f"p{k}", k / 10] for k in range(10)]
    data, _ = load(write_csv(tmp_path / "t.csv", ["name", "prompt", "mos"], *rows))
    assert any("add --mos-range 0 1." in note for note in data.notes)


def test_decimal_commas_are_one_line(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("name;prompt;MOS\na.png;x;3,5\nb.png;y;4,25\n")
    with pytest.raises(DataError) as caught:
        load(table)
    assert str(caught.value) == (
        f"{table}, line 2: MOS is '3,5', with a decimal comma, as are 2 values in all; write 3.5 instead."
    )


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_hugging_face_image_folder(tmp_path, suffix):
    save_image(tmp_path / "sub" / "a.png")
    record = {"file_name": "sub/a.png", "text": "a cat", "mos": 2.5}
    table = tmp_path / f"metadata.{suffix}"
    if suffix == "csv":
        write_csv(table, list(record), list(record.values()))
    elif suffix == "jsonl":
        table.write_text(json.dumps(record) + "\n")
    else:
        pq.write_table(pa.Table.from_pylist([record]), table)
    data, _ = load(tmp_path, images=True)
    assert shown(data) == [("sub/a.png", "a cat", {"quality": 2.5})]
    assert data.items[0].image == tmp_path / "sub/a.png"
