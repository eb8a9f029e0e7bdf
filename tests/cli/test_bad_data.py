"""Bad data and models, one kind at a time: one clear message, exit 1, and no store that could pass for a good one."""

import json
import shutil

import pytest
from PIL import Image

from tests.cli.conftest import SMALL_HEAD
from tests.cli.refusals import extract, refuse, truncate
from tests.extract.small_sets import COLUMNS, read_table, save_noise, write_set, write_table, write_talks
from tests.extract.tiny_models import write_grid_checkpoint


@pytest.fixture
def pictures(tmp_path):
    return write_set(tmp_path / "pictures", 6, images=True)


def rewrite(folder, change, columns=COLUMNS):
    """data.csv with `change` applied to its list of rows (lists of cells)."""
    rows = [list(row.values()) for row in read_table(folder)]
    write_table(folder, change(rows), columns)


def with_cell(row, column, value):
    def change(rows):
        rows[row][column] = value
        return rows

    return change


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (truncate, "not a readable image"),
        (lambda path: path.write_text("no image"), "not a readable image (of no known format)"),
        (lambda path: path.write_bytes(b""), "not a readable image"),
        (lambda path: path.unlink(), "no image of that name"),
    ],
    ids=["truncated", "text", "empty", "missing"],
)
def test_unreadable_images(agiqa, pictures, new, tiny_vision_checkpoint, harm, reason):
    harm(pictures / "images" / "002.png")
    outcome = extract(agiqa, pictures, new, tiny_vision_checkpoint)
    refuse(outcome, "002.png (data.csv, line 4)", reason, pictures / "images")
    assert "003.png" not in outcome.err
    assert not new.exists()
    skipped = extract(agiqa, pictures, new, tiny_vision_checkpoint, "--on-bad-item", "skip")
    assert (skipped.json["items"], len(skipped.json["skipped"])) == (5, 1)
    assert "skipped 002.png" in skipped.err


def test_images_that_the_processor_refuses_are_items_like_others(agiqa, pictures, new, tmp_path):
    """Qwen's takes no image that is more than 200 times as wide as high."""
    model = write_grid_checkpoint(tmp_path / "model")
    Image.new("RGB", (20000, 10)).save(pictures / "images" / "002.png")
    outcome = extract(agiqa, pictures, new, model)
    refuse(outcome, "1 problem\n", f"002.png: {pictures / 'images' / '002.png'}: the image processor of", "ratio")
    assert not new.exists()
    skipped = extract(agiqa, pictures, new, model, "--on-bad-item", "skip").json
    assert (skipped["items"], len(skipped["skipped"])) == (5, 1)


@pytest.mark.parametrize(
    ("change", "mentions"),
    [
        (with_cell(2, 1, ""), ("002.png (data.csv, line 4)", "the prompt is empty")),
        (with_cell(2, 1, "  "), ("002.png (data.csv, line 4)", "the prompt is empty")),
        (with_cell(2, 2, ""), ("002.png (data.csv, line 4)", "no MOS at all")),
        (with_cell(2, 2, "good"), ("002.png (data.csv, line 4)", "'good', not a number")),
        (with_cell(2, 2, "nan"), ("002.png (data.csv, line 4)", "mos_quality is nan, outside 0 to 5")),
        (with_cell(2, 2, "61"), ("002.png (data.csv, line 4)", "mos_quality is 61, outside 0 to 5")),
        (with_cell(2, 0, "001.png"), ("001.png (data.csv, line 4)", "duplicate of line 3")),
        (with_cell(2, 0, "../001.png"), ("../001.png", "line 4", "not a plain relative path")),
        (with_cell(2, 0, "/etc/passwd"), ("/etc/passwd", "line 4", "no such file, and no image of that name in")),
        (with_cell(2, 0, ""), ("line 4", "the name is empty")),
        (with_cell(2, 3, "tset"), ("002.png (data.csv, line 4)", "split 'tset'")),
        (with_cell(2, 4, ""), ("002.png (data.csv, line 4)", "no description")),
        (lambda rows: [*rows[:2], rows[2][:3], *rows[3:]], ("line 4", "has 3 fields where the header has 5")),
        (lambda _rows: [], ("data.csv", "but no rows")),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_bad_rows(agiqa, texts, new, tiny_text_checkpoint, change, mentions):
    rewrite(texts, change)
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), *mentions)
    assert not new.exists()


def test_missing_columns(agiqa, texts, new, tiny_text_checkpoint):
    rewrite(texts, lambda rows: rows, ["name", "words", "mos_quality", "split", "description"])
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), texts / "data.csv", "no column 'prompt'")
    assert not new.exists()


def test_a_table_without_mos_is_extracted_and_labelled_later(agiqa, texts, new, tmp_path, tiny_text_checkpoint):
    labelled = write_table(tmp_path / "labels", [list(row.values()) for row in read_table(texts)]) / "data.csv"
    rewrite(texts, lambda rows: rows, ["name", "prompt", "mark", "split", "description"])
    outcome = extract(agiqa, texts, new, tiny_text_checkpoint)
    assert outcome.json["state"] == "complete"
    assert "has no MOS column (found: name, prompt, mark, split, description)" in outcome.err
    refuse(agiqa("train", new, tmp_path / "run", *SMALL_HEAD), "'quality'", "Known: none")
    assert agiqa("store", "labels", new, labelled).code == 0
    assert agiqa("store", "info", new, "--json").json["labels"] == {"quality": 6}
    talks = write_talks(texts)
    refuse(agiqa("words", talks, "--labels", texts / "data.csv"), texts / "data.csv", "no MOS column")


