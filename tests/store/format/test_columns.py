"""Columns by what they mean: recognised, named by the user, and refused where two may mean the same."""

import pytest

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.progress import said_to
from agiqa.store.format.columns import open_labels


def opened(path, text, columns=None):
    """The table as a list of dicts, and what was said."""
    path.write_text(text)
    said = []
    with said_to(said.append):
        table = open_labels(path, columns)
        rows = [dict(zip(table.header, row.cells, strict=True)) for row in table.rows]
    return rows, said


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.csv"


@pytest.mark.parametrize(
    "name", ["image", "IMG", "img-path", "Image Path", "filename", "file_name", "image_name", "path"]
)
@pytest.mark.parametrize("mos", ["MOS", "score", "Mean", "gt_score", "MOS quality", "quality"])
def test_usual_names_are_recognised_and_announced_once(path, name, mos):
    rows, said = opened(path, f"{name},{mos}\na.png,1\nb.png,2\n")
    assert rows == [{"name": "a.png", "mos_quality": "1"}, {"name": "b.png", "mos_quality": "2"}]
    assert said == [f"{path}: reading columns {name!r} as name, {mos!r} as quality"]


def test_published_names_need_no_word(path):
    text = "name,prompt,adj1,mos_quality,std_quality,mos_align,std_align\na,x,y,1,0,2,0\n"
    rows, said = opened(path, text)
    assert rows[0]["mos_align"] == "2"
    assert rows[0]["std_quality"] == "0"
    assert said == []


def test_every_meaning_has_other_names(path):
    rows, said = opened(path, "img,caption,Align,authenticity,Split,model\na,x,1,2,test,sd\n")
    assert rows == [
        {
            "name": "a",
            "prompt": "x",
            "mos_correspondence": "1",
            "mos_authenticity": "2",
            "split": "test",
            "generator": "sd",
        }
    ]
    assert "'Align' as correspondence" in said[0]


def test_a_documented_name_comes_before_others_which_are_announced(path):
    rows, said = opened(path, "name,image,prompt,text,mos,score\na,b,x,y,1,9\n")
    assert rows == [{"name": "a", "image": "b", "prompt": "x", "text": "y", "mos": "1", "score": "9"}]
    assert said == [
        f"{path}: column 'image' is not read; if it is the name, add --columns name=image",
        f"{path}: column 'text' is not read; if it is the prompt, add --columns prompt=text",
        f"{path}: column 'score' is not read; if it is the quality, add --columns mos_quality=score",
    ]


def test_other_names_are_never_chosen_among(path):
    for header in ("name,MOS,score", "name,quality,gt_score", "Image,path,mos"):
        with pytest.raises(DataError, match="two columns mean the same"):
            opened(path, f"{header}\na,1,2\n")


def test_texts_in_any_case(path):
    rows, said = opened(path, "name,Description,Rating,Text_Author,Answer\na,x,good,model,y\n")
    assert rows == [{"name": "a", "description": "x", "rating": "good", "text_author": "model", "answer": "y"}]
    assert "'Rating' as rating word" in said[0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"mos_quality": "a", "mos_align": "a"}, "gives 'a' two meanings, mos_quality and mos_correspondence"),
        ({"mos_quality": "a", "quality": "b"}, "names two columns for mos_quality, 'a' and 'b'"),
        ({"mos_quality": "c"}, "2 columns are called 'c'; give the number of one: .*=3 or --columns mos_quality=4"),
    ],
)
def test_options_that_contradict_each_other(path, columns, message):
    with pytest.raises((ConfigError, DataError), match=message):
        opened(path, "name,a,b,c,c\nx,1,2,3,4\n", columns)


def test_standard_deviations(path):
    rows, said = opened(path, "name,mos,Std,std_align\na,1,.5,.25\n")
    assert rows == [{"name": "a", "mos": "1", "std_quality": ".5", "std_align": ".25"}]
    assert said == [f"{path}: reading column 'Std' as std_quality"]


@pytest.mark.parametrize(
    ("header", "first", "second", "meaning"),
    [
        ("name,mos,MOS", "mos", "MOS", "mos_quality"),
        ("name,mos_quality,mos", "mos_quality", "mos", "mos_quality"),
        ("name,score,mean", "score", "mean", "mos_quality"),
        ("image,filename,mos", "image", "filename", "name"),
    ],
)
def test_two_columns_of_one_meaning_are_refused_with_the_option(path, header, first, second, meaning):
    with pytest.raises(DataError) as caught:
        opened(path, f"{header}\na,1,2\n")
    message = str(caught.value)
    assert f"{first!r} and {second!r} may be the {meaning.removeprefix('mos_')}" in message
    assert f"--columns {meaning}={first} or --columns {meaning}={second}" in message
    rows, _ = opened(path, f"{header}\na,b,c\n", {meaning: second})
    assert rows[0]["mos" if second == "mos" else meaning] == "abc"[header.split(",").index(second)]


def test_the_users_columns_beat_the_names(path):
    rows, said = opened(path, "name,other,score,MOS\na,b,1,2\n", {"name": "other", "quality": "score"})
    assert rows == [{"name (not read)": "a", "name": "b", "mos_quality": "1", "MOS": "2"}]
    assert said == [f"{path}: reading columns 'other' as name, 'score' as quality"]


def test_unknown_columns_and_meanings(path):
    with pytest.raises(UnknownName, match=r"No column is called 'scor'\. Did you mean 'score'"):
        opened(path, "name,score\na,1\n", {"mos_quality": "scor"})
    with pytest.raises(UnknownName, match="Did you mean 'mos_quality'"):
        opened(path, "name,score\na,1\n", {"mos_qualty": "score"})


def test_a_table_without_header(path):
    rows, said = opened(path, "a.png,3.5\nb.png,2\n")
    assert rows == [{"name": "a.png", "mos_quality": "3.5"}, {"name": "b.png", "mos_quality": "2"}]
    assert said == [f"{path}: no header; reading column 0 as name, column 1 as mos_quality"]


def test_a_table_without_header_whose_columns_are_not_clear(path):
    text = "0,001-0.png,Glide,3,2,,\n1,001-1.png,Glide,4,1,dull,\n"
    with pytest.raises(DataError, match=r"no header; .*counted from 0, such as --columns name=1,mos_quality=4"):
        opened(path, text)
    rows, _ = opened(path, text, {"name": "1", "generator": "2", "mos_quality": "3"})
    assert [(row["name"], row["generator"], row["mos_quality"]) for row in rows] == [
        ("001-0.png", "Glide", "3"),
        ("001-1.png", "Glide", "4"),
    ]


def test_a_missing_column_is_asked_for(path):
    path.write_text("photo,mos\na,1\n")
    with pytest.raises(DataError, match=r"no column 'name' \(found: photo, mos\); .*--columns name=COLUMN"):
        open_labels(path).need("name")
