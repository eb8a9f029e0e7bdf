"""Data sets from real files: the three forms of DATA, the variants, and every kind of bad input."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from agiqa.errors import ConfigError, DataError, UnknownName
from agiqa.extract.data.datasets import load_data_set
from agiqa.extract.data.items import Message, item_key
from agiqa.extract.data.templates import template_of

ROLES = ("user", "assistant", "user", "assistant")


def write_csv(path, rows, columns=("name", "prompt", "mos_quality")):
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)
    return path


def talk(name, *, contents=("<image>\nLook?", "It is dull.", "Rate?", "fair"), roles=ROLES, **more):
    turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return {"id": name, "image": f"data/set/images/{name}", "conversations": turns, **more}


def write_json(path, talks):
    path.write_text(json.dumps(talks), encoding="utf-8")
    return path


def save_image(path, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(len(path.name)).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    """data.csv with two rows, their images in images/."""
    write_csv(tmp_path / "data.csv", [("a.png", "a cat", 1.5), ("b.png", "a dog", 4.0)])
    for name in ("a.png", "b.png"):
        save_image(tmp_path / "images" / name)
    return tmp_path


@pytest.fixture
def talks(tmp_path):
    return write_json(tmp_path / "quality_train.json", [talk("b.png"), talk("a.png")])


def contents(item):
    return [message.content for message in item.conversation]


def problems_of(data, **options):
    with pytest.raises(DataError) as caught:
        load_data_set(data, **{"images": False, "variant": "no_id", **options})
    return str(caught.value)


def test_a_folder(folder):
    data = load_data_set(folder, variant="no_id", images=True)
    assert data.name == folder.name
    assert [item.name for item in data.items] == ["a.png", "b.png"]
    assert [item.image for item in data.items] == [folder / "images/a.png", folder / "images/b.png"]
    assert data.items[0].labels == {"quality": 1.5}
    assert data.items[0].split is None
    assert data.items[0].description is None
    assert (data.skipped, data.notes) == ((), ())
    question = template_of("quality").one_round.replace("{prompt}", "a cat")
    assert data.items[0].conversation == (Message(role="user", content=question),)


def test_images_are_not_looked_for_when_nobody_reads_them(tmp_path):
    table = write_csv(tmp_path / "set.csv", [("a.png", "a cat", 1.5)])
    data = load_data_set(table, variant="no_id", images=False)
    assert data.name == "set"
    assert data.items[0].image is None
    assert "a.png (set.csv, line 2): no image of that name in" in problems_of(table, images=True)


def test_images_may_lie_beside_the_table_and_in_subfolders(tmp_path):
    table = write_csv(tmp_path / "set.csv", [("sd/a.png", "a cat", 1.5)])
    path = save_image(tmp_path / "sd" / "a.png")
    assert load_data_set(table, variant="no_id", images=True).items[0].image == path


def test_optional_columns_and_both_names_of_aspects(tmp_path):
    columns = ("name", "prompt", "mos", "mos_align", "mos_authenticity", "split", "generator", "adj1")
    rows = [("a", "x", "1", "2", "3", "val", "sd", "old"), ("b", "y", "", "5", "", "", "", "")]
    first, second = load_data_set(write_csv(tmp_path / "d.csv", rows, columns), variant="no_id", images=False).items
    assert first.labels == {"quality": 1.0, "correspondence": 2.0, "authenticity": 3.0}
    assert (first.split, first.generator) == ("val", "sd")
    assert second.labels == {"correspondence": 5.0}
    assert (second.split, second.generator) == (None, None)


def test_conversations_keep_their_own_words(folder, talks):
    data = load_data_set(folder, conversations=[str(talks)], images=False)
    assert [item.name for item in data.items] == ["a.png", "b.png"]
    assert contents(data.items[0]) == ["Look?", "It is dull.", "Rate?"]
    assert [message.role for message in data.items[0].conversation] == list(ROLES[:3])
    assert {item.split for item in data.items} == {"train"}
    assert data.items[0].description == "It is dull."
    full = load_data_set(folder, conversations=[str(talks)], images=False, variant="full")
    assert contents(full.items[0]) == ["Look?", "It is dull.", "Rate?", "fair"]
    one = load_data_set(folder, conversations=[str(talks)], images=False, variant="no_id")
    assert contents(one.items[0]) == [template_of("quality").one_round.replace("{prompt}", "a cat")]


def test_test_conversations_read_the_local_models_answers(folder):
    own = {"response_0": "Sharp.", "response_1": "good"}
    path = write_json(folder / "quality_test_res.jsonl", [talk("a.png", **own)])
    data = load_data_set(path, labels=folder / "data.csv", images=True, variant="full")
    assert data.name == "quality_test_res"
    assert contents(data.items[0]) == ["Look?", "Sharp.", "Rate?", "good"]
    assert data.items[0].split == "test"
    assert data.items[0].image == folder / "images/a.png"
    assert data.notes == ("1 of 2 rows of data.csv are left out: no conversation names them.",)


def test_json_lines_and_a_named_split(folder):
    path = folder / "described.jsonl"
    path.write_text("\n".join(json.dumps(talk(name)) for name in ("a.png", "b.png")) + "\n")
    data = load_data_set(folder, conversations=[f"val={path}"], images=False)
    assert {item.split for item in data.items} == {"val"}
    assert {item.split for item in load_data_set(folder, conversations=[str(path)], images=False).items} == {None}
    with pytest.raises(UnknownName, match="Did you mean 'train'"):
        load_data_set(folder, conversations=[f"trian={path}"], images=False)


def test_descriptions_from_the_table(tmp_path):
    columns = ("name", "prompt", "mos_quality", "description", "rating")
    rows = [("a", "{0} a cat {prompt}", "1", "Blurry.", "poor")]
    table = write_csv(tmp_path / "d.csv", rows, columns)
    wording = template_of("correspondence")
    item = load_data_set(table, aspect="correspondence", variant="full", images=False).items[0]
    asked = wording.describe.replace("{prompt}", "{0} a cat {prompt}")
    assert contents(item) == [asked, "Blurry.", wording.rate, "poor"]
    assert contents(load_data_set(table, images=False).items[0])[1:] == ["Blurry.", template_of("quality").rate]


def test_unknown_names(folder):
    with pytest.raises(UnknownName, match="Did you mean 'no_id'"):
        load_data_set(folder, variant="noid", images=False)
    with pytest.raises(UnknownName, match="Did you mean 'quality'"):
        load_data_set(folder, aspect="qualty", images=False)


def test_descriptions_are_needed(folder, tmp_path):
    message = problems_of(folder, variant="id")
    assert "give --conversations or use --variant no_id" in message
    columns = ("name", "prompt", "mos", "description")
    table = write_csv(tmp_path / "d.csv", [("a", "x", "1", "dull"), ("b", "y", "1", " ")], columns)
    assert "b (d.csv, line 3): no description" in problems_of(table, variant="id")
    assert "a (d.csv, line 2): no rating word" in problems_of(table, variant="full")


def test_every_bad_row_is_named_in_one_error(tmp_path):
    rows = [
        ("good.png", "fine", "2"),
        ("", "x", "1"),
        ("../up.png", "x", "1"),
        ("/rooms/abs.png", "x", "1"),
        ("a\\b.png", "x", "1"),
        ("no-prompt.png", "  ", "1"),
        ("no-mos.png", "x", ""),
        ("text.png", "x", "good"),
        ("nan.png", "x", "nan"),
        ("inf.png", "x", "inf"),
        ("high.png", "x", "5.1"),
        ("good.png", "again", "2"),
        ("short.png", "x"),
        ("long.png", "x", "1", "surplus"),
    ]
    table = write_csv(tmp_path / "d.csv", rows)
    message = problems_of(table)
    assert message.startswith(f"{table}: 11 problems")
    for part in (
        "a row without a name (d.csv, line 3): the name is empty",
        "../up.png (d.csv, line 4): the name '../up.png' is not a plain relative path",
        "no-prompt.png (d.csv, line 7): the prompt is empty",
        "no-mos.png (d.csv, line 8): no MOS at all",
        "text.png (d.csv, line 9): mos_quality is 'good', not a number",
        "nan.png (d.csv, line 10): mos_quality is nan, outside 0 to 5",
        "inf.png (d.csv, line 11): mos_quality is inf, outside",
        "high.png (d.csv, line 12): mos_quality is 5.1, outside 0 to 5 (give the range of these MOS by --mos-range)",
        "good.png (d.csv, line 13): duplicate of line 2",
        "short.png (d.csv, line 14): has 2 fields where the header has 3",
        "long.png (d.csv, line 15): has 4 fields",
    ):
        assert part in message
    kept = load_data_set(table, variant="no_id", images=False, on_bad_item="skip")
    assert [item.name for item in kept.items] == ["good.png", "abs.png", "a/b.png"]
    assert kept.items[0].prompt == "fine"
    assert len(kept.skipped) == 11
    assert any(line.startswith("high.png (d.csv, line 12)") for line in kept.skipped)


def test_the_range_is_the_data_sets_own(tmp_path):
    table = write_csv(tmp_path / "d.csv", [("a", "x", "87.5")])
    assert load_data_set(table, variant="no_id", images=False, mos_range=(0, 100)).items[0].labels["quality"] == 87.5
    with pytest.raises(ConfigError, match="5 to 0 is empty"):
        load_data_set(table, variant="no_id", images=False, mos_range=(5, 0))


def test_a_table_without_mos_is_noted_and_one_with_gaps_is_refused(tmp_path):
    table = write_csv(tmp_path / "d.csv", [("a", "x"), ("b", "y")], ("name", "prompt"))
    data = load_data_set(table, variant="no_id", images=False)
    assert [item.labels for item in data.items] == [{}, {}]
    assert len(data.notes) == 1
    assert "has no MOS column (found: name, prompt)" in data.notes[0]
    assert "agiqa store labels" in data.notes[0]
    gaps = write_csv(tmp_path / "e.csv", [("a", "x", "1"), ("b", "y", "")])
    assert "b (e.csv, line 3): no MOS at all" in problems_of(gaps)


def test_nobody_looks_at_mos_that_nobody_asks_for(tmp_path):
    table = write_csv(tmp_path / "d.csv", [("a", "x", "87.5"), ("b", "y", ""), ("c", "z", "none")])
    data = load_data_set(table, variant="no_id", images=False, mos_range=None)
    assert [(item.name, item.labels) for item in data.items] == [("a", {}), ("b", {}), ("c", {})]
    assert data.notes == ()


def test_nothing_left_is_an_error_even_when_skipping(tmp_path):
    table = write_csv(tmp_path / "d.csv", [("a", "", "1")])
    assert "the prompt is empty" in problems_of(table, on_bad_item="skip")


def test_bad_images(folder):
    whole = (folder / "images/a.png").read_bytes()
    (folder / "images/a.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images/b.png").write_text("not an image")
    message = problems_of(folder, images=True)
    assert f"a.png (data.csv, line 2): {folder / 'images/a.png'}: not a readable image" in message
    assert f"b.png (data.csv, line 3): {folder / 'images/b.png'}: not a readable image" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "the file is empty"),
        (b"name,prompt,mos\n", "but no rows"),
        (b"name,prompt,description,description_quality\na,b,c,d\n", "two columns mean the same"),
        (b"prompt,mos\na,1\n", "no column 'name' (found: prompt, mos)"),
        (b"name|prompt|mos\na|b|1\n", "no column 'name'"),
        (b"name,prompt,mos,mos_quality\na,b,1,1\n", "two columns mean the same"),
        (b"name,prompt,mos\na,\xff\x00,1\n", "not UTF-8 text"),
        (b'name,prompt,mos\na,"b,1\n', "not a csv file"),
    ],
)
def test_tables_that_cannot_be_used_always_fail(tmp_path, content, expected):
    table = tmp_path / "d.csv"
    table.write_bytes(content)
    assert expected in problems_of(table, on_bad_item="skip")


def test_a_byte_order_mark_is_no_column_name(tmp_path):
    table = tmp_path / "d.csv"
    table.write_bytes(b'\xef\xbb\xbfname,prompt,mos\r\na,"x, ""y""",1\r\n')
    assert load_data_set(table, variant="no_id", images=False).items[0].prompt == 'x, "y"'


