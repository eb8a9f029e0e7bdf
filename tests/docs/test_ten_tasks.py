"""A newcomer's ten tasks, docs/ten-tasks.md, run as they are written."""

import csv
import json
import re

import pytest

from agiqa.store import open_store
from tests.command_line import REPOSITORY
from tests.docs.pages import blocks, programs, run_script, write_demo

PAGE = REPOSITORY / "docs" / "ten-tasks.md"


@pytest.fixture(scope="module")
def done(agiqa, tmp_path_factory):
    """The folder in which the page was run, and what the shell printed. A demo that is there already is kept by the
    first task."""
    folder = tmp_path_factory.mktemp("tasks")
    write_demo(folder / "demo")
    with programs(agiqa, folder / "bin") as environment:
        return folder, run_script("".join(blocks(PAGE)), folder, environment)


def test_there_are_ten():
    numbers = re.findall(r"^## (\d+)\. ", PAGE.read_text(), re.MULTILINE)
    assert numbers == [str(number) for number in range(1, 11)]
    assert len(blocks(PAGE)) == 10


def test_the_table_is_read_by_its_own_columns_and_scale(done):
    folder, shell = done
    items = open_store(folder / "photos.agiqa").items
    with (folder / "demo" / "data" / "data.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))[:60]
    assert list(items.names) == [row["name"] for row in rows]
    expected = [20 * float(row["mos_quality"]) for row in rows]
    assert list(items.labels["quality"]) == pytest.approx(expected, abs=0.01)
    assert "columns are separated by semicolons" in shell.stderr


def test_a_head_reads_the_other_set_and_new_images(done):
    folder, shell = done
    assert "quality from 0 to 100 to 0 to 5" in shell.stderr
    assert (folder / "scores.csv").read_text().count("\n") == 61
    assert len(re.findall(r"^demo/data/images/\S+: MOS \d", shell.stdout, re.MULTILINE)) == 2


def test_heads_are_compared_and_labels_added(done):
    folder, _ = done
    assert (folder / "heads" / "report" / "index.html").is_file()
    labels = open_store(folder / "photos.agiqa").items.labels
    assert sorted(label for label, values in labels.items() if (values == values).any()) == [
        "correspondence",
        "quality",
    ]


def test_the_copy_is_the_store(done):
    folder, shell = done
    assert open_store(folder / "copy.agiqa").id == open_store(folder / "photos64.agiqa").id
    assert re.search(r"^sketch 60 \(\d+, 64\)$", shell.stdout, re.MULTILINE)


def test_the_table_is_checked_and_a_pooling_of_ones_own_compared(done):
    folder, shell = done
    assert re.search(r"^splits +train \(\d+\), test \(\d+\)$", shell.stdout, re.MULTILINE)
    assert re.search(r"^pooling +middle +my_parts +The mean of the largest", shell.stdout, re.MULTILINE)
    assert "| runs/mean |" in shell.stdout
    rows = [json.loads(line) for line in (folder / "heads" / "rows.jsonl").read_text().splitlines()]
    assert sum("pooling=middle" in row["row"] for row in rows) == 2
    assert [*(folder / "heads" / "report" / "tables").glob("*.tex")]