def test_all_bad_rows_are_told_at_once(agiqa, texts, new, tiny_text_checkpoint):
    rewrite(texts, lambda rows: with_cell(1, 1, "")(with_cell(4, 2, "x")(rows)))
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), "2 problems", "001.png", "004.png")


def test_a_table_that_is_no_text(agiqa, texts, new, tiny_text_checkpoint):
    (texts / "data.csv").write_bytes(b"name,prompt,mos\n\xff\xfe\x00")
    refuse(extract(agiqa, texts, new, tiny_text_checkpoint), texts / "data.csv", "not UTF-8")
    assert not new.exists()


def test_an_empty_folder(agiqa, tmp_path, new, tiny_text_checkpoint):
    (tmp_path / "nothing").mkdir()
    refuse(extract(agiqa, tmp_path / "nothing", new, tiny_text_checkpoint), tmp_path / "nothing", "data.csv")
    assert not new.exists()


@pytest.mark.parametrize(
    ("harm", "mention"),
    [
        (lambda talk: talk["conversations"].reverse(), "expected user, assistant, user, assistant"),
        (lambda talk: talk["conversations"].pop(0), "expected user, assistant, user"),
        (lambda talk: talk.update(conversations=[]), "has 0 messages"),
        (lambda talk: talk["conversations"][1].update(content=" "), "message 2 is empty"),
        (lambda talk: talk.update(image="set/images/unknown.png"), "'set/images/unknown.png'"),
        (lambda talk: talk.update(image="set/images/001.png"), "has a conversation already"),
    ],
    ids=["reversed", "three", "none", "empty", "unknown", "twice"],
)
def test_bad_conversations(agiqa, texts, new, tiny_text_checkpoint, harm, mention):
    path = write_talks(texts)
    talks = json.loads(path.read_text())
    harm(talks[2])
    path.write_text(json.dumps(talks))
    outcome = extract(agiqa, texts, new, tiny_text_checkpoint, "--conversations", path)
    refuse(outcome, "talks.json, id '002.png'", mention)
    assert not new.exists()


def test_conversations_that_are_no_json(agiqa, texts, new, tiny_text_checkpoint):
    (texts / "talks.json").write_text("[{]")
    outcome = extract(agiqa, texts, new, tiny_text_checkpoint, "--conversations", texts / "talks.json")
    refuse(outcome, texts / "talks.json", "not JSON")


def test_labels_that_join_nothing(agiqa, texts, new, tmp_path, tiny_text_checkpoint):
    talks = write_talks(texts)
    rows = [[f"other/{row['name']}.jpg", row["prompt"], "1"] for row in read_table(texts)]
    table = write_table(tmp_path / "other", rows, ["name", "prompt", "mos_quality"]) / "data.csv"
    refuse(extract(agiqa, talks, new, tiny_text_checkpoint, "--labels", table), talks, table, "no image in common")
    refuse(extract(agiqa, talks, new, tiny_text_checkpoint), talks, "--labels")
    assert not new.exists()


def test_images_swapped_after_the_store_was_made(agiqa, pictures, new, tiny_vision_checkpoint):
    assert extract(agiqa, pictures, new, tiny_vision_checkpoint).code == 0
    save_noise(pictures / "images" / "001.png", seed=3)
    refuse(extract(agiqa, pictures, new, tiny_vision_checkpoint), new, "data_set.plan_sha256")


def test_items_without_the_label(agiqa, texts, tmp_path, tiny_text_checkpoint):
    columns = ["name", "prompt", "mos_quality", "split", "description", "mos_authenticity"]
    rewrite(texts, lambda rows: [[*row, "" if number == 2 else "3.5"] for number, row in enumerate(rows)], columns)
    store = tmp_path / "s.agiqa"
    assert extract(agiqa, texts, store, tiny_text_checkpoint).code == 0
    outcome = agiqa("train", store, tmp_path / "run", "--label", "authenticity", "--validation", 0, *SMALL_HEAD)
    refuse(outcome, "'002.png' has no authenticity MOS", "authenticity on 5 of 6 items")


def test_a_data_set_without_splits_says_what_to_do(agiqa, texts, tmp_path, tiny_text_checkpoint):
    rewrite(texts, lambda rows: [[*row[:3], "", row[4]] for row in rows])
    store = tmp_path / "s.agiqa"
    assert extract(agiqa, texts, store, tiny_text_checkpoint).code == 0
    refuse(agiqa("train", store, tmp_path / "run", *SMALL_HEAD), "'published'", "'grouped'")


@pytest.mark.parametrize("kind", ["folder", "file", "package", "type", "weights", "tokenizer", "torn", "nowhere"])
def test_models_that_are_none(agiqa, texts, new, tmp_path, tiny_text_checkpoint, kind):
    model = tmp_path / "model"
    if kind == "folder":
        model.mkdir()
    elif kind == "file":
        model.write_text("not a model")
    elif kind == "package":
        model = "pkg:no_such_package"
    elif kind != "nowhere":
        shutil.copytree(tiny_text_checkpoint, model)
    if kind == "type":
        (model / "config.json").write_text('{"model_type": "lamma"}')
    elif kind == "weights":
        (model / "model.safetensors").unlink()
    elif kind == "tokenizer":
        (model / "tokenizer.json").unlink()
    elif kind == "torn":
        truncate(model / "model.safetensors")
    refuse(extract(agiqa, texts, new, model), model)
    if new.exists():  # the plan needs no weights, so torn ones are found when they are loaded
        assert kind == "torn"
        refuse(agiqa("train", new, tmp_path / "run"), new, "incomplete")
