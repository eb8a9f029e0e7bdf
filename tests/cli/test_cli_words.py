"""`agiqa words`: rating words from a conversation file or a csv, against the MOS of a table."""

import csv
import json

import pytest

from tests.cli.refusals import misuse, refuse
from tests.extract.small_sets import read_table, write_set, write_talks

ROUGH = {"bad": "poor", "poor": "fair", "fair": "good", "good": "excellent", "excellent": "good"}


def word(mos):
    return ("bad", "poor", "fair", "good", "excellent")[min(4, int(mos))]


@pytest.fixture
def data(tmp_path):
    return write_set(tmp_path / "set", 20)


@pytest.fixture
def truths(data):
    return [word(float(row["mos_quality"])) for row in read_table(data)]


def write_answers(path, data, answers, columns=("name", "answer", "prompt", "mos_quality")):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows({**row, "answer": answer} for row, answer in zip(read_table(data), answers, strict=True))
    return path


def answers_for(truths):
    """Eight right, eight off by one, and four that say nothing."""
    return [f"It is {word}." for word in truths[:8]] + [ROUGH[word].upper() for word in truths[8:16]] + ["?"] * 4


def talks_with(data, answers):
    path = write_talks(data)
    talks = json.loads(path.read_text())
    for talk, answer in zip(talks, answers, strict=True):
        talk["response_1"] = answer
    path.write_text(json.dumps(talks))
    return path


def check(printed):
    assert (printed["n"], printed["unknown"]) == (20, 4)
    assert (printed["accuracy"], printed["rough_accuracy"]) == (0.4, 0.8)
    for metric in ("accuracy", "rough_accuracy", "precision", "f1", "precision_weighted", "f1_weighted"):
        low, high = printed["ci"][metric]
        assert 0 <= low <= printed[metric] <= high <= 1


def test_a_conversation_file_with_a_label_table(agiqa, data, truths):
    talks = talks_with(data, answers_for(truths))
    outcome = agiqa("words", talks, "--labels", data / "data.csv", "--json")
    check(outcome.json)
    assert outcome.err == ""
    shown = agiqa("words", talks, "--labels", data / "data.csv").out
    assert "n 20, of which 4 without a clear word" in shown
    assert "rough accuracy      0.8000 [" in shown


def test_a_csv_of_answers_with_and_without_its_own_truth(agiqa, data, truths, tmp_path):
    answers = answers_for(truths)
    own = agiqa("words", write_answers(tmp_path / "own.csv", data, answers), "--json")
    check(own.json)
    bare = write_answers(tmp_path / "bare.csv", data, answers, ("name", "answer"))
    joined = agiqa("words", bare, "--labels", data / "data.csv", "--json")
    assert {**joined.json, "file": ""} == {**own.json, "file": ""}
    unprompted = write_answers(tmp_path / "unprompted.csv", data, answers, ("name", "answer", "mos_quality"))
    alone = agiqa("words", unprompted, "--json")
    check(alone.json)
    assert "has no column 'prompt'" in alone.err
    assert alone.json["ci"] != own.json["ci"]


def test_words_of_the_teacher_are_warned_of(agiqa, data, truths):
    talks = talks_with(data, truths)
    entries = json.loads(talks.read_text())
    for entry in entries[:7]:
        del entry["response_1"]
    talks.write_text(json.dumps(entries))
    outcome = agiqa("words", talks, "--labels", data / "data.csv", "--json")
    assert outcome.code == 0
    assert "7 of 20 conversations" in outcome.err
    assert "those of the teacher, which knew the MOS" in outcome.err


def test_the_mos_range_moves_the_bins(agiqa, data, truths, tmp_path):
    plain = write_answers(tmp_path / "plain.csv", data, truths)
    assert agiqa("words", plain, "--json").json["accuracy"] == 1.0
    assert agiqa("words", plain, "--mos-range", 0, 10, "--json").json["accuracy"] < 1.0
    refuse(agiqa("words", plain, "--mos-range", 1, 5), "outside 1 to 5")
    refuse(agiqa("words", plain, "--mos-range", 5, 0))


def test_too_few_prompts_have_no_intervals_and_say_so(agiqa, tmp_path):
    table = tmp_path / "few.csv"
    rows = [f"{prompt}{k}.png,{word},{prompt},1.5" for prompt in "abcd" for k, word in enumerate(("poor", "good"))]
    table.write_text("name,answer,prompt,mos_quality\n" + "\n".join(rows) + "\n")
    shown = agiqa("words", table)
    assert shown.code == 0, shown.err
    assert "accuracy            0.5000\n" in shown.out
    assert "prompts only: an interval needs 10" in shown.out
    assert set(agiqa("words", table, "--json").json["ci"].values()) == {None}


def test_bad_input_is_refused_by_name(agiqa, data, truths, tmp_path):
    talks = talks_with(data, answers_for(truths))
    refuse(agiqa("words", talks), "--labels data.csv")
    misuse(agiqa("words", talks, "--labels", data / "data.csv", "--label", "qualty"), "Did you mean 'quality'?")
    refuse(agiqa("words", talks, "--labels", data / "data.csv", "--label", "authenticity"), "no MOS of authenticity")
    refuse(agiqa("words", data / "data.csv"), "no column 'answer'")
    bare = write_answers(tmp_path / "bare.csv", data, truths, ("name", "answer"))
    refuse(agiqa("words", bare), "no column with the MOS of quality", "--labels")
    strange = tmp_path / "strange.csv"
    strange.write_text("name,answer,mos\n000.png,good,3\n000.png,good,3\n1.png,good\n2.png,good,x\n")
    refuse(agiqa("words", strange), "3 problems", "line 3): duplicate of line 2", "has 2 fields", "'x', not a number")
    strange.write_text("name,answer\nnowhere.png,good\n")
    refuse(agiqa("words", strange, "--labels", data / "data.csv"), "no row of data.csv has this name")
    assert agiqa("words", tmp_path / "absent.csv").code == 2


def test_answers_about_other_prompts_are_refused_by_both(agiqa, data, truths, tmp_path):
    talks, labels = talks_with(data, answers_for(truths)), data / "data.csv"
    entries = json.loads(talks.read_text())
    for k, entry in enumerate(entries):
        entry["conversations"][0]["content"] = f"Describe house {k}."
    talks.write_text(json.dumps(entries))
    mentions = ("20 problems", "000.png has the prompt 'a picture 0' (data.csv, line 2)", "'Describe house 0.'")
    refuse(agiqa("words", talks, "--labels", labels), *mentions)
    answers = tmp_path / "answers.csv"
    answers.write_text("name,answer,prompt\n000.png,good,A  picture 0\n001.png,good,a house\n")
    mentions = ("1 problem", "its prompt is 'a house', in data.csv, line 3, it is 'a picture 0'")
    refuse(agiqa("words", answers, "--labels", labels), *mentions)
