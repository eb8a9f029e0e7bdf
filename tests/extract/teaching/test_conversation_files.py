"""The conversations that teach writes, as extract and tune read them: texts, words, authors, splits."""

import json

import pytest

from agiqa.errors import DataError
from agiqa.extract import load_data_set
from agiqa.extract.teaching.conversation_files import write_conversations
from agiqa.extract.teaching.questions import QuestionSettings
from tests.extract.small_sets import write_table

COLUMNS = ["name", "prompt", "mos_quality", "mos_align"]
BINS = [
    (0.0, "bad"),
    (0.999, "bad"),
    (1.0, "poor"),
    (2.5, "fair"),
    (3.0, "good"),
    (4.0, "excellent"),
    (5.0, "excellent"),
]
"""The paper's bins on 0 to 5: [0, 1) bad, [1, 2) poor, [2, 3) fair, [3, 4) good, [4, 5] excellent."""
SPLITS = ["train", "val", "test", None, "train", "train", "test"]


def write(folder, aspects=("quality", "correspondence"), *, scale=1.0, status="ok", **settings):
    """A table whose MOS are BINS times `scale`, and the conversation files about it."""
    mos = [value * scale for value, _ in BINS]
    rows = [[f"{k}.png", f"prompt {k}", value, mos[-1 - k]] for k, value in enumerate(mos)]
    write_table(folder, rows, COLUMNS)
    low_high = (0.0, 5.0 * scale)
    items = load_data_set(folder, variant="no_id", images=False, mos_range=low_high).items
    lines = {
        item.name: {"status": status, "explanations": {aspect: f"{aspect} of {item.name}" for aspect in aspects}}
        for item in items
    }
    splits = dict(zip(lines, SPLITS, strict=True))
    question = QuestionSettings(aspects=aspects, mos_range=low_high, **settings)
    return write_conversations(folder / "teacher.jsonl", items, lines, question, splits)


@pytest.mark.parametrize("scale", [1.0, 20.0, 0.2])
def test_extract_reads_texts_words_authors_and_splits(tmp_path, scale):
    files = write(tmp_path, scale=scale)
    assert files["quality"] == tmp_path / "teacher.quality.jsonl"
    read = load_data_set(
        tmp_path, conversations=[str(files["quality"])], variant="full", images=False, mos_range=(0.0, 5.0 * scale)
    )
    assert [item.split for item in read.items] == SPLITS
    assert {item.text_author for item in read.items} == {"teacher"}
    for item, (_, word) in zip(read.items, BINS, strict=True):
        question, description, rate, rating = (turn.content for turn in item.conversation)
        assert f"'prompt {item.name[0]}'" in question
        assert "<image>" not in question
        assert description == f"quality of {item.name}"
        assert "[bad, poor, fair, good, excellent]" in rate
        assert rating == word


def test_the_files_have_the_published_form(tmp_path):
    path = write(tmp_path)["correspondence"]
    entry = json.loads(path.read_text().splitlines()[0])
    assert [turn["role"] for turn in entry["conversations"]] == ["user", "assistant"] * 2
    assert entry["conversations"][0]["content"].startswith("<image>\nPlease closely examine")
    assert entry["conversations"][3]["content"] == "excellent"  # of the other aspect's MOS
    assert (entry["image"], entry["prompt"], entry["split"]) == ("0.png", "prompt 0", "train")


def test_two_aspects_in_one_context(tmp_path):
    files = write(tmp_path)
    sources = [str(path) for path in files.values()]
    read = load_data_set(tmp_path, conversations=sources, variant="id:quality+correspondence", images=False)
    assert [item.split for item in read.items] == SPLITS
    first = [turn.content for turn in read.items[0].conversation]
    assert (first[1], first[3]) == ("quality of 0.png", "correspondence of 0.png")


def test_a_blind_text_is_blind_but_its_rating_word_is_not(tmp_path):
    source = str(write(tmp_path, ("quality",), blind=True)["quality"])
    texts = load_data_set(tmp_path, conversations=[source], variant="id", images=False)
    words = load_data_set(tmp_path, conversations=[source], variant="full", images=False)
    assert {item.text_author for item in texts.items} == {"teacher-blind"}
    assert {item.text_author for item in words.items} == {"teacher"}


def test_an_item_without_a_mos_has_no_rating_word(tmp_path):
    source = str(write(tmp_path, ("authenticity",), blind=True)["authenticity"])
    texts = load_data_set(tmp_path, conversations=[source], aspect="authenticity", images=False)
    assert [len(item.conversation) for item in texts.items] == [3] * len(BINS)
    with pytest.raises(DataError, match="no rating word"):
        load_data_set(tmp_path, conversations=[source], aspect="authenticity", variant="full", images=False)


def test_only_explained_items_are_written(tmp_path):
    assert write(tmp_path, status="refused") == {}
    assert not list(tmp_path.glob("*.jsonl"))


def change(path, **values):
    entries = [json.loads(line) | values for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return str(path)


def test_the_split_of_an_entry_beats_that_of_the_file(tmp_path):
    path = write(tmp_path)["quality"]
    read = load_data_set(tmp_path, conversations=[f"val={path}"], images=False)
    assert [item.split for item in read.items] == [split or "val" for split in SPLITS]


def test_a_split_that_contradicts_the_table_is_a_problem(tmp_path):
    path = write(tmp_path)["quality"]
    rows = [[f"{k}.png", f"prompt {k}", 1.0, "test"] for k in range(len(BINS))]
    write_table(tmp_path, rows, ["name", "prompt", "mos_quality", "split"])
    with pytest.raises(
        DataError, match=r"in split test by the table but train by teacher\.quality\.jsonl, id '0\.png'"
    ):
        load_data_set(tmp_path, conversations=[str(path)], images=False)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("split", "dev", "`split` is 'dev', none of train, val, test"),
        ("split", 3, "`split` is 3"),
        ("rating_author", "me", "`rating_author` is 'me', none of teacher, teacher-blind, model"),
    ],
)
def test_other_values_are_problems(tmp_path, field, value, said):
    source = change(write(tmp_path)["quality"], **{field: value})
    with pytest.raises(DataError, match=said):
        load_data_set(tmp_path, conversations=[source], images=False)


def test_texts_may_hold_any_line_separator(tmp_path):
    """JSON lines end with a line feed alone; other separators may stand in a text as they are."""
    path = write(tmp_path)["quality"]
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    text = "one\u2028two\x85three"
    for entry in entries:
        entry["conversations"][1]["content"] = text
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\r\n" for entry in entries), encoding="utf-8")
    read = load_data_set(tmp_path, conversations=[str(path)], images=False)
    assert {item.conversation[1].content for item in read.items} == {text}
