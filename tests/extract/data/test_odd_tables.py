"""Tables as people have them: other tables in the folder, no table at all, names that are absolute, one prompt."""

import json

import openpyxl
import pytest

from agiqa.errors import ConfigError, DataError
from agiqa.extract.data.datasets import items_of_images, load_data_set
from agiqa.progress import said_to
from tests.extract.small_sets import save_noise

TABLE = "name,prompt,mos\na.png,a cat,3\n"


def load(data, *, images=False, **options):
    """The data set, and what was said of it."""
    said = []
    with said_to(said.append):
        loaded = load_data_set(data, variant="no_id", images=images, **options)
    return loaded, [line for line in said if not line.startswith("check:")]


def names(data):
    return [item.name for item in data.items]


def test_the_only_table_of_a_folder_is_read(tmp_path):
    (tmp_path / "AIGC_all.csv").write_text(TABLE)
    (tmp_path / "~$AIGC_all.xlsx").write_text("a lock file of an office program")
    (tmp_path / "settings.json").write_text("{}")
    data, said = load(tmp_path)
    assert names(data) == ["a.png"]
    assert said == [f"{tmp_path}: reading the table AIGC_all.csv"]
    (tmp_path / "other.tsv").write_text(TABLE.replace(",", "\t"))
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: no data.csv, and 2 tables (AIGC_all.csv, other.tsv); give the one to read instead of the folder."
    )
    (tmp_path / "data.csv").write_text(TABLE)
    assert load(tmp_path)[1] == []


def test_a_folder_of_images_needs_no_table(tmp_path):
    for number, name in enumerate(("b.png", "deep/a.PNG", ".hidden.png")):
        save_noise(tmp_path / name, seed=number)
    data, said = load(tmp_path, images=True, prompt="a cat")
    assert [(item.name, item.prompt, dict(item.labels), item.image) for item in data.items] == [
        (name, "a cat", {}, tmp_path / name) for name in ("b.png", "deep/a.PNG")
    ]
    assert said == [f"{tmp_path}: no table; reading its 2 images, named by their files, without labels"]
    assert (data.notes, data.warnings) == ((), ())
    with pytest.raises(ConfigError, match=r"2 images and no table.*--prompt TEXT if all have the same"):
        load(tmp_path)


