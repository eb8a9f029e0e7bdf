"""Tables of any content at any width: whole numbers, whole intervals, no line that is too long."""

import io
import re
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from agiqa.bench.recording.tables import TextTable
from agiqa.commands.terminal_tables import print_drawn

WORDS = st.text("abc=_/", min_size=1, max_size=14)
NAMES = st.lists(WORDS, min_size=1, max_size=4).map(",".join)
NUMBERS = st.floats(-1, 1).map("{:.4f}".format)
INTERVALS = st.tuples(NUMBERS, NUMBERS, NUMBERS).map(lambda one: f"{one[0]} [{one[1]}, {one[2]}]")
COLUMNS = st.lists(st.sampled_from([NAMES, NUMBERS, INTERVALS]), min_size=1, max_size=9)


@st.composite
def tables(draw):
    columns = [NAMES, *draw(COLUMNS)]
    rows = [[draw(column) for column in columns] for _ in range(draw(st.integers(1, 4)))]
    return TextTable(
        head=[draw(st.sampled_from(["run", "test SRCC", "settings that differ"])) for _ in columns], rows=rows
    )


def drawn(table, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    with monkeypatch.context() as patch:
        output = io.StringIO()
        patch.setattr(sys, "stdout", output)
        print_drawn([table])
    return output.getvalue()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(table=tables(), width=st.integers(44, 200))
@example(
    table=TextTable(head=["run", "validation"], rows=[["runs/a,lr=0.0003,epochs=10", "0.1234 ± 0.0567"]]), width=44
)
def test_every_number_and_interval_is_whole_and_every_line_fits(table, width, monkeypatch):
    text = drawn(table, width, monkeypatch)
    assert max(map(len, text.splitlines())) <= width
    for row in table.rows:
        for cell in row[1:]:
            if re.match(r"-?\d", cell):
                value, *interval = cell.split(" ", 1)
                assert re.search(rf"(?<![\d.]){re.escape(value)}(?![\d.])", text)
                assert all(part in text for part in interval)


def test_texts_break_after_commas_spaces_and_slashes(monkeypatch):
    table = TextTable(
        head=["run", "srcc"], rows=[["runs/experiment/encoder=gru,lr=0.00034,token_dropout=0.123", "0.5"]]
    )
    lines = drawn(table, 44, monkeypatch).splitlines()
    for whole in ("runs/experiment/", "encoder=gru,", "lr=0.00034,", "token_dropout=0.123"):
        assert any(whole in line for line in lines)


@pytest.mark.parametrize(("width", "tables_drawn"), [(120, 1), (48, 2), (40, 3)])
def test_a_table_that_is_too_wide_becomes_several_with_the_first_column(width, tables_drawn, monkeypatch):
    cells = [f"0.{k}123 [0.1{k}4, 0.2{k}5]" for k in range(3)]
    table = TextTable(head=["run", "SRCC", "PLCC", "KRCC"], rows=[["runs/first", *cells]])
    text = drawn(table, width, monkeypatch)
    assert text.count("runs/first") == tables_drawn
    assert all(cell.split(" ", 1)[1] in text for cell in cells)


@pytest.mark.parametrize(("width", "labelled"), [(200, 1), (72, 2), (40, 1)])
def test_rows_of_one_name_are_told_apart_in_every_part_of_a_wide_table(width, labelled, monkeypatch):
    scores = [f"0.{k}123 [0.1{k}4, 0.2{k}5]" for k in range(3)]
    rows = [["encoder=gru,pooling=mean", label, *scores] for label in ("quality", "correspondence")]
    text = drawn(TextTable(head=["run", "label", "SRCC", "PLCC", "KRCC"], rows=rows), width, monkeypatch)
    assert text.count("correspondence") == labelled  # at 40 there is no room for a name, a label and a score
    assert max(map(len, text.splitlines())) <= width


def test_texts_are_broken_within_words_rather_than_cut_off(monkeypatch):
    row = ["runs/a_folder_of_mine", "projection=vocabulary, width=64", "0.5"]
    text = drawn(TextTable(head=["", "", ""], rows=[row]), 40, monkeypatch)
    assert max(map(len, text.splitlines())) <= 40
    assert Counter("".join(row).replace(" ", "")) <= Counter(text)