def test_bad_conversations_are_named_by_id(folder):
    records = [
        talk("a.png"),
        talk("a.png", id="again"),
        talk("c.png"),
        talk("b.png", id="roles", roles=("assistant", "user", "user", "assistant")),
        talk("b.png", id="two", contents=("a", "b")),
        talk("b.png", id="empty", contents=("<image>\n", "", "x", "y")),
        talk("b.png", id="own", response_0=" "),
        {"id": "bare", "image": "b.png"},
        {"id": "pictureless", "conversations": talk("b.png")["conversations"]},
        "text",
    ]
    path = write_json(folder / "train.json", records)
    message = problems_of(folder, conversations=[str(path)], variant="id")
    for part in (
        "train.json, id 'again': the image a.png has a conversation already (train.json, id 'a.png')",
        "train.json, id 'c.png': no row of data.csv is named like its image 'data/set/images/c.png'",
        "train.json, id 'roles': has the roles ['assistant', 'user', 'user', 'assistant']",
        "train.json, id 'two': has 2 messages, expected 4",
        "train.json, id 'empty': message 2 is empty or not text; message 1 is empty",
        "train.json, id 'own': `response_0` is empty",
        "train.json, id 'bare': has no list `conversations`",
        "train.json, id 'pictureless': has no `image`",
        "train.json, entry 10: is not a JSON object",
    ):
        assert part in message
    kept = load_data_set(folder, conversations=[str(path)], images=False, on_bad_item="skip")
    assert [item.name for item in kept.items] == ["a.png"]
    assert len(kept.skipped) == 9


