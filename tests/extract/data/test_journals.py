"""Journals keep what they have written, and leave files alone that are no journals."""

import pytest

from agiqa.errors import DataError, SettingsConflict
from agiqa.extract.data.journals import Journal


def journal_at(path, **provenance):
    return Journal(path, {"a": 1} | provenance, command="agiqa x", verb="has")


def line(value):
    return {"name": "n", "item_sha256": "0", "value": value}


def test_the_last_line_of_an_item_is_remembered(tmp_path):
    journal = journal_at(tmp_path / "j.jsonl")
    with journal.writing():
        journal.append([line(1)])
        journal.append([line(2)])
    assert [one["value"] for one in journal_at(tmp_path / "j.jsonl").lines.values()] == [2]


@pytest.mark.parametrize("text", ['[{"image": "a.png"}]', "one line", "two\nlines"])
def test_a_file_that_is_no_journal_is_left_alone(tmp_path, text):
    """Also if it has no whole line, as a JSON list without a line end: it is no line that a kill has torn."""
    path = tmp_path / "j.jsonl"
    path.write_text(text)
    with pytest.raises((DataError, SettingsConflict), match="Choose another OUT"):
        journal_at(path)
    journal = journal_at(tmp_path / "other.jsonl")
    journal.path = path  # written by somebody else in the meantime
    with pytest.raises((DataError, SettingsConflict), match="Choose another OUT"), journal.writing():
        pytest.fail("the file is taken for a journal")
    assert path.read_text() == text


def test_a_torn_first_line_is_cut_off(tmp_path):
    path = tmp_path / "j.jsonl"
    with journal_at(path).writing():
        path.write_text('{"name": "n", "it')
    journal = journal_at(path)
    with journal.writing():
        journal.append([line(1)])
    assert journal_at(path).lines == {"n": line(1)}


def test_a_last_line_without_its_line_end_is_kept(tmp_path):
    """An editor may have removed the line end: what was paid for stays."""
    path = tmp_path / "j.jsonl"
    journal = journal_at(path)
    with journal.writing():
        journal.append([line(1)])
    path.write_bytes(path.read_bytes()[:-1])
    again = journal_at(path)
    assert again.lines == {"n": line(1)}
    with again.writing():
        again.append([line(2) | {"name": "m"}])
    assert journal_at(path).lines == {"n": line(1), "m": line(2) | {"name": "m"}}
