"""Mistakes in tables: one line that names the file, what was found, what was expected, and what mends it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openpyxl
import pytest

from agiqa.errors import AgiqaError
from agiqa.extract.data.datasets import load_data_set
from agiqa.store import join_labels
from tests.extract.small_sets import save_noise
from tests.store.conftest import make_content, make_store

HEADER = "name,prompt,mos\n"
TALK = [{"role": role, "content": "x"} for role in ("user", "assistant", "user")]


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """One wrong file, and what its message says."""

    file: str = "t.csv"
    """The file to give, and to be named; an empty text is the folder."""
    content: str | bytes | Callable[[Path], None]
    found: str
    expected: str
    mends: str
    images: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def two_sheets(path):
    book = openpyxl.Workbook()
    for sheet in (book.active, book.create_sheet("second")):
        for row in (["name", "mos"], ["a.png", 3]):
            sheet.append(row)
    book.save(path)


def two_tables(path):
    for name in ("one.csv", "two.csv"):
        (path / name).write_text(HEADER + "a.png,x,3\n")


MISTAKES = {
    "no column of names": Mistake(
        content="nom,prompt,mos\na.png,x,3\n", found="nom", expected="'name'", mends="--columns name=COLUMN"
    ),
    "no prompts": Mistake(
        content="name,mos\na.png,3\n", found="name, mos", expected="'prompt'", mends="--prompt TEXT if all images"
    ),
    "two columns of MOS": Mistake(
        content="name,prompt,MOS,score\na.png,x,3,4\n",
        found="'MOS' and 'score'",
        expected="may be the quality",
        mends="--columns mos_quality=MOS or --columns mos_quality=score",
    ),
    "two columns of names": Mistake(
        content="image,path,prompt\na.png,b.png,x\n",
        found="'image' and 'path'",
        expected="may be the name",
        mends="--columns name=image or --columns name=path",
    ),
    "a column that is none": Mistake(
        content=HEADER + "a.png,x,3\n",
        options={"columns": {"mos_quality": "moss"}},
        found="'moss'",
        expected="name, prompt",
        mends="Did you mean 'mos'",
    ),
    "a repeated header": Mistake(
        content="name,prompt,a,a\na.png,x,3,4\n",
        options={"columns": {"mos_quality": "a"}},
        found="2 columns are called 'a'",
        expected="the number of one",
        mends="--columns mos_quality=2",
    ),
    "words for numbers": Mistake(
        content="name,prompt,quality\na.png,x,good\nb.png,x,bad\n",
        found="'good'",
        expected="is a number",
        mends="--columns mos_quality=COLUMN",
    ),
    "decimal commas": Mistake(
        content="name;prompt;mos\na.png;x;3,5\n", found="'3,5'", expected="a decimal comma", mends="write 3.5"
    ),
    "decimal commas between commas": Mistake(
        content=HEADER + "a.png,x,3,5\n", found="4 fields", expected="the header has 3", mends="write 3.5"
    ),
    "another scale": Mistake(
        content=HEADER + "a.png,x,16\nb.png,x,73\n",
        found="go from 16 to 73",
        expected="0 to 5",
        mends="add --mos-range 0 100",
    ),
    "one value outside the scale": Mistake(
        content=HEADER + "a.png,x,7\n" + "b.png,x,3\n", found="mos is 7", expected="0 to 5", mends="by --mos-range"
    ),
    "no header": Mistake(
        content="1,a.png,3,4\n2,b.png,4,5\n",
        found="1, a.png, 3, 4",
        expected="what its columns mean, counted from 0",
        mends="--columns name=1,mos_quality=3",
    ),
    "two separators": Mistake(
        content="name;x,mos\na.png;x,3\n", found="commas or semicolons", expected="separated", mends="'sep=;'"
    ),
    "several images of one name": Mistake(
        content=HEADER + "a.png,x,3\n",
        images=("p/a.png", "q/a.png"),
        found="'a.png'",
        expected="may be p/a.png, q/a.png",
        mends="write the one that is meant",
    ),
    "an unknown split": Mistake(
        content="name,prompt,split\na.png,x,rest\n", found="'rest'", expected="none of", mends="train, val, test"
    ),
    "a negative deviation": Mistake(
        content="name,prompt,mos,std\na.png,x,3,-1\n", found="'-1'", expected="0 or more", mends="a number"
    ),
    "a repeated row": Mistake(
        content=HEADER + "a.png,x,3\na.png,x,4\n", found="duplicate", expected="line 2", mends="line 3"
    ),
    "no rows": Mistake(content=HEADER, found="name, prompt, mos", expected="expected a row", mends="for each image"),
    "a picture": Mistake(
        content=b"\x89PNG\r\n\x1a\n\0\0\0\r", found="not UTF-8 text", expected="text", mends="save it as UTF-8"
    ),
    "another kind of file": Mistake(
        file="t.docx",
        content="x",
        found="t.docx",
        expected=".csv, .json, .jsonl, .parquet",
        mends="save it as one of these",
    ),
    "a workbook of two sheets": Mistake(
        file="t.xlsx", content=two_sheets, found="Sheet, second", expected="2 sheets", mends="save the one to read"
    ),
    "a list of names": Mistake(
        file="t.json",
        content='["a.png"]',
        found="not a JSON object",
        expected="expected a list of objects",
        mends="--columns says",
    ),
    "broken JSON": Mistake(
        file="t.json", content='[{"name": }]', found="column 11", expected="not JSON", mends="expected"
    ),
    "conversations alone": Mistake(
        file="t.json",
        content=json.dumps([{"image": "a.png", "conversations": TALK}]),
        found="holds conversations",
        expected="the table with their MOS",
        mends="--labels data.csv",
    ),
    "several tables": Mistake(
        file="", content=two_tables, found="one.csv, two.csv", expected="no data.csv", mends="give the one to read"
    ),
    "images alone": Mistake(
        file="",
        content=lambda _: None,
        images=("a.png",),
        found="1 images and no table",
        expected="prompts",
        mends="--prompt TEXT",
    ),
    "a prompt too many": Mistake(
        content=HEADER + "a.png,x,3\n",
        options={"prompt": "x"},
        found="'prompt'",
        expected="has a column with prompts",
        mends="leave --prompt out",
    ),
}


def line_of(error: AgiqaError) -> str:
    """The line that tells of the mistake, with the file that all problems are in, and its notes."""
    first, *problems = str(error).splitlines()
    assert len(problems) <= 1, error
    return " ".join([first, *problems, *getattr(error, "__notes__", [])])


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_one_line_says_where_what_and_what_to_do(mistake, tmp_path):
    path = tmp_path / mistake.file
    for number, name in enumerate(mistake.images):
        save_noise(tmp_path / name, seed=number)
    if callable(mistake.content):
        mistake.content(path)
    else:
        content = mistake.content
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AgiqaError) as caught:
        load_data_set(path, variant="no_id", images=bool(mistake.images), **mistake.options)
    line = line_of(caught.value)
    for part in (str(path), mistake.found, mistake.expected, mistake.mends):
        assert part in line


def test_without_openpyxl_one_line_says_what_to_install(tmp_path, monkeypatch):
    two_sheets(tmp_path / "t.xlsx")
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(AgiqaError) as caught:
        load_data_set(tmp_path / "t.xlsx", variant="no_id", images=False)
    assert str(caught.value) == (
        f"{tmp_path / 't.xlsx'}: reading xlsx needs openpyxl: pip install 'agiqa[xlsx]', or save the sheet as csv."
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("name,colour\nimage_0.png,red\n", ("found: name, colour", "at least one of mos", "--columns mos_quality=")),
        ("name,mos\nother.png,3\n", ("has other.png", "the store has image_0.png", "another data set")),
        ("name,mos\nimage_0.png,30\nimage_1.png,70\n", ("from 30 to 70", "0 to 5", "--mos-range 0 100")),
    ],
)
def test_tables_of_labels_that_do_not_fit_a_store(content, parts, tmp_path):
    store, table = make_store(tmp_path / "s.agiqa", make_content([3, 4])), tmp_path / "t.csv"
    table.write_text(content)
    with pytest.raises(AgiqaError) as caught:
        join_labels(store, table)
    line = line_of(caught.value)
    for part in (str(table), *parts):
        assert part in line