def test_half_a_character_in_a_conversation_is_named(folder):
    """Such as a description that was cut within an emoji: neither tokenizers nor tables accept it."""
    cut = talk("a.png", id="cut", contents=("Look?", "a cat \ud83d", "Rate?", "fair"))
    own = talk("b.png", id="own", response_0="\ude00 a dog")
    path = write_json(folder / "train.json", [cut, own])
    message = problems_of(folder, conversations=[str(path)], variant="id")
    assert "2 problems" in message
    assert r"train.json, id 'cut': the text 'a cat \ud83d' holds half a character" in message
    assert r"train.json, id 'own': the text '\ude00 a dog' holds half a character" in message


def test_strangers_are_one_error_that_names_both(folder):
    path = write_json(folder / "train.json", [talk("x.png"), talk("y.png")])
    message = problems_of(folder, conversations=[str(path)], variant="id")
    assert "train.json" in message
    assert "data.csv have no image in common" in message
    assert "'data/set/images/x.png'" in message
    assert "'a.png'" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[1, 2", "not JSON"),
        ("[]", "no conversations in the file"),
        ('{"id": 1}\n{oops\n', "line 2: not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[" + "1" * 5_000 + "]", "not JSON"),
        ("  \n", "the file is empty"),
    ],
)
def test_conversation_files_that_cannot_be_used(folder, text, expected):
    path = folder / "train.json"
    path.write_text(text)
    assert expected in problems_of(folder, conversations=[str(path)], on_bad_item="skip")


