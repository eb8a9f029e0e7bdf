"""Predictions of other tools: what a csv must hold, and every fault of it by name."""

import pytest

from agiqa.bench.networks.predicted import read_predicted
from agiqa.errors import DataError


@pytest.fixture
def table(tmp_path):
    def write(text):
        path = tmp_path / "tool.csv"
        path.write_text(text)
        return path

    return write


def test_a_csv_with_and_without_seeds(table, source):
    path = table("predicted,name,more\n1.5,000.png,x\n2.5,001.png,y\n")
    found = read_predicted("tool", path, source)
    assert found.seeds == [0]
    assert found.of(["001.png", "000.png"], 0).tolist() == [2.5, 1.5]
    seeded = read_predicted("tool", table("name,predicted,seed\n000.png,1,3\n000.png,2,1\n"), source)
    assert seeded.seeds == [1, 3]
    assert seeded.of(["000.png"], 3).tolist() == [1.0]


def test_missing_items_are_named(table, source):
    found = read_predicted("tool", table("name,predicted,seed\n000.png,1,0\n003.png,1,1\n"), source)
    with pytest.raises(DataError, match=r"no prediction of '003.png' for the seed 0, a test item"):
        found.of(["000.png", "003.png"], 0)


def test_all_faults_are_listed(table, source):
    path = table("name,predicted,seed\nextra.png,1,0\n001.png,nan,0\n002.png,1,x\n003.png,1,0\n003.png,2,0\n")
    with pytest.raises(DataError) as told:
        read_predicted("tool", path, source)
    for text in (
        "4 problems",
        "line 2: 'extra.png' is no item",
        "line 3: 'nan'",
        "line 4: '1' (seed 'x')",
        "line 6: '003.png' is there twice",
    ):
        assert text in str(told.value)


@pytest.mark.parametrize("text", ["", "name,score\n000.png,1\n"])
def test_a_file_without_the_columns_is_refused(table, source, text):
    with pytest.raises(DataError, match=r"needs the columns name and predicted, and has: (no rows|name, score)"):
        read_predicted("tool", table(text), source)