def test_a_prompt_for_all_is_for_tables_without_prompts(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("Image,Score\na.png,3\n")
    assert load(table, prompt="a cat")[0].items[0].prompt == "a cat"
    table.write_text(TABLE)
    with pytest.raises(ConfigError, match=r"t\.csv has a column with prompts, 'prompt'; leave --prompt out"):
        load(table, prompt="a cat")
    with pytest.raises(ConfigError, match="The prompt is empty; give the text"):
        load(table, prompt=" ")


def test_absolute_names_are_the_same_wherever_the_images_lie(tmp_path):
    """Two users of one set, with the images in other places: items are named below the folder common to all."""
    found = []
    for user in ("alice", "bob"):
        files = [tmp_path / user / "pictures" / name for name in ("one/a.png", "two/a.png")]
        for number, file in enumerate(files):
            save_noise(file, seed=number)
        table = tmp_path / user / "labels" / "t.csv"
        table.parent.mkdir()
        table.write_text("name,prompt,mos\n" + "".join(f"{file},x,3\n" for file in files))
        data, said = load(table, images=True)
        assert [item.image for item in data.items] == files
        assert said == [
            f"{table}: 2 names are absolute paths; items are named by the path below {tmp_path / user / 'pictures'}"
        ]
        assert names(load(table)[0]) == names(data)  # a model that reads no images
        found.append(names(data))
    assert found == [["one/a.png", "two/a.png"]] * 2


def test_absolute_names_of_another_machine_are_found_in_the_folder(tmp_path):
    save_noise(tmp_path / "images/one/a.png", seed=0)
    (tmp_path / "data.csv").write_text("name,prompt,mos\n/home/else/set/one/a.png,x,3\n")
    assert names(load(tmp_path, images=True)[0]) == ["one/a.png"]


def test_one_image_under_two_spellings_is_one_item(tmp_path):
    save_noise(tmp_path / "images/a.png", seed=0)
    (tmp_path / "data.csv").write_text("name,prompt,mos\na.png,x,3\n./a.png,y,4\n")
    with pytest.raises(DataError, match="duplicate of line 2"):
        load(tmp_path, images=True)


def test_splits_in_other_words(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("name,prompt,mos,split\na.png,x,1,Train\nb.png,x,2,validation\nc.png,x,3,test\n")
    data, said = load(table)
    assert [item.split for item in data.items] == ["train", "val", "test"]
    assert said == [f"{table}: reading split 'Train' as train, split 'validation' as val"]


def test_standard_deviations_are_kept(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("name,prompt,mos_quality,std_quality,std_align\na.png,x,1,.5,\nb.png,x,2,0,.25\n")
    data, said = load(table)
    assert [dict(item.deviations) for item in data.items] == [
        {"quality": 0.5},
        {"quality": 0.0, "correspondence": 0.25},
    ]
    assert said == []
    table.write_text("name,prompt,mos_quality,std_quality\na.png,x,1,-1\n")
    with pytest.raises(DataError, match="std_quality is '-1', not a standard deviation"):
        load(table)


def test_a_list_within_an_object_is_read(tmp_path):
    table = tmp_path / "t.json"
    rows = [{"image": ["a.png"], "prompt": "x", "mos": 3}]
    table.write_bytes(json.dumps({"info": {"version": 1}, "data": rows}).encode("utf-16"))
    data, said = load(table)
    assert names(data) == ["a.png"]
    assert "reading the list 'data'" in said[1]


def test_sheets_without_a_stated_size(tmp_path):
    """Other programs leave the size out; then openpyxl gives rows without their empty cells at the end."""
    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    for row in (
        ["name", "prompt", "mos", "split"],
        ["a.png", "x", 3, "train"],
        ["b.png", "x", None, "test"],
        ["c", "x"],
    ):
        sheet.append(row)
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(DataError) as caught:
        load(tmp_path / "t.xlsx")
    assert "1 problem\n  c (t.xlsx, line 4): no MOS at all" in str(caught.value)


def test_a_folder_to_score(tmp_path):
    for number, name in enumerate(("b.png", "deep/a.jpg")):
        save_noise(tmp_path / "set" / name, seed=number)
    table = tmp_path / "prompts.csv"
    table.write_text("name,prompt\nB.png,a dog\ndeep/a.png,a cat\n")
    items, problems = items_of_images([tmp_path / "set"], prompt=None, table=table)
    assert problems == {}
    assert [(item.name, item.prompt) for item in items] == [
        (str(tmp_path / "set/b.png"), "a dog"),
        (str(tmp_path / "set/deep/a.jpg"), "a cat"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="a folder without images"):
        items_of_images([tmp_path / "empty"], prompt="x", table=None)


@pytest.mark.parametrize(
    ("written", "file"), [("e\u0301.png", "\u00e9.png"), (" a.png ", "a.png"), ("C:\\pictures\\a.png", "a.png")]
)
def test_names_in_other_writings(tmp_path, written, file):
    save_noise(tmp_path / "images" / file, seed=0)
    (tmp_path / "data.csv").write_text(f"name,prompt,mos\n{written},x,3\n")
    assert names(load(tmp_path, images=True)[0]) == [file]


def test_a_space_after_each_comma_belongs_to_no_value(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text('name, prompt, mos\na.png, "a cat, black", 3\n')
    assert load(table)[0].items[0].prompt == "a cat, black"
    table.write_text("name,prompt,mos\na.png, a cat,3\n")
    assert load(table)[0].items[0].prompt == " a cat"


def test_a_table_as_pandas_writes_it_by_default(tmp_path):
    table = tmp_path / "t.json"
    rows = {"name": {"0": "a.png", "1": "b.png"}, "prompt": {"0": "x", "1": "y"}, "mos": {"0": 3, "1": None}}
    table.write_text(json.dumps({**rows, "split": {"0": "train", "1": "test"}}))
    items = load(table)[0].items
    assert [(item.name, item.prompt, dict(item.labels)) for item in items] == [
        ("a.png", "x", {"quality": 3.0}),
        ("b.png", "y", {}),
    ]