def test_a_split_that_table_and_file_disagree_on(tmp_path):
    columns = ("name", "prompt", "mos", "split")
    table = write_csv(tmp_path / "d.csv", [("a.png", "x", "1", "test"), ("b.png", "x", "1", "holdout")], columns)
    path = write_json(tmp_path / "train.json", [talk("a.png"), talk("b.png")])
    message = problems_of(table, conversations=[str(path)])
    assert "a.png (d.csv, line 2): in split test by the table but train by train.json, id 'a.png'" in message
    assert "b.png (d.csv, line 3): split 'holdout' is none of train, val, test" in message


def test_missing_files_and_misplaced_options(tmp_path, folder, talks):
    (tmp_path / "empty").mkdir()
    assert "no such file (looked for data.csv in the folder" in problems_of(tmp_path / "empty")
    assert "absent.json: no such file" in problems_of(folder, conversations=[str(tmp_path / "absent.json")])
    with pytest.raises(ConfigError, match="--labels"):
        load_data_set(talks, images=False)
    with pytest.raises(ConfigError, match="has its own labels"):
        load_data_set(folder, labels=folder / "data.csv", images=False)
    other = tmp_path / "d.docx"
    other.touch()
    assert "expected a folder with data.csv" in problems_of(other)


def test_the_key_follows_image_and_words(folder):
    first, second = load_data_set(folder, variant="no_id", images=True).items
    key = item_key(first)
    assert len(key) == 32
    assert key != item_key(second)
    assert key == item_key(load_data_set(folder, variant="no_id", images=True).items[0])
    assert key != item_key(load_data_set(folder, variant="no_id", images=False).items[0])
    assert key != item_key(load_data_set(folder, variant="no_id", aspect="correspondence", images=True).items[0])
    save_image(folder / "images/a.png", size=(9, 9))
    assert key != item_key(first)
    (folder / "images/a.png").unlink()
    with pytest.raises(DataError, match=r"a\.png: cannot read the image"):
        item_key(first)
