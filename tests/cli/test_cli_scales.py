"""The scale of MOS on the command line: recorded by `extract`, shown by `info`, converted where a head meets another."""

import json
import shutil

import pytest

from tests.cli.conftest import ITEMS
from tests.extract.small_sets import read_table, write_table


@pytest.fixture
def hundred(agiqa, example, tmp_path):
    """A copy of the example's store with the same MOS on 0 to 100."""
    store = shutil.copytree(example.store, tmp_path / "hundred.agiqa")
    rows = [[row["name"], repr(float(row["mos_quality"]) * 20)] for row in read_table(example.data)]
    table = write_table(tmp_path / "table", rows, ["name", "mos"]) / "data.csv"
    outcome = agiqa("store", "labels", store, table, "--mos-range", 0, 100)
    assert outcome.code == 0, outcome.err
    assert "mos_quality: recorded as on 0 to 100" in outcome.out
    return store


def test_info_shows_the_scale_that_extract_recorded(agiqa, example, hundred):
    assert agiqa("store", "info", example.store, "--json").json["mos_ranges"] == {"quality": [0.0, 5.0]}
    assert "0 to 100 (quality)" in agiqa("store", "info", hundred).out


def test_a_head_is_evaluated_on_its_own_scale(agiqa, example, hundred):
    """RMSE once compared values on two scales."""
    alone = agiqa("evaluate", example.run, example.store, "--json").json
    outcome = agiqa("evaluate", example.run, hundred, "--json")
    assert outcome.json["rmse"] == pytest.approx(alone["rmse"], rel=1e-9)
    assert outcome.json["mos_range"] == alone["mos_range"] == [0.0, 5.0]
    assert (
        f"warning: The MOS of {hundred} are converted to the scale of this head: quality from 0 to 100" in outcome.err
    )
    assert "converted" not in agiqa("evaluate", example.run, example.store).err
    assert json.loads((example.run / "config.json").read_text())["mos_ranges"] == {"quality": [0.0, 5.0]}


def test_a_table_of_another_scale_for_some_items_is_converted(agiqa, hundred, tmp_path):
    table = tmp_path / "few.csv"
    table.write_text("name,mos\n000.png,4\n")
    outcome = agiqa("store", "labels", hundred, table, "--mos-range", 0, 5, "--json")
    assert outcome.json["converted"] == {"mos_quality": [0.0, 5.0]}
    assert "note: the quality MOS of the table are converted from 0 to 5 to 0 to 100" in outcome.err
    again = agiqa("store", "labels", hundred, table, "--json").json
    assert again["replaced"] == {"mos_quality": 1}  # 4 of 100 where nobody says: on the scale of the store
    assert again["kept"] == ITEMS - 1
