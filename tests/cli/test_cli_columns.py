"""`--columns` and tables of other formats on the command line."""

import openpyxl
import pytest

from tests.cli.refusals import extract, misuse, refuse
from tests.extract.small_sets import read_table, save_noise


@pytest.fixture
def sheet(texts, tmp_path):
    """The table of `texts` as xlsx, under other names."""
    book = openpyxl.Workbook()
    book.active.append(["file", "wording", "rated", "mean", "split", "description"])
    for row in read_table(texts):
        name, prompt, mos, split, description = row.values()
        book.active.append([name, prompt, float(mos), 3.0, split, description])
    book.save(tmp_path / "labels.xlsx")
    return tmp_path / "labels.xlsx"


def test_an_xlsx_with_the_users_columns(agiqa, texts, sheet, new, tiny_text_checkpoint):
    refuse(extract(agiqa, sheet, new, tiny_text_checkpoint), sheet, "no column 'prompt'", "--columns prompt=COLUMN")
    columns = ("--columns", "prompt=wording, mos_quality=rated")
    outcome = extract(agiqa, sheet, new, tiny_text_checkpoint, *columns)
    assert outcome.json["items"] == len(read_table(texts))
    assert "reading columns 'file' as name, 'wording' as prompt, 'rated' as quality" in outcome.err
    assert agiqa("store", "info", new, "--json").json["labels"] == {"quality": len(read_table(texts))}
    again = agiqa("store", "labels", new, sheet, "--columns", "quality=mean,prompt=wording", "--json")
    assert again.json["replaced"] == {"mos_quality": len(read_table(texts))}


def test_columns_that_are_none(agiqa, sheet, new, tiny_text_checkpoint):
    refuse(extract(agiqa, sheet, new, tiny_text_checkpoint, "--columns", "promt=wording"), "Did you mean 'prompt'")
    refuse(extract(agiqa, sheet, new, tiny_text_checkpoint, "--columns", "prompt=wordin"), "Did you mean 'wording'")
    misuse(extract(agiqa, sheet, new, tiny_text_checkpoint, "--columns", "wording"), "is not MEANING=COLUMN")
    misuse(extract(agiqa, sheet, new, tiny_text_checkpoint, "--columns", "name=a,name=b"), "given twice")
    assert not new.exists()


def test_words_need_no_prompts(agiqa, tmp_path):
    answers, table = tmp_path / "answers.csv", tmp_path / "AIGC_all.csv"
    words = ("bad", "poor", "fair", "good", "excellent")
    answers.write_text("name,answer\n" + "".join(f"{k}.jpg,{word}\n" for k, word in enumerate(words)))
    table.write_text("Image,Score\n" + "".join(f"{k}.jpg,{k + 0.5}\n" for k in range(5)))
    outcome = agiqa("words", answers, "--labels", table, "--json")
    assert outcome.json["accuracy"] == 1.0
    assert "'Image' as name, 'Score' as quality" in outcome.err


def test_a_folder_of_images_is_described_and_extracted(agiqa, tmp_path, tiny_vision_checkpoint):
    for number, name in enumerate(("a.png", "deep/b.png")):
        save_noise(tmp_path / "set" / name, seed=number)
    model = ("--model", tiny_vision_checkpoint, "--device", "cpu", "--json")
    refuse(agiqa("describe", tmp_path / "set", tmp_path / "d.jsonl", *model), "2 images and no table", "--prompt TEXT")
    prompt = ("--prompt", "a cat")
    described = agiqa("describe", tmp_path / "set", tmp_path / "d.jsonl", *model, *prompt, "--max-new-tokens", 4)
    assert described.json["items"] == 2
    assert "no table; reading its 2 images, named by their files, without labels" in described.err
    stored = agiqa("extract", tmp_path / "set", tmp_path / "s.agiqa", *model, *prompt, "--variant", "no_id")
    assert stored.json["items"] == 2
    save_noise(tmp_path / "set" / "c.png", seed=5)
    grown = agiqa("extract", tmp_path / "set", tmp_path / "s.agiqa", *model, *prompt, "--variant", "no_id")
    assert (grown.json["items"], grown.json["filled"]["items"]) == (3, 1)
    assert "has 2 of 3 items; to add: 1" in grown.err
    info = agiqa("store", "info", tmp_path / "s.agiqa", "--json").json
    assert (info["labels"], info["state"], info["provenance"]["data_set"]["grown"]) == ({}, "complete", [2])
    table = tmp_path / "agiqa1k.csv"
    table.write_text("Image,Score\nA.PNG,1.5\nb.png,2.5\n")
    joined = agiqa("store", "labels", tmp_path / "s.agiqa", table, "--json")
    assert joined.json["filled"] == {"mos_quality": 2}
    assert "'Image' as name, 'Score' as quality" in joined.err
    assert "image names that differ in" in joined.err
    save_noise(tmp_path / "set" / "d.png", seed=6)
    again = agiqa("extract", tmp_path / "set", tmp_path / "s.agiqa", *model, *prompt, "--variant", "no_id")
    assert (again.json["items"], again.json["filled"]["items"]) == (4, 1)
    assert agiqa("store", "info", tmp_path / "s.agiqa", "--json").json["labels"] == {"quality": 2}


def test_a_folder_of_images_is_no_store(agiqa, example, tmp_path):
    save_noise(tmp_path / "set" / "a.png", seed=0)
    outcome = agiqa("predict", example.run, tmp_path / "set", tmp_path / "out.csv")
    refuse(outcome, "is a folder of images, not a store", f"agiqa score {tmp_path / 'set'} --run {example.run}")
