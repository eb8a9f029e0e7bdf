"""Who wrote each text: read from conversations and tables, and warned about before a model runs."""

import json

import pytest

from agiqa.errors import DataError
from agiqa.extract.data.datasets import load_data_set
from agiqa.store.format.items import MODEL, TEACHER, TEACHER_BLIND, author_of
from tests.extract.small_sets import write_table

OWN = {"response_0": "Sharp.", "response_1": "good"}
NAMES = [f"{k}.png" for k in range(8)]


def talk(name, **more):
    roles, texts = ("user", "assistant", "user", "assistant"), ("What do you see?", "It is dull.", "Rate it.", "fair")
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    return {"id": name, "image": f"set/{name}", "conversations": turns, **more}


def write(folder, name, names, **more):
    (folder / name).write_text(json.dumps([talk(one, **more) for one in names]))
    return str(folder / name)


@pytest.fixture
def folder(tmp_path):
    return write_table(tmp_path, [[name, f"p{name}", 3.0] for name in NAMES], ["name", "prompt", "mos_quality"])


def load(folder, *files, variant="id", **options):
    return load_data_set(folder, conversations=files, variant=variant, images=False, **options)


def authors(data):
    return [item.text_author for item in data.items]


def test_the_author_who_knew_most_of_the_mos_counts():
    assert author_of([MODEL, TEACHER]) == TEACHER
    assert author_of([None, TEACHER]) == TEACHER
    assert author_of([MODEL, None, TEACHER_BLIND]) is None
    assert author_of([MODEL, TEACHER_BLIND]) == TEACHER_BLIND
    assert author_of([MODEL, MODEL]) == MODEL
    assert author_of([]) is None


@pytest.mark.parametrize(
    ("more", "read"),
    [
        ({}, (TEACHER, TEACHER)),
        (OWN, (MODEL, MODEL)),
        ({"response_0": "Sharp."}, (MODEL, TEACHER)),  # the word is still the teacher's
        ({"response_1": "good"}, (TEACHER, TEACHER)),
        ({"text_author": TEACHER_BLIND}, (TEACHER_BLIND, TEACHER_BLIND)),
        ({"text_author": MODEL}, (MODEL, MODEL)),
        ({"text_author": TEACHER_BLIND, "response_0": "Sharp."}, (MODEL, TEACHER_BLIND)),
        ({"text_author": None}, (TEACHER, TEACHER)),
    ],
)
def test_the_author_of_what_each_variant_reads(folder, more, read):
    path = write(folder, "quality_test.json", NAMES, **more)
    assert [set(authors(load(folder, path, variant=variant))) for variant in ("id", "full")] == [{read[0]}, {read[1]}]
    assert set(authors(load(folder, path, variant="no_id"))) == {None}


def test_an_unknown_author_is_a_bad_item(folder):
    path = write(folder, "quality_test.json", NAMES[:1], text_author="me")
    with pytest.raises(DataError, match=r"`text_author` is 'me', none of teacher, teacher-blind, model"):
        load(folder, path)


def test_of_several_aspects_the_worst_author_counts(folder):
    quality = write(folder, "quality_test.json", NAMES, **OWN)
    for more, expected in ((OWN, MODEL), ({}, TEACHER)):
        other = write(folder, "alignment_test.json", NAMES, **more)
        assert set(authors(load(folder, quality, other, variant="id:quality+correspondence"))) == {expected}


def test_a_table_says_it_in_a_column_and_without_one_nobody_knows(tmp_path):
    columns = ["name", "prompt", "mos", "description", "rating"]
    rows = [["a", "x", 1.0, "dull", "poor"], ["b", "y", 2.0, "sharp", "fair"]]
    assert authors(load(write_table(tmp_path, rows, columns), variant="full")) == [None, None]
    signed = [[*rows[0], "teacher"], [*rows[1], ""]]
    assert authors(load(write_table(tmp_path, signed, [*columns, "text_author"]))) == [TEACHER, None]
    write_table(tmp_path, [[*rows[0], "her"]], [*columns, "text_author"])
    with pytest.raises(DataError, match="text_author 'her' is none of teacher, teacher-blind, model"):
        load(tmp_path)


def test_rating_words_of_a_table_that_nobody_signed_are_asked_about(tmp_path):
    columns = ["name", "prompt", "mos", "description", "rating", "split", "text_author"]
    rows = [["a", "x", 1.0, "dull", "poor", "test", ""], ["b", "y", 2.0, "sharp", "fair", "test", "model"]]
    data = write_table(tmp_path, rows, columns)
    (found,) = load(data, variant="full").warnings
    assert "data.csv does not say who wrote the rating words that 1 of 2 test items read" in found
    assert "in a column `text_author` (teacher, teacher-blind, model)" in found
    assert load(data, variant="id").warnings == ()


@pytest.mark.parametrize(("variant", "word"), [("full", "its rating word included"), ("id", "without its rating word")])
def test_test_and_val_items_that_read_a_teacher_are_warned_of(folder, variant, word):
    files = [
        write(folder, "quality_train.json", NAMES[:4]),
        write(folder, "quality_val.json", NAMES[4:6]),
        write(folder, "quality_test.json", NAMES[6:], **OWN),
    ]
    (found,) = load(folder, *files, variant=variant).warnings
    assert found.startswith("2 of 2 val items read the text of a teacher that knew their MOS")
    assert word in found
    write(folder, "quality_test.json", NAMES[6:])
    assert [line.split(" items")[0] for line in load(folder, *files, variant=variant).warnings] == [
        "2 of 2 val",
        "2 of 2 test",
    ]
    assert load(folder, *files, variant="no_id").warnings == ()


@pytest.mark.parametrize("name", ["answers_val_quality_lora.json", "answers-quality_lora_res.jsonl"])
def test_a_missing_test_part_is_warned_of_with_the_option_that_mends_it(folder, name):
    train, held = write(folder, "quality_train.json", NAMES[:5]), write(folder, name, NAMES[5:], **OWN)
    (found,) = load(folder, train, held).warnings
    assert "no item is in the split test, which `agiqa train` tests on by default; the splits are: train (5)" in found
    assert f"--conversations test={held}." in found
    mended = load(folder, train, f"test={held}")
    assert mended.warnings == ()
    assert [item.split for item in mended.items] == ["train"] * 5 + ["test"] * 3


def test_the_warning_of_a_missing_test_part_names_the_column_of_a_table(folder):
    (found,) = load(folder, variant="no_id").warnings
    assert "the splits are: none (8)" in found
    assert f"Give {folder / 'data.csv'} a column `split`, or train with `--split grouped`" in found


@pytest.mark.parametrize("word", ["alignment", "align", "correspondence"])
def test_alignment_in_a_files_name_is_correspondence(folder, word):
    files = [
        write(folder, "answers_train_quality.json", NAMES),
        write(folder, f"answers_train_{word}.json", NAMES, response_0="It fits."),
    ]
    data = load(folder, *files, variant="id:quality+correspondence")
    assert {item.conversation[3].content for item in data.items} == {"It fits."}
    assert data.items == load(folder, files[0], f"{word}:{files[1]}", variant="id:quality+correspondence").items
